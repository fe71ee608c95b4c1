"""fluxserve serve --page: the gateway and its web page, a process beside the server, on loopback and without keys."""

import importlib.util
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from fluxserve import process
from fluxserve.errors import LibraryMissing, ServerError
from fluxserve.supervisor import LOOPBACK

PORT = 8080
_READY_TIMEOUT_S = 120.0
_POLL_S = 0.1
_STANDARD_ERROR = 2
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Front:
    """One gateway process; a context manager that ends it."""

    def __init__(self, model: str, server: str, port: int) -> None:
        """
        Args:
            model: the name that the server's model is offered under; it tells the page which fields there are.
            server: the server's gRPC address, HOST:PORT.
            port: the gateway's; its host is loopback.

        Raises:
            LibraryMissing: the gateway is not installed.
        """
        for library in ("fluxserve_gateway", "gradio"):
            if importlib.util.find_spec(library) is None:
                raise LibraryMissing(library, comes_with="the page (pip install './gateway[page]')")
        self.url = f"http://{LOOPBACK}:{port}"
        self._command = [sys.executable, "-m", "fluxserve_gateway", "serve", "--page", "--no-auth", "--quiet"]
        self._command += ["--port", str(port), "--server", f"{model}=grpc://{server}"]
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Front":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(lambda: True)

    @property
    def ended(self) -> bool:
        """Whether the process was started and has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def start(self, stopping: Callable[[], bool]) -> None:
        """Start the process, and wait until it answers or `stopping` says that nobody waits any more.

        Raises:
            ServerError: it ended, or never answered.
        """
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=_STANDARD_ERROR,
            start_new_session=True,  # Ctrl-C is for us to hand on: first the gateway ends, then the server
        )
        self._guard = process.guard(self._process.pid)
        end = time.monotonic() + _READY_TIMEOUT_S
        while not stopping() and not self._answers():
            if self.ended:
                raise ServerError(f"--page: the gateway ended with status {self._process.returncode}; it said why")
            if time.monotonic() > end:
                raise ServerError(f"--page: the gateway did not answer within {_READY_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        try:
            with _DIRECT.open(f"{self.url}/health/ready", timeout=1):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def stop(self, hurry: Callable[[], bool]) -> None:
        """End the process once its requests are answered, or at once where `hurry` says so."""
        if self._process is None:
            return
        self._process.terminate()
        while self._process.poll() is None and not hurry():
            time.sleep(_POLL_S)
        self._process.kill()
        self._process.wait()
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
        self._process = self._guard = None
