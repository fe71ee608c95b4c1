"""Jobs: how they are planned and cross, and what `generate` checks of one that nobody planned."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fluxserve.errors import InvalidRequest
from fluxserve.families import registry
from fluxserve.families.flux import tokens
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders import checkpoint
from fluxserve.job import Array, Job
from fluxserve.job import parse as job_of
from fluxserve.media.images import write_image
from fluxserve.pipeline import Pipeline
from fluxserve.sampling import schedule
from fluxserve.settings import default_checkpoint
from fluxserve.text import Tokenizers
from tests.support import random_flux, random_flux2, threads
from tests.support.jobs import changed, check

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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads.one():
        yield


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    pipeline = Pipeline(FLUX().spec, FLUX().components())
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return Tokenizers(checkpoint.read(default_checkpoint()))


def planned(tokenizers: Tokenizers, steps: int = 8, strength: float | None = None, side: int = 64) -> Job:
    spec = replace(FLUX().spec, text=FLUX().spec.text.changed("t5", tokens=32))
    fields = {"prompt": b"a fox", "height": side, "width": side, "num_inference_steps": steps, "guidance_scale": 3.5}
    fields |= {"seed": 40, "num_images": 2}
    fields |= {"image": [write_image(IMAGE, "png", 90)], "strength": strength} if strength is not None else {}
    return registry.plan(fields, spec, tokenizers)


def test_plan(tokenizers: Tokenizers) -> None:
    job = planned(tokenizers)
    assert (job.height, job.width, job.steps, job["guidance"].tolist(), job.seeds) == (64, 64, 8, [3.5], (40, 41))
    assert set(job.arrays) == {"ids.clip", "ids.t5", "guidance"}
    assert np.array_equal(job.sigmas, schedule.sigmas(8, 16, FLUX().spec.schedule))
    assert np.array_equal(job["ids.clip"], tokenizers("a fox")["clip"].ids)
    assert np.array_equal(job["ids.t5"], tokenizers("a fox")["t5"].ids)


@pytest.mark.parametrize(
    ("strength", "steps"), [(1.0, 8), (0.999, 8), (0.75, 6), (0.5, 4), (0.126, 2), (0.125, 1), (1e-9, 1), (1e-30, 1)]
)
def test_plan_with_an_image(tokenizers: Tokenizers, strength: float, steps: int) -> None:
    job = planned(tokenizers, strength=strength)
    assert job.steps == steps, "at least one step runs"
    assert np.array_equal(job.sigmas, schedule.sigmas(8, 16, FLUX().spec.schedule)[-steps - 1 :])
    assert np.array_equal(job["image"], IMAGE)


def test_the_image_is_scaled_to_the_size(tokenizers: Tokenizers) -> None:
    job = planned(tokenizers, strength=0.5, side=96)
    assert job["image"].shape == (96, 96, 3)


def test_likeness(tokenizers: Tokenizers) -> None:
    job = planned(tokenizers)
    other = {"guidance": np.array([1.0], np.float32), "ids.clip": job["ids.clip"] + 1}
    assert job.likeness == changed(job, other, seeds=(9,)).likeness
    others = [
        planned(tokenizers, steps=7),
        planned(tokenizers, side=96),
        planned(tokenizers, strength=1.0),
        replace(job, sigmas=job.sigmas**2),
        changed(job, {"ids.t5": job["ids.t5"][:-1]}),
        changed(job, {"ids.clip": job["ids.clip"][:-1]}),
    ]
    assert len({j.likeness for j in [job, *others]}) == 7


def test_strength_decides_how_much_of_the_image_stays(pipeline: Pipeline) -> None:
    """Right after the start: the image's own latents at sigma 0, the noise alone at sigma 1, in between a mixture."""
    base = changed(a_job(), {"image": IMAGE})
    with torch.inference_mode():

        def start(sigma: float) -> torch.Tensor:
            job = replace(base, sigmas=np.array([sigma, 0.0], np.float32))
            return next(pipeline.denoise([(job, 7, pipeline.encode(job))]))

        clean, noise, half = start(0.0), start(1.0), start(0.5)
    torch.testing.assert_close(half, (clean + noise) / 2)
    generator = torch.Generator().manual_seed(7)
    torch.randn((1, 16, 8, 8), generator=generator)
    assert torch.equal(noise, tokens.pack(torch.randn((1, 16, 8, 8), generator=generator))), (
        "the generator's second draw"
    )


# --- what `generate` checks of a job that nobody planned -------------------------------------------------------------


def klein_job(arrays: Mapping[str, Array | None] | None = None) -> tuple[FluxSpec, Job]:
    own = {"ids.qwen3": np.zeros(64, np.int64), "mask.qwen3": np.ones(64, np.int64)}
    job = Job(64, 64, (0,), np.array([1, 0], np.float32), {**own, "guidance": np.ones(1, np.float32)})
    return random_flux2.klein().checkpoint(64).spec, changed(job, arrays or {})


@pytest.mark.parametrize("mask", [np.zeros(64), np.ones(63), np.full(64, 2), np.empty(0)], ids=str)
def test_a_mask_that_can_not_be(mask: np.ndarray) -> None:
    spec, good = klein_job()
    check(good, spec)
    with pytest.raises(InvalidRequest, match=r"mask\.qwen3"):
        check(changed(good, {"mask.qwen3": mask.astype(np.int64)}), spec)


def test_a_klein_redraws_no_image() -> None:
    spec, job = klein_job({"image": IMAGE})
    with pytest.raises(InvalidRequest, match="an array 'image'"):
        check(job, spec)


def numbered(sizes: Sequence[tuple[int, int]]) -> dict[str, Array | None]:
    return {f"references.{index}": np.zeros((*size, 3), np.uint8) for index, size in enumerate(sizes)}


@pytest.mark.parametrize("sizes", [[(64, 64)] * 5, [(48, 64)], [(64, 72)], [(64, 64), (1040, 1024)]], ids=str)
def test_references_that_prepare_would_not_send(sizes: list[tuple[int, int]]) -> None:
    spec, job = klein_job(numbered(sizes))
    with pytest.raises(InvalidRequest, match="references"):
        check(job, spec)
    check(klein_job(numbered([(64, 2880)]))[1], spec)


@pytest.mark.parametrize("names", [["1"], ["0", "2"], ["0", "x"], ["0", "4"]], ids=str)
def test_references_are_numbered_without_gaps(names: list[str]) -> None:
    spec, job = klein_job({f"references.{name}": IMAGE for name in names})
    with pytest.raises(InvalidRequest, match=rf"an array 'references\.{names[-1]}'"):
        check(job, spec)


def test_flux1_draws_after_no_reference() -> None:
    with pytest.raises(InvalidRequest, match=r"an array 'references\.0'"):
        check(changed(a_job(), {"references.0": IMAGE}), FLUX().spec)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids.t5": None}, r"job: got no ids\.t5"),
        ({"ids.t5": np.zeros(512, np.int32)}, r"ids\.t5: got int32 \[512\]"),
        ({"ids.t5": np.full(512, 2**40)}, r"ids\.t5: got 512 ids"),
        ({"ids.t5": np.full(513, 1)}, r"ids\.t5: got 513 ids"),
        ({"guidance": np.empty(0, np.float32)}, r"guidance: got float32 \[0\]"),
        ({"guidance": np.array([np.nan], np.float32)}, "guidance: got nan"),
        ({"image": IMAGE[:32]}, r"image: got \[32, 64, 3\]"),
        ({"more": IMAGE}, "job: got an array 'more'"),
    ],
)
def test_arrays_that_prepare_would_not_send(arrays: dict[str, Array | None], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check(changed(a_job(), arrays), FLUX().spec)


SCALE = np.array([4.0], np.float32)
NEGATIVE = {"negative.ids.clip": np.zeros(77, np.int64), "negative.ids.t5": np.zeros(24, np.int64)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"cfg_scale": SCALE}, r"job: got no negative\.ids\.clip, negative\.ids\.t5"),
        ({**NEGATIVE}, "job: got an array 'negative.ids.clip'"),
        ({**NEGATIVE, "cfg_scale": SCALE, "negative.ids.t5": np.full(512, -1)}, r"negative\.ids\.t5: got 512 ids"),
        ({**NEGATIVE, "cfg_scale": SCALE, "negative.ids.t5": np.zeros(9, np.int64)}, r"negative\.ids\.t5: got 9 ids"),
        ({**NEGATIVE, "cfg_scale": SCALE * 0}, "cfg_scale: got 0.0"),
        ({**NEGATIVE, "cfg_scale": SCALE * np.nan}, "cfg_scale: got nan"),
        ({**NEGATIVE, "cfg_scale": SCALE.repeat(2)}, "cfg_scale: got 4.0, 4.0; allowed: one number"),
        ({**NEGATIVE, "cfg_scale": SCALE.astype(np.float64)}, "cfg_scale: got float64"),
        ({"guidance": SCALE.repeat(2)}, "guidance: got 4.0, 4.0; allowed: one number"),
    ],
)
def test_guidance_that_prepare_would_not_send(arrays: dict[str, Array | None], message: str) -> None:
    check(changed(a_job(), {**NEGATIVE, "cfg_scale": SCALE}), FLUX().spec)
    with pytest.raises(InvalidRequest, match=message):
        check(changed(a_job(), arrays), FLUX().spec)


def test_a_klein_takes_one_pass() -> None:
    spec, job = klein_job({"cfg_scale": SCALE})
    with pytest.raises(InvalidRequest, match="cfg_scale: got an array; allowed: nothing"):
        check(job, spec)


@pytest.mark.parametrize("sizes", [[], [(64, 80)], [(64, 64), (80, 96), (64, 64)]], ids=str)
def test_a_job_crosses_as_it_is(sizes: list[tuple[int, int]]) -> None:
    job = klein_job(numbered(sizes))[1]
    came, numbers = job_of(job.dump(ticket=2**62, quality=90), ("ticket", "quality"))
    assert numbers == {"ticket": 2**62, "quality": 90}
    assert (came.height, came.width, came.seeds, came.likeness) == (job.height, job.width, job.seeds, job.likeness)
    assert all(np.array_equal(came[name], array) for name, array in job.arrays.items())


def test_jobs_of_one_likeness_are_as_long() -> None:
    """What Triton batches by."""
    jobs = [a_job((seed,), prompt=prompt) for seed, prompt in ((1, 5), (2**62, 9))]
    assert len({len(job.dump(ticket=ticket)) for job in jobs for ticket in (0, 2**62)}) == 1
    assert len(a_job((1, 2)).dump(ticket=0)) != len(jobs[0].dump(ticket=0))


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (b"", "job: got 0 bytes"),
        (b"\xff" * 64, "job: got 64 bytes"),
        (a_job().dump()[:-1], "job: got"),
        (a_job().dump(quality=1), "job: got arrays"),
        (a_job().dump(ticket=1, more=2), "job: got arrays"),
        (replace(a_job(), sigmas=np.ones((2, 2), np.float32)).dump(ticket=1), "job: sigmas: got float32"),
    ],
    ids=["empty", "noise", "cut", "another number", "one more", "another rank"],
)
def test_bytes_that_are_no_job(wire: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        job_of(wire, ("ticket",))


def test_references_of_other_sizes_are_not_alike() -> None:
    sizes = [(64, 80), (80, 64)]
    jobs = [klein_job(numbered(chosen))[1] for chosen in ([], sizes[:1], sizes[1:], sizes, sizes[::-1])]
    assert len({job.likeness for job in jobs}) == 5
