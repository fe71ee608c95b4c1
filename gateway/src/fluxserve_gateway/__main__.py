"""Let `python -m fluxserve_gateway` be the command `fluxserve-gateway`."""

from fluxserve_gateway.cli import main

main()
