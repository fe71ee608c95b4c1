"""FLUX.1's double and single blocks: what is read of a checkpoint, and the seven or four launches that each of them is.

diffusers' FluxTransformerBlock and FluxSingleTransformerBlock, with these differences in arithmetic: products keep
float32 until bias, activation, gate and residual are done, and round once; the residual stream is in the compute dtype
as theirs is. Rows are text, then image; a double block has weights for each, a single block one set for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxserve.artifact import Scales
from fluxserve.engines.fused.scales import BlockScales, of_block
from fluxserve.engines.fused.weights import Precision, Reader, stack
from fluxserve.kernels.layers import Heads, Linear, in_halves
from fluxserve.kernels.operations import Operations
from fluxserve.spec import TransformerSpec

MLP_RATIO = 4
_DOUBLE_STREAMS = (("add_{}_proj", "to_add_out", "norm_added_{}", "ff_context"), ("to_{}", "to_out.0", "norm_{}", "ff"))
"""diffusers' names in a double block's attention and MLP: text, image."""


@dataclass(frozen=True)
class Buffers:
    """One image's activations, at fixed addresses. S rows, of which `split` are text; D = hidden_size.

    residual: compute dtype [S, D]. normed: linear dtype [S, D], with float32 row_scale [S] if that is E4M3.
    qkv: linear dtype [S, 3·D]. wide: linear dtype [S, D + 4·D], attention's output and the MLP's hidden layer side by
    side, which is what a single block's projection reads. cos, sin: float32 [S, head_dim / 2].
    """

    split: int
    residual: Tensor
    normed: Tensor
    row_scale: Tensor | None
    qkv: Tensor
    wide: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def attended(self) -> Tensor:
        return self.wide[:, : self.residual.shape[1]]

    @property
    def hidden(self) -> Tensor:
        return self.wide[:, self.residual.shape[1] :]


class _Attention:
    """What both kinds of block do with q, k and v."""

    def __init__(self, spec: TransformerSpec, norms: Tensor, scales: BlockScales) -> None:
        self._heads = spec.num_attention_heads
        streams, _, dim = norms.shape
        ones = torch.ones(streams, 1, dim, device=norms.device)
        inverse = torch.tensor([1 / scales.q, 1 / scales.k, 1 / scales.v], device=norms.device)
        halves = in_halves(dim).to(norms.device)
        self._factors = torch.cat([norms[:, :, halves], ones], dim=1) * inverse[:, None]
        descale = [scales.q, scales.k, scales.v, 1 / scales.out]
        self._descale = torch.tensor(descale, dtype=torch.float32, device=norms.device)

    def heads(self, b: Buffers) -> Heads:
        """What becomes of q, k and v."""
        return Heads(self._factors, b.cos, b.sin)

    def __call__(self, run: Operations, b: Buffers) -> None:
        run.attention(b.qkv, self._heads, self._descale, b.attended)


def _order(spec: TransformerSpec, device: torch.device) -> Tensor:
    """Of a product's outputs: q and k with their heads in halves (see kernels.linear.in_halves), v as it is."""
    d, dim = spec.hidden_size, spec.attention_head_dim
    starts = torch.arange(0, 2 * d, dim)[:, None]
    return torch.cat([(starts + in_halves(dim)).flatten(), torch.arange(2 * d, 3 * d)]).to(device)


class DoubleBlock:
    """Text and image each with weights of their own, attending to each other."""

    PARTS, STREAMS = 6, 2
    """Of its modulation: shift, scale, gate before attention and before the MLP; text and image."""

    def __init__(
        self,
        read: Reader,
        index: int,
        spec: TransformerSpec,
        precision: Precision,
        found: Scales | None,
        run: Operations,
    ) -> None:
        name, width = f"transformer_blocks.{index}", spec.hidden_size
        hidden = tuple(f"{mlp}.net.2" for *_, mlp in _DOUBLE_STREAMS)
        scales = of_block(found, name, hidden, spec.attention_head_dim) if found else BlockScales()

        def linear(modules: Sequence[Sequence[str]], inputs: int, outputs: int, factor: float = 1.0) -> Linear:
            return stack(read, _of(name, modules), inputs, [outputs], precision, [factor, factor], arrange=run.arrange)

        parts = [[f"attn.{q.format(part)}" for part in "qkv"] for q, *_ in _DOUBLE_STREAMS]
        order = _order(spec, read.device)
        self._qkv = stack(read, _of(name, parts), width, [width] * 3, precision, order=order, arrange=run.arrange)
        norms = [f"{name}.attn.{norm}" for _, _, norm, _ in _DOUBLE_STREAMS]
        self._attention = _Attention(spec, _norms(read, norms, spec), scales)
        self._out = linear([[f"attn.{out}"] for _, out, _, _ in _DOUBLE_STREAMS], width, width, scales.out)
        up, down = ([[f"{mlp}.net.{part}"] for *_, mlp in _DOUBLE_STREAMS] for part in ("0.proj", "2"))
        self._up = linear(up, width, MLP_RATIO * width)
        self._down = linear(down, MLP_RATIO * width, width, scales.hidden)
        self._inverse_hidden = 1 / scales.hidden

    def __call__(self, run: Operations, b: Buffers, modulation: Tensor) -> None:
        """modulation: float32 [6, 2, D]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        run.norm(b.residual, shift, scale, b.split, b.normed, b.row_scale)
        run.linear_heads(b.normed, b.row_scale, self._qkv, b.split, self._attention.heads(b), b.qkv)
        self._attention(run, b)
        run.linear_add(b.attended, None, self._out, b.split, gate, b.residual)
        run.norm(b.residual, mlp_shift, mlp_scale, b.split, b.normed, b.row_scale)
        run.linear_gelu(b.normed, b.row_scale, self._up, b.split, self._inverse_hidden, b.hidden)
        run.linear_add(b.hidden, None, self._down, b.split, mlp_gate, b.residual)


class SingleBlock:
    """One set of weights for all rows; attention and MLP side by side, projected back together."""

    PARTS, STREAMS = 3, 1
    """Of its modulation: shift, scale, gate."""

    def __init__(
        self,
        read: Reader,
        index: int,
        spec: TransformerSpec,
        precision: Precision,
        found: Scales | None,
        run: Operations,
    ) -> None:
        name, width = f"single_transformer_blocks.{index}", spec.hidden_size
        scales = of_block(found, name, ("proj_out",), spec.attention_head_dim) if found else BlockScales()
        parts = [["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]]
        rest = torch.arange(3 * width, (3 + MLP_RATIO) * width, device=read.device)
        order = torch.cat([_order(spec, read.device), rest])
        outputs = [width, width, width, MLP_RATIO * width]
        self._in = stack(read, _of(name, parts), width, outputs, precision, order=order, arrange=run.arrange)
        self._attention = _Attention(spec, _norms(read, [f"{name}.attn.norm_{{}}"], spec), scales)
        factors = torch.full(((1 + MLP_RATIO) * width,), scales.hidden, device=read.device)
        factors[:width] = scales.out
        out = [[f"{name}.proj_out"]]
        self._out = stack(read, out, len(factors), [width], precision, [factors], arrange=run.arrange)
        self._inverse_hidden = 1 / scales.hidden

    def __call__(self, run: Operations, b: Buffers, modulation: Tensor, wanted: int = 0) -> None:
        """modulation: float32 [3, 1, D]. wanted: the first row of the residual stream that anybody reads afterwards."""
        shift, scale, gate = modulation
        run.norm(b.residual, shift, scale, 0, b.normed, b.row_scale)
        heads, inverse = self._attention.heads(b), self._inverse_hidden
        run.linear_heads_gelu(b.normed, b.row_scale, self._in, heads, b.qkv, inverse, b.hidden)
        self._attention(run, b)
        run.linear_add(b.wide[wanted:], None, self._out, 0, gate, b.residual[wanted:])


def _of(block: str, modules: Sequence[Sequence[str]]) -> list[list[str]]:
    """Full names of a block's modules."""
    return [[f"{block}.{module}" for module in stream] for stream in modules]


def _norms(read: Reader, names: Sequence[str], spec: TransformerSpec) -> Tensor:
    """RMSNorm's weights, float32 [streams, 2, head_dim]; each name has a place for "q" and "k"."""
    dim = spec.attention_head_dim
    weights = [read.shaped(f"{name.format(part)}.weight", dim) for name in names for part in "qk"]
    return torch.stack(weights).float().view(len(names), 2, dim)
