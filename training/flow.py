"""Stages 3 and 4: flow matching with the text encoders, then guidance distilled into its embedding.

A point on the path is x_t = (1 - t)·x_0 + t·noise and its velocity noise - x_0 (Liu et al., arXiv:2209.03003),
as in FLUX.1; the transformer is given t in 0..1 and the guidance as it is served.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from training.latents import Bucket
from training.loop import Chance, Losses
from training.models import T5_TOKENS, make_clip, make_t5, make_transformer
from training.text import corpus, make_clip_tokenizer, make_t5_tokenizer, tokenise

CAPTION_DROPOUT = 0.1
GUIDANCE = (1.0, 6.0)  # the range that distillation covers
_LONG_TEXT = (64, 128, 256, 512)  # other paddings of the T5 sequence; 512 is the default of diffusers
_RARE = 0.15  # part of the batches at another size or another padding


@dataclass
class Batch:
    """Latents [B, T, 64], T5 ids [B, L], CLIP ids [B, 32] and the position ids that go with them."""

    latents: Tensor
    t5: Tensor
    clip: Tensor
    image_ids: Tensor
    usual: bool  # the common shape, for which there is a compiled transformer


class Text(nn.Module):
    """Both encoders: token ids → T5's sequence [B, L, 128] and CLIP's pooled vector [B, 128]."""

    def __init__(self) -> None:
        super().__init__()
        captions = corpus()
        self.tokenizers = make_t5_tokenizer(captions), make_clip_tokenizer(captions)
        self.t5, self.clip = make_t5(self.tokenizers[0]), make_clip(self.tokenizers[1])

    def forward(self, t5: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
        """int64 ids [B, L] and [B, 32 or 77]; no attention mask, as FLUX serves it."""
        return self.t5(input_ids=t5).last_hidden_state, self.clip(input_ids=clip).pooler_output

    def ids(self, prompts: list[str], length: int = T5_TOKENS) -> tuple[Tensor, Tensor]:
        """Tokenise prompts for ``forward``, on the encoders' device."""
        device = next(self.parameters()).device
        t5, clip = self.tokenizers
        return tokenise(t5, prompts, length).long().to(device), tokenise(clip, prompts).long().to(device)


def make_flow() -> nn.ModuleDict:
    """The transformer and the text encoders, with fresh weights."""
    torch.manual_seed(2)
    return nn.ModuleDict({"transformer": make_transformer(), "text": Text()})


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """FLUX.1's position ids (0, y, x) of a picture in pixels: float32 [H/16·W/16, 3]."""
    y, x = torch.meshgrid(torch.arange(height // 16), torch.arange(width // 16), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float().to(device)


def shift_of(tokens: int) -> float:
    """FLUX.1's μ for a number of image tokens: 0.5 at 256, 1.15 at 4096, linear."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def draw_times(count: int, tokens: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Times of a batch: half uniform, half logit-normal, shifted as the sampler shifts its own: [B] in 0..1.

    The logit-normal half favours the middle, where the velocity is hardest; the uniform one keeps the ends.
    """
    normal = torch.randn(count, device=device, generator=generator).sigmoid()
    uniform = torch.rand(count, device=device, generator=generator)
    t = torch.where(torch.arange(count, device=device) % 2 == 0, normal, uniform).clamp(1e-4, 1)
    shift = math.exp(shift_of(tokens))
    return shift * t / (1 + (shift - 1) * t)


def velocity(
    net: Callable[..., Tensor], x: Tensor, t: Tensor, guidance: Tensor, text: tuple[Tensor, Tensor], ids: Tensor
) -> Tensor:
    """Call a FLUX transformer: x [B, T, 64], t and guidance [B] → the velocity, float32 [B, T, 64]."""
    sequence, pooled = text
    text_ids = torch.zeros(sequence.shape[1], 3, device=x.device)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = net(
            hidden_states=x,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            timestep=t,
            guidance=guidance,
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
    return out.float()


class Batches:
    """Draws batches: mostly 128×128 with 32 text tokens, sometimes another size or padding, with dropped captions."""

    def __init__(self, buckets: list[Bucket], batch: int, empty: tuple[Tensor, Tensor]):
        self.buckets, self.batch, self.empty = buckets, batch, empty
        self.ids = {b.size: image_ids(*b.size, b.latents.device) for b in buckets}

    def draw(self, chance: Chance) -> Batch:
        """A batch; unusual ones are smaller, so that they cost about as much."""
        bucket, length, count = self.buckets[0], T5_TOKENS, self.batch
        usual = chance.host.random() >= _RARE
        if not usual:
            if len(self.buckets) > 1 and chance.host.random() < 0.5:
                bucket = self.buckets[int(chance.host.integers(1, len(self.buckets)))]
            if bucket is self.buckets[0] or chance.host.random() < 0.3:
                length = int(chance.host.choice(_LONG_TEXT))
            count = max(1, self.batch * 96 // (length + bucket.latents.shape[1]))
        device = bucket.latents.device
        rows = torch.randint(len(bucket.latents), (count,), device=device, generator=chance.device)
        dropped = torch.rand(count, 1, device=device, generator=chance.device) < CAPTION_DROPOUT
        t5 = torch.where(dropped, self.empty[0], bucket.t5[rows].long())
        clip = torch.where(dropped, self.empty[1], bucket.clip[rows].long())
        t5 = F.pad(t5, (0, length - T5_TOKENS))  # T5's <pad> is 0
        return Batch(bucket.latents[rows].float(), t5, clip, self.ids[bucket.size], usual)


def noised(batch: Batch, chance: Chance) -> tuple[Tensor, Tensor, Tensor]:
    """Points on the paths of a batch: x_t, t and the true velocity."""
    clean = batch.latents
    t = draw_times(len(clean), clean.shape[1], chance.device, clean.device)
    noise = torch.randn(clean.shape, device=clean.device, generator=chance.device)
    mixed = t[:, None, None]
    return (1 - mixed) * clean + mixed * noise, t, noise - clean


def flow_loss(modules: nn.ModuleDict, batches: Batches, compiled: Callable[..., Tensor]) -> Callable[[Chance], Losses]:
    """Flow matching at guidance 1: the mean squared error of the velocity."""
    text, net = modules["text"], modules["transformer"]

    def loss(chance: Chance) -> Losses:
        batch = batches.draw(chance)
        x, t, target = noised(batch, chance)
        with torch.autocast(x.device.type, torch.bfloat16):
            encoded = text(batch.t5, batch.clip)
        one = torch.ones_like(t)
        out = velocity(compiled if batch.usual else net, x, t, one, encoded, batch.image_ids)
        return {"loss": F.mse_loss(out, target)}

    return loss


def distil_loss(
    student: FluxTransformer2DModel,
    teacher: nn.ModuleDict,
    compiled: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    batches: Batches,
) -> Callable[[Chance], Losses]:
    """Guidance distillation (Meng et al., arXiv:2210.03142): one pass learns what two passes of the teacher give.

    Args:
        compiled: student and teacher, compiled for the usual shape.
    """
    text = teacher["text"]

    def loss(chance: Chance) -> Losses:
        batch = batches.draw(chance)
        learner, frozen = compiled if batch.usual else (student, teacher["transformer"])
        x, t, _ = noised(batch, chance)
        guidance = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(
            t.shape, device=t.device, generator=chance.device
        )
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
            encoded = text(batch.t5, batch.clip)
            empty = F.pad(batches.empty[0], (0, batch.t5.shape[1] - T5_TOKENS)), batches.empty[1]
            blank = tuple(e.repeat(len(t), *[1] * (e.ndim - 1)) for e in text(*(e[None] for e in empty)))
            one = torch.ones_like(t)
            with_text = velocity(frozen, x, t, one, encoded, batch.image_ids)
            without = velocity(frozen, x, t, one, blank, batch.image_ids)
            target = without + guidance[:, None, None] * (with_text - without)
        out = velocity(learner, x, t, guidance, encoded, batch.image_ids)
        return {"loss": F.mse_loss(out, target)}

    return loss


def make_optimizer(modules: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW. Muon learnt more a step here but took twice the time, its many small kernels being launched one by one."""
    fused = next(modules.parameters()).is_cuda
    return torch.optim.AdamW(modules.parameters(), learning_rate, (0.9, 0.99), weight_decay=0.01, fused=fused)


def frozen_copy(modules: nn.Module) -> nn.Module:
    """A copy that nothing trains."""
    return copy.deepcopy(modules).eval().requires_grad_(False)
