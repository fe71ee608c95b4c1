"""Compile kernels, keep what was compiled on disk, and launch it."""
