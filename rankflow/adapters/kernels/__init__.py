"""Triton kernels, picked at run time; the torch code beside them is the reference."""
