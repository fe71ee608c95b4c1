"""What depends on time, guidance and the pooled prompt alone: every block's adaLN modulation, for many steps at once.

The embedding of step and prompt is diffusers' CombinedTimestepGuidanceTextProjEmbeddings, rounded where theirs is; all
blocks' modulation layers are one matrix behind it, read once for up to AHEAD rows (a row is one step of one image).
"""

import math

import torch
from torch import Tensor

from fluxserve.engines.fused.blocks import DoubleBlock, SingleBlock
from fluxserve.engines.fused.weights import Dense, Precision, Reader, dense
from fluxserve.kernels.modulation import quantise_channels
from fluxserve.kernels.operations import Operations
from fluxserve.spec import TransformerSpec

AHEAD = 32
"""Rows whose modulation is held at once: 4 MB each for FLUX.1."""

_TIME_CHANNELS = 256
_MAX_PERIOD = 10000
_FINAL_PARTS = 2


def width(spec: TransformerSpec) -> int:
    """Numbers that steer one step: of every double block, every single block and the last norm."""
    double = spec.num_layers * DoubleBlock.PARTS * DoubleBlock.STREAMS
    single = spec.num_single_layers * SingleBlock.PARTS * SingleBlock.STREAMS
    return (double + single + _FINAL_PARTS) * spec.hidden_size


class Modulation:
    """Embedders and the one matrix; INT8 with a scale per channel where blocks are quantised."""

    def __init__(self, read: Reader, spec: TransformerSpec, precision: Precision) -> None:
        self._spec, self._precision = spec, precision
        assert spec.pooled_projection_dim is not None, "open.py lets no other model in"
        inputs = {"timestep_embedder": _TIME_CHANNELS, "text_embedder": spec.pooled_projection_dim}
        if spec.guidance_embeds:
            inputs["guidance_embedder"] = _TIME_CHANNELS
        self._embedders = {name: self._embedder(read, name, channels) for name, channels in inputs.items()}
        device = self._embedders["text_embedder"][0].weight.device
        rows, dtype = width(spec), torch.int8 if precision.quantised else precision.compute
        self._weight = torch.empty(rows, spec.hidden_size, dtype=dtype, device=device)
        self._scale = torch.ones(rows, dtype=torch.float32, device=device)
        self._bias = torch.empty(rows, dtype=torch.float32, device=device)
        at = 0
        for index in range(spec.num_layers):
            block = f"transformer_blocks.{index}"
            at = self._put(read, at, [f"{block}.norm1_context.linear", f"{block}.norm1.linear"], DoubleBlock.PARTS)
        for index in range(spec.num_single_layers):
            at = self._put(read, at, [f"single_transformer_blocks.{index}.norm.linear"], SingleBlock.PARTS)
        at = self._put(read, at, ["norm_out.linear"], _FINAL_PARTS)

    def _embedder(self, read: Reader, name: str, inputs: int) -> tuple[Dense, Dense]:
        """The two layers that `_mlp` runs."""
        module, precision, d = f"time_text_embed.{name}", self._precision, self._spec.hidden_size
        first = dense(read, f"{module}.linear_1", precision, inputs, d)
        return first, dense(read, f"{module}.linear_2", precision, d, d)

    def _put(self, read: Reader, at: int, modules: list[str], parts: int) -> int:
        """Write the rows of one block's layers as [parts, streams, D]; where the next begins."""
        d = self._spec.hidden_size
        weights = [read.shaped(f"{module}.weight", parts * d, d).view(parts, d, d) for module in modules]
        biases = [read.shaped(f"{module}.bias", parts * d).view(parts, d) for module in modules]
        weight, end = torch.stack(weights, dim=1).view(-1, d), at + parts * len(modules) * d
        if self._precision.quantised:
            self._weight[at:end], self._scale[at:end] = quantise_channels(weight)
        else:
            self._weight[at:end] = weight
        self._bias[at:end] = torch.stack(biases, dim=1).view(-1)
        return end

    def __call__(self, run: Operations, timesteps: Tensor, guidance: Tensor, pooled: Tensor, out: Tensor) -> None:
        """Write out, float32 [rows, width]. timesteps [rows] in 0..1, guidance [rows], pooled [rows, ..]."""
        x = torch.nn.functional.silu(self._embed(timesteps, guidance, pooled))
        if self._precision.quantised:
            run.modulation(x, self._weight, self._scale, self._bias, out)
        else:
            torch.add(torch.nn.functional.linear(x, self._weight), self._bias, out=out)

    def _embed(self, timesteps: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        compute = self._precision.compute
        embedding = self._mlp("timestep_embedder", _sinusoid(timesteps.to(compute) * 1000).to(compute))
        if "guidance_embedder" in self._embedders:
            scaled = _sinusoid(guidance.to(compute) * 1000).to(compute)
            embedding = embedding + self._mlp("guidance_embedder", scaled)
        return embedding + self._mlp("text_embedder", pooled.to(compute))

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        first, second = self._embedders[name]
        return second(torch.nn.functional.silu(first(x)))

    def split(self, step: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Views of one row [width]: [6, 2, D] a double block, [3, 1, D] a single one; scale and shift [2, 1, D]."""
        spec, d = self._spec, self._spec.hidden_size
        sizes = [DoubleBlock.PARTS * DoubleBlock.STREAMS * d] * spec.num_layers
        sizes += [SingleBlock.PARTS * SingleBlock.STREAMS * d] * spec.num_single_layers + [_FINAL_PARTS * d]
        parts = torch.split(step, sizes)
        double = [p.view(DoubleBlock.PARTS, DoubleBlock.STREAMS, d) for p in parts[: spec.num_layers]]
        single = [p.view(SingleBlock.PARTS, SingleBlock.STREAMS, d) for p in parts[spec.num_layers : -1]]
        return double, single, parts[-1].view(_FINAL_PARTS, 1, d)


def _sinusoid(t: Tensor) -> Tensor:
    """cos, then sin, of t at 128 frequencies from 1 down to 1/10,000; float32 [rows, 256]."""
    half = _TIME_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(_MAX_PERIOD) / half)
    angles = t[:, None].float() * torch.exp(exponents)[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
