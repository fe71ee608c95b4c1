"""Between Triton's Python backend and the pipeline: everything a model.py calls."""
