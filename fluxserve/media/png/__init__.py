"""PNG files, written without loss: on the CPU in strips (strips.py), or where the picture is, on a GPU (gpu.py)."""
