"""Offline measurements of device and model, and the plan made from them."""
