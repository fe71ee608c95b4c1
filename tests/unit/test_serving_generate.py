"""serving/generate against a stand-in for Triton: unlike jobs in one batch, errors, cancellation, slots, metrics."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluxserve import contract
from fluxserve.serving.inflight import NO_TICKET, InflightTable
from tests.support.fake_triton import InferenceRequest, Logger, answers, counted, error_of, installed, outputs

STEPS = 3


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
    model = serving["generate"].GenerateModel()
    parameters = {n: {"string_value": v} for n, v in (("inflight", str(table.path)), ("threads", "1"))}
    config = json.dumps({"parameters": parameters})
    model.initialize({"model_config": config, "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    yield model
    model.finalize()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_is_left(table: InflightTable) -> Iterator[None]:
    """Whatever a test does to `generate`, its slots come back."""
    Logger.lines.clear()
    yield
    assert table.live() == 0


def job(
    ticket: int = NO_TICKET,
    seeds: tuple[int, ...] = (1,),
    size: tuple[int, int] = (64, 64),
    steps: int = STEPS,
    request_id: str = "",
    cancelled_after: int | None = None,
    **changed: Any,
) -> InferenceRequest:
    values = {
        "token_ids": np.full((1, 77), 5, np.int64),
        "token_ids_2": np.full((1, 32), 5, np.int64),
        "token_mask": np.empty((1, 0), np.int64),
        "references": np.empty((1, 0), np.uint8),
        "reference_sizes": np.empty((1, 0, 2), np.int32),
        "pixels": np.zeros((1, *size, 0), np.uint8),
        "sigmas": np.linspace(1, 0, steps + 1, dtype=np.float32)[None],
        "guidance": np.full((1, 1), 3.0, np.float32),
        "noise_seeds": np.array([seeds]),
        "ticket": np.array([[ticket]]),
    }
    return InferenceRequest({**values, **changed}, request_id, cancelled_after)


def images(response: Any) -> np.ndarray:
    return outputs(response)["pixels_out"]


def spent(metric: str, **labels: str) -> float:
    return counted(f"fluxserve_{metric}", **labels)


def test_what_generate_gives_is_its_contract(generate: Any, table: InflightTable) -> None:
    before = {m: spent(f"{m}_total") for m in ("images", "pixels", "steps")}
    (response,) = answers(generate, [job(table.claim("r"), seeds=(1, 2), size=(64, 96), request_id="r")])
    out = outputs(response)
    assert list(out) == [t.name for t in contract.GENERATE.outputs]
    assert out["pixels_out"].shape == (1, 2, 64, 96, 3) and out["pixels_out"].dtype == np.uint8
    timings = json.loads(out["stage_timings"][0, 0])
    assert list(timings) == ["queue", "encode", "denoise", "decode", "total"]
    assert timings["total"] == pytest.approx(timings["encode"] + timings["denoise"] + timings["decode"])
    after = {m: spent(f"{m}_total") for m in before}
    assert {m: after[m] - before[m] for m in after} == {"images": 2, "pixels": 2 * 64 * 96, "steps": 2 * STEPS}
    assert spent("stage_seconds", stage="denoise") >= timings["denoise"] / 1000


def test_a_warm_up_is_not_counted_as_an_image(generate: Any) -> None:
    before = spent("images_total")
    assert images(answers(generate, [job()])[0]).shape == (1, 1, 64, 64, 3)
    assert spent("images_total") == before


def test_unlike_jobs_in_one_batch(generate: Any, table: InflightTable) -> None:
    """Triton's shapes leave the schedule open; each job gets what it gets alone, in the order of the requests."""
    other = np.linspace(1, 0, STEPS + 1, dtype=np.float32)[None] ** 2
    batch = [{"seeds": (1,)}, {"seeds": (2,), "sigmas": other}, {"seeds": (3,)}, {"seeds": (1,), "sigmas": other}]
    alone = [images(answers(generate, [job(**b)])[0]) for b in batch]  # type: ignore[arg-type]
    together = answers(generate, [job(table.claim(str(k)), **b) for k, b in enumerate(batch)])  # type: ignore[arg-type]
    assert all(np.array_equal(a, images(t)) for a, t in zip(alone, together, strict=True))
    assert len({a.tobytes() for a in alone}) == 4


def test_a_stale_ticket_among_good_ones(generate: Any, table: InflightTable) -> None:
    stale = table.claim("stale")
    table.release(stale)
    before = spent("cancellations_total")
    good, bad, also = answers(generate, [job(table.claim("a")), job(stale), job(table.claim("b"), seeds=(2,))])
    assert error_of(bad)[0] == "CANCELLED"
    assert not good.has_error() and not also.has_error()
    assert spent("cancellations_total") == before + 1


def test_a_request_cancelled_while_it_waited_is_not_drawn(generate: Any, table: InflightTable) -> None:
    ticket, steps = table.claim("gone"), spent("steps_total")
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
        [job(table.claim("out"), (1, 2), request_id="out"), job(table.claim("stay"), (5, 6), request_id="stay")],
    )
    assert error_of(out) == ("CANCELLED", f"[CANCELLED] request 'out' was cancelled at step 2 of {2 * STEPS}")
    assert np.array_equal(images(stay), images(answers(generate, [job(seeds=(5, 6))])[0]))
    assert (spent("cancellations_total"), spent("images_total")) == (before[0] + 1, before[1] + 2)


def test_a_caller_that_hangs_up(generate: Any, table: InflightTable) -> None:
    steps = spent("steps_total")
    (response,) = answers(generate, [job(table.claim("r"), steps=50, request_id="r", cancelled_after=4)])
    assert error_of(response)[0] == "CANCELLED"
    assert spent("steps_total") - steps == 5


def test_a_caller_without_a_ticket_that_hangs_up(generate: Any, table: InflightTable) -> None:
    neighbour = table.claim("neighbour")
    table.start(neighbour, 77)
    try:
        (response,) = answers(generate, [job(request_id="r", cancelled_after=0)])
        assert error_of(response)[0] == "CANCELLED"
        assert "of 77" not in error_of(response)[1], "that is somebody else's request"
    finally:
        table.release(neighbour)


def test_an_exception_releases_the_slots(generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(generate._pipeline, "draw", fail)
    responses = answers(generate, [job(table.claim("a")), job(table.claim("b"), steps=2)])
    assert [error_of(r) for r in responses] == [("INTERNAL", "internal error: RuntimeError: out of memory")] * 2
    assert "out of memory" in Logger.lines[0]


def test_one_groups_exception_leaves_the_others(
    generate: Any, table: InflightTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw: Callable[..., Any] = generate._pipeline.draw

    def fail_for_two_steps(jobs: Any, watch: Any) -> Any:
        if jobs[0].steps == 2:
            raise RuntimeError("a bad schedule")
        return draw(jobs, watch)

    monkeypatch.setattr(generate._pipeline, "draw", fail_for_two_steps)
    bad, good = answers(generate, [job(table.claim("a"), steps=2), job(table.claim("b"))])
    assert error_of(bad)[0] == "INTERNAL"
    assert images(good).shape == (1, 1, 64, 64, 3)


@pytest.mark.parametrize("size", [(16, 16), (1024, 64), (64, 528)])
def test_a_size_outside_the_limits_never_reaches_the_loop(generate: Any, size: tuple[int, int]) -> None:
    steps = spent("steps_total")
    (response,) = answers(generate, [job(size=size, steps=1)])
    assert error_of(response)[0] == "INVALID_ARG"
    assert spent("steps_total") == steps


def test_the_worker_is_known(generate: Any, table: InflightTable) -> None:
    assert table.processes("generate") == [os.getpid()]


def test_an_unusable_checkpoint_fails_while_loading(serving: dict[str, Any], tmp_path: Path) -> None:
    given = {"checkpoint": tmp_path / "nowhere", "inflight": tmp_path / "table"}
    parameters = {name: {"string_value": str(value)} for name, value in given.items()}
    args = {"model_config": json.dumps({"parameters": parameters}), "model_instance_kind": "CPU"}
    with pytest.raises(Exception, match="nowhere: no such folder"):
        serving["generate"].GenerateModel().initialize(args)
