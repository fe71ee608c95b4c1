"""fluxserve: the FLUX family of text-to-image models behind Triton Inference Server."""

__version__ = "0.1.0"
