"""Kernels of each instruction set, memory, and the layout of weights: native."""
