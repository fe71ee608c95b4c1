"""Stage 5: the judge of the tests, trained on drawn pictures that are blurred, noised and put through the VAE."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from testing.judge import ObjectNet
from training.loop import Chance, Losses, Run, Stage, fit
from training.models import make_vae
from training.objects import OBJECTS
from training.scenes import Scenes
from training.vae import random_pictures, reconstruct


def worsen(images: Tensor, chance: Chance, vae: AutoencoderKL | None) -> Tensor:
    """What a generated picture may suffer: the VAE, a blur, noise, a change of contrast. [B, 3, H, W]."""
    if vae is not None and chance.host.random() < 0.5:
        images = reconstruct(vae, images)
    if chance.host.random() < 0.5:
        factor = float(chance.host.uniform(0.4, 0.9))
        small = F.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True)
        images = F.interpolate(small, size=images.shape[-2:], mode="bilinear")
    level = torch.rand(len(images), 1, 1, 1, device=images.device, generator=chance.device)
    noise = torch.randn(images.shape, device=images.device, generator=chance.device)
    gain = 0.85 + 0.3 * torch.rand(len(images), 3, 1, 1, device=images.device, generator=chance.device)
    return images * gain + noise * 0.15 * level


def _step(
    net: Callable[[Tensor], Tensor], scenes: Scenes, vae: AutoencoderKL, batch: int
) -> Callable[[Chance], Losses]:
    def loss(chance: Chance) -> Losses:
        images, things, _ = random_pictures(scenes, batch, chance)
        with torch.no_grad():
            images = worsen(images, chance, vae)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = net(images).float()
        wrong = (logits.argmax(1) != things).float().mean()
        return {"loss": F.cross_entropy(logits, things, label_smoothing=0.05), "wrong": wrong}

    return loss


@torch.no_grad()
def ceiling(net: nn.Module, scenes: Scenes, vae: AutoencoderKL) -> float:
    """Accuracy on fresh drawn pictures after the VAE: what a perfect model could reach."""
    right = []
    for k in range(16):
        images, things, _ = random_pictures(scenes, 256, Chance.of(98, k, scenes.device))
        right.append((net(reconstruct(vae, images)).argmax(1) == things).float().mean())
    return float(torch.stack(right).mean())


def train_judge(run: Run, scenes: Scenes, steps: int, batch: int, seconds: float = math.inf) -> bool:
    """Train the classifier and keep it as ``judge``; returns whether all steps are done."""
    torch.manual_seed(3)
    vae = run.load("vae", make_vae())
    net = ObjectNet(len(OBJECTS)).to(run.device)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    stage = Stage("judge", nn.ModuleDict({"judge": net}), [optimizer], steps, _step(net, scenes, vae, batch))
    ema = fit(stage, run, seconds, seed=5)
    if ema is not None:
        run.save("judge", ema["judge"])
        run.facts(judge_accuracy_on_drawn_pictures=round(ceiling(ema["judge"], scenes, vae), 4))
    return ema is not None


def export_judge(run: Run, path: Path) -> None:
    """Write the classifier as the tests read it, in float16."""
    net = run.load("judge", ObjectNet(len(OBJECTS)))
    save_file({k: v.half().cpu().contiguous() for k, v in net.state_dict().items()}, path)
