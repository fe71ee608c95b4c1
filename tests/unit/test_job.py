"""job.plan, what it plans drawn, and what `generate` checks of a job that nobody planned."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fluxserve.errors import InvalidRequest
from fluxserve.families.flux import tokens
from fluxserve.folders import checkpoint
from fluxserve.job import Job, join, plan, split
from fluxserve.media.images import read_image, write_image
from fluxserve.pipeline import Pipeline
from fluxserve.request import Request
from fluxserve.sampling import schedule
from fluxserve.settings import default_checkpoint
from fluxserve.spec import ModelSpec
from fluxserve.text import Tokenizers
from tests.support import random_flux, random_flux2, threads

STEPS = 4
FLUX = random_flux.make
IMAGE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def a_job(seeds: tuple[int, ...] = (0,), steps: int = STEPS, prompt: int = 5, side: int = 64) -> Job:
    spec = FLUX().spec
    clip_ids = np.full(spec.text.named("clip").tokens, random_flux.VOCABULARY - 1)
    clip_ids[:8] = prompt
    sigmas = schedule.sigmas(steps, spec.image_tokens(side, side), spec.schedule)
    t5_ids = np.full(spec.text.sequence.tokens, prompt)
    return Job(clip_ids, t5_ids, np.empty((side, side, 0), np.uint8), sigmas, 3.5, seeds)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads.one():
        yield


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    pipeline = Pipeline(FLUX().spec, FLUX().components())
    yield pipeline
    pipeline.close()


# --- job.plan, and drawing what it plans -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return Tokenizers(checkpoint.read(default_checkpoint()))


def planned(tokenizers: Tokenizers, steps: int = 8, strength: float | None = None, side: int = 64) -> Job:
    spec = replace(FLUX().spec, text=FLUX().spec.text.changed("t5", tokens=32))
    images = (read_image(write_image(IMAGE, "png", 90), spec.limits),) if strength is not None else ()
    request = Request("a fox", side, side, steps, 3.5, 40, 2, images, strength, "png", 90, "binary")
    return plan(request, spec, tokenizers)


def test_plan(tokenizers: Tokenizers) -> None:
    job = planned(tokenizers)
    assert (job.height, job.width, job.steps, job.guidance, job.noise_seeds) == (64, 64, 8, 3.5, (40, 41))
    assert not job.is_image_to_image and job.pixels.nbytes == 0
    assert np.array_equal(job.sigmas, schedule.sigmas(8, 16, FLUX().spec.schedule))
    assert np.array_equal(job.token_ids, tokenizers("a fox")["clip"].ids)
    assert np.array_equal(job.token_ids_2, tokenizers("a fox")["t5"].ids)


@pytest.mark.parametrize(
    ("strength", "steps"), [(1.0, 8), (0.999, 8), (0.75, 6), (0.5, 4), (0.126, 2), (0.125, 1), (1e-9, 1), (1e-30, 1)]
)
def test_plan_with_an_image(tokenizers: Tokenizers, strength: float, steps: int) -> None:
    job = planned(tokenizers, strength=strength)
    assert job.steps == steps, "at least one step runs"
    assert np.array_equal(job.sigmas, schedule.sigmas(8, 16, FLUX().spec.schedule)[-steps - 1 :])
    assert job.is_image_to_image and np.array_equal(job.pixels, IMAGE)


def test_the_image_is_scaled_to_the_size(tokenizers: Tokenizers) -> None:
    job = planned(tokenizers, strength=0.5, side=96)
    assert job.pixels.shape == (96, 96, 3)


def test_likeness(tokenizers: Tokenizers) -> None:
    job = planned(tokenizers)
    assert job.likeness == replace(job, guidance=1.0, noise_seeds=(9,), token_ids=job.token_ids + 1).likeness
    others = [
        planned(tokenizers, steps=7),
        planned(tokenizers, side=96),
        planned(tokenizers, strength=1.0),
        replace(job, sigmas=job.sigmas**2),
        replace(job, token_ids_2=job.token_ids_2[:-1]),
        replace(job, token_ids=job.token_ids[:-1]),
    ]
    assert len({j.likeness for j in [job, *others]}) == 7


def test_strength_decides_how_much_of_the_image_stays(pipeline: Pipeline) -> None:
    """Right after the start: the image's own latents at sigma 0, the noise alone at sigma 1, in between a mixture."""
    base = replace(a_job(), pixels=IMAGE)
    with torch.inference_mode():

        def start(sigma: float) -> torch.Tensor:
            return pipeline.start(replace(base, sigmas=np.array([sigma, 0.0], np.float32)), seed=7)

        clean, noise, half = start(0.0), start(1.0), start(0.5)
    torch.testing.assert_close(half, (clean + noise) / 2)
    generator = torch.Generator().manual_seed(7)
    torch.randn((1, 16, 8, 8), generator=generator)
    assert torch.equal(noise, tokens.pack(torch.randn((1, 16, 8, 8), generator=generator))), (
        "the generator's second draw"
    )


# --- what `generate` checks of a job that nobody planned -------------------------------------------------------------


def klein_job(**changed: Any) -> tuple[ModelSpec, Job]:
    blank, ids = np.empty((64, 64, 0), np.uint8), np.zeros(64, np.int64)
    job = Job(ids, ids[:0], blank, np.array([1, 0], np.float32), 1.0, (0,), token_mask=np.ones(64, np.int64))
    return random_flux2.klein().checkpoint(64).spec, replace(job, **changed)


@pytest.mark.parametrize("mask", [np.zeros(64), np.ones(63), np.full(64, 2), np.empty(0)], ids=str)
def test_a_mask_that_can_not_be(mask: np.ndarray) -> None:
    spec, good = klein_job()
    good.check(spec)
    with pytest.raises(InvalidRequest, match="token_mask"):
        replace(good, token_mask=mask.astype(np.int64)).check(spec)


def test_a_klein_redraws_no_image() -> None:
    spec, job = klein_job(pixels=IMAGE)
    with pytest.raises(InvalidRequest, match="pixels of 0 channels"):
        job.check(spec)


@pytest.mark.parametrize("sizes", [[(64, 64)] * 5, [(48, 64)], [(64, 72)], [(64, 64), (1040, 1024)]], ids=str)
def test_references_that_prepare_would_not_send(sizes: list[tuple[int, int]]) -> None:
    spec, job = klein_job(references=tuple(np.zeros((*size, 3), np.uint8) for size in sizes))
    with pytest.raises(InvalidRequest, match="references"):
        job.check(spec)
    klein_job(references=(np.zeros((64, 2880, 3), np.uint8),))[1].check(spec)


def test_flux1_draws_after_no_reference() -> None:
    with pytest.raises(InvalidRequest, match=r"references: got 1; allowed: at most 0"):
        replace(a_job(), references=(IMAGE,)).check(FLUX().spec)


@pytest.mark.parametrize("sizes", [[], [(64, 80)], [(64, 64), (80, 96), (64, 64)]], ids=str)
def test_references_cross_as_two_arrays(sizes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    sent = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    pixels, shapes = join(sent)
    assert (pixels.dtype, shapes.dtype, shapes.shape) == (np.uint8, np.int32, (len(sizes), 2))
    came = split(pixels, shapes)
    assert len(came) == len(sent) and all(map(np.array_equal, came, sent))


@pytest.mark.parametrize("sizes", [[(64, 64)], [(-64, -64)], [(64, -64), (64, 64)], [(0, 64)], [(2**31 - 1,) * 2], []])
def test_references_whose_bytes_do_not_add_up(sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(InvalidRequest, match="references: got 100 bytes"):
        split(np.zeros(100, np.uint8), np.array(sizes, np.int32).reshape(-1, 2))


def test_references_of_other_sizes_are_not_alike() -> None:
    images = [np.zeros((*size, 3), np.uint8) for size in ((64, 80), (80, 64))]
    jobs = [klein_job(references=tuple(chosen))[1] for chosen in ([], images[:1], images[1:], images, images[::-1])]
    assert len({job.likeness for job in jobs}) == 5
