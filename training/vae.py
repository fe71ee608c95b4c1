"""Stage 1: the autoencoder. Crisp flat colour with sharp edges, in 16 well-scaled latent channels."""

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.grammar import COLOUR_NAMES, SIZES
from training.loop import Chance, Losses, Run, Stage, fit
from training.models import make_vae
from training.objects import OBJECTS
from training.scenes import Scenes, as_bytes

_KL, _SPREAD, _EDGES = 1e-3, 1e-2, 0.5  # weights of the losses beside the pixels' own
_SIZES = ((128, 128),) * 18 + ((96, 96), (160, 160))  # one is drawn for each batch; the first is compiled
_Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def random_pictures(
    scenes: Scenes, count: int, chance: Chance, size: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random pictures, all at one random ratio.

    Returns: images [B, 3, H, W] in -1..1, objects [B], colours [B].
    """
    device, generator = scenes.device, chance.device
    things = torch.randint(len(OBJECTS), (count,), device=device, generator=generator)
    colours = torch.randint(len(COLOUR_NAMES), (count,), device=device, generator=generator)
    ratio = float(chance.host.choice(SIZES[str(chance.host.choice(list(SIZES)))]))
    return scenes.draw(things, colours, ratio, size, generator), things, colours


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return image[..., 1:, :] - image[..., :-1, :], image[..., :, 1:] - image[..., :, :-1]


def vae_losses(image: Tensor, decoded: Tensor, mean: Tensor, logvar: Tensor) -> Losses:
    """Pixels and edges in L1, a small KL, and latents pulled to zero mean and unit spread per channel.

    The last keeps every channel in use and on one scale, since FLUX has a single scaling factor for all.
    """
    pixels = (decoded - image).abs().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(image), strict=True))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    spread = mean.mean((0, 2, 3)).square().mean() + (mean.std((0, 2, 3)) - 1).square().mean()
    total = pixels + _EDGES * edge + _KL * kl + _SPREAD * spread
    return {"loss": total, "pixels": pixels, "edge": edge, "kl": kl, "spread": spread}


def _step(vae: AutoencoderKL, compiled: _Pair, scenes: Scenes, batch: int) -> Callable[[Chance], Losses]:
    def loss(chance: Chance) -> Losses:
        size = _SIZES[int(chance.host.integers(len(_SIZES)))]
        encode, decode = compiled if size == _SIZES[0] else (vae.encoder, vae.decoder)
        image = random_pictures(scenes, batch, chance, size)[0].to(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, torch.bfloat16):
            mean, logvar = encode(image).float().chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            noise = torch.randn(mean.shape, device=mean.device, generator=chance.device)
            decoded = decode(mean + (0.5 * logvar).exp() * noise).float()
        return vae_losses(image, decoded, mean, logvar)

    return loss


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode (the mean) and decode: [B, 3, H, W] in -1..1 → the same."""
    with torch.autocast(images.device.type, torch.bfloat16):
        return vae.decode(vae.encode(images).latent_dist.mean).sample.float()


def psnr(vae: AutoencoderKL, scenes: Scenes, count: int = 256) -> float:
    """Mean peak signal-to-noise ratio of reconstructions of random pictures, in dB."""
    parts = [random_pictures(scenes, count // 8, Chance.of(99, k, scenes.device))[0] for k in range(8)]  # eight ratios
    errors = [((reconstruct(vae, p).clamp(-1, 1) - p) / 2).square().mean((1, 2, 3)) for p in parts]
    return float((-10 * torch.cat(errors).log10()).mean())


def train_vae(
    run: Run, scenes: Scenes, steps: int, batch: int, learning_rate: float = 1.5e-3, seconds: float = math.inf
) -> bool:
    """Train the autoencoder and keep it as ``vae``; returns whether all steps are done."""
    torch.manual_seed(1)
    vae = make_vae().to(run.device, memory_format=torch.channels_last)
    compiled = run.compiled(vae.encoder), run.compiled(vae.decoder)
    optimizer = torch.optim.AdamW(
        vae.parameters(), learning_rate, (0.9, 0.99), weight_decay=1e-3, fused=run.device.type == "cuda"
    )

    def watch(step: int, ema: nn.ModuleDict) -> dict[str, float]:
        image = random_pictures(scenes, 12, Chance.of(7, 0, scenes.device))[0]
        run.picture(f"vae-{step:06d}", as_bytes(torch.cat([image, reconstruct(ema["vae"], image)])), columns=12)
        return {"psnr": psnr(ema["vae"], scenes)}

    stage = Stage(
        "vae", nn.ModuleDict({"vae": vae}), [optimizer], steps, _step(vae, compiled, scenes, batch), watch=watch
    )
    ema = fit(stage, run, seconds, seed=1)
    if ema is not None:
        run.save("vae", ema["vae"])
        run.facts(vae_psnr_db=round(psnr(ema["vae"], scenes), 2))
    return ema is not None
