"""`python -m fluxserve_client`."""

import sys

from fluxserve_client.cli import main

sys.exit(main())
