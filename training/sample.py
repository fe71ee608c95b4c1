"""Paint with modules in training: FLUX.1's sampler in its shortest form, with or without two-pass guidance."""

import itertools
import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.flow import Text, image_ids, shift_of, velocity
from training.latents import unpack
from training.models import LATENT_CHANNELS, VAE_STRIDE
from training.scenes import as_bytes


def schedule(steps: int, tokens: int) -> list[float]:
    """FLUX.1-dev's noise levels, from 1 down to 0: steps + 1 values."""
    shift = math.exp(shift_of(tokens))
    levels = [1 - k * (1 - 1 / steps) / max(steps - 1, 1) for k in range(steps)]
    return [shift / (shift + 1 / s - 1) for s in levels] + [0.0]


@dataclass
class Painter:
    """Modules on one device that together turn prompts into pixels.

    Attributes:
        shift, scale: the VAE's shift_factor and scaling_factor.
    """

    transformer: nn.Module
    text: Text
    vae: AutoencoderKL
    shift: float
    scale: float

    def _noise(self, seeds: list[int], height: int, width: int, device: torch.device) -> Tensor:
        shape = (LATENT_CHANNELS * 4, height // (2 * VAE_STRIDE) * (width // (2 * VAE_STRIDE)))
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).transpose(1, 2).to(device)

    @torch.no_grad()
    def paint(
        self,
        prompts: list[str],
        seeds: list[int],
        steps: int = 20,
        guidance: float = 1.0,
        two_pass: float | None = None,
        size: tuple[int, int] = (128, 128),
        text_tokens: int = 32,
    ) -> Tensor:
        """Draw one picture a prompt.

        Args:
            guidance: what the guidance embedding is given; two_pass: classifier-free guidance on top of it.
        Returns: uint8 [N, H, W, 3] on the CPU.
        """
        device = next(self.transformer.parameters()).device
        x = self._noise(seeds, *size, device)
        ids = image_ids(*size, device)
        with torch.autocast(device.type, torch.bfloat16):
            text = self.text(*self.text.ids(prompts, text_tokens))
            blank = self.text(*self.text.ids([""] * len(prompts), text_tokens)) if two_pass else text
        strength = torch.full((len(prompts),), guidance, device=device)
        levels = schedule(steps, x.shape[1])
        for now, then in itertools.pairwise(levels):
            t = torch.full((len(prompts),), now, device=device)
            v = velocity(self.transformer, x, t, strength, text, ids)
            if two_pass:
                without = velocity(self.transformer, x, t, strength, blank, ids)
                v = without + two_pass * (v - without)
            x = x + (then - now) * v
        latents = unpack(x, size[0] // VAE_STRIDE, size[1] // VAE_STRIDE) / self.scale + self.shift
        with torch.autocast(device.type, torch.bfloat16):
            return as_bytes(self.vae.decode(latents).sample)
