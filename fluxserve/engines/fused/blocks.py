"""FLUX's double and single blocks: what is read of a checkpoint, and the seven or four launches that each of them is.

diffusers' FluxTransformerBlock and FluxSingleTransformerBlock, and those of Flux2, with these differences in
arithmetic: products keep float32 until bias, activation, gate and residual are done, and round once; the residual
stream is in the compute dtype as theirs is. Rows are text, then image, then reference images; a double block has
weights for text and for all others, a single block one set for both. What differs by generation is said in `Style`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fluxserve.artifact import Scales
from fluxserve.engines.fused.scales import BlockScales, of_block
from fluxserve.engines.fused.weights import Precision, Reader, stack
from fluxserve.kernels.layers import Heads, Linear, in_halves, in_turns
from fluxserve.kernels.operations import Operations
from fluxserve.spec import TransformerSpec

_DOUBLE_STREAMS = (("add_{}_proj", "to_add_out", "norm_added_{}", "ff_context"), ("to_{}", "to_out.0", "norm_{}", "ff"))
"""diffusers' names in a double block's attention and MLP: text, image."""


@dataclass(frozen=True)
class Style:
    """A generation's own.

    up, down: names of an MLP's layers in a double block. both: of what gives q, k, v and the hidden layer in a single
    block; back: of what takes attention and the hidden layer. gated: whether the MLP is SwiGLU, with all gates before
    all values in its first product, and not GELU.
    """

    up: str
    down: str
    both: tuple[str, ...]
    back: str
    gated: bool

    @staticmethod
    def of(spec: TransformerSpec) -> "Style":
        return _STYLES[spec.generation]

    def products(self, spec: TransformerSpec) -> int:
        """Outputs of an MLP's first product."""
        return spec.mlp_width * (2 if self.gated else 1)

    def order(self, spec: TransformerSpec) -> Tensor:
        """Which of them comes where."""
        return in_turns(spec.mlp_width) if self.gated else torch.arange(spec.mlp_width)


_STYLES = {
    1: Style("net.0.proj", "net.2", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "proj_out", gated=False),
    2: Style("linear_in", "linear_out", ("attn.to_qkv_mlp_proj",), "attn.to_out", gated=True),
}


@dataclass(frozen=True)
class Buffers:
    """One image's activations, at fixed addresses. S rows, of which `split` are text; D = hidden_size, M = mlp_width.

    residual: compute dtype [S, D]. normed: linear dtype [S, D], with float32 row_scale [S] if that is E4M3.
    qkv: linear dtype [S, 3·D]. wide: linear dtype [S, D + M], attention's output and the MLP's hidden layer side by
    side, which is what a single block's projection reads. Both are the first rows of what attention takes, padded to
    whole tiles. cos, sin: float32 [S, head_dim / 2].
    """

    split: int
    residual: Tensor
    normed: Tensor
    row_scale: Tensor | None
    qkv_padded: Tensor
    wide_padded: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def qkv(self) -> Tensor:
        return self.qkv_padded[: len(self.residual)]

    @property
    def wide(self) -> Tensor:
        return self.wide_padded[: len(self.residual)]

    @property
    def attended_padded(self) -> Tensor:
        return self.wide_padded[:, : self.residual.shape[1]]

    @property
    def attended(self) -> Tensor:
        return self.attended_padded[: len(self.residual)]

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
        run.attention(b.qkv_padded, len(b.residual), self._heads, self._descale, b.attended_padded)


def _order(spec: TransformerSpec, device: torch.device) -> Tensor:
    """Of a product's outputs: q and k with their heads in halves (see kernels.linear.in_halves), v as it is."""
    d, dim = spec.hidden_size, spec.attention_head_dim
    starts = torch.arange(0, 2 * d, dim)[:, None]
    return torch.cat([(starts + in_halves(dim)).flatten(), torch.arange(2 * d, 3 * d)]).to(device)


class DoubleBlock:
    """Text and image each with weights of their own, attending to each other."""

    PARTS = 6
    """Of its modulation, for text and for image: shift, scale, gate before attention and before the MLP."""

    def __init__(
        self,
        read: Reader,
        index: int,
        spec: TransformerSpec,
        precision: Precision,
        found: Scales | None,
        run: Operations,
    ) -> None:
        name, width, style = f"transformer_blocks.{index}", spec.hidden_size, Style.of(spec)
        hidden = tuple(f"{mlp}.{style.down}" for *_, mlp in _DOUBLE_STREAMS)
        scales = of_block(found, name, hidden, spec.attention_head_dim) if found else BlockScales()

        def linear(
            modules: Sequence[Sequence[str]],
            inputs: int,
            outputs: Sequence[int],
            factor: float = 1.0,
            order: Tensor | None = None,
        ) -> Linear:
            names, factors = _of(name, modules), [factor] * len(modules)
            return stack(read, names, inputs, outputs, precision, factors, order, run.arrange, spec.biased)

        parts = [[f"attn.{q.format(part)}" for part in "qkv"] for q, *_ in _DOUBLE_STREAMS]
        self._qkv = linear(parts, width, [width] * 3, order=_order(spec, read.device))
        norms = [f"{name}.attn.{norm}" for _, _, norm, _ in _DOUBLE_STREAMS]
        self._attention = _Attention(spec, _norms(read, norms, spec), scales)
        self._out = linear([[f"attn.{out}"] for _, out, _, _ in _DOUBLE_STREAMS], width, [width], scales.out)
        up, down = ([[f"{mlp}.{part}"] for *_, mlp in _DOUBLE_STREAMS] for part in (style.up, style.down))
        self._up = linear(up, width, [style.products(spec)], order=style.order(spec).to(read.device))
        self._down = linear(down, spec.mlp_width, [width], scales.hidden)
        self._inverse_hidden, self._gated = 1 / scales.hidden, style.gated

    def __call__(self, run: Operations, b: Buffers, modulation: Tensor) -> None:
        """modulation: float32 [6, 2, D]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        run.norm(b.residual, shift, scale, b.split, b.normed, b.row_scale)
        run.linear_heads(b.normed, b.row_scale, self._qkv, b.split, self._attention.heads(b), b.qkv)
        self._attention(run, b)
        run.linear_add(b.attended, None, self._out, b.split, gate, b.residual)
        run.norm(b.residual, mlp_shift, mlp_scale, b.split, b.normed, b.row_scale)
        activated = run.linear_swiglu if self._gated else run.linear_gelu
        activated(b.normed, b.row_scale, self._up, b.split, self._inverse_hidden, b.hidden)
        run.linear_add(b.hidden, None, self._down, b.split, mlp_gate, b.residual)


class SingleBlock:
    """One set of weights for all rows; attention and MLP side by side, projected back together."""

    PARTS = 3
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
        name, width, style = f"single_transformer_blocks.{index}", spec.hidden_size, Style.of(spec)
        scales = of_block(found, name, (style.back,), spec.attention_head_dim) if found else BlockScales()
        outputs = [width, width, width, style.products(spec)]
        outputs = outputs if len(style.both) == len(outputs) else [sum(outputs)]
        order = torch.cat([_order(spec, read.device), 3 * width + style.order(spec).to(read.device)])
        linear = partial(stack, read, precision=precision, arrange=run.arrange, biased=spec.biased)
        self._in = linear(_of(name, [style.both]), width, outputs, order=order)
        self._attention = _Attention(spec, _norms(read, [f"{name}.attn.norm_{{}}"], spec), scales)
        factors = torch.full((width + spec.mlp_width,), scales.hidden, device=read.device)
        factors[:width] = scales.out
        self._out = linear(_of(name, [[style.back]]), len(factors), [width], factors=[factors])
        self._inverse_hidden, self._gated = 1 / scales.hidden, style.gated

    def __call__(self, run: Operations, b: Buffers, modulation: Tensor, wanted: int = 0) -> None:
        """modulation: float32 [3, 1, D]. wanted: the first row of the residual stream that anybody reads afterwards."""
        shift, scale, gate = modulation
        run.norm(b.residual, shift, scale, 0, b.normed, b.row_scale)
        heads, inverse = self._attention.heads(b), self._inverse_hidden
        both = run.linear_heads_swiglu if self._gated else run.linear_heads_gelu
        both(b.normed, b.row_scale, self._in, heads, b.qkv, inverse, b.hidden)
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
