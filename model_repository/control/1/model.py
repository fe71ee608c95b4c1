"""Triton's entry point of `control`; the work is in fluxserve.serving.control."""

from fluxserve.serving.control import ControlModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
