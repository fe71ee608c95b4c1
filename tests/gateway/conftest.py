"""One gateway for all tests that need no settings of their own, in front of a fake server that each test has anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fluxserve_gateway import Fleet

from tests.client.fakes import FakeFlux
from tests.gateway.serving import MODEL, Gateway, server_of, wait_for
from tests.support import certificates


class Stage:
    """Passes calls on to the fake server of the test that runs."""

    def __init__(self) -> None:
        self.fake = FakeFlux()

    async def __call__(self, *call: Any) -> Any:
        return await self.fake(*call)


@pytest.fixture(scope="session")
def _stage() -> Iterator[tuple[Stage, Gateway]]:
    stage = Stage()
    with Gateway(Fleet({MODEL: [server_of(stage)]})) as opened:
        yield stage, opened


@pytest.fixture
def fake() -> FakeFlux:
    return FakeFlux()


@pytest.fixture
def gateway(fake: FakeFlux, _stage: tuple[Stage, Gateway]) -> Iterator[Gateway]:
    stage, opened = _stage
    stage.fake = fake
    yield opened
    (server,) = opened.fleet.servers
    wait_for(lambda: server.in_flight == 0)
    server.ready = True


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificates.make(tmp_path_factory.mktemp("tls"))
