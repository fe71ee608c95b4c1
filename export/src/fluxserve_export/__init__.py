"""Checkpoint → ONNX → quantised ONNX → engine and manifest. See README.md beside this file."""
