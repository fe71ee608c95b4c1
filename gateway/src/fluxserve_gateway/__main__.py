"""Let `python -m fluxserve_gateway` be the command `fluxserve-gateway`."""

import sys

from fluxserve_gateway.cli import main

sys.exit(main())
