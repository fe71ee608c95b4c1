"""The loop is ours, diffusers is the judge: latents after every step and the final image, in float32."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from fluxserve.engine import Components
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.job import Array, Job
from fluxserve.pipeline import Pipeline
from fluxserve.sampling import schedule
from tests.support import exports, parity, random_flux
from tests.support.fused import FusedOf
from tests.support.parity import RELATIVE, our_steps, relative
from tests.support.random_flux import RandomFlux

pytestmark = pytest.mark.xdist_group("parity")


def job_of(
    spec: FluxSpec,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    seeds: Sequence[int],
    image: np.ndarray | None = None,
    strength: float = 1.0,
    prompt_seed: int = 5,
) -> Job:
    """A job with random tokens: the parity of tokenisers is another test's business."""
    rng = np.random.default_rng(prompt_seed)
    clip_ids = rng.integers(0, random_flux.VOCABULARY - 2, spec.text.named("clip").tokens)
    clip_ids[20:] = random_flux.VOCABULARY - 1
    sigmas = schedule.sigmas(steps, spec.image_tokens(*size), spec.schedule)
    arrays: dict[str, Array] = {}
    if image is not None:
        arrays["image"] = image
        sigmas = sigmas[schedule.image_to_image_start(steps, strength) :]
    t5_ids = rng.integers(0, random_flux.VOCABULARY, spec.text.sequence.tokens)
    arrays |= {"ids.clip": clip_ids, "ids.t5": t5_ids, "guidance": np.array([guidance], np.float32)}
    return Job(*size, tuple(seeds), sigmas, arrays)


def their_run(
    flux: RandomFlux, job: Job, steps: int, image: np.ndarray | None = None, strength: float = 1.0
) -> tuple[list[torch.Tensor], np.ndarray]:
    """diffusers' pipeline for the same job: latents after every step, uint8 images [n, h, w, 3]."""
    cls = FluxPipeline if image is None else FluxImg2ImgPipeline
    pipe = cls(flux.new_scheduler(), flux.vae, None, None, None, None, flux.transformer)
    pipe.set_progress_bar_config(disable=True)
    rows = len(job.seeds)
    seen: list[torch.Tensor] = []

    # One image a row: given a single one, diffusers draws the posterior's sample from the first generator alone.
    task = {} if image is None else {"image": [Image.fromarray(image)] * rows, "strength": strength}
    images = pipe(
        prompt_embeds=flux.t5(torch.from_numpy(job["ids.t5"])[None]).last_hidden_state.expand(rows, -1, -1),
        pooled_prompt_embeds=flux.clip(torch.from_numpy(job["ids.clip"])[None]).pooler_output.expand(rows, -1),
        height=job.height,
        width=job.width,
        num_inference_steps=steps,
        guidance_scale=float(job["guidance"][0]),
        generator=[torch.Generator("cpu").manual_seed(s) for s in job.seeds],
        callback_on_step_end=parity.noting(seen),
        output_type="np",
        **task,
    ).images
    return seen, images


Open = Callable[[RandomFlux], Components]


@pytest.fixture(params=["torch_eager", "onnxruntime", "fused"])
def opened(request: pytest.FixtureRequest, onnx: exports.OnnxOf, fused: FusedOf) -> Open:
    """Opens the same weights with each engine that a machine without a GPU has; the fused one without its kernels."""
    opens: dict[str, Open] = {"torch_eager": RandomFlux.components, "onnxruntime": onnx, "fused": fused}
    return opens[request.param]


def check(
    opened: Open, flux: RandomFlux, job: Job, steps: int, image: np.ndarray | None = None, strength: float = 1.0
) -> None:
    parity.agree(Pipeline(flux.spec, opened(flux)), job, *their_run(flux, job, steps, image, strength))


@pytest.mark.parametrize(
    ("size", "steps", "guidance", "seeds"),
    [
        ((64, 64), 1, 3.5, [0]),
        ((64, 96), 4, 1.0, [7]),
        ((128, 64), 5, 3.5, [1, 2, 3]),
        ((80, 144), 9, 7.25, [2**40, 11]),
        ((256, 256), 2, 0.0, [3]),
    ],
)
def test_text_to_image(opened: Open, size: tuple[int, int], steps: int, guidance: float, seeds: list[int]) -> None:
    flux = random_flux.make()
    check(opened, flux, job_of(flux.spec, size, steps, guidance, seeds), steps)


@pytest.mark.parametrize(("size", "steps", "seeds"), [((64, 64), 4, [0]), ((96, 64), 3, [5, 6])])
def test_schnell_has_no_guidance_and_a_static_shift(
    opened: Open, size: tuple[int, int], steps: int, seeds: list[int]
) -> None:
    flux = random_flux.make(guidance_embeds=False, dynamic=False)
    assert flux.spec.name == "custom"
    assert not flux.spec.schedule.use_dynamic_shifting
    check(opened, flux, job_of(flux.spec, size, steps, 0.0, seeds), steps)


@pytest.mark.parametrize(
    ("size", "steps", "strength", "seeds"),
    [((64, 64), 5, 0.6, [1]), ((96, 80), 4, 1.0, [2, 3]), ((64, 128), 10, 0.15, [4]), ((64, 64), 7, 0.5, [8])],
)
def test_image_to_image(opened: Open, size: tuple[int, int], steps: int, strength: float, seeds: list[int]) -> None:
    flux = random_flux.make()
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    check(opened, flux, job_of(flux.spec, size, steps, 3.5, seeds, image, strength), steps, image, strength)


def test_the_judge_sees_a_wrong_schedule() -> None:
    """A sceptic's question: would the comparison notice? One sigma off by 1% must fail it."""
    flux = random_flux.make()
    job = job_of(flux.spec, (64, 64), 4, 3.5, [0])
    theirs, _ = their_run(flux, job, 4)
    wrong = job.sigmas.copy()
    wrong[1] *= 1.01
    job = replace(job, sigmas=wrong)
    assert relative(our_steps(Pipeline(flux.spec, flux.components()), job)[0], theirs[0]) > RELATIVE


@pytest.mark.parametrize("max_rows", [1, 3])
def test_noise_depends_on_the_seed_alone(opened: Open, max_rows: int) -> None:
    """Seed 42 alone, as image 2 of three, and in a batch with another request."""
    flux = random_flux.make()
    pipeline = Pipeline(flux.spec, opened(flux), max_rows=max_rows)
    alone, trio, other = (
        job_of(flux.spec, (64, 64), 3, 3.5, seeds, prompt_seed=p)
        for seeds, p in (([42], 5), ([40, 41, 42], 5), ([9], 6))
    )
    (a,), (t,), (o, b) = pipeline.draw([alone]), pipeline.draw([trio]), pipeline.draw([other, alone])
    assert a and t and o and b
    images = [a.images[0], t.images[2], b.images[0]]
    if max_rows == 1:
        assert all(np.array_equal(images[0], i) for i in images), "one row at a time: the same bytes"
    spread = max(int(np.abs(images[0].astype(int) - i).max()) for i in images)
    assert spread <= 1, "rows together: the same but for rounding"
    assert np.abs(o.images[0].astype(int) - images[0]).max() > 1
