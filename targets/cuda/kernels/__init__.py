"""Kernels of the CUDA target: products and attention."""
