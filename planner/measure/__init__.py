"""Measurements of this device: reads, memory, kernels."""
