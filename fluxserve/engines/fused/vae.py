"""The VAE, pixel by pixel: cuDNN's convolutions over channels-last pictures, our GroupNorm and SiLU between them.

diffusers' AutoencoderKL as FLUX.1 has it, and AutoencoderKLFlux2: the same networks with one attention of a single head
in the middle, and what may lie between them and the latents, see `latents.py`. In the compute dtype, whatever the
transformer is in. A picture may lack an `offset`, the bias of the convolution that it comes from: every layer knows
since it was made which one, and adds it where it reads the picture anyway. Not captured: its launches take a fraction
of what they start, and a graph would keep the pictures of every size in memory for good.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

from fluxserve.engine import Shapes, Signature
from fluxserve.engines.fused import latents
from fluxserve.engines.fused.build import Build, Dense
from fluxserve.engines.fused.latents import Pointwise, Squares, Statistics
from fluxserve.engines.fused.weights import Reader
from fluxserve.families.flux import signatures
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.checkpoint import Checkpoint

FOLDER = "vae"
_EPSILON = 1e-6
_LOG_VARIANCE = (-30.0, 20.0)
_PICTURES = 3
"""So many as large as the largest are there at once, at most: a layer's input, what is made of it, what comes out."""
_BESIDES = 512 * 2**20
"""Bytes, whatever the picture's size: cuDNN's workspaces, the attention's scores, what the pool can't use."""


@dataclass(frozen=True)
class _Context:
    """What every layer is made with; `groups` of its GroupNorms."""

    build: Build
    groups: int

    @property
    def read(self) -> Reader:
        return self.build.read


@dataclass(frozen=True)
class _Picture:
    """pixels: [1, C, H, W], channels-last. statistics: what the next GroupNorm wants of them, if it was taken."""

    pixels: Tensor
    statistics: Tensor | None = None


class _Conv:
    """Without its bias, for which cuDNN would take a pass of its own: whoever reads the result adds it in passing.

    `then` is what follows it and is linear in its channels: it becomes part of the weights before they are rounded.
    """

    def __init__(
        self, c: _Context, name: str, inputs: int, outputs: int, side: int = 3, then: Pointwise | None = None
    ) -> None:
        weight = c.read.shaped(f"{name}.weight", outputs, inputs, side, side)
        self.bias = c.read.shaped(f"{name}.bias", outputs).float()
        if then is not None:
            weight = torch.einsum("nm,mkyx->nkyx", then.weight, weight.float())
            self.bias = then(self.bias)
        self._weight = weight.to(c.build.precision.compute).contiguous(memory_format=torch.channels_last)
        self._margin = side // 2

    def __call__(self, x: Tensor) -> Tensor:
        return conv2d(x, self._weight, padding=self._margin)

    def biased(self, x: Tensor) -> Tensor:
        """The whole of it, where nobody reads the result but the caller."""
        return conv2d(x, self._weight, self.bias.to(x.dtype), padding=self._margin)

    def halved(self, x: Tensor) -> Tensor:
        """Every second pixel, with a margin right and below alone; x has an even height and width.

        A margin of two on all sides gives the same, and a row and a column before it: less to copy than a padded x.
        """
        y = conv2d(x, self._weight, padding=2, stride=2)
        return y[:, :, 1:, 1:].contiguous(memory_format=torch.channels_last)

    def of_constant(self, offset: Tensor) -> Tensor:
        """What a convolution of single pixels makes of an addend [C] that is the same everywhere; without its bias."""
        return self._weight[:, :, 0, 0].float() @ offset


class _Norm:
    """`offset` [C] belongs to every x that comes, and was not added yet."""

    def __init__(self, c: _Context, name: str, channels: int, offset: Tensor | None = None) -> None:
        self._weight, self._bias = (c.read.shaped(f"{name}.{part}", channels).float() for part in ("weight", "bias"))
        self._kernels, self._groups, self._offset = c.build.kernels, c.groups, offset

    def __call__(self, x: _Picture, silu: bool = True) -> Tensor:
        factor, shift, offset = self._weight, self._bias, self._offset
        return self._kernels.group_norm(x.pixels, self._groups, factor, shift, _EPSILON, silu, offset, x.statistics)


class _Resnet:
    """`offset` [C], if any, belongs to every x that comes, and was not added yet; what goes out is whole."""

    def __init__(self, c: _Context, name: str, inputs: int, outputs: int, offset: Tensor | None = None) -> None:
        self._conv1 = _Conv(c, f"{name}.conv1", inputs, outputs)
        self._conv2 = _Conv(c, f"{name}.conv2", outputs, outputs)
        self._norm1 = _Norm(c, f"{name}.norm1", inputs, offset)
        self._norm2 = _Norm(c, f"{name}.norm2", outputs, self._conv1.bias)
        other_depth = inputs != outputs
        self._shortcut = _Conv(c, f"{name}.conv_shortcut", inputs, outputs, side=1) if other_depth else None
        self._kernels, self._groups, self._bias = c.build.kernels, c.groups, self._conv2.bias
        if self._shortcut:
            self._bias = self._bias + self._shortcut.bias
        if offset is not None:
            self._bias = self._bias + (self._shortcut.of_constant(offset) if self._shortcut else offset)

    def __call__(self, x: _Picture) -> _Picture:
        """x is overwritten, unless it has another depth than what comes out."""
        own, other = self._branches(x)
        return _Picture(own, self._kernels.add(own, other, self._bias, self._groups))

    def upsampled(self, x: _Picture) -> Tensor:
        """The same at twice the height and width; the small picture is never written."""
        return self._kernels.add_upsampled(*self._branches(x), self._bias)

    def _branches(self, x: _Picture) -> tuple[Tensor, Tensor]:
        y = self._conv2(self._norm2(_Picture(self._conv1(self._norm1(x)))))
        return self._shortcut(x.pixels) if self._shortcut else x.pixels, y


class _Attention:
    """Every pixel to every other, one head as wide as the picture is deep. q, k and v are one product."""

    def __init__(self, c: _Context, name: str, channels: int) -> None:
        self._norm = _Norm(c, f"{name}.group_norm", channels)
        parts = [c.build.dense(f"{name}.to_{part}", channels, channels) for part in "qkv"]
        biases = [p.bias for p in parts if p.bias is not None]
        self._qkv = Dense(torch.cat([p.weight for p in parts]), torch.cat(biases))
        out = f"{name}.to_out.0"
        self._out = c.read.shaped(f"{out}.weight", channels, channels).to(c.build.precision.compute)
        self._bias = c.read.shaped(f"{out}.bias", channels).float()
        self._kernels, self._groups = c.build.kernels, c.groups

    def __call__(self, x: _Picture) -> _Picture:
        """x is overwritten."""
        _, channels, height, width = x.pixels.shape
        pixels = self._norm(x, silu=False).permute(0, 2, 3, 1).view(height * width, channels)
        mixed = torch.empty_like(pixels)
        q, k, v = self._qkv(pixels).chunk(3, dim=1)
        self._kernels.wide_attention(q, k, v, mixed)
        y = linear(mixed, self._out).view(1, height, width, channels).permute(0, 3, 1, 2)
        return _Picture(x.pixels, self._kernels.add(x.pixels, y, self._bias, self._groups))


class _Middle:
    """`offset`: see _Resnet."""

    def __init__(self, c: _Context, channels: int, offset: Tensor | None = None) -> None:
        self._first = _Resnet(c, "mid_block.resnets.0", channels, channels, offset)
        self._attention = _Attention(c, "mid_block.attentions.0", channels)
        self._last = _Resnet(c, "mid_block.resnets.1", channels, channels)

    def __call__(self, x: _Picture) -> _Picture:
        return self._last(self._attention(self._first(x)))


class _Level:
    """Resnets at one resolution, and the way to the next, if there is one. `offset`: see _Resnet.

    Args:
        depths: channels that come in, and that go out.
        sampler: its name; "" for the last level.
    """

    def __init__(
        self, c: _Context, name: str, resnets: int, depths: tuple[int, int], sampler: str, offset: Tensor | None
    ) -> None:
        inputs, outputs = depths
        self._resnets = [_Resnet(c, f"{name}.resnets.0", inputs, outputs, offset)]
        self._resnets += [_Resnet(c, f"{name}.resnets.{i}", outputs, outputs) for i in range(1, resnets)]
        self.sampler = _Conv(c, f"{name}.{sampler}.0.conv", outputs, outputs) if sampler else None

    def up(self, x: _Picture) -> _Picture:
        """What comes out is twice as high and wide, if there is a sampler."""
        *before, last = self._resnets
        for resnet in before:
            x = resnet(x)
        return _Picture(self.sampler(last.upsampled(x))) if self.sampler else last(x)

    def down(self, x: _Picture) -> _Picture:
        """What comes out is half as high and wide, if there is a sampler."""
        for resnet in self._resnets:
            x = resnet(x)
        return _Picture(self.sampler.halved(x.pixels)) if self.sampler else x


def _levels(
    c: _Context, name: str, channels: Sequence[int], resnets: int, sampler: str, offset: Tensor | None
) -> list[_Level]:
    """One of each depth, of which the first has the depth of what comes. Each adds the bias of the sampler before it,
    the first `offset`; the last has no sampler."""
    levels: list[_Level] = []
    for i, depths in enumerate(zip((channels[0], *channels), channels, strict=False)):
        levels.append(_Level(c, f"{name}.{i}", resnets, depths, sampler if i + 1 < len(channels) else "", offset))
        offset = levels[-1].sampler.bias if levels[-1].sampler else None
    return levels


class _Decoder:
    """`before` is what makes of the loop's latents those that the network takes; None: they are the same."""

    def __init__(self, c: _Context, config: Mapping[str, Any], before: Squares | None) -> None:
        channels, resnets = _decoder_channels(config)[::-1], config["layers_per_block"] + 1
        self._before = before
        self._in = _Conv(c, "conv_in", config["latent_channels"], channels[0])
        self._middle = _Middle(c, channels[0], self._in.bias)
        self._levels = _levels(c, "up_blocks", channels, resnets, "upsamplers", None)
        self._norm = _Norm(c, "conv_norm_out", channels[-1])
        self._out = _Conv(c, "conv_out", channels[-1], config["out_channels"])
        c.read.finish()

    def __call__(self, given: Tensor) -> tuple[Tensor, ...]:
        x = self._middle(_Picture(self._in(self._before(given) if self._before else given)))
        for level in self._levels:
            x = level.up(x)
        return (self._out.biased(self._norm(x)),)


class _Encoder:
    """`then` follows the last convolution; by `statistics` its latents become those of the loop. None: they are."""

    def __init__(
        self, c: _Context, config: Mapping[str, Any], then: Pointwise | None, statistics: Statistics | None
    ) -> None:
        channels, resnets = config["block_out_channels"], config["layers_per_block"]
        self._in = _Conv(c, "conv_in", config["in_channels"], channels[0])
        self._levels = _levels(c, "down_blocks", channels, resnets, "downsamplers", self._in.bias)
        self._middle = _Middle(c, channels[-1])
        self._norm = _Norm(c, "conv_norm_out", channels[-1])
        both = 2 * config["latent_channels"]  # mean, logarithm of variance
        self._out = _Conv(c, "conv_out", channels[-1], both, then=then)
        self._statistics = statistics
        c.read.finish()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        x = _Picture(self._in(pixels))
        for level in self._levels:
            x = level.down(x)
        mean, log_variance = self._out.biased(self._norm(self._middle(x))).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(*_LOG_VARIANCE))
        return self._statistics.normalised(mean, std) if self._statistics else (mean, std)


class FusedVae:
    """An Engine for one way of the VAE; see engine.py."""

    def __init__(
        self, signature: Signature, network: "_Decoder | _Encoder", dtype: torch.dtype, device: torch.device
    ) -> None:
        self.signature, self.dtype, self.device = signature, dtype, device
        self.network: _Decoder | _Encoder | None = network

    def bind(self, shapes: Shapes) -> "_Bound":
        assert self.network is not None, "bind after close"
        return _Bound(self, self.network, self.signature.resolve(shapes))

    def close(self) -> None:
        self.network = None


class _Bound:
    """Pictures go through one after the other."""

    def __init__(self, engine: FusedVae, network: "_Decoder | _Encoder", sizes: Shapes) -> None:
        def empty(name: str) -> Tensor:
            return torch.zeros(sizes[name], dtype=engine.dtype, device=engine.device)

        self.inputs: Mapping[str, Tensor] = {t.name: empty(t.name) for t in engine.signature.inputs}
        self.outputs: Mapping[str, Tensor] = {t.name: empty(t.name) for t in engine.signature.outputs}
        self._network = network

    @torch.inference_mode()
    def run(self) -> None:
        (given,) = self.inputs.values()
        for row in range(len(given)):
            picture = given[row : row + 1].contiguous(memory_format=torch.channels_last)
            for output, result in zip(self.outputs.values(), self._network(picture), strict=True):
                output[row : row + 1].copy_(result)


def decoder(checkpoint: Checkpoint, build: Build) -> FusedVae:
    """Open the network from latents to pixels. Raises CheckpointError."""
    config, beside = checkpoint.config(FOLDER), _beside(build, "quant_conv.")
    convolution = latents.pointwise(beside, config, "post_quant_conv", config["latent_channels"])
    before = latents.before(convolution, latents.statistics(beside, checkpoint), build.precision.compute)
    beside.finish()
    network = _Decoder(_Context(build.below("decoder."), config["norm_num_groups"]), config, before)
    return FusedVae(
        signatures.vae_decoder(FluxSpec.of(checkpoint.spec)), network, build.precision.compute, build.device
    )


def encoder(checkpoint: Checkpoint, build: Build) -> FusedVae:
    """Open the network from pixels to mean and standard deviation of latents. Raises CheckpointError."""
    config, beside = checkpoint.config(FOLDER), _beside(build, "post_quant_conv.")
    then = latents.pointwise(beside, config, "quant_conv", 2 * config["latent_channels"])
    statistics = latents.statistics(beside, checkpoint)
    beside.finish()
    network = _Encoder(_Context(build.below("encoder."), config["norm_num_groups"]), config, then, statistics)
    return FusedVae(
        signatures.vae_encoder(FluxSpec.of(checkpoint.spec)), network, build.precision.compute, build.device
    )


def peak(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes that one picture takes on its way through either network, at most, if it is as large as any may be."""
    config, pixels = checkpoint.config(FOLDER), checkpoint.spec.limits.max_pixels
    largest = 0
    for channels in (config["block_out_channels"], _decoder_channels(config)):
        deeper = (*channels[1:], channels[-1])  # what comes to a level is as deep as the one below it
        pairs = enumerate(zip(channels, deeper, strict=True))
        largest = max(largest, *(max(pair) * pixels >> 2 * level for level, pair in pairs))
    return _PICTURES * largest * dtype.itemsize + _BESIDES


def _decoder_channels(config: Mapping[str, Any]) -> list[int]:
    """FLUX.2-small-decoder's are fewer than its encoder's."""
    channels: list[int] = config.get("decoder_block_out_channels") or config["block_out_channels"]
    return channels


def _beside(build: Build, other: str) -> Reader:
    """Return a reader of what belongs to neither network; `other` is read by the network of the other direction."""
    read = build.read.below("")
    read.ignore_below("encoder.", "decoder.", other)
    return read
