"""One call, over a fake transport, real gRPC and real HTTP: tensors, answers, errors, progress, cancellation."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fluxserve_client import (
    AsyncClient,
    Cancelled,
    DeadlineExceeded,
    FluxserveError,
    InvalidRequest,
    MockTransport,
    Progress,
    QueueFull,
    RequestIdInUse,
    ServerError,
    State,
    Unavailable,
)
from PIL import Image

from tests.client.fakes import TIMINGS, FakeFlux, Wire, strings

Connect = Callable[..., AsyncClient]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_every_option_becomes_its_tensor(fake: FakeFlux, connect: Connect) -> None:
    async with connect() as client:
        await client.generate(
            "ein Fuchs 🦊",
            height=64,
            width=np.int64(96),  # what numpy code passes
            num_inference_steps=9,
            guidance_scale=3,
            seed=-(2**63),
            num_images=2,
            image=b"\x89PNG\x00\x00",
            strength=0.5,
            negative_prompt="",
            true_cfg_scale=4.5,
            output_format="webp",
            quality=80,
            request_id="a.B-9 é",
        )
    [(name, inputs)] = fake.requests
    assert name == "a.B-9 é"
    expected = {
        "prompt": (np.object_, "ein Fuchs 🦊".encode()),
        "height": (np.int32, 64),
        "width": (np.int32, 96),
        "num_inference_steps": (np.int32, 9),
        "guidance_scale": (np.float32, 3.0),
        "seed": (np.int64, -(2**63)),
        "num_images": (np.int32, 2),
        "image": (np.object_, b"\x89PNG\x00\x00"),
        "strength": (np.float32, 0.5),
        "negative_prompt": (np.object_, b""),
        "true_cfg_scale": (np.float32, 4.5),
        "output_format": (np.object_, b"webp"),
        "quality": (np.int32, 80),
    }
    assert {key: (tensor.dtype, tensor.shape, tensor[0]) for key, tensor in inputs.items()} == {
        key: (np.dtype(dtype), (1,), value) for key, (dtype, value) in expected.items()
    }


async def test_what_is_not_given_is_not_sent(fake: FakeFlux, connect: Connect) -> None:
    async with connect() as client:
        result = await client.generate("a fox")
    [(name, inputs)] = fake.requests
    assert list(inputs) == ["prompt"]
    assert re.fullmatch("[0-9a-f]{32}", name)
    assert result.request_id == name


async def test_the_answer_arrives_to_the_byte(connect: Connect) -> None:
    async with connect() as client:
        result = await client.generate("a fox", num_images=3, seed=7)
    assert result.images == (b"\x89PNG\r\n\x1a\n\xff\x00\x00",) * 3
    assert result.seeds == (7, 8, 9)
    assert (result.height, result.width, result.format) == (16, 32, "png")
    assert vars(result.timings) == TIMINGS


async def test_pictures_far_beyond_grpcs_default_limit(fake: FakeFlux, connect: Connect) -> None:
    fake.pictures = (bytes(9_000_000), bytes(9_000_000))
    async with connect() as client:
        result = await client.generate("a fox", image=b"\x01" * 9_000_000, output_format="raw")
    assert result.images == fake.pictures
    assert fake.requests[0][1]["image"][0] == b"\x01" * 9_000_000


async def test_an_image_may_be_a_path_or_a_pillow_image(fake: FakeFlux, connect: Connect, tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 2), (250, 0, 7))
    picture.save(tmp_path / "in.png")
    async with connect() as client:
        await client.generate("a fox", image=tmp_path / "in.png")
        await client.generate("a fox", image=picture)
        await client.generate("a fox", image=[picture, tmp_path / "in.png", b"\x00bytes\x00"])
    (first,), (second,), several = (inputs["image"] for _, inputs in fake.requests)
    assert first == (tmp_path / "in.png").read_bytes()
    assert second.startswith(b"\x89PNG")
    assert list(several) == [second, first, b"\x00bytes\x00"], "in their order"


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        ("INVALID_ARGUMENT", "height: got 17; allowed: multiples of 16", InvalidRequest),
        ("UNAVAILABLE", "Exceeds maximum queue size", QueueFull),
        ("UNAVAILABLE", "Server is stopping", Unavailable),
        ("CANCELLED", "request 'x1' was cancelled at step 3 of 9", Cancelled),
        ("ALREADY_EXISTS", "request_id: 'x1' is in use by a running request", RequestIdInUse),
        ("INTERNAL", "CUDA error", ServerError),
        ("NOT_FOUND", "Request for unknown model: 'flux' is not found", ServerError),
    ],
)
async def test_errors_are_the_same_over_every_wire(
    fake: FakeFlux, connect: Connect, status: str, message: str, kind: type[FluxserveError]
) -> None:
    fake.error = kind(message, status=status, request_id="x1")
    async with connect() as client:
        with pytest.raises(kind) as caught:
            await client.generate("a fox", request_id="x1")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.status, caught.value.request_id) == (message, status, "x1")
    assert fake.actions == []  # the server has answered: there is nothing to cancel


async def test_an_id_in_use_is_refused(fake: FakeFlux, connect: Connect) -> None:
    fake.steps, fake.step_s = 100, 0.01
    async with connect() as client:
        first = asyncio.create_task(client.generate("a fox", request_id="one"))
        await until(lambda: "one" in fake.table)
        with pytest.raises(RequestIdInUse):
            await client.generate("a fox", request_id="one")
        assert await client.cancel("one") is State.CANCELLING
        with pytest.raises(Cancelled, match="was cancelled at step"):
            await first


async def test_a_timeout_stops_the_server(fake: FakeFlux, connect: Connect) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    async with connect() as client:
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.2 s") as caught:
            await client.generate("a fox", request_id="late", timeout=0.2)
        assert isinstance(caught.value, TimeoutError)
        assert ("late", "cancel") in fake.actions
        assert not hasattr(caught.value, "__notes__")


async def test_a_cancelled_task_stops_the_server(fake: FakeFlux, connect: Connect) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    async with connect() as client:
        task = asyncio.create_task(client.generate("a fox", request_id="left"))
        await until(lambda: "left" in fake.table)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fake.actions == [("left", "cancel")]


async def test_a_request_still_on_its_way_is_cancelled_when_it_arrives(fake: FakeFlux, connect: Connect) -> None:
    fake.steps, fake.step_s, fake.arrival_s = 1000, 0.01, 0.3
    async with connect() as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate("a fox", request_id="slow", timeout=0.1)
        assert fake.actions.count(("slow", "cancel")) > 1
        await until(lambda: not fake.table)


async def test_nothing_is_cancelled_twice_when_the_answer_comes_first(fake: FakeFlux) -> None:
    fake.arrival_s, fake.steps = 0.17, 0  # unknown to `control` till then, and done at once after it
    async with AsyncClient(transport=MockTransport(fake), cancel_timeout=5) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            await client.generate("a fox", timeout=0.1)
    assert time.monotonic() - started < 2
    assert not hasattr(caught.value, "__notes__")
    assert fake.ended[0][1] == "done"


async def test_a_cancel_that_fails_is_told(fake: FakeFlux, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    fake.steps, fake.step_s = 20, 0.02
    fake.control_error = Unavailable("control is gone", status="UNAVAILABLE")
    async with connect() as client:
        with caplog.at_level(logging.WARNING), pytest.raises(DeadlineExceeded) as caught:
            await client.generate("a fox", request_id="x", timeout=0.1)
    expected = "request x may still run on the server: it could not be cancelled: control is gone"
    assert caught.value.__notes__ == [expected]
    assert expected in caplog.text


async def test_a_cancel_that_hangs_is_given_up(fake: FakeFlux) -> None:
    async def hanging(model: str, inputs: object, request_id: str) -> dict[str, np.ndarray]:
        await asyncio.sleep(60)
        return {}

    async with AsyncClient(transport=MockTransport(hanging), cancel_timeout=0.1) as client:
        task = asyncio.create_task(client.generate("a fox"))
        await asyncio.sleep(0.01)
        task.cancel()
        started = time.monotonic()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
    assert time.monotonic() - started < 2
    assert "no confirmation within 0.1 s" in caught.value.__notes__[0]


async def test_a_second_cancel_leaves_at_once_and_the_message_still_goes_out(fake: FakeFlux, wire: Wire) -> None:
    fake.steps, fake.step_s, fake.arrival_s = 1000, 0.01, 0.3
    async with AsyncClient(wire.url("http")) as client:
        task = asyncio.create_task(client.generate("a fox", request_id="x"))
        await until(lambda: fake.requests)
        task.cancel()
        await until(lambda: fake.actions)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "x" not in fake.table  # left before the request had arrived
    await until(lambda: fake.ended == [("x", "cancelled")])  # `close` waited until the message was out


async def test_progress_is_followed(fake: FakeFlux, connect: Connect) -> None:
    fake.steps, fake.step_s = 10, 0.02
    seen: list[Progress] = []
    async with connect(poll_interval=0.01) as client:
        await client.generate("a fox", request_id="p", progress=seen.append)
    assert len(seen) >= 5
    assert {now.state for now in seen} == {State.RUNNING}
    assert {now.steps for now in seen} == {10}
    assert [now.step for now in seen] == sorted({now.step for now in seen})  # changes only
    assert set(fake.actions) == {("p", "status")}


async def test_what_the_callback_raises_stops_the_request(fake: FakeFlux, connect: Connect) -> None:
    fake.steps, fake.step_s = 1000, 0.01

    def enough(now: Progress) -> None:
        if now.step >= 3:
            raise TimeoutError("enough")  # one that must not be taken for the client's own deadline

    async with connect(poll_interval=0.01) as client:
        with pytest.raises(TimeoutError, match="enough") as caught:
            await client.generate("a fox", request_id="p", progress=enough, timeout=60)
    assert not isinstance(caught.value, FluxserveError)
    assert fake.actions[-1] == ("p", "cancel")


async def test_a_server_that_cannot_tell_progress_does_not_cost_the_picture(
    fake: FakeFlux, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    fake.steps, fake.step_s = 10, 0.02
    fake.control_error = Unavailable("control is gone", status="UNAVAILABLE")
    async with connect(poll_interval=0.01) as client:
        with caplog.at_level(logging.WARNING):
            result = await client.generate("a fox", progress=lambda now: None)
    assert result.image
    assert "is not followed any more: control is gone" in caplog.text
    assert len(fake.actions) == 1


async def test_status_cancel_ready(fake: FakeFlux, connect: Connect) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    async with connect() as client:
        assert await client.ready()
        assert await client.status("x") == Progress(State.UNKNOWN, 0, 0)
        assert await client.cancel("x") is State.UNKNOWN
        task = asyncio.create_task(client.generate("a fox", request_id="x"))
        await until(lambda: fake.table and fake.table["x"].step > 0)
        now = await client.status("x")
        assert now.state is State.RUNNING
        assert 0 < now.step < now.steps == 1000
        await client.cancel("x")
        with pytest.raises(Cancelled):
            await task


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"prompt": 7}, TypeError, "prompt: got int, expected str"),
        ({"prompt": "\udc00"}, ValueError, "prompt: not valid Unicode"),
        ({"height": 64.0}, TypeError, "height: got float, expected int"),
        ({"height": True}, TypeError, "height: got bool"),
        ({"width": 2**31}, ValueError, "width: got 2147483648"),
        ({"seed": 2**63}, ValueError, "seed: got 9223372036854775808"),
        ({"guidance_scale": "3"}, TypeError, "guidance_scale: got str"),
        ({"guidance_scale": 1e39}, ValueError, "guidance_scale: got 1e[+]39"),
        ({"image": "fox.png"}, TypeError, r"image: got the text 'fox.png', expected a pathlib\.Path"),
        ({"image": "https://x/fox.png"}, TypeError, "URLs are not fetched"),
        ({"image": 7}, TypeError, r"image: got int, expected bytes, a pathlib\.Path"),
        ({"request_id": ""}, ValueError, "request_id: got ''"),
        ({"request_id": "a\x7f"}, ValueError, "request_id: got 'a.x7f'"),
        ({"request_id": "a\n"}, ValueError, "request_id"),
        ({"request_id": "x" * 129}, ValueError, "request_id"),
        ({"request_id": "é" * 65}, ValueError, "request_id"),
        ({"request_id": "\udcff"}, ValueError, "request_id"),
        ({"request_id": 7}, TypeError, "request_id: got int"),
    ],
)
async def test_what_cannot_be_sent_is_refused_here(
    fake: FakeFlux, options: dict[str, object], kind: type[Exception], message: str
) -> None:
    async with AsyncClient(transport=MockTransport(fake)) as client:
        with pytest.raises(kind, match=message):
            await client.generate(**{"prompt": "a fox", **options})  # type: ignore[arg-type]
    assert fake.requests == []


async def test_values_are_left_to_the_server(fake: FakeFlux, connect: Connect) -> None:
    async with connect() as client:
        await client.generate("", height=17, guidance_scale=float("nan"), strength=-1, num_inference_steps=0)
    inputs = fake.requests[0][1]
    assert np.isnan(inputs["guidance_scale"][0])
    assert inputs["prompt"][0] == b""


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"images": None}, "images: missing from the answer, which has image_size, seeds, timings"),
        ({"seeds": np.array([1, 2])}, "seeds: got 2 of them for 1 images"),
        ({"timings": strings(b"{}")}, "timings: got b'{}'"),
        ({"timings": strings(b"[")}, "timings: got"),
        ({"image_size": np.array([1])}, "image_size: got 1 elements, expected 2"),
        ({"images": strings(b"GIF89a")}, "no PNG, JPEG or WebP"),
    ],
)
async def test_an_answer_that_breaks_the_contract(
    fake: FakeFlux, broken: dict[str, np.ndarray | None], message: str
) -> None:
    def answer(model: str, inputs: object, request_id: str) -> dict[str, np.ndarray]:
        outputs = {**fake.answer({}), **broken}
        return {name: tensor for name, tensor in outputs.items() if tensor is not None}

    async with AsyncClient(transport=MockTransport(answer)) as client:
        with pytest.raises(ServerError, match=re.escape(message)):
            await client.generate("a fox")
