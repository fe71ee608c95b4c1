"""Serve OpenAI's images API in front of fluxserve servers, reached by `fluxserve_client` alone."""

from fluxserve_gateway.app import create_app
from fluxserve_gateway.config import Config
from fluxserve_gateway.fleet import Fleet, Server
from fluxserve_gateway.version import __version__

__all__ = ["Config", "Fleet", "Server", "__version__", "create_app"]
