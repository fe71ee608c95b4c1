"""Stage 2: every training picture, drawn, encoded and captioned once, so that later stages never run the VAE."""

import itertools
import random
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.grammar import SIZES, Picture, caption, training_pairs
from training.loop import Chance, Run
from training.models import make_vae
from training.scenes import Scenes
from training.text import corpus, make_clip_tokenizer, make_t5_tokenizer, tokenise

NOISY_CAPTIONS = 0.1
_OTHER_SIZES = ((96, 96), (160, 160), (128, 192), (192, 128))


@dataclass
class Bucket:
    """Pictures of one size, on the device.

    Attributes:
        size: height and width in pixels.
        latents: bf16 [N, H/16·W/16, 64], packed, shifted and scaled to zero mean and unit spread.
        t5, clip: int16 [N, 32], token ids of the captions.
    """

    size: tuple[int, int]
    latents: Tensor
    t5: Tensor
    clip: Tensor


def pack(latents: Tensor) -> Tensor:
    """FLUX's packing: [B, C, H, W] → [B, H/2·W/2, 4·C]."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``, for latents of ``height`` × ``width``: [B, H/2·W/2, 4·C] → [B, C, H, W]."""
    b, _, c = tokens.shape
    grid = tokens.view(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(b, c // 4, height, width)


def _ratios(variations: int) -> list[tuple[str, float]]:
    """Sizes and ratios in the proportion 3 medium : 1 small : 1 big, cycling through the ratios of each."""
    cycles = {name: itertools.cycle(ratios) for name, ratios in SIZES.items()}
    names = itertools.cycle(("medium", "small", "medium", "big", "medium"))
    return [(name, next(cycles[name])) for name in itertools.islice(names, variations)]


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        return vae.encode(images.to(memory_format=torch.channels_last)).latent_dist.mean.float()


def _encode_all(
    vae: AutoencoderKL, scenes: Scenes, size: tuple[int, int], variations: int, batch: int = 512
) -> tuple[Tensor, list[Picture]]:
    pairs = torch.tensor(training_pairs(), device=scenes.device)
    parts, pictures = [], []
    for k, (name, ratio) in enumerate(_ratios(variations)):
        generator = Chance.of(size[0] * 1000 + size[1], k, scenes.device).device
        for chunk in pairs.split(batch):
            image = scenes.draw(chunk[:, 0], chunk[:, 1], ratio, size, generator)
            parts.append(pack(_encode(vae, image)).bfloat16())
        pictures += [Picture(thing, colour, name) for thing, colour in pairs.tolist()]
    return torch.cat(parts), pictures


def build_latents(run: Run, scenes: Scenes, variations: int, other_variations: int) -> None:
    """Encode and caption everything; writes ``latents.cache`` and the statistics of the latents."""
    vae = run.load("vae", make_vae()).to(memory_format=torch.channels_last)
    tokenizers = make_t5_tokenizer(corpus()), make_clip_tokenizer(corpus())
    sizes = [((128, 128), variations), *((size, other_variations) for size in _OTHER_SIZES if other_variations)]
    buckets = []
    for size, count in sizes:
        latents, pictures = _encode_all(vae, scenes, size, count)
        rng = random.Random(str(size))  # noqa: S311
        captions = [caption(picture, rng, noise=NOISY_CAPTIONS) for picture in pictures]
        t5, clip = (tokenise(tokenizer, captions) for tokenizer in tokenizers)
        buckets.append({"size": size, "latents": latents, "t5": t5, "clip": clip})
        run.log(stage="latents", size=size, pictures=len(latents))
    first = buckets[0]["latents"].float()
    shift, scale = round(float(first.mean()), 4), round(1 / float(first.std()), 4)
    for bucket in buckets:
        bucket["latents"] = ((bucket["latents"].float() - shift) * scale).bfloat16()
    run.facts(shift_factor=shift, scaling_factor=scale, pictures=sum(len(b["latents"]) for b in buckets))
    torch.save(buckets, run.folder / "latents.cache")


def load_latents(run: Run) -> list[Bucket]:
    """Read what ``build_latents`` wrote, onto the run's device."""
    saved = torch.load(run.folder / "latents.cache", map_location=run.device, weights_only=True)
    return [Bucket(**bucket) for bucket in saved]
