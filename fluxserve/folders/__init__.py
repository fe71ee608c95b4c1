"""Folders on disk: checkpoints as people have them, and artifacts as the exporter makes them. Nothing is unpickled."""
