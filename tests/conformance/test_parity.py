"""The loop is ours, diffusers is the judge: latents after every step and the final image, in float32."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from fluxserve.engine import Bound, Components, Engine, Shapes
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.job import Array, Job
from fluxserve.pipeline import Pipeline
from fluxserve.sampling import schedule
from tests.support import exports, parity, random_flux
from tests.support.fused import FusedOf
from tests.support.jobs import changed
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
    cfg_scale: float = 1.0,
) -> Job:
    """A job with random tokens: the parity of tokenisers is another test's business.

    Args:
        cfg_scale: above 1 with a negative prompt, of random tokens too.
    """
    sigmas = schedule.sigmas(steps, spec.image_tokens(*size), spec.schedule)
    arrays: dict[str, Array] = {}
    if image is not None:
        arrays["image"] = image
        sigmas = sigmas[schedule.image_to_image_start(steps, strength) :]
    arrays |= {"guidance": np.array([guidance], np.float32), **random_tokens(spec, prompt_seed)}
    if cfg_scale > 1:
        negative = {f"negative.{name}": ids for name, ids in random_tokens(spec, prompt_seed + 1).items()}
        arrays |= {"cfg_scale": np.array([cfg_scale], np.float32), **negative}
    return Job(*size, tuple(seeds), sigmas, arrays)


def random_tokens(spec: FluxSpec, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    clip_ids = rng.integers(0, random_flux.VOCABULARY - 2, spec.text.named("clip").tokens)
    clip_ids[20:] = random_flux.VOCABULARY - 1
    return {"ids.clip": clip_ids, "ids.t5": rng.integers(0, random_flux.VOCABULARY, spec.text.sequence.tokens)}


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
    guided = {}
    if "cfg_scale" in job.arrays:
        sequence, pooled = their_states(flux, job, "negative.")
        guided = {"negative_prompt_embeds": sequence, "negative_pooled_prompt_embeds": pooled}
        guided |= {"true_cfg_scale": float(job["cfg_scale"][0])}
    sequence, pooled = their_states(flux, job)
    images = pipe(
        prompt_embeds=sequence,
        pooled_prompt_embeds=pooled,
        height=job.height,
        width=job.width,
        num_inference_steps=steps,
        guidance_scale=float(job["guidance"][0]),
        generator=[torch.Generator("cpu").manual_seed(s) for s in job.seeds],
        callback_on_step_end=parity.noting(seen),
        output_type="np",
        **task,
        **guided,
    ).images
    return seen, images


def their_states(flux: RandomFlux, job: Job, which: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """T5's states and CLIP's pooled one of a job's prompt, a row for each of its pictures."""
    rows, (t5, clip) = len(job.seeds), (torch.from_numpy(job[f"{which}ids.{name}"])[None] for name in ("t5", "clip"))
    return flux.t5(t5).last_hidden_state.expand(rows, -1, -1), flux.clip(clip).pooler_output.expand(rows, -1)


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


@pytest.mark.parametrize(
    ("size", "steps", "scale", "seeds", "strength"),
    [
        ((64, 64), 1, 4.0, [0], None),
        ((64, 96), 4, 1.5, [7], None),
        ((128, 64), 5, 6.0, [1, 2], None),
        ((64, 80), 5, 3.0, [4, 5], 0.6),
    ],
)
def test_a_negative_prompt(
    opened: Open, size: tuple[int, int], steps: int, scale: float, seeds: list[int], strength: float | None
) -> None:
    """Classifier-free guidance beside the distilled one; also of an image that is redrawn."""
    flux = random_flux.make()
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8) if strength else None
    job = job_of(flux.spec, size, steps, 3.5, seeds, image, strength or 1.0, cfg_scale=scale)
    check(opened, flux, job, steps, image, strength or 1.0)


def test_a_negative_prompt_for_schnell(opened: Open) -> None:
    flux = random_flux.make(guidance_embeds=False, dynamic=False)
    check(opened, flux, job_of(flux.spec, (64, 96), 3, 0.0, [5, 6], cfg_scale=2.5), 3)


def test_two_scales_in_one_pass() -> None:
    """Requests of one likeness go through the loop together, each with the scale and negative prompt of its own."""
    flux = random_flux.make()
    pipeline = Pipeline(flux.spec, flux.components(), max_rows=2)
    jobs = [job_of(flux.spec, (64, 64), 3, 3.5, [k], prompt_seed=10 * k, cfg_scale=1.5 + 2 * k) for k in (1, 2)]
    assert len({job.likeness for job in jobs}) == 1
    with torch.inference_mode():
        _, *ours = [x.clone() for x in pipeline.denoise([(job, job.seeds[0], pipeline.encode(job)) for job in jobs])]
    for row, job in enumerate(jobs):
        theirs, images = their_run(flux, job, 3)
        assert all(relative(a[row], b[0]) < RELATIVE for a, b in zip(ours, theirs, strict=True))
        drawing = pipeline.draw(jobs)[row]
        assert drawing and np.abs(drawing.images / 255.0 - images).max() <= 0.5 / 255 + RELATIVE


def other_scale(job: Job) -> Job:
    return changed(job, {"cfg_scale": job["cfg_scale"] * np.float32(1.01)})


def other_order(job: Job) -> Job:
    """The prompt in the place of the negative prompt."""
    names = ("ids.clip", "ids.t5")
    negative = {name: job[f"negative.{name}"] for name in names}
    return changed(job, {**negative, **{f"negative.{name}": job[name] for name in names}})


def one_pass(job: Job) -> Job:
    return changed(job, {name: None for name in job.arrays if name.startswith("negative.") or name == "cfg_scale"})


@pytest.mark.parametrize("spoil", [other_scale, other_order, one_pass])
def test_the_judge_sees_wrong_guidance(spoil: Callable[[Job], Job]) -> None:
    flux = random_flux.make()
    job = job_of(flux.spec, (64, 64), 4, 3.5, [0], cfg_scale=4.0)
    theirs, _ = their_run(flux, job, 4)
    pipeline = Pipeline(flux.spec, flux.components())
    assert relative(our_steps(pipeline, job)[-1], theirs[-1]) < RELATIVE
    assert relative(our_steps(pipeline, spoil(job))[-1], theirs[-1]) > RELATIVE


class Watched:
    """An engine that notes how many rows it is bound for."""

    def __init__(self, engine: Engine, rows: tuple[int, int]) -> None:
        self._engine, self.signature, self.bound = engine, engine.signature.narrowed({"rows": rows}), list[int]()

    def bind(self, shapes: Shapes) -> Bound:
        self.signature.resolve(shapes)
        self.bound.append(shapes["hidden_states"][0])
        return self._engine.bind(shapes)

    def close(self) -> None:
        self._engine.close()


@pytest.mark.parametrize(("scale", "seeds", "rows"), [(1.0, [1, 2, 3], [3]), (4.0, [1, 2, 3], [2]), (4.0, [1], [2])])
def test_rows_of_a_network(scale: float, seeds: list[int], rows: list[int]) -> None:
    """A prompt alone takes one row a picture; with a negative prompt two, and as many pictures as the engine has room
    for go together, whatever max_rows allows."""
    flux = random_flux.make()
    components = flux.components()
    network = Watched(components.network, (1, 3))
    watched = components.replacing(transformer=network)
    (drawing,) = Pipeline(flux.spec, watched, max_rows=3).draw(
        [job_of(flux.spec, (64, 64), 2, 3.5, seeds, cfg_scale=scale)]
    )
    assert drawing is not None and len(drawing.images) == len(seeds)
    assert network.bound == rows


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
