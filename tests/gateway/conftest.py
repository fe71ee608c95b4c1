"""One fake server and the gateway in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.fakes import FakeFlux
from tests.gateway.serving import Gateway, in_front_of


@pytest.fixture
def fake() -> FakeFlux:
    return FakeFlux()


@pytest.fixture
def gateway(fake: FakeFlux) -> Iterator[Gateway]:
    with in_front_of(fake) as opened:
        yield opened
