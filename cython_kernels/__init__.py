"""C kernels behind thin Cython: ``native`` (kernel variants, layout, memory) and ``program`` (the data plane)."""
