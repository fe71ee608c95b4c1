"""Triton's entry point of `generate`; the work is in fluxserve.serving.generate."""

from fluxserve.serving.generate import GenerateModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
