"""Triton's entry point of `prepare`; the work is in fluxserve.serving.prepare."""

from fluxserve.serving.prepare import PrepareModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
