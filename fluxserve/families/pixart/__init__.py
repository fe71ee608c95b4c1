"""PixArt-Σ: a transformer with cross-attention, T5 with masked padding, classifier-free guidance."""
