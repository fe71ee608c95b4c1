"""Attention over all heads, the plan cache of cuDNN's kernels, and what stands before and behind scores."""
