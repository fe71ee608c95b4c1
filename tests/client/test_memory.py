"""A client's process keeps the memory of one answer for the next."""

import os
import platform
import subprocess
import sys

import pytest

# One answer's worth of buffers, made and dropped; the last of twenty rounds is counted.
FAULTS = """
import resource
from fluxserve_client.transports import opener
from fluxserve_client.transports.endpoint import Endpoint
opener(Endpoint.parse("localhost"), {})
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [b"x" * (3 << 20) for _ in range(6)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc that gives memory back so eagerly")
def test_buffers_are_not_faulted_in_again() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS], env=plain, capture_output=True, text=True, check=True, timeout=60
    )
    assert int(ran.stdout) < 500, "4,600 when each buffer is new"
