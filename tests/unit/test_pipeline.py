"""pipeline.Pipeline beside the parity with diffusers: cancellation, chunks of rows, bounds, what is not finite."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fluxserve.engine import Bound, Shapes
from fluxserve.errors import NotFinite
from fluxserve.job import Job
from fluxserve.pipeline import _BOUNDS_KEPT, Pipeline
from fluxserve.sampling import schedule
from tests.support import random_flux, threads

STEPS = 4
FLUX = random_flux.make
IMAGE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def a_job(seeds: tuple[int, ...] = (0,), steps: int = STEPS, prompt: int = 5, side: int = 64) -> Job:
    spec = FLUX().spec
    clip_ids = np.full(spec.text.named("clip").tokens, random_flux.VOCABULARY - 1)
    clip_ids[:8] = prompt
    sigmas = schedule.sigmas(steps, spec.image_tokens(side, side), spec.schedule)
    t5_ids = np.full(spec.text.sequence.tokens, prompt)
    arrays = {"ids.clip": clip_ids, "ids.t5": t5_ids, "guidance": np.array([3.5], np.float32)}
    return Job(side, side, seeds, sigmas, arrays)


class Runs:
    """Stands before an engine and notes the rows of each pass."""

    def __init__(self, engine: object) -> None:
        self._engine, self.rows, self.bound = engine, list[int](), 0
        self.signature = engine.signature  # type: ignore[attr-defined]

    def bind(self, shapes: Shapes) -> Bound:
        self.bound += 1
        bound = self._engine.bind(shapes)  # type: ignore[attr-defined]
        run: Callable[[], None] = bound.run

        def noted() -> None:
            self.rows.append(next(iter(bound.inputs.values())).shape[0])
            run()

        bound.run = noted
        return bound  # type: ignore[no-any-return]

    def close(self) -> None:
        self._engine.close()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads.one():
        yield


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    pipeline = Pipeline(FLUX().spec, FLUX().components())
    yield pipeline
    pipeline.close()


class StepCount:
    """Counts the steps of every job; calls job k off after `off[k]` of them."""

    def __init__(self, **off: int) -> None:
        self.steps: Counter[int] = Counter()
        self._off = {int(name.removeprefix("job")): steps for name, steps in off.items()}

    def __call__(self, job: int) -> bool:
        self.steps[job] += 1
        return self.steps[job] < self._off.get(job, 10**9)


def test_every_step_of_every_image_is_told(pipeline: Pipeline) -> None:
    count = StepCount()
    drawings = pipeline.draw([a_job((1, 2, 3)), a_job((4,))], count)
    assert count.steps == {0: 3 * STEPS, 1: STEPS}
    assert [d.images.shape for d in drawings if d] == [(3, 64, 64, 3), (1, 64, 64, 3)]


@pytest.mark.parametrize("off", [1, 2, STEPS])
@pytest.mark.parametrize("max_rows", [1, 2])
def test_jobs_that_are_called_off_stop_within_a_step(off: int, max_rows: int) -> None:
    transformer, decoder = Runs(FLUX().components().network), Runs(FLUX().components().vae_decoder)
    components = FLUX().components().replacing(transformer=transformer, vae_decoder=decoder)
    jobs = [a_job((k,)) for k in range(max_rows)]
    count = StepCount(job0=off, job1=off)
    assert Pipeline(FLUX().spec, components, max_rows=max_rows).draw(jobs, count) == [None] * max_rows
    assert set(count.steps.values()) == {off}
    assert transformer.rows == [max_rows] * off, "not another step"
    assert decoder.rows == []


def test_the_images_after_the_one_that_is_called_off_are_not_begun() -> None:
    transformer = Runs(FLUX().components().network)
    count = StepCount(job0=2)
    pipeline = Pipeline(FLUX().spec, FLUX().components().replacing(transformer=transformer))
    assert pipeline.draw([a_job((1, 2, 3))], count) == [None]
    assert count.steps == {0: 2} and transformer.rows == [1, 1]


@pytest.mark.parametrize("max_rows", [2, 3])
def test_every_image_of_a_chunk_is_told(max_rows: int) -> None:
    """`generate` announces steps x images; with fewer calls a request would end at step 4 of 12."""
    count = StepCount()
    Pipeline(FLUX().spec, FLUX().components(), max_rows=max_rows).draw([a_job((1, 2, 3))], count)
    assert count.steps == {0: 3 * STEPS}


def test_between_two_images(pipeline: Pipeline) -> None:
    count = StepCount(job0=STEPS + 1)
    assert pipeline.draw([a_job((1, 2, 3))], count) == [None]
    assert count.steps == {0: STEPS + 1}


def test_its_neighbours_are_drawn_all_the_same(pipeline: Pipeline) -> None:
    count = StepCount(job1=2)
    first, out, last = pipeline.draw([a_job((1,)), a_job((2,)), a_job((3,), prompt=9)], count)
    assert out is None and count.steps == {0: STEPS, 1: 2, 2: STEPS}
    (alone,) = pipeline.draw([a_job((3,), prompt=9)])
    assert first and last and alone and np.array_equal(last.images, alone.images)


def test_rows_that_run_together_stop_when_nobody_wants_any(pipeline: Pipeline) -> None:
    together = Pipeline(FLUX().spec, FLUX().components(), max_rows=2)
    count = StepCount(job0=1, job1=3)
    assert together.draw([a_job((1,)), a_job((2,))], count) == [None, None]
    assert count.steps == {0: 1, 1: 3}, "who left is not asked again"


@pytest.mark.parametrize(("max_rows", "chunks"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (8, [5])])
def test_chunks(max_rows: int, chunks: list[int]) -> None:
    components = FLUX().components()
    transformer, decoder = Runs(components.network), Runs(components.vae_decoder)
    components = components.replacing(transformer=transformer, vae_decoder=decoder)
    drawings = Pipeline(FLUX().spec, components, max_rows=max_rows).draw([a_job((1, 2, 3)), a_job((4, 5), prompt=7)])
    assert transformer.rows == [rows for rows in chunks for _ in range(STEPS)]
    assert decoder.rows == chunks
    assert [len(d.images) for d in drawings if d] == [3, 2]


def test_bounds_are_kept_and_no_more_than_a_few() -> None:
    decoder = Runs(FLUX().components().vae_decoder)
    pipeline = Pipeline(FLUX().spec, FLUX().components().replacing(vae_decoder=decoder))
    spec = pipeline.spec

    def decode(rows: int) -> None:
        pipeline._bind(decoder, {"latents": (rows, spec.vae.latent_channels, 8, 8)})

    for rows in range(1, _BOUNDS_KEPT + 1):
        decode(rows)
    assert decoder.bound == len(pipeline._bounds) == _BOUNDS_KEPT
    decode(1)
    assert decoder.bound == _BOUNDS_KEPT, "it was kept"
    decode(_BOUNDS_KEPT + 1)
    assert len(pipeline._bounds) == _BOUNDS_KEPT
    decode(1)
    assert decoder.bound == _BOUNDS_KEPT + 1, "used last: not the one to go"
    decode(2)
    assert decoder.bound == _BOUNDS_KEPT + 2, "longest unused: gone"


def test_unlike_jobs_are_our_own_mistake(pipeline: Pipeline) -> None:
    with pytest.raises(AssertionError, match="alike"):
        pipeline.draw([a_job(steps=2), a_job(steps=3)])


def test_timings(pipeline: Pipeline) -> None:
    first, second = pipeline.draw([a_job((1,)), a_job((2,))])
    assert first and second and first.timings == second.timings
    timings = first.timings
    assert list(timings) == ["encode", "denoise", "decode", "total"]
    assert timings["total"] == pytest.approx(sum(timings[s] for s in ("encode", "denoise", "decode")))
    assert all(spent > 0 for spent in timings.values())


def test_noise_does_not_depend_on_the_global_generator(pipeline: Pipeline) -> None:
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        (drawing,) = pipeline.draw([a_job((2**63 - 1,))])
        assert drawing
        drawn.append(drawing.images)
    assert np.array_equal(*drawn)


def test_conditionings_do_not_share_memory(pipeline: Pipeline) -> None:
    """Two prompts go through one bound; the first must survive the second."""
    with torch.inference_mode():
        (first,) = pipeline.encode(a_job(prompt=5)).states
        kept = {name: value.clone() for name, value in first.items()}
        pipeline.encode(a_job(prompt=9))
    assert set(kept) == {"pooled", "sequence"}
    assert all(torch.equal(first[name], value) for name, value in kept.items())


# --- pictures that are not finite ------------------------------------------------------------------------------------


class Spoils:
    """Stands before an engine and spoils an output of some of its runs."""

    def __init__(self, engine: Any, output: str, value: float, runs: tuple[int, ...]) -> None:
        self._engine, self._output, self._value, self._runs, self._count = engine, output, value, runs, 0
        self.signature = engine.signature

    def bind(self, shapes: Shapes) -> Bound:
        bound = self._engine.bind(shapes)
        run = bound.run

        def spoilt() -> None:
            run()
            if self._count in self._runs:
                bound.outputs[self._output].view(-1)[7] = self._value
            self._count += 1

        bound.run = spoilt
        return bound  # type: ignore[no-any-return]

    def close(self) -> None:
        self._engine.close()


SPOILT = [("transformer", "velocity"), ("vae_decoder", "pixels")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("component", "output"), SPOILT)
def test_a_picture_that_is_not_finite_is_never_given_out(component: str, output: str, value: float) -> None:
    spoils = Spoils(FLUX().components().by_name[component], output, value, runs=(1,))
    pipeline = Pipeline(FLUX().spec, FLUX().components().replacing(**{component: spoils}))
    jobs = [a_job((1,)), a_job((2, 3)), a_job((4,))]
    drawings = pipeline.draw(jobs)
    spoilt = 0 if component == "transformer" else 1  # the second step of the first image, or the second image
    for index, drawing in enumerate(drawings):
        assert drawing is not None and drawing.finite == (index != spoilt)
        if index == spoilt:
            with pytest.raises(NotFinite, match="NaN or infinity"):
                _ = drawing.images
        else:
            assert drawing.images.any(), "its neighbours are drawn"


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_what_conditions_a_picture_shows_in_it(name: str) -> None:
    output = {"clip": "pooled", "t5": "sequence"}[name]
    spoils = Spoils(FLUX().components().by_name[name], output, float("nan"), (0,))
    (drawing,) = Pipeline(FLUX().spec, FLUX().components().replacing(**{name: spoils})).draw([a_job((1,))])
    assert drawing is not None and not drawing.finite


@pytest.mark.parametrize(("component", "output"), [*SPOILT, ("vae_encoder", "mean")])
def test_a_model_that_draws_nan_does_not_become_ready(component: str, output: str) -> None:
    spoils = Spoils(FLUX().components().by_name[component], output, float("nan"), tuple(range(99)))
    with pytest.raises(NotFinite):
        Pipeline(FLUX().spec, FLUX().components().replacing(**{component: spoils})).warm_up()
