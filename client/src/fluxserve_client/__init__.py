"""Pictures from a fluxserve server: sync or asyncio, over gRPC or HTTP.

```python
from fluxserve_client import Client

with Client("localhost:8001") as client:
    client.generate("a red fox in the snow").save("fox.png")
```
"""

from fluxserve_client.aio import AsyncClient
from fluxserve_client.errors import (
    AccessDenied,
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    FluxserveError,
    InvalidRequest,
    QueueFull,
    RequestIdInUse,
    ServerError,
    Unavailable,
)
from fluxserve_client.result import Preview, Progress, Result, State, Timings
from fluxserve_client.retry import Retry
from fluxserve_client.sync import Client
from fluxserve_client.transports import Transport
from fluxserve_client.transports.endpoint import Tls
from fluxserve_client.transports.mock import MockTransport

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "AsyncClient",
    "Cancelled",
    "Client",
    "ConnectionFailed",
    "DeadlineExceeded",
    "FluxserveError",
    "InvalidRequest",
    "MockTransport",
    "Preview",
    "Progress",
    "QueueFull",
    "RequestIdInUse",
    "Result",
    "Retry",
    "ServerError",
    "State",
    "Timings",
    "Tls",
    "Transport",
    "Unavailable",
]
