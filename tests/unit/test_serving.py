"""serving/prepare, control and the border's errors, against a stand-in for Triton."""

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxserve import contract, errors, inflight
from fluxserve.contract import MAX_WAITING
from fluxserve.inflight import MAX_ID_BYTES, InflightTable
from fluxserve.media.images import write_image
from fluxserve.serving import decoder
from fluxserve.serving.envelope import opened
from fluxserve.serving.processes import Heartbeat, ProcessTable
from tests.support.admission import admitted
from tests.support.fake_triton import FINAL, InferenceRequest, Logger, counted, error_of, installed, outputs, prepared

NUMPY = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "BOOL": np.bool_}
PNG = write_image(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8), "png", 90)


@pytest.fixture
def serving() -> Iterator[dict[str, Any]]:
    with installed() as modules:
        yield modules


@pytest.fixture
def table(tmp_path: Path) -> InflightTable:
    return InflightTable(tmp_path / "table")


def started(model: Any, table: InflightTable) -> Any:
    parameters = {"inflight": {"string_value": str(table.path)}}
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    return model


@pytest.fixture
def prepare(serving: dict[str, Any], table: InflightTable) -> Iterator[Any]:
    model = started(serving["prepare"].PrepareModel(), table)
    yield model
    model.finalize()


@pytest.fixture
def control(serving: dict[str, Any], table: InflightTable) -> Any:
    return started(serving["control"].ControlModel(), table)


def ask(request_id: str = "", **fields: Any) -> InferenceRequest:
    kinds = {t.name: NUMPY[t.dtype] for t in contract.REQUEST_INPUTS}
    return InferenceRequest({n: np.array([v], dtype=kinds[n]) for n, v in fields.items()}, request_id)


# --- prepare ---------------------------------------------------------------------------------------------------------


def test_what_prepare_gives_is_its_contract(prepare: Any, table: InflightTable) -> None:
    request = ask("r", prompt=b"a fox", num_images=3, seed=7, width=64, output_format=b"JPEG", quality=3)
    (response,) = prepared(prepare, [request])
    out = outputs(response)
    assert list(out) == [t.name for t in contract.PREPARE.outputs]
    for tensor in contract.PREPARE.outputs:
        want = {"BYTES": np.object_, "UINT8": np.uint8, **NUMPY}[tensor.dtype]
        assert out[tensor.name].dtype == want, tensor.name
        assert len(out[tensor.name].shape) == len(tensor.dims)
        assert all(d in (contract.ANY, s) for d, s in zip(tensor.dims, out[tensor.name].shape, strict=True))
    assert out["batch_key"].shape == (1, 128, 64, 20, 0)
    job, delivery = opened(out)
    assert (job.height, job.width, job.seeds, job.steps) == (128, 64, (7, 8, 9), 20)
    assert (delivery.output_format, delivery.quality, delivery.encoding) == ("jpeg", 3, "binary")
    assert delivery.prompt == "", "files hold no prompt unless the caller wants it"
    assert table.status("r").state == "queued"
    assert table.start(delivery.ticket, 20) >= 0


def test_a_prompt_crosses_over_for_the_file_if_its_caller_wants_that(prepare: Any, table: InflightTable) -> None:
    shapes = set()
    for prompt, wanted in (("狐 & co", True), ("a fox", True), ("a fox", False)):
        (response,) = prepared(prepare, [ask(prompt=prompt.encode(), embed_prompt=wanted)])
        out = outputs(response)
        assert opened(out)[1].prompt == (prompt if wanted else "")
        shapes.add(tuple(out[tensor.name].shape for tensor in contract.PREPARE.outputs))
    assert len(shapes) == 1, "Triton may batch them"


def test_prepare_with_an_image(prepare: Any) -> None:
    (response,) = prepared(prepare, [ask(prompt=b"a fox", image=PNG, strength=0.25, num_inference_steps=8)])
    job, _ = opened(outputs(response))
    assert np.array_equal(job["image"], np.asarray(Image.open(io.BytesIO(PNG))))
    assert job.steps == 2, "of eight"


@pytest.mark.parametrize("strength", [1e-30, 1e-7, 1e-3])
def test_a_tiny_strength_runs_one_step(prepare: Any, strength: float) -> None:
    (response,) = prepared(prepare, [ask(prompt=b"a fox", image=PNG, strength=strength)])
    assert opened(outputs(response))[0].steps == 1


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_a_strength_as_fp32_is_the_number_that_was_typed(prepare: Any, steps: int) -> None:
    given = {"prompt": b"a fox", "image": PNG, "num_inference_steps": steps}
    default, typed = (opened(outputs(r))[0] for r in prepared(prepare, [ask(**given), ask(strength=0.6, **given)]))
    assert typed.steps == default.steps


def test_one_bad_request_among_good_ones(prepare: Any, table: InflightTable) -> None:
    good, bad, also_good = prepared(
        prepare, [ask("a", prompt=b"a fox"), ask("b", prompt=b"a fox", height=17), ask("c", prompt=b"a fox")]
    )
    assert not good.has_error() and not also_good.has_error()
    assert error_of(bad) == ("INVALID_ARG", "height: got 17; allowed: a multiple of 16 from 64 to 512")
    assert table.status("b").state == "unknown" and table.live() == 2


def refused(prepare: Any, request: InferenceRequest) -> tuple[str, str]:
    (response,) = prepared(prepare, [request])
    return error_of(response)


def test_refusals_are_counted_by_reason(prepare: Any, table: InflightTable) -> None:
    assert refused(prepare, ask()) == ("INVALID_ARG", "prompt: got nothing; allowed: 1 to 4096 bytes of UTF-8 text")
    table.claim("mine")
    status, message = refused(prepare, ask("mine", prompt=b"x"))
    assert (status, message[:16]) == ("ALREADY_EXISTS", "[ALREADY_EXISTS]")
    for k in range(MAX_WAITING - 1):
        table.claim(str(k))
    assert refused(prepare, ask("more", prompt=b"x"))[0] == "UNAVAILABLE"
    table.drain()
    assert refused(prepare, ask("late", prompt=b"x"))[0] == "UNAVAILABLE"
    name = "fluxserve_rejected_requests_total"
    reasons = ("invalid_request", "request_id_in_use", "queue_full", "draining")
    assert [counted(name, reason=r) for r in reasons] == [1, 1, 1, 1]
    assert counted(name, reason="internal") == 0
    assert Logger.lines == []


@pytest.mark.parametrize("request_id", ["x" * (MAX_ID_BYTES + 1), "é" * MAX_ID_BYTES, "a\x00", "a\nb", "\x7f", "\x9b"])
def test_request_ids_that_are_refused(prepare: Any, table: InflightTable, request_id: str) -> None:
    status, message = refused(prepare, ask(request_id, prompt=b"x"))
    assert status == "INVALID_ARG" and message.startswith("request_id: got")
    assert table.live() == 0


def test_a_failure_after_the_claim_gives_the_slot_back(
    prepare: Any, table: InflightTable, serving: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the tokenizer broke")

    monkeypatch.setattr(prepare._family, "lay_out", fail)
    assert refused(prepare, ask("r", prompt=b"x")) == ("INTERNAL", "internal error: RuntimeError: the tokenizer broke")
    assert table.live() == 0
    assert counted("fluxserve_rejected_requests_total", reason="internal") == 1
    assert "Traceback" in Logger.lines[0] and "in fail" in Logger.lines[0]


def test_requests_with_and_without_images_together(
    prepare: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets its own answer; what is damaged is named, and its slot comes back."""
    monkeypatch.setattr(inflight, "HANDOVER_S", 60.0)  # nobody draws them, and a decoder's start may take a while
    fields = {"prompt": b"a fox", "strength": 0.5}
    without, whole, damaged, bad = prepared(
        prepare,
        [ask("a", prompt=b"a fox"), ask("b", image=PNG, **fields), ask("c", image=PNG[:-3000], **fields), ask("d")],
    )
    assert opened(outputs(without))[0].get("image") is None
    assert opened(outputs(whole))[0]["image"].shape == (64, 96, 3)
    status, message = error_of(damaged)
    assert status == "INVALID_ARG" and message.startswith("image: got a damaged or truncated PNG file")
    assert error_of(bad)[0] == "INVALID_ARG"
    assert [table.status(name).state for name in "abcd"] == ["queued", "queued", "unknown", "unknown"]


def test_a_full_queue_refuses_before_an_image_is_decoded(prepare: Any, table: InflightTable) -> None:
    """Files that are wrong, so that a look at them would show: at pixels, a header, base64."""
    table.start(admitted(table, "running"), 9)
    waiting = [table.claim(str(k)) for k in range(MAX_WAITING)]
    wrong = [{"image": PNG[:-3000]}, {"image": b"GIF89a"}, {"image": b"no base64", "encoding": b"base64"}]
    for fields in wrong:
        assert refused(prepare, ask(prompt=b"x", **fields))[0] == "UNAVAILABLE"
    assert refused(prepare, ask(prompt=b"x", quality=0, **wrong[0]))[0] == "INVALID_ARG", "plain fields come first"
    assert table.live() == MAX_WAITING + 1
    table.release(waiting[0])
    for fields in wrong:
        assert refused(prepare, ask(prompt=b"x", **fields))[0] == "INVALID_ARG"
    assert table.live() == MAX_WAITING


def test_as_many_may_wait_as_are_drawn_in_time(prepare: Any, table: InflightTable) -> None:
    """FLUX.1-dev on one GPU: 64 would wait for 127 s, and Triton lets nobody wait for more than 120."""
    table.start(admitted(table, "running"), 9)
    drawing = Heartbeat(ProcessTable.beside(table.path), "generate")
    drawing.draws_in(1.98)
    try:
        answers = [refused_or_not(prepare, ask(prompt=b"x")) for _ in range(61)]
    finally:
        drawing.close()
    assert answers[:-1] == [""] * 60
    assert "queue: 60 requests are waiting; at most 60 may. The wait would be about 119 s." in answers[-1]


def refused_or_not(prepare: Any, request: InferenceRequest) -> str:
    (response,) = prepared(prepare, [request])
    return error_of(response)[1] if response.has_error() else ""


def test_more_images_than_may_wait(
    prepare: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch, serving: dict[str, Any]
) -> None:
    """The rest is refused at once, with its slot given back, while the decoder is at the first."""
    at_work, go = threading.Event(), threading.Event()
    decode = decoder.Decoder.decode

    def wait(*arguments: Any) -> Any:
        at_work.set()
        assert go.wait(20)
        return decode(*arguments)

    monkeypatch.setattr(decoder.Decoder, "decode", wait)
    requests = [ask(str(k), prompt=b"x", image=PNG) for k in range(decoder.MAX_REQUESTS + 2)]
    assert prepare.execute(requests) is None
    assert at_work.wait(20)
    sent = [request.get_response_sender().response for request in requests]
    assert sent[: decoder.MAX_REQUESTS] == [None] * decoder.MAX_REQUESTS
    for response in sent[decoder.MAX_REQUESTS :]:
        assert response is not None
        status, message = error_of(response)
        assert status == "UNAVAILABLE" and f"images: {decoder.MAX_REQUESTS} requests with images, of " in message
    assert table.live() == decoder.MAX_REQUESTS
    assert counted("fluxserve_rejected_requests_total", reason="images_full") == 2
    go.set()
    prepared(prepare, [ask("last", prompt=b"x")])
    assert all(outputs(r.get_response_sender().response) for r in requests[: decoder.MAX_REQUESTS])  # type: ignore[arg-type]


def test_an_answer_that_can_not_be_sent_is_logged(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ask(prompt=b"x", image=PNG)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a broken pipe")

    monkeypatch.setattr(request.get_response_sender(), "send", fail)
    assert prepare.execute([request]) is None
    prepared(prepare, [ask(prompt=b"x")])
    assert "a broken pipe" in Logger.lines[0]


def test_where_memory_is_scarce_the_end_comes_by_itself(
    prepare: Any, serving: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that could not be written is followed by the end, which Triton makes an error of; errors come whole."""
    tensors, sent = serving["tensors"], list[tuple[bool, int]]()

    class Sender:
        def send(self, response: Any = None, flags: int = 0) -> None:
            sent.append((response is not None, flags))
            if response is not None and not response.has_error():
                raise RuntimeError("no room")

    (good,), (bad,) = prepared(prepare, [ask(prompt=b"x")]), prepared(prepare, [ask()])
    for scarce, response in ((True, good), (False, good), (True, bad)):
        monkeypatch.setattr(serving["shared_memory"], "is_scarce", lambda scarce=scarce: scarce)
        with suppress(RuntimeError):
            tensors.send(Sender(), response)
    assert sent == [(True, 0), (False, FINAL), (True, FINAL), (True, FINAL)]


def test_cancelled_while_its_image_is_decoded(
    prepare: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = decoder.Decoder.decode

    def cancel(*arguments: Any) -> Any:
        table.cancel("a")
        return decode(*arguments)

    monkeypatch.setattr(decoder.Decoder, "decode", cancel)
    (response,) = prepared(prepare, [ask("a", prompt=b"x", image=PNG, num_inference_steps=5)])
    assert error_of(response) == ("CANCELLED", "[CANCELLED] request 'a' was cancelled at step 0 of 3")
    assert table.live() == 0


def test_a_job_without_room_gives_its_slot_back(prepare: Any, table: InflightTable, serving: dict[str, Any]) -> None:
    def full(folder: str) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 1536, 10, 10, 0, 0, 0, 0, 255))

    request = ask(
        "a", prompt=b"x", image=write_image(np.zeros((512, 1024, 3), np.uint8), "png", 90), width=512, height=512
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving["shared_memory"].os, "statvfs", full)
        (response,) = prepared(prepare, [request])
        assert not prepared(prepare, [ask("b", prompt=b"x")])[0].has_error(), "a small one fits into what is there"
        patch.setattr(sys.modules["c_python_backend_utils"].shared_memory, "free_memory", lambda: 100_000)
        (small,) = prepared(prepare, [ask("c", prompt=b"x", image=PNG, width=256, height=256)])
    assert not response.has_error(), "0.8 of 1 MiB"
    status, message = error_of(small)
    assert status == "UNAVAILABLE" and message.startswith("answer: it has 19")
    assert [table.status(name).state for name in "abc"] == ["queued", "queued", "unknown"]
    assert counted("fluxserve_rejected_requests_total", reason="no_room") == 1


# --- control ---------------------------------------------------------------------------------------------------------


def test_control(control: Any, table: InflightTable) -> None:
    table.start(ticket := admitted(table, "r"), 9)
    table.advance(ticket)
    asked = [("r", b"status"), ("r", b"cancel"), ("nobody", b"cancel"), ("r", b"status")]
    answers = [outputs(r) for r in control.execute([_control(n.encode(), action) for n, action in asked])]
    got = [(a["state"][0], int(a["step"][0]), int(a["steps"][0])) for a in answers]
    assert got == [(b"running", 1, 9), (b"cancelling", 1, 9), (b"unknown", 0, 0), (b"cancelling", 1, 9)]
    assert not table.advance(ticket)


@pytest.mark.parametrize(
    ("request_id", "action", "field"),
    [
        (b"r", b"kill", "action: got 'kill'; allowed: status, cancel, preview"),
        (b"r", b"", "action: got ''"),
        (b"r", b"\xff" * 1000, "action: got "),
        (b"", b"status", "request_id: got 0 bytes"),
        (b"x" * 129, b"cancel", "request_id: got 129 bytes"),
        (b"\xff", b"cancel", "request_id: got bytes that are not UTF-8"),
    ],
)
def test_control_refuses(control: Any, request_id: bytes, action: bytes, field: str) -> None:
    status, message = error_of(control.execute([_control(request_id, action)])[0])
    assert status == "INVALID_ARG" and message.startswith(field) and len(message) < 200


def _control(request_id: bytes, action: bytes) -> InferenceRequest:
    values = {"request_id": request_id, "action": action}
    return InferenceRequest({n: np.array([v], dtype=object) for n, v in values.items()})


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_arrays_are_handed_over_as_they_read(serving: dict[str, Any]) -> None:
    """Triton takes the buffer, not the strides; and the contract's dtype, not the caller's."""
    view = np.arange(12, dtype=np.int32).reshape(1, 12)[:, ::-2]
    values = {"images": [[b"file"]], "seeds": view, "timings": [[b"{}"]], "image_size": [(64, 96)]}
    out = outputs(serving["tensors"].response(contract.GENERATE, values))
    assert np.array_equal(out["seeds"], view) and out["seeds"].dtype == np.int64
    assert (out["images"].tolist(), out["image_size"].dtype) == ([[b"file"]], np.int32)


# --- the border's errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "head"),
    [
        (errors.InvalidRequest("a", "b", "c"), "INVALID_ARG", "a: got b"),
        (errors.ShapeError("s"), "INVALID_ARG", "s"),
        (errors.QueueFull(3, 2), "UNAVAILABLE", "queue: 3"),
        (errors.Draining(), "UNAVAILABLE", "server: it is"),
        (errors.RequestIdInUse("r", "queued"), "ALREADY_EXISTS", "[ALREADY_EXISTS] request_id: 'r'"),
        (errors.Cancelled("r", 1, 2), "CANCELLED", "[CANCELLED] request 'r' was cancelled at step 1 of 2"),
        (errors.EngineError("e"), "INTERNAL", "internal error: EngineError: e"),
        (ZeroDivisionError("z"), "INTERNAL", "internal error: ZeroDivisionError: z"),
    ],
)
def test_codes(serving: dict[str, Any], error: Exception, code: str, head: str) -> None:
    status, message = error_of(serving["errors"].response(error))
    assert status == code and message.startswith(head)
    assert bool(Logger.lines) == (code == "INTERNAL"), "what the caller did is no news for the log"
