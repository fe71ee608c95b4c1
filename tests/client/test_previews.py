"""Previews in `generate`: glimpses and partial images, over every wire, asyncio and blocking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fluxserve_client import AsyncClient, Client, Preview, Progress

from tests.client.fakes import FakeFlux, Wire

Connect = Callable[..., AsyncClient]


async def test_glimpses(fake: FakeFlux, connect: Connect) -> None:
    fake.steps, fake.step_s = 10, 0.03
    seen: list[Preview] = []
    async with connect(poll_interval=0.01) as client:
        await client.generate("a fox", on_preview=seen.append)
    assert len(seen) >= 5
    assert [one.index for one in seen] == list(range(len(seen)))
    steps = [one.step for one in seen]
    assert steps == sorted(set(steps)), "each of them once, the newest last"
    assert {(one.width, one.height, one.format) for one in seen} == {(8, 4, "png")}
    assert seen[3].pil().getpixel((0, 0)) == (seen[3].step, 0, 0)


@pytest.mark.parametrize(("count", "due"), [(1, [5]), (2, [4, 7]), (3, [3, 5, 8])])
async def test_partial_images_are_spread_over_the_steps(
    fake: FakeFlux, connect: Connect, count: int, due: list[int]
) -> None:
    fake.steps, fake.step_s = 10, 0.06
    seen: list[Preview] = []
    told: list[Progress] = []

    async def show(preview: Preview) -> None:
        seen.append(preview)

    async with connect(poll_interval=0.01) as client:
        await client.generate("a fox", on_preview=show, partial_images=count, progress=told.append)
    assert [one.step for one in seen] == due
    assert {(one.width, one.height) for one in seen} == {(64, 32)}
    assert {kind for kind, _ in fake.previews} == {"partial"}
    assert [now.step for now in told] == sorted({now.step for now in told}), "progress goes on beside"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_blocking_client(fake: FakeFlux, wire: Wire, protocol: str) -> None:
    fake.steps, fake.step_s = 6, 0.05
    seen: list[Preview] = []
    with Client(wire.url(protocol), poll_interval=0.01) as client:
        client.generate("a fox", on_preview=seen.append)
    assert seen


async def test_what_the_callback_raises_stops_the_request(fake: FakeFlux, connect: Connect) -> None:
    fake.steps, fake.step_s = 1000, 0.01

    def stop(_: Preview) -> None:
        raise ArithmeticError("seen enough")

    async with connect(poll_interval=0.01) as client:
        with pytest.raises(ArithmeticError, match="seen enough"):
            await client.generate("a fox", request_id="p", on_preview=stop)
    assert fake.actions[-1] == ("p", "cancel")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"partial_images": 4, "on_preview": print}, ValueError, "partial_images: got 4, expected 0 to 3"),
        ({"partial_images": -1, "on_preview": print}, ValueError, "partial_images: got -1"),
        ({"partial_images": True, "on_preview": print}, TypeError, "partial_images: got bool"),
        ({"partial_images": 1}, ValueError, "partial_images: got 1 without on_preview"),
    ],
)
async def test_refusals(
    fake: FakeFlux, connect: Connect, options: dict[str, object], kind: type[Exception], message: str
) -> None:
    async with connect() as client:
        with pytest.raises(kind, match=message):
            await client.generate("a fox", **options)  # type: ignore[arg-type]
    assert fake.requests == []
