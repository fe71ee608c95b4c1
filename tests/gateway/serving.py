"""A gateway on a real socket, in a thread, in front of servers that are in memory."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx2
import openai
from fluxserve_client import AsyncClient, MockTransport
from fluxserve_gateway import Config, Fleet, Server, create_app
from fluxserve_gateway.jobs.settings import JobSettings
from fluxserve_gateway.keys import Keys
from fluxserve_gateway.serve import Listening, http_server
from PIL import Image

from tests.client.fakes import FakeFlux

MODEL = "tiny"


def png(side: int = 16, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def wait_for(holds: Callable[[], object], patience: float = 10.0) -> None:
    end = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def server_of(fake: Any, url: str = "grpc://fake", ready: bool = True) -> Server:
    """A server of the fleet that `fake` plays. As in Triton, hanging up does not stop a request; `cancel` does."""

    async def answer(model: str, inputs: Any, request_id: str) -> Any:
        return await asyncio.shield(fake(model, inputs, request_id))

    transport = MockTransport(answer, ready_models=("flux", "control") if ready else ())
    return Server(url, AsyncClient(transport=transport, poll_interval=0.01))


class Gateway:
    """The application under uvicorn, inside the `with` block."""

    def __init__(
        self,
        fleet: Fleet,
        config: Config | None = None,
        keys: Keys | None = None,
        jobs: JobSettings | None = None,
        page: bool = False,
    ) -> None:
        self.fleet = fleet
        config = config or Config()
        app = create_app(fleet, config=config, keys=keys, jobs=jobs, page=page)
        self._server = http_server(app, Listening(port=0), config.send_timeout, drain_s=5)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._loop.run_until_complete(self._server.serve())
        self._loop.close()

    @property
    def tasks(self) -> int:
        """How many tasks the gateway's event loop has."""
        return len(asyncio.all_tasks(self._loop))

    @property
    def connections(self) -> int:
        """How many callers are connected, or hung up unnoticed."""
        return len(self._server.server_state.connections)

    def __enter__(self) -> Self:
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def sdk(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def post(self, path: str = "/v1/images/generations", **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, timeout=20, verify=False, **options)  # no certificates to read

    def delete(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.delete(self.url + path, timeout=20, verify=False, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=20, verify=False, **options)


def in_front_of(*fakes: FakeFlux, config: Config | None = None, keys: Keys | None = None) -> Gateway:
    """A gateway in front of these servers, all of one model."""
    servers = [server_of(fake, f"grpc://fake-{number}") for number, fake in enumerate(fakes)]
    return Gateway(Fleet({MODEL: servers}), config, keys)
