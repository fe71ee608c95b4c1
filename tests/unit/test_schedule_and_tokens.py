"""Schedules, tokens and positions against diffusers; equality is bit for bit unless a test says otherwise."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, FluxImg2ImgPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from fluxserve.families.flux import tokens
from fluxserve.families.flux.models import FLUX1_DEV, FLUX1_SCHNELL, FLUX2_DEV_TURBO, FLUX2_KLEIN_4B
from fluxserve.sampling import schedule as schedules
from fluxserve.sampling.schedule import ScheduleSpec

STEPS = (1, 2, 3, 4, 7, 20, 28, 50, 99, 100)
TOKENS = (16, 64, 255, 256, 257, 1024, 4096, 4300, 4301, 16384)
SCHEDULES = (
    FLUX1_DEV.schedule,
    FLUX1_SCHNELL.schedule,
    FLUX2_KLEIN_4B.schedule,
    ScheduleSpec(use_dynamic_shifting=False, shift=3.0),
    ScheduleSpec(True, 1.0, 0.3, 1.7, 100, 900),
)


def their_schedule(steps: int, tokens: int, schedule: ScheduleSpec) -> FlowMatchEulerDiscreteScheduler:
    """Set up as FluxPipeline.__call__ and Flux2KleinPipeline.__call__ do it."""
    config = {name: value for name, value in vars(schedule).items() if name not in ("empirical_shift", "base_sigmas")}
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    ours = schedule
    mu = calculate_shift(tokens, ours.base_image_seq_len, ours.max_image_seq_len, ours.base_shift, ours.max_shift)
    if schedule.empirical_shift:
        mu = compute_empirical_mu(tokens, steps)
    scheduler.set_timesteps(sigmas=schedule.base_sigmas or np.linspace(1.0, 1 / steps, steps), mu=mu, device="cpu")
    return scheduler


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sigmas_are_those_of_diffusers(schedule: ScheduleSpec) -> None:
    for steps, length in itertools.product(STEPS, TOKENS):
        ours = schedules.sigmas(steps, length, schedule)
        theirs = their_schedule(steps, length, schedule).sigmas.numpy()
        assert ours.dtype == theirs.dtype == np.float32
        assert ours.tobytes() == theirs.tobytes(), (steps, length)


def test_base_sigmas_are_shifted() -> None:
    """As diffusers does it with those that are given to a call."""
    schedule = FLUX2_DEV_TURBO.schedule
    for length in TOKENS:
        assert (
            schedules.sigmas(8, length, schedule).tobytes()
            == their_schedule(8, length, schedule).sigmas.numpy().tobytes()
        )
    expected = [1, 0.9474, 0.8825, 0.8003, 0.6928, 0.5462, 0.3347, 0.0030, 0]
    assert schedules.sigmas(8, 4096, schedule) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(AssertionError, match="base sigmas"):
        schedules.sigmas(7, 4096, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES[:4])
def test_sigmas_fall_from_one_to_zero(schedule: ScheduleSpec) -> None:
    for steps, length in itertools.product(STEPS, TOKENS):
        levels = schedules.sigmas(steps, length, schedule)
        assert levels.shape == (steps + 1,)
        assert levels[0] == 1.0 and levels[-1] == 0.0
        assert (np.diff(levels) < 0).all()


def test_the_shift_grows_with_the_picture() -> None:
    """At the schedule's own corners μ is the configuration's, and a larger picture keeps more noise for longer."""
    schedule = FLUX1_DEV.schedule
    assert schedules.shift_mu(256, schedule) == pytest.approx(0.5)
    assert schedules.shift_mu(4096, schedule) == pytest.approx(1.15)
    small, large = schedules.sigmas(8, 256, schedule), schedules.sigmas(8, 4096, schedule)
    assert (large[1:-1] > small[1:-1]).all()


def test_the_empirical_shift_leaps_where_its_lines_part() -> None:
    """FLUX.2: a picture of more than 4,300 tokens is shifted as if it were drawn in 200 steps."""
    assert schedules.empirical_mu(4096, 4) == pytest.approx(2.291180, abs=1e-6)
    assert schedules.empirical_mu(4300, 4) == pytest.approx(2.308, abs=1e-3)
    assert schedules.empirical_mu(4301, 4) == schedules.empirical_mu(4301, 50) == pytest.approx(1.185, abs=1e-3)
    levels = schedules.sigmas(4, 4096, FLUX2_KLEIN_4B.schedule)
    assert levels == pytest.approx([1, 0.9674, 0.9081, 0.7672, 0], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_timesteps_are_rounded_as_diffusers_does(dtype: torch.dtype) -> None:
    """pipeline_flux: `t.expand(batch).to(latents.dtype)`, then `timestep / 1000`."""
    for steps, length in itertools.product(STEPS, (64, 4096)):
        levels = torch.from_numpy(schedules.sigmas(steps, length, FLUX1_DEV.schedule))
        ours = tokens.timesteps(levels, FLUX1_DEV.schedule, dtype)
        theirs = their_schedule(steps, length, FLUX1_DEV.schedule).timesteps
        assert ours.dtype == dtype
        assert torch.equal(ours[:-1], torch.stack([t.expand(1).to(dtype) / 1000 for t in theirs]).flatten())


def test_low_precision_rounds_before_it_divides() -> None:
    """The order shows: in bfloat16 some levels are off by an ulp when the sigma itself is rounded."""
    levels = torch.from_numpy(schedules.sigmas(50, 4096, FLUX1_DEV.schedule))
    assert not torch.equal(tokens.timesteps(levels, FLUX1_DEV.schedule, torch.bfloat16), levels.bfloat16())


def test_image_to_image_start_is_that_of_diffusers() -> None:
    for steps, percent in itertools.product(STEPS, range(1, 101)):
        strength = percent / 100
        pipe = SimpleNamespace(scheduler=their_schedule(steps, 256, FLUX1_DEV.schedule))
        left, count = FluxImg2ImgPipeline.get_timesteps(pipe, steps, strength, "cpu")
        start = schedules.image_to_image_start(steps, strength)
        assert steps - start == count == len(left), (steps, strength)


@pytest.mark.parametrize(("steps", "strength", "start"), [(4, 1.0, 0), (10, 0.5, 5), (4, 1e-9, 3), (4, 1e-30, 4)])
def test_image_to_image_start_at_the_edges(steps: int, strength: float, start: int) -> None:
    """diffusers skips all steps when float arithmetic loses the strength: `job.plan` keeps the last one."""
    assert schedules.image_to_image_start(steps, strength) == start


SIZES = [(2, 2), (8, 8), (2, 64), (18, 10), (64, 2), (128, 130)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("batch", "channels"), [(1, 16), (3, 4)])
def test_packing_is_that_of_diffusers(batch: int, channels: int, height: int, width: int) -> None:
    latents = torch.randn(batch, channels, height, width)
    ours = tokens.pack(latents)
    assert torch.equal(ours, FluxPipeline._pack_latents(latents, batch, channels, height, width))
    assert torch.equal(tokens.unpack(ours, height, width), latents)
    theirs = FluxPipeline._unpack_latents(ours, height * 8, width * 8, vae_scale_factor=8)
    assert torch.equal(tokens.unpack(ours, height, width), theirs)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("batch", [1, 2])
def test_packing_is_that_of_flux2(batch: int, height: int, width: int) -> None:
    """Flux2KleinPipeline folds squares into channels first and makes tokens of places afterwards."""
    pipe, latents = Flux2KleinPipeline, torch.randn(batch, 32, height, width)
    folded = pipe._patchify_latents(latents)
    ours = tokens.pack(latents)
    assert torch.equal(ours, pipe._pack_latents(folded))
    assert torch.equal(ours, tokens.pack(folded, patch=1))
    assert torch.equal(tokens.unpack(ours, height, width), pipe._unpatchify_latents(folded))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_ids_are_those_of_flux2(height: int, width: int) -> None:
    places = torch.empty(1, 128, height // 2, width // 2)
    assert np.array_equal(tokens.image_ids(height, width, 4), Flux2KleinPipeline._prepare_latent_ids(places)[0].numpy())
    assert np.array_equal(
        tokens.text_ids(height, 4), Flux2KleinPipeline._prepare_text_ids(torch.empty(1, height, 8))[0].numpy()
    )


@pytest.mark.parametrize("sizes", [[], SIZES[:1], SIZES[1:3], SIZES[:4]], ids=str)
def test_reference_ids_are_those_of_flux2(sizes: list[tuple[int, int]]) -> None:
    ours = tokens.reference_ids(sizes, 4)
    assert ours.shape == (sum(h * w // 4 for h, w in sizes), 4) and ours.dtype == np.float32
    if sizes:
        latents = [torch.empty(1, 128, h // 2, w // 2) for h, w in sizes]
        assert np.array_equal(ours, Flux2KleinPipeline._prepare_image_ids(latents)[0].numpy())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_ids_are_those_of_diffusers(height: int, width: int) -> None:
    theirs = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    ours = tokens.image_ids(height, width)
    assert ours.dtype == np.float32
    assert np.array_equal(ours, theirs.numpy())


def test_text_has_no_position() -> None:
    ids = tokens.text_ids(7)
    assert ids.shape == (7, 3) and ids.dtype == np.float32 and not ids.any()


@pytest.mark.parametrize("sigma", [0.0, 0.25, 1.0])
def test_blend_is_that_of_diffusers(sigma: float) -> None:
    clean, noise = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    ours = tokens.blend_(clean, noise.clone(), sigma)
    torch.testing.assert_close(ours, sigma * noise + (1 - sigma) * clean)
