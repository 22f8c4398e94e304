"""The CUDA target, under construction: kernels for NVIDIA GPUs as PTX, not wired to `compile` yet."""
