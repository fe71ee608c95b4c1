"""The fused engine: FLUX.1 on one GPU with our own kernels, FP8 or BF16, one CUDA graph per step and shape."""
