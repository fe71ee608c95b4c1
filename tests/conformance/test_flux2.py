"""FLUX.2 from a folder and a prompt, judged by diffusers as FLUX.1 is: latents after every step, and images."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fluxserve.engines.open import open_components
from fluxserve.families import registry
from fluxserve.families.flux import tokens
from fluxserve.families.flux.models import FLUX2_DEV_TURBO
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.job import Job
from fluxserve.media.images import write_image
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers
from tests.support import parity, random_flux2
from tests.support.jobs import changed, check
from tests.support.parity import RELATIVE, relative
from tests.support.random_flux2 import TOKENS, RandomFlux2

pytestmark = pytest.mark.xdist_group("klein")

PROMPT = "a fox on a blue background"


def opened(flux: RandomFlux2, tokens: int = TOKENS, max_rows: int = 1, model: FluxSpec | None = None) -> Pipeline:
    folder = flux.checkpoint(tokens, model)
    return Pipeline(folder.spec, open_components("torch_eager", folder, "cpu", "float32"), max_rows=max_rows)


def job_of(
    flux: RandomFlux2,
    size: tuple[int, int] | None = (64, 64),
    steps: int | None = 4,
    seeds: Sequence[int] = (0,),
    prompt: str = PROMPT,
    tokens: int = TOKENS,
    images: Sequence[np.ndarray] = (),
    model: FluxSpec | None = None,
    **more: object,
) -> Job:
    """As `prepare` makes it."""
    folder = flux.checkpoint(tokens, model)
    fields: dict[str, object] = {"num_images": len(seeds), "seed": seeds[0], **more}
    fields |= {"num_inference_steps": steps} if steps else {}
    fields |= {"height": size[0], "width": size[1]} if size else {}
    fields |= {"image": [write_image(image, "png", 90) for image in images]} if images else {}
    planned = registry.plan({**fields, "prompt": prompt.encode()}, folder.spec, Tokenizers(folder))
    job = replace(planned, seeds=tuple(seeds))
    check(job, folder.spec)
    return job


def encoder_of(job: Job) -> str:
    (name,) = (name.removeprefix("ids.") for name in job.arrays if name.startswith("ids."))
    return name


def ids_of(job: Job) -> np.ndarray:
    return job[f"ids.{encoder_of(job)}"]


def mask_of(job: Job) -> np.ndarray:
    return job[f"mask.{encoder_of(job)}"]


def guidance_of(job: Job) -> float:
    return float(job["guidance"][0])


def their_run(
    flux: RandomFlux2,
    job: Job,
    steps: int,
    prompt: str = PROMPT,
    tokens: int = TOKENS,
    images: Sequence[np.ndarray] = (),
    size: tuple[int, int] | None = (64, 64),
    sigmas: Sequence[float] = (),
    negative: str = "",
) -> tuple[list[torch.Tensor], np.ndarray]:
    """diffusers' pipeline from the prompt: latents after every step, images [n, h, w, 3]."""
    seen: list[torch.Tensor] = []
    given = {"sigmas": list(sigmas)} if sigmas else {}
    if negative:
        embedded, _ = flux.pipe.encode_prompt(
            negative, num_images_per_prompt=len(job.seeds), max_sequence_length=tokens
        )
        given["negative_prompt_embeds"] = embedded
    drawn = flux.pipe(
        prompt=prompt,
        image=[Image.fromarray(image) for image in images] or None,
        height=job.height if size else None,
        width=job.width if size else None,
        num_inference_steps=steps,
        guidance_scale=guidance_of(job),
        num_images_per_prompt=len(job.seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in job.seeds],
        max_sequence_length=tokens,
        callback_on_step_end=parity.noting(seen),
        output_type="np",
        **given,
    ).images
    return seen, drawn


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("size", "steps", "seeds"),
    [
        ((64, 64), 1, [0]),
        ((64, 96), 4, [7]),
        ((96, 80), 5, [1, 2, 3]),
        ((80, 64), 8, [2**40, 11]),
        ((256, 256), 2, [3]),
    ],
)
def test_text_to_image(tied: bool, size: tuple[int, int], steps: int, seeds: list[int]) -> None:
    klein = random_flux2.klein(tied)
    job = job_of(klein, size, steps, seeds)
    parity.agree(opened(klein), job, *their_run(klein, job, steps))


@pytest.mark.parametrize("prompt", ["🦊 übermäßig\n", "a fox " * 60, "a<|endoftext|>fox<|im_end|>\n<think>"])
def test_prompts(prompt: str) -> None:
    """Bytes that are no characters of their own, more than fits, words that spell special tokens."""
    klein = random_flux2.klein()
    job = job_of(klein, prompt=prompt)
    parity.agree(opened(klein), job, *their_run(klein, job, 4, prompt))


def test_at_its_full_length_of_text() -> None:
    klein = random_flux2.klein()
    full = 512
    job = job_of(klein, tokens=full)
    assert len(ids_of(job)) == full
    parity.agree(opened(klein, full), job, *their_run(klein, job, 4, tokens=full))


def test_rows_together() -> None:
    klein = random_flux2.klein()
    job = job_of(klein, seeds=[4, 5, 6])
    parity.agree(opened(klein, max_rows=3), job, *their_run(klein, job, 4))


BASE = [
    ((64, 64), 1, 4.0, [0], "", []),
    ((64, 96), 4, None, [7, 8], "", []),
    ((96, 80), 9, 2.5, [3], "blurred, a cat", []),
    ((64, 64), 3, 6.0, [1, 2], "", [(64, 80), (80, 64)]),
    ((64, 80), 3, 1.0, [4], "", []),
]


@pytest.mark.parametrize(("size", "steps", "guidance", "seeds", "negative", "sizes"), BASE)
def test_base(
    size: tuple[int, int],
    steps: int,
    guidance: float | None,
    seeds: list[int],
    negative: str,
    sizes: list[tuple[int, int]],
) -> None:
    """FLUX.2-klein Base: classifier-free guidance, references in both passes; a guidance of 1 is one pass."""
    base, images = random_flux2.klein(distilled=False), random_flux2.pictures(*sizes)
    more = ({"guidance_scale": guidance} if guidance else {}) | (
        {"negative_prompt": negative.encode()} if negative else {}
    )
    job = job_of(base, size, steps, seeds, images=images, **more)
    assert guidance_of(job) == (guidance or 4.0)
    assert ("cfg_scale" in job.arrays) == (guidance != 1.0)
    parity.agree(opened(base, max_rows=2), job, *their_run(base, job, steps, images=images, negative=negative))


def test_base_takes_fifty_steps_of_its_own() -> None:
    base = random_flux2.klein(distilled=False)
    assert job_of(base, steps=None).steps == 50
    opened(base).warm_up()


@pytest.mark.parametrize(
    ("sizes", "size", "steps", "seeds"),
    [
        ([(64, 64)], (64, 64), 4, [1]),
        ([(64, 80)], (96, 64), 1, [2, 3]),
        ([(64, 96), (80, 64)], (64, 80), 5, [4]),
        ([(64, 96), (80, 96), (96, 64)], (80, 64), 4, [5, 6]),
        ([(64, 64), (64, 64), (70, 91), (64, 512)], (64, 64), 3, [7]),
        ([(100, 70)], None, 4, [8]),
    ],
)
def test_editing(sizes: list[tuple[int, int]], size: tuple[int, int] | None, steps: int, seeds: list[int]) -> None:
    """One to four references, of several sizes, some no multiples of 16, for one picture or two of another size."""
    klein, images = random_flux2.klein(), random_flux2.pictures(*sizes)
    job = job_of(klein, size, steps, seeds, images=images)
    assert len(job.numbered("references")) == len(sizes)
    parity.agree(opened(klein), job, *their_run(klein, job, steps, images=images, size=size))


def test_editing_with_a_reference_that_is_scaled_down() -> None:
    klein, images = random_flux2.klein(), random_flux2.pictures((900, 1300), (64, 64))
    job = job_of(klein, steps=2, images=images)
    assert job["references.0"].shape == (848, 1216, 3)
    parity.agree(opened(klein), job, *their_run(klein, job, 2, images=images))


def test_references_of_a_row_are_its_own() -> None:
    """Two requests of one shape in one pass through the transformer, each after its own image."""
    klein = random_flux2.klein()
    jobs = [job_of(klein, images=random_flux2.pictures((64, 80), seed=k)) for k in (1, 2)]
    together = [drawing.images for drawing in opened(klein, max_rows=2).draw(jobs) if drawing]
    alone = [drawing.images for job in jobs for drawing in opened(klein).draw([job]) if drawing]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(together, alone, strict=True))
    assert np.abs(together[0].astype(int) - together[1]).max() > 1


@pytest.mark.parametrize(
    ("size", "steps", "guidance", "seeds", "sizes"),
    [
        ((64, 64), 1, 4.0, [0], []),
        ((64, 96), 4, 1.0, [7, 8], []),
        ((96, 80), 9, 2.5, [3], []),
        ((64, 64), 4, 4.0, [1, 2], [(64, 80), (80, 64)]),
    ],
)
def test_dev(
    size: tuple[int, int], steps: int, guidance: float, seeds: list[int], sizes: list[tuple[int, int]]
) -> None:
    """FLUX.2-dev: guidance, a system message, padding before the words, words that would stand for an image."""
    flux, images, tokens = random_flux2.dev(), random_flux2.pictures(*sizes), 256
    prompt = "a fox [IMG] on a blue background"
    job = job_of(flux, size, steps, seeds, prompt, tokens, images, guidance_scale=guidance)
    assert not mask_of(job).all() and mask_of(job)[-1] == 1
    parity.agree(opened(flux, tokens), job, *their_run(flux, job, steps, prompt, tokens, images))


@pytest.mark.parametrize(
    ("size", "seeds", "sizes"), [((64, 64), [0], []), ((96, 80), [3, 4], []), ((64, 80), [5], [(80, 64)])]
)
def test_turbo(size: tuple[int, int], seeds: list[int], sizes: list[tuple[int, int]]) -> None:
    """Dev with the noise levels of Turbo, which both have to shift; its steps and guidance are the defaults."""
    flux, images, tokens = random_flux2.dev(), random_flux2.pictures(*sizes), 256
    pipeline = opened(flux, tokens, model=FLUX2_DEV_TURBO)
    job = job_of(flux, size, None, seeds, tokens=tokens, images=images, model=FLUX2_DEV_TURBO)
    base = FLUX2_DEV_TURBO.schedule.base_sigmas
    assert (job.steps, guidance_of(job)) == (len(base), 2.5) == (8, 2.5)
    theirs = their_run(flux, job, 8, tokens=tokens, images=images, sigmas=base)
    parity.agree(pipeline, job, *theirs)
    dev = job_of(flux, size, 8, seeds, tokens=tokens, images=images)
    other = parity.our_steps(pipeline, changed(dev, {"guidance": job["guidance"]}))
    assert relative(other[-1], theirs[0][-1]) > RELATIVE, "the judge sees dev's own noise levels"


def wrong_schedule(job: Job) -> Job:
    return replace(job, sigmas=job.sigmas * np.array([1, 1.01, 1, 1, 1], np.float32))


def unmasked(job: Job) -> Job:
    return changed(job, {f"mask.{encoder_of(job)}": np.ones_like(mask_of(job))})


def other_padding(job: Job) -> Job:
    return changed(job, {f"ids.{encoder_of(job)}": np.where(mask_of(job) == 1, ids_of(job), 5)})


def other_order(job: Job) -> Job:
    return changed(job, {"references.0": job["references.1"], "references.1": job["references.0"]})


def other_picture(job: Job) -> Job:
    return changed(job, {"references.1": 255 - job["references.1"]})


def one_less(job: Job) -> Job:
    return changed(job, {"references.1": None})


@pytest.mark.parametrize("spoil", [other_order, other_picture, one_less])
def test_the_judge_sees_wrong_references(spoil: object) -> None:
    klein, images = random_flux2.klein(), random_flux2.pictures((64, 64), (64, 64))
    job = job_of(klein, images=images)
    theirs, _ = their_run(klein, job, 4, images=images)
    wrong = parity.our_steps(opened(klein), spoil(job))  # type: ignore[operator]
    assert relative(wrong[-1], theirs[-1]) > RELATIVE


def test_the_judge_sees_a_wrong_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """References that are 11 apart, and not 10."""
    klein, images = random_flux2.klein(), random_flux2.pictures((64, 64))
    job = job_of(klein, images=images)
    theirs, _ = their_run(klein, job, 4, images=images)
    monkeypatch.setattr(tokens, "_REFERENCE_TIME", 11)
    assert relative(parity.our_steps(opened(klein), job)[-1], theirs[-1]) > RELATIVE


def other_scale(job: Job) -> Job:
    return changed(job, {"cfg_scale": job["cfg_scale"] * np.float32(1.01)})


def other_order(job: Job) -> Job:
    pairs = [(name, f"negative.{name}") for name in job.arrays if name.startswith(("ids.", "mask."))]
    return changed(job, {a: job[b] for pair in pairs for a, b in (pair, pair[::-1])})


def one_pass(job: Job) -> Job:
    return changed(job, {name: None for name in job.arrays if name.startswith("negative.") or name == "cfg_scale"})


@pytest.mark.parametrize("spoil", [other_scale, other_order, one_pass])
def test_the_judge_sees_wrong_guidance(spoil: Callable[[Job], Job]) -> None:
    base = random_flux2.klein(distilled=False)
    job = job_of(base)
    theirs, _ = their_run(base, job, 4)
    assert relative(parity.our_steps(opened(base), spoil(job))[-1], theirs[-1]) > RELATIVE


@pytest.mark.parametrize("spoil", [wrong_schedule, unmasked, other_padding])
def test_the_judge_sees_what_is_wrong(spoil: object) -> None:
    """A sceptic's question: would the comparison notice? Rows of padding are context, too."""
    klein = random_flux2.klein()
    job = job_of(klein)
    theirs, _ = their_run(klein, job, 4)
    wrong = parity.our_steps(opened(klein), spoil(job))  # type: ignore[operator]
    assert relative(wrong[-1], theirs[-1]) > RELATIVE


def test_it_warms_up() -> None:
    opened(random_flux2.klein()).warm_up()
