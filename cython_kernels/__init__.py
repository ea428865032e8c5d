"""C kernels and the data plane behind thin Cython, one subpackage for each part."""
