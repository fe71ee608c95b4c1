"""Triton's entry point of `encode_image`; the work is in fluxserve.serving.encode_image."""

from fluxserve.serving.encode_image import EncodeImageModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
