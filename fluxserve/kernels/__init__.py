"""One fused kernel and its plain PyTorch reference per file; README.md says what was measured, chosen and dropped.

Every operation is there twice under one signature: launched (Triton, cuDNN; a CUDA device) and `plain_…` (any device,
in float32 with one rounding at the end). An engine is handed one set of them, see `operations`.
"""
