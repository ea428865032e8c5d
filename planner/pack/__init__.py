"""Conversion of a model into a pack."""
