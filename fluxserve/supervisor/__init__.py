"""Starts Triton, watches it, drains it, and leaves nothing behind.

    launch.py    the command line, the environment and the folders of one tritonserver
    server.py    TritonServer: one process from start to end
    watch.py     Watch: starts Triton again when a process died, hangs, or holds too much memory
    log.py       Triton's output, and why a start failed
    memory.py    how much memory a server holds, and how much it may
    sockets.py   addresses, ports, and bytes that a client has not taken yet

Recovery has one mechanism: end Triton with all of its processes, and start it again. A client whose request is lost
sees a broken connection, and one that comes while models load finds the port closed. Both mean UNAVAILABLE. No model is
ever loaded or unloaded by a request, so that the administrative API stays shut for everybody.
"""

from fluxserve.supervisor.server import DRAIN_TIMEOUT_S, EXIT_TIMEOUT_S, GONE_TIMEOUT_S, READY_TIMEOUT_S, TritonServer
from fluxserve.supervisor.sockets import LOOPBACK, Ports
from fluxserve.supervisor.watch import Watch

__all__ = [
    "DRAIN_TIMEOUT_S",
    "EXIT_TIMEOUT_S",
    "GONE_TIMEOUT_S",
    "LOOPBACK",
    "READY_TIMEOUT_S",
    "Ports",
    "TritonServer",
    "Watch",
]
