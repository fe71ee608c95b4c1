"""The fused engine: FLUX on one GPU with our own kernels, FP8 or BF16, one CUDA graph per step and shape."""
