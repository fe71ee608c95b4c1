"""serving/generate against a stand-in for Triton: unlike jobs in a batch, files, errors, cancellation, metrics."""

import gc
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxserve import contract
from fluxserve.errors import SigningFailed
from fluxserve.inflight import InflightTable
from fluxserve.media.png import strips
from fluxserve.media.provenance import Provenance
from fluxserve.serving import files
from fluxserve.serving.processes import ProcessTable
from tests.support.admission import admitted
from tests.support.drawing_requests import STEPS, images, job, spent
from tests.support.fake_triton import (
    Logger,
    answers,
    error_of,
    installed,
    outputs,
    queue_policy,
)

QUEUE_TIMEOUT_S = 30


@pytest.fixture(scope="module")
def serving() -> Iterator[dict[str, Any]]:
    with installed() as modules:
        yield modules


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> InflightTable:
    return InflightTable(tmp_path_factory.mktemp("generate") / "table")


@pytest.fixture(scope="module")
def generate(serving: dict[str, Any], table: InflightTable) -> Iterator[Any]:
    """The shipped model, loaded once."""
    threads = torch.get_num_threads()
    serving["generate"]._WRITERS = 1  # so that what comes after a file can be waited for
    model = serving["generate"].GenerateModel()
    parameters = {n: {"string_value": v} for n, v in (("inflight", str(table.path)), ("threads", "1"))}
    config = json.dumps({"parameters": parameters} | queue_policy(QUEUE_TIMEOUT_S))
    model.initialize({"model_config": config, "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    yield model
    model.finalize()
    gc.unfreeze()  # a model's process ends with it; this one goes on
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_is_left(table: InflightTable) -> Iterator[None]:
    """Whatever a test does to `generate`, its slots come back."""
    Logger.lines.clear()
    yield
    assert table.live() == 0
    processes = ProcessTable.beside(table.path)
    assert not processes.busy() and processes.trouble() is None


def test_what_generate_gives_is_its_contract(generate: Any, table: InflightTable) -> None:
    before = {m: spent(f"{m}_total") for m in ("images", "pixels", "steps")}
    (response,) = answers(generate, [job(admitted(table, "r"), seeds=(1, 2), size=(64, 96), request_id="r")])
    out = outputs(response)
    assert list(out) == [t.name for t in contract.GENERATE.outputs]
    assert images(response).shape == (1, 2, 64, 96, 3)
    assert (out["seeds"].tolist(), out["image_size"].tolist()) == ([[1, 2]], [[64, 96]])
    timings = json.loads(out["timings"][0, 0])
    assert list(timings) == ["queue", "encode", "denoise", "decode", "total", "image"]
    assert timings["total"] == pytest.approx(timings["encode"] + timings["denoise"] + timings["decode"], abs=2e-3)
    after = {m: spent(f"{m}_total") for m in before}
    assert {m: after[m] - before[m] for m in after} == {"images": 2, "pixels": 2 * 64 * 96, "steps": 2 * STEPS}
    assert spent("stage_seconds", stage="denoise") >= timings["denoise"] / 1000 - 1e-6


@pytest.mark.parametrize("output_format", [b"png", b"jpeg", b"webp"])
def test_files(generate: Any, table: InflightTable, output_format: bytes) -> None:
    seeds = (1, 2)
    raw, encoded = (
        answers(generate, [job(admitted(table), seeds=seeds, output_format=f)])[0] for f in (b"raw", output_format)
    )
    files = outputs(encoded)["images"][0]
    assert len(files) == len(seeds)
    for file, pixels, seed in zip(files, images(raw)[0], seeds, strict=True):
        picture = Image.open(io.BytesIO(file))
        assert f"<fluxserve:seed>{seed}<".encode() in picture.info["xmp"], "each image has its own"
        assert picture.format == output_format.decode().upper() and picture.size == (64, 64)
        assert output_format != b"png" or np.array_equal(np.asarray(picture), pixels)


def test_a_file_that_fails_is_its_own_requests_error(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write_image

    def fail_for_webp(image: np.ndarray, output_format: str, quality: int, made: Provenance) -> bytes:
        if output_format == "webp":
            raise RuntimeError("no such codec")
        return bytes(write(image, output_format, quality, made))

    monkeypatch.setattr(files, "write_image", fail_for_webp)
    bad, good = answers(generate, [job(admitted(table, "a"), output_format=b"webp"), job(admitted(table, "b"))])
    assert error_of(bad) == ("INTERNAL", "internal error: RuntimeError: no such codec")
    assert not good.has_error()


def test_pngs_are_written_where_the_picture_is(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, played here; other formats are the host's."""
    drawn: list[torch.Tensor] = []

    def encode(pixels: torch.Tensor, texts: bytes) -> bytes:
        drawn.append(pixels)
        return strips.encode(pixels.numpy(), texts)

    monkeypatch.setattr(generate._files, "_encode", encode)
    wanted = job(admitted(table, "a"), seeds=(1, 2), output_format=b"png")
    png, raw = answers(generate, [wanted, job(admitted(table, "b"), output_format=b"raw")])
    assert [tuple(pixels.shape) for pixels in drawn] == [(64, 64, 3)] * 2
    first = Image.open(io.BytesIO(outputs(png)["images"][0, 0]))
    assert outputs(raw)["images"][0, 0] == np.asarray(first).tobytes(), "the same picture"
    assert b"trainedAlgorithmicMedia" in first.info["xmp"], "the host says what made it"


def test_a_gpu_that_fails_at_a_file_fails_that_request_alone(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pixels: torch.Tensor, texts: bytes) -> bytes:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(generate._files, "_encode", fail)
    wanted = job(admitted(table, "a"), output_format=b"png")
    bad, good = answers(generate, [wanted, job(admitted(table, "b"), output_format=b"raw")])
    assert error_of(bad) == ("INTERNAL", "internal error: RuntimeError: no such kernel")
    assert not good.has_error()


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_a_file_that_can_not_be_signed_is_not_sent(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch, on_a_gpu: bool
) -> None:
    """Its request gets the error. Raw pixels have no place for a signature."""

    class Expired:
        def sign(self, file: bytes, output_format: str) -> bytes:
            raise SigningFailed("the certificate was not valid at time of signing")

    monkeypatch.setattr(generate._files, "_signer", Expired())
    if on_a_gpu:
        monkeypatch.setattr(generate._files, "_encode", lambda pixels, texts: strips.encode(pixels.numpy(), texts))
    bad, good = answers(generate, [job(admitted(table, "a"), output_format=b"png"), job(admitted(table, "b"))])
    status, message = error_of(bad)
    assert status == "INTERNAL" and "signature: the certificate was not valid at time of signing" in message
    assert not bad.output_tensors() and not good.has_error()


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"prompt": b"\xff"}, "embedded_prompt: got 1 bytes; allowed: at most 8192"),
        ({"prompt": b"a" * 8193}, "embedded_prompt: got 8193 bytes"),
        ({"index": 4}, "output_format: got 4; allowed: 0 to 3: png, jpeg, webp, raw"),
        ({"index": -1}, "output_format: got -1"),
        ({"encoding": 2}, "encoding: got 2; allowed: 0 to 1: binary, base64"),
        ({"quality": 0}, "quality: got 0; allowed: 1 to 100"),
    ],
)
def test_a_file_that_can_not_be_is_refused_before_it_is_drawn(
    generate: Any, table: InflightTable, changed: dict[str, int], field: str
) -> None:
    steps = spent("steps_total")
    (response,) = answers(generate, [job(**changed)])
    status, message = error_of(response)
    assert status == "INVALID_ARG" and message.startswith(field)
    assert spent("steps_total") == steps


def test_an_answer_that_can_not_be_sent_is_logged(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, other = job(admitted(table, "a")), job(admitted(table, "b"))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a broken pipe")

    monkeypatch.setattr(request.get_response_sender(), "send", fail)
    generate.execute([request])
    assert not answers(generate, [other])[0].has_error()
    assert "a broken pipe" in Logger.lines[0]


@pytest.mark.parametrize("ticket", [0, 1, -1, 2**62])
def test_a_job_past_the_door_is_refused(generate: Any, table: InflightTable, ticket: int) -> None:
    """Beside one that was admitted, which is drawn."""
    steps = spent("steps_total")
    forged, good = answers(generate, [job(ticket), job(admitted(table, "good"))])
    allowed = "that of a request which `prepare` has admitted, once; clients call `flux`"
    got = f"ticket: got {ticket}, which no waiting request has"
    assert error_of(forged) == ("INVALID_ARG", f"{got}; allowed: {allowed}")
    assert images(good).shape == (1, 1, 64, 64, 3)
    assert spent("steps_total") - steps == STEPS


def test_unlike_jobs_in_one_batch(generate: Any, table: InflightTable) -> None:
    """Triton's shapes leave the schedule open; each job gets what it gets alone, in the order of the requests."""
    other = np.linspace(1, 0, STEPS + 1, dtype=np.float32) ** 2
    batch = [{"seeds": (1,)}, {"seeds": (2,), "sigmas": other}, {"seeds": (3,)}, {"seeds": (1,), "sigmas": other}]
    alone = [images(answers(generate, [job(admitted(table), **b)])[0]) for b in batch]  # type: ignore[arg-type]
    together = answers(generate, [job(admitted(table, str(k)), **b) for k, b in enumerate(batch)])  # type: ignore[arg-type]
    assert all(np.array_equal(a, images(t)) for a, t in zip(alone, together, strict=True))
    assert len({a.tobytes() for a in alone}) == 4


def test_a_cancelled_ticket_among_good_ones(generate: Any, table: InflightTable) -> None:
    stale = admitted(table, "stale")
    table.cancel("stale")
    before = spent("cancellations_total")
    good, bad, also = answers(generate, [job(admitted(table, "a")), job(stale), job(admitted(table, "b"), seeds=(2,))])
    assert error_of(bad)[0] == "CANCELLED"
    assert not good.has_error() and not also.has_error()
    assert spent("cancellations_total") == before + 1


def test_a_request_cancelled_while_it_waited_is_not_drawn(generate: Any, table: InflightTable) -> None:
    ticket, steps = admitted(table, "gone"), spent("steps_total")
    table.cancel("gone")
    (response,) = answers(generate, [job(ticket, request_id="gone")])
    assert error_of(response) == ("CANCELLED", f"[CANCELLED] request 'gone' was cancelled at step 0 of {STEPS}")
    assert spent("steps_total") == steps


def cancelling(table: InflightTable, name: str, step: int) -> Callable[[InflightTable, int], bool]:
    """An `advance` before which a request is cancelled, as `control` does it, once so many steps are done."""
    advance = InflightTable.advance

    def cancel_and_advance(self: InflightTable, ticket: int) -> bool:
        if table.status(name).step == step:
            table.cancel(name)
        return advance(self, ticket)

    return cancel_and_advance


def test_a_running_request_stops_at_once(generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InflightTable, "advance", cancelling(table, "out", 1))
    before = spent("cancellations_total"), spent("images_total")
    out, stay = answers(
        generate,
        [
            job(admitted(table, "out"), (1, 2), request_id="out"),
            job(admitted(table, "stay"), (5, 6), request_id="stay"),
        ],
    )
    assert error_of(out) == ("CANCELLED", f"[CANCELLED] request 'out' was cancelled at step 2 of {2 * STEPS}")
    assert (spent("cancellations_total"), spent("images_total")) == (before[0] + 1, before[1] + 2)
    assert np.array_equal(images(stay), images(answers(generate, [job(admitted(table), seeds=(5, 6))])[0]))


def test_a_caller_that_hangs_up(generate: Any, table: InflightTable) -> None:
    steps = spent("steps_total")
    (response,) = answers(generate, [job(admitted(table, "r"), steps=50, request_id="r", cancelled_after=4)])
    assert error_of(response)[0] == "CANCELLED"
    assert spent("steps_total") - steps == 5


def test_the_numbers_come_after_the_answer(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them waits for Triton's process."""
    request, answered = job(admitted(table, "a")), list[bool]()
    sent = request.get_response_sender()
    monkeypatch.setattr(generate._metrics, "drawn", lambda *_: answered.append(sent.response is not None))
    answers(generate, [request])
    assert answered == [True]


def test_saturated_values_are_counted_once(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine counts from its start on, and the metric what has come since the last picture."""
    before, totals = spent("saturated_values_total"), iter([0, 5, 5, 9])
    monkeypatch.setattr(generate._pipeline, "saturated", lambda: next(totals))
    seen = []
    for name in "abcd":
        answers(generate, [job(admitted(table, name))])
        seen.append(spent("saturated_values_total") - before)
    assert seen == [0, 5, 5, 9]


@pytest.mark.parametrize("output_format", [b"raw", b"png", b"jpeg"])
def test_a_picture_that_is_not_finite_is_an_error_and_counted(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch, output_format: bytes
) -> None:
    """The VAE gives NaN for one of two requests; the other gets its picture."""
    decoded, calls = generate._pipeline._decoded, []

    def spoilt(*given: Any) -> torch.Tensor:
        values: torch.Tensor = decoded(*given)
        calls.append(1)
        return values * float("nan") if len(calls) == 1 else values

    monkeypatch.setattr(generate._pipeline, "_decoded", spoilt)
    before, drawn = spent("not_finite_requests_total"), spent("images_total")
    jobs = [job(admitted(table, name), output_format=output_format) for name in ("black", "good")]
    bad, good = answers(generate, jobs)
    code, message = error_of(bad)
    assert code == "INTERNAL" and "NotFinite: picture: got NaN or infinity; expected finite numbers" in message
    assert not good.has_error()
    assert (spent("not_finite_requests_total") - before, spent("images_total") - drawn) == (1, 1)


def test_an_exception_releases_the_slots(generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(generate._pipeline, "draw", fail)
    responses = answers(generate, [job(admitted(table, "a")), job(admitted(table, "b"), steps=2)])
    assert [error_of(r) for r in responses] == [("INTERNAL", "internal error: RuntimeError: out of memory")] * 2
    assert "out of memory" in Logger.lines[0]


def test_one_groups_exception_leaves_the_others(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw: Callable[..., Any] = generate._pipeline.draw

    def fail_for_two_steps(jobs: Any, *callbacks: Any) -> Any:
        if jobs[0].steps == 2:
            raise RuntimeError("a bad schedule")
        return draw(jobs, *callbacks)

    monkeypatch.setattr(generate._pipeline, "draw", fail_for_two_steps)
    bad, good = answers(generate, [job(admitted(table, "a"), steps=2), job(admitted(table, "b"))])
    assert error_of(bad)[0] == "INTERNAL"
    assert images(good).shape == (1, 1, 64, 64, 3)


@pytest.mark.parametrize("size", [(16, 16), (1024, 64), (64, 528)])
def test_a_size_outside_the_limits_never_reaches_the_loop(generate: Any, size: tuple[int, int]) -> None:
    steps = spent("steps_total")
    (response,) = answers(generate, [job(size=size, steps=1)])
    assert error_of(response)[0] == "INVALID_ARG"
    assert spent("steps_total") == steps


def test_what_the_door_needs_to_know(generate: Any, table: InflightTable) -> None:
    """Triton's bound on the wait, and what a picture takes: measured, so within a wide range."""
    assert table.queue_timeout_s == QUEUE_TIMEOUT_S
    begin = time.monotonic()
    generate._pipeline.warm_up()
    longest = 20 * (time.monotonic() - begin)
    assert 0 < ProcessTable.beside(table.path).seconds_each() < longest


def test_the_worker_is_known(generate: Any, table: InflightTable) -> None:
    assert ProcessTable.beside(table.path).pids("generate") == [os.getpid()]
