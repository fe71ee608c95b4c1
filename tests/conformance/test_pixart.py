"""PixArt-Σ from its folder: diffusers is the judge of words, latents after every step and pictures, in float32."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fluxserve.engine import Components
from fluxserve.engines import torch_eager
from fluxserve.families import registry
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.job import Job, parse
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers
from tests.support import parity, random_pixart

pytestmark = pytest.mark.xdist_group("pixart")

FIELDS: Mapping[str, Any] = {"prompt": b" A red Apple on a blue background ", "height": 64, "width": 96, "seed": 5}


@pytest.fixture(scope="module")
def folder() -> Checkpoint:
    return random_pixart.make().checkpoint()


@pytest.fixture(scope="module")
def components(folder: Checkpoint) -> Components:
    return torch_eager.open_components(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def tokenizers(folder: Checkpoint) -> Tokenizers:
    return Tokenizers(folder)


@pytest.fixture(scope="module")
def job_of(folder: Checkpoint, tokenizers: Tokenizers) -> Callable[..., Job]:
    return lambda **fields: registry.plan({**FIELDS, **fields}, folder.spec, tokenizers)


def their_run(fields: Mapping[str, Any]) -> tuple[list[torch.Tensor], np.ndarray]:
    """Latents after each step, and images [n, h, w, 3] in 0..1."""
    pipe, seen = random_pixart.make().pipe, list[torch.Tensor]()
    count = fields.get("num_images", 1)
    images = pipe(
        fields["prompt"].decode(),
        negative_prompt=fields.get("negative_prompt", b"").decode(),
        height=fields["height"],
        width=fields["width"],
        num_inference_steps=fields.get("num_inference_steps", 20),
        guidance_scale=fields.get("guidance_scale", 4.5),
        num_images_per_prompt=count,
        generator=[torch.Generator("cpu").manual_seed(fields["seed"] + index) for index in range(count)],
        use_resolution_binning=False,
        clean_caption=False,
        output_type="np",
        callback=lambda _step, _timestep, latents: seen.append(latents.clone()),
        callback_steps=1,
    ).images
    return seen, images


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 1.0, "num_inference_steps": 1, "height": 128, "width": 64, "seed": 2**40},
        {"negative_prompt": b"A GREEN dog", "num_inference_steps": 15, "seed": 0},
        {"num_inference_steps": 2, "height": 112, "width": 64, "num_images": 3, "guidance_scale": 7.0},
        {"num_inference_steps": 7, "height": 64, "width": 64, "guidance_scale": 1.01},
    ],
    ids=str,
)
def test_latents_and_images(fields: dict[str, Any], components: Components, job_of: Callable[..., Job]) -> None:
    job = job_of(**fields)
    assert (len(job.seeds), job.steps) == (fields.get("num_images", 1), fields.get("num_inference_steps", 20))
    parity.agree(Pipeline(random_pixart.make().checkpoint().spec, components), job, *their_run({**FIELDS, **fields}))


def test_the_words_are_those_of_diffusers(
    folder: Checkpoint, components: Components, job_of: Callable[..., Job]
) -> None:
    pipe = random_pixart.make().pipe
    states = Pipeline(folder.spec, components).encode(job_of(negative_prompt=b"a dog")).states
    words = pipe.encode_prompt(FIELDS["prompt"].decode(), negative_prompt="a dog", clean_caption=False)
    for (expected, mask), got in zip((words[:2], words[2:]), states, strict=True):
        assert parity.relative(got["sequence"], expected) < parity.RELATIVE
        assert 1 < mask.sum() < mask.shape[1] == 300


def test_what_a_request_says_shows_in_the_picture(
    folder: Checkpoint, components: Components, job_of: Callable[..., Job]
) -> None:
    """A parity of pictures that ignore an input would not notice if it were lost."""
    pipeline = Pipeline(folder.spec, components)
    others = [{}, {"prompt": b"a dog"}, {"negative_prompt": b"a dog"}, {"guidance_scale": 7.0}, {"guidance_scale": 1.0}]
    last = [parity.our_steps(pipeline, job_of(**fields, num_inference_steps=3))[-1] for fields in others]
    for index, one in enumerate(last):
        for other in last[:index]:
            assert parity.relative(one, other) > 10 * parity.RELATIVE


def test_requests_of_a_batch_keep_their_own_scale(
    folder: Checkpoint, components: Components, job_of: Callable[..., Job]
) -> None:
    jobs = [job_of(num_inference_steps=3, guidance_scale=scale, num_images=n) for scale, n in ((2.0, 1), (9.0, 2))]
    assert jobs[0].likeness == jobs[1].likeness != job_of(num_inference_steps=3, guidance_scale=1.0).likeness
    together = Pipeline(folder.spec, components, max_rows=6).draw(jobs)
    for job, drawn in zip(jobs, together, strict=True):
        (alone,) = Pipeline(folder.spec, components).draw([job])
        assert alone is not None
        assert drawn is not None
        assert np.abs(alone.images.astype(int) - drawn.images).max() <= 1


def test_max_rows_counts_pictures_and_not_their_passes(
    folder: Checkpoint, components: Components, job_of: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, bind = list[int](), torch_eager.TorchEngine.bind

    def counting(engine: torch_eager.TorchEngine, shapes: Mapping[str, tuple[int, ...]]) -> torch_eager.TorchBound:
        rows.append(next(iter(shapes.values()))[0] if "timestep" in shapes else 0)
        return bind(engine, shapes)

    monkeypatch.setattr(torch_eager.TorchEngine, "bind", counting)
    Pipeline(folder.spec, components, max_rows=4).draw([job_of(num_inference_steps=1, num_images=3)])
    assert [count for count in rows if count] == [6]


def test_a_job_survives_the_wire_and_is_checked(folder: Checkpoint, job_of: Callable[..., Job]) -> None:
    family = registry.of(folder.spec)
    for job in (job_of(), job_of(guidance_scale=1.0), family.nothing(folder.spec, 64, False)):
        read, _ = parse(job.dump(), ())
        family.check(read, folder.spec)
        assert read.likeness == job.likeness
