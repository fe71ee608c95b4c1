"""One gateway for all tests that need no settings of their own, in front of a fake server that each test has anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fluxserve_gateway import Fleet

from tests.client.fakes import FakeFlux
from tests.gateway.serving import MODEL, Gateway, server_of, wait_for
from tests.support import certificates
from tests.support.postgres import Postgres, programs


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
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL, once for all tests that share a process."""
    found = programs()
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("postgresql is not installed, and CI runs every test: scripts/system-packages.sh names it")
        pytest.skip("postgresql is not installed")
    with Postgres(found) as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.xdist_group("postgresql"))])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    server = request.getfixturevalue("postgres")
    assert isinstance(server, Postgres)
    return server.database()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificates.make(tmp_path_factory.mktemp("tls"))
