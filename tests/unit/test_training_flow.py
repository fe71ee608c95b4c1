"""What training must share with the pipeline that serves: packing, schedule, velocity; and the loop resumes."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

from training.flow import draw_times, image_ids, shift_of
from training.latents import pack, unpack
from training.loop import Chance, Losses, Run, Stage, fit, rate
from training.models import make_scheduler
from training.sample import schedule


def test_packing_is_that_of_flux() -> None:
    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(unpack(pack(latents), 8, 12), latents)
    assert torch.equal(
        image_ids(64, 96, torch.device("cpu")), FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    )


@pytest.mark.parametrize(("steps", "tokens"), [(1, 64), (8, 64), (20, 256), (28, 4096)])
def test_the_schedule_is_that_of_flux(steps: int, tokens: int) -> None:
    scheduler = make_scheduler()
    sigmas = torch.linspace(1, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=shift_of(tokens))
    torch.testing.assert_close(torch.tensor(schedule(steps, tokens)), scheduler.sigmas, rtol=1e-5, atol=1e-6)


def test_times_cover_the_path() -> None:
    t = draw_times(4096, 64, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert 0 < t.min() < 0.02
    assert 0.98 < t.max() <= 1
    assert 0.5 < t.mean() < 0.7  # shifted towards noise


def stage(steps: int) -> Stage:
    torch.manual_seed(0)
    net = nn.ModuleDict({"net": nn.Linear(4, 4)})

    def loss(chance: Chance) -> Losses:
        x = torch.randn(8, 4, generator=chance.device) * float(chance.host.random())
        return {"loss": (net["net"](x) - x).square().mean()}

    return Stage("toy", net, [torch.optim.AdamW(net.parameters(), 1e-2)], steps, loss, warmup=3)


def test_an_interrupted_run_goes_on_exactly(tmp_path: Path) -> None:
    straight = fit(stage(12), Run(tmp_path / "a", "cpu"))
    run, calls, broken = Run(tmp_path / "b", "cpu"), 0, None
    while broken is None:
        broken, calls = fit(stage(12), run, seconds=0), calls + 1  # one step a call
    assert calls == 12
    assert straight is not None
    for ours, theirs in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_rate_rises_holds_and_falls() -> None:
    made = stage(100)
    rates = [rate(step, made) for step in range(100)]
    assert rates[0] < rates[2] <= 1
    assert rates[30] == 1
    assert rates[99] == pytest.approx(1 / 40)
