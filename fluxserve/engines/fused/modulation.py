"""What depends on time, guidance and the pooled prompt alone: every block's adaLN modulation, for many steps at once.

The embedding of step and prompt is diffusers' CombinedTimestepGuidanceTextProjEmbeddings, or FLUX.2's
Flux2TimestepGuidanceEmbeddings, rounded where theirs is; all modulation layers are one matrix behind it, read once for
up to AHEAD rows (a row is one step of one image). FLUX.1 has layers for each block, FLUX.2 for each kind of block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxserve.engines.fused.blocks import DoubleBlock, SingleBlock
from fluxserve.engines.fused.build import Build, Dense
from fluxserve.engines.fused.weights import Reader
from fluxserve.families.flux.parts import TransformerSpec
from fluxserve.kernels.gemm.adaln import quantise_channels
from fluxserve.kernels.operations import Operations

AHEAD = 32
"""Rows whose modulation is held at once: 4 MB each for FLUX.1."""

_TIME_CHANNELS = 256
_MAX_PERIOD = 10000
_FINAL_PARTS = 2


@dataclass(frozen=True)
class _Layers:
    """One layer for each stream, text first; each gives `parts` times D numbers."""

    modules: tuple[str, ...]
    parts: int


def _layers(spec: TransformerSpec) -> list[_Layers]:
    """All there are: of double blocks, of single blocks, of the last norm."""
    final = _Layers(("norm_out.linear",), _FINAL_PARTS)
    if spec.generation == 2:
        streams = tuple(f"double_stream_modulation_{stream}.linear" for stream in ("txt", "img"))
        return [
            _Layers(streams, DoubleBlock.PARTS),
            _Layers(("single_stream_modulation.linear",), SingleBlock.PARTS),
            final,
        ]
    blocks = [f"transformer_blocks.{index}" for index in range(spec.num_layers)]
    double = [_Layers((f"{b}.norm1_context.linear", f"{b}.norm1.linear"), DoubleBlock.PARTS) for b in blocks]
    blocks = [f"single_transformer_blocks.{index}" for index in range(spec.num_single_layers)]
    return [*double, *(_Layers((f"{b}.norm.linear",), SingleBlock.PARTS) for b in blocks), final]


def width(spec: TransformerSpec) -> int:
    """Numbers that steer one step."""
    return sum(layers.parts * len(layers.modules) for layers in _layers(spec)) * spec.hidden_size


class Modulation:
    """Embedders and the one matrix.

    Where blocks are quantised it is INT8 with a scale per channel for FLUX.1. FLUX.2's is a twentieth of its weights,
    and every block would be steered by the same rounding: it stays in the compute dtype.
    """

    def __init__(self, build: Build, spec: TransformerSpec) -> None:
        precision = build.precision
        self._spec, self._precision, self._layers = spec, precision, _layers(spec)
        inputs = {"timestep_embedder": _TIME_CHANNELS}
        if spec.pooled_projection_dim is not None:
            inputs["text_embedder"] = spec.pooled_projection_dim
        if spec.guidance_embeds:
            inputs["guidance_embedder"] = _TIME_CHANNELS
        self._embedders = {name: self._embedder(build, name, channels) for name, channels in inputs.items()}
        self._quantised = precision.quantised and spec.generation == 1
        rows, dtype = width(spec), torch.int8 if self._quantised else precision.compute
        self._weight = torch.empty(rows, spec.hidden_size, dtype=dtype, device=build.device)
        self._scale = torch.ones(rows, dtype=torch.float32, device=build.device)
        self._bias = torch.zeros(rows, dtype=torch.float32, device=build.device)
        at = 0
        for layers in self._layers:
            at = self._put(build.read, at, layers)

    def _embedder(self, build: Build, name: str, inputs: int) -> tuple[Dense, Dense]:
        """The two layers that `_mlp` runs."""
        spec, d = self._spec, self._spec.hidden_size
        module = f"{'time_text_embed' if spec.generation == 1 else 'time_guidance_embed'}.{name}"
        first = build.dense(f"{module}.linear_1", inputs, d, spec.biased)
        return first, build.dense(f"{module}.linear_2", d, d, spec.biased)

    def _put(self, read: Reader, at: int, layers: _Layers) -> int:
        """Write their rows as [parts, streams, D]; where the next begin."""
        d, parts, modules = self._spec.hidden_size, layers.parts, layers.modules
        weights = [read.shaped(f"{module}.weight", parts * d, d).view(parts, d, d) for module in modules]
        weight, end = torch.stack(weights, dim=1).view(-1, d), at + parts * len(modules) * d
        if self._quantised:
            self._weight[at:end], self._scale[at:end] = quantise_channels(weight)
        else:
            self._weight[at:end] = weight
        if self._spec.biased:
            biases = [read.shaped(f"{module}.bias", parts * d).view(parts, d) for module in modules]
            self._bias[at:end] = torch.stack(biases, dim=1).view(-1)
        return end

    def __call__(self, kernels: Operations, timesteps: Tensor, given: Mapping[str, Tensor], out: Tensor) -> None:
        """Write out, float32 [rows, width].

        timesteps [rows] in 0..1; given: guidance [rows] and pooled_projections [rows, ..], if the model takes them.
        """
        x = torch.nn.functional.silu(self._embed(timesteps, given))
        if self._quantised:
            kernels.modulation(x, self._weight, self._scale, self._bias, out)
        else:
            torch.add(torch.nn.functional.linear(x, self._weight), self._bias, out=out)

    def _embed(self, timesteps: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        compute = self._precision.compute
        embedding = self._mlp("timestep_embedder", _sinusoid(timesteps.to(compute) * 1000).to(compute))
        if "guidance_embedder" in self._embedders:
            scaled = _sinusoid(given["guidance"].to(compute) * 1000).to(compute)
            embedding = embedding + self._mlp("guidance_embedder", scaled)
        if "text_embedder" in self._embedders:
            embedding = embedding + self._mlp("text_embedder", given["pooled_projections"].to(compute))
        return embedding

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        first, second = self._embedders[name]
        return second(torch.nn.functional.silu(first(x)))

    def split(self, step: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Views of one row [width]: [6, 2, D] a double block, [3, 1, D] a single one; scale and shift [2, 1, D]."""
        spec, d = self._spec, self._spec.hidden_size
        sizes = [(layers.parts, len(layers.modules), d) for layers in self._layers]
        parts = torch.split(step, [math.prod(size) for size in sizes])
        *blocks, final = (part.view(size) for part, size in zip(parts, sizes, strict=True))
        if spec.generation == 2:
            double, single = blocks
            return [double] * spec.num_layers, [single] * spec.num_single_layers, final
        return blocks[: spec.num_layers], blocks[spec.num_layers :], final


def _sinusoid(t: Tensor) -> Tensor:
    """cos, then sin, of t at 128 frequencies from 1 down to 1/10,000; float32 [rows, 256]."""
    half = _TIME_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(_MAX_PERIOD) / half)
    angles = t[:, None].float() * torch.exp(exponents)[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
