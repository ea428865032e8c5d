"""Weights that are read while steps run: the ring of streamed pieces, page caches, single rows."""
