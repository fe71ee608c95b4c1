"""One fake server, reached over every wire the client has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fluxserve_client import AsyncClient, MockTransport

from tests.client.fakes import FakeFlux, Wire


@pytest.fixture
def fake() -> FakeFlux:
    return FakeFlux()


@pytest.fixture
def wire(fake: FakeFlux) -> Iterator[Wire]:
    with Wire(fake) as opened:
        yield opened


@pytest.fixture(params=["mock", "grpc", "http"])
def connect(request: pytest.FixtureRequest, fake: FakeFlux) -> Iterator[Callable[..., AsyncClient]]:
    """Makes an `AsyncClient` of `fake`, over each wire in turn."""
    if request.param == "mock":
        yield lambda **options: AsyncClient(transport=MockTransport(fake), **options)
    else:
        with Wire(fake) as opened:
            yield lambda **options: AsyncClient(opened.url(request.param), **options)
