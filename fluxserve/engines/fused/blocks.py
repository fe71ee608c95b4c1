"""FLUX's double and single blocks: what is read of a checkpoint, and the seven or four launches that each of them is.

diffusers' FluxTransformerBlock and FluxSingleTransformerBlock, and those of Flux2, with these differences in
arithmetic: products keep float32 until bias, activation, gate and residual are done, and round once; the residual
stream is in the compute dtype as theirs is. Rows are text, then image, then reference images; a double block has
weights for text and for all others, a single block one set for both. What differs by generation is said in `Style`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fluxserve.engines.fused.build import Build, Precision
from fluxserve.engines.fused.scales import BlockScales, of_block
from fluxserve.engines.fused.weights import Reader
from fluxserve.families.flux.parts import TransformerSpec
from fluxserve.kernels.gemm.layers import Centre, Heads, Linear, Watched, in_halves, in_turns
from fluxserve.kernels.operations import Operations, as_they_are

Arrange = Callable[[Linear], Linear]

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
class Mode:
    """How one block computes. precision: its products'. quantised_attention: whether its attention is E4M3."""

    precision: Precision
    quantised_attention: bool


def mode_of(build: Build, block: str) -> Mode:
    """Return how a block computes: without ranges nothing is quantised, and export may have kept some of it."""
    if build.ranges is None:
        return Mode(build.precision, False)
    if block in build.ranges.kept_blocks:
        return Mode(replace(build.precision, linear=build.precision.compute), False)
    return Mode(build.precision, build.ranges.quantises(f"{block}.attn"))


def _scales_of(build: Build, mode: Mode, block: str, hidden: Sequence[str]) -> BlockScales:
    """Return a block's static scales; all 1 where it is not quantised. Raises ArtifactError."""
    if build.ranges is None or not mode.precision.quantised:
        return BlockScales()
    return of_block(build.ranges, block, hidden, mode.quantised_attention)


def _arrange(build: Build, mode: Mode) -> Arrange:
    """Return the layout of weights around attention: the CUDA kernel writes q, k and v in E4M3 alone, Triton's both."""
    return build.kernels.arrange if mode.quantised_attention else as_they_are


@dataclass(frozen=True)
class Rows:
    """What a block computes on its way, in one dtype. S rows; D = hidden_size, M = mlp_width.

    normed: [S, D], with float32 row_scale [S] if the dtype is E4M3. qkv: [S, 3·D]. wide: [S, D + M], attention's output
    and the MLP's hidden layer side by side, which is what a single block's projection reads. Both are the first rows of
    what attention takes, padded to whole tiles.
    """

    normed: Tensor
    row_scale: Tensor | None
    qkv_padded: Tensor
    wide_padded: Tensor

    @property
    def qkv(self) -> Tensor:
        return self.qkv_padded[: len(self.normed)]

    @property
    def wide(self) -> Tensor:
        return self.wide_padded[: len(self.normed)]

    @property
    def attended_padded(self) -> Tensor:
        return self.wide_padded[:, : self.normed.shape[1]]

    @property
    def attended(self) -> Tensor:
        return self.attended_padded[: len(self.normed)]

    @property
    def hidden(self) -> Tensor:
        return self.wide[:, self.normed.shape[1] :]


@dataclass(frozen=True)
class Buffers:
    """One image's activations, at fixed addresses. S rows, of which `split` are text; D = hidden_size.

    residual: compute dtype [S, D]. linear: rows in the dtype that blocks multiply in. compute: rows in the compute
    dtype, for blocks that are kept in it; None if none is. cos, sin: float32 [S, head_dim / 2]. due, means, restored:
    int32 [1] and float32 [blocks, D] and [blocks, 2, D], what `Centre` carries from step to step.
    """

    split: int
    residual: Tensor
    linear: Rows
    compute: Rows | None
    cos: Tensor
    sin: Tensor
    due: Tensor
    means: Tensor
    restored: Tensor

    def rows(self, precision: Precision) -> Rows:
        """Those of a block in this precision."""
        if precision.quantised or self.compute is None:
            return self.linear
        return self.compute


class _Attention:
    """What both kinds of block do with q, k and v, in E4M3 or in the compute dtype.

    In E4M3, v is written without its mean, and the projection `back` adds what the mean would have given it. A
    quantised block whose attention is kept in the compute dtype does the same, because its output is rounded to E4M3
    all the same.
    """

    def __init__(self, spec: TransformerSpec, norms: Tensor, scales: BlockScales, mode: Mode, place: int) -> None:
        """place: of the block among all blocks of both kinds."""
        self._heads, self._mode, self._scales, self._place = spec.num_attention_heads, mode, scales, place
        halves = in_halves(spec.attention_head_dim).to(norms.device)
        self._factors, self._descale = scales.head_factors(norms[:, :, halves]), scales.descale(norms.device)

    def heads(self, b: Buffers, back: Linear) -> Heads:
        """What becomes of q, k and v."""
        carried = b.means[self._place], b.restored[self._place, : len(back.weight)]
        centre = Centre(back, self._scales.inverse_out, b.due, *carried)
        return Heads(self._factors, b.cos, b.sin, centre if self._mode.precision.quantised else None)

    def rows(self, b: Buffers) -> Rows:
        """Where q, k and v are written."""
        return b.linear if self._mode.quantised_attention or b.compute is None else b.compute

    def __call__(self, kernels: Operations, b: Buffers) -> None:
        given, wanted = self.rows(b), b.rows(self._mode.precision)
        kernels.attention(given.qkv_padded, len(b.residual), self._heads, self._descale, given.attended_padded)
        if given is not wanted:
            kernels.rows(given.attended, wanted.attended, None)  # v was divided by its scale, so this is one rounding

    def output(self, b: Buffers) -> Tensor:
        """What attention gives, float32 [S, D], with the mean that is given back behind it."""
        rows = b.rows(self._mode.precision)
        if not self._mode.precision.quantised:
            return rows.attended.float()
        return self._scales.attended(rows.attended, b.means[self._place])

    def restored(self, b: Buffers, streams: int) -> Tensor | None:
        """What the projection adds to its bias."""
        return b.restored[self._place, :streams] if self._mode.precision.quantised else None

    def watched(self, b: Buffers) -> list[Tensor]:
        """E4M3 rows that static scales may have clipped."""
        return [b.linear.qkv] if self._mode.quantised_attention else []


def _order(spec: TransformerSpec, device: torch.device) -> Tensor:
    """Of a product's outputs: q and k with their heads in halves (see kernels.gemm.layers.in_halves), v as it is."""
    d, dim = spec.hidden_size, spec.attention_head_dim
    starts = torch.arange(0, 2 * d, dim)[:, None]
    return torch.cat([(starts + in_halves(dim)).flatten(), torch.arange(2 * d, 3 * d)]).to(device)


class DoubleBlock:
    """Text and image each with weights of their own, attending to each other."""

    PARTS = 6
    """Of its modulation, for text and for image: shift, scale, gate before attention and before the MLP."""

    def __init__(self, build: Build, index: int, spec: TransformerSpec) -> None:
        name, width, style = f"transformer_blocks.{index}", spec.hidden_size, Style.of(spec)
        self.name, self._mode = name, mode_of(build, name)
        hidden = tuple(f"{mlp}.{style.down}" for *_, mlp in _DOUBLE_STREAMS)
        scales = _scales_of(build, self._mode, name, hidden)
        own, arranged = replace(build, precision=self._mode.precision), _arrange(build, self._mode)

        def linear(
            modules: Sequence[Sequence[str]],
            inputs: int,
            outputs: Sequence[int],
            input_scale: float = 1.0,
            order: Tensor | None = None,
            arrange: Arrange = build.kernels.arrange,
        ) -> Linear:
            input_scales = [input_scale] * len(modules)
            return own.linear(_of(name, modules), inputs, outputs, input_scales, order, arrange, spec.biased)

        parts = [[f"attn.{q.format(part)}" for part in "qkv"] for q, *_ in _DOUBLE_STREAMS]
        self._qkv = linear(parts, width, [width] * 3, order=_order(spec, build.device), arrange=arranged)
        norms = [f"{name}.attn.{norm}" for _, _, norm, _ in _DOUBLE_STREAMS]
        self._attention = _Attention(spec, _norms(build.read, norms, spec), scales, self._mode, index)
        outs = [[f"attn.{out}"] for _, out, _, _ in _DOUBLE_STREAMS]
        self._out = linear(outs, width, [width], scales.v, arrange=arranged)
        up, down = ([[f"{mlp}.{part}"] for *_, mlp in _DOUBLE_STREAMS] for part in (style.up, style.down))
        self._up = linear(up, width, [style.products(spec)], order=style.order(spec).to(build.device))
        self._down = linear(down, spec.mlp_width, [width], scales.hidden)
        self._inverse_hidden, self._gated = scales.inverse_hidden, style.gated

    def attend(self, kernels: Operations, b: Buffers, modulation: Tensor) -> None:
        """The first half: from the residual stream to attention's output, in `b.rows(…).attended`."""
        shift, scale, *_ = modulation
        rows = b.rows(self._mode.precision)
        kernels.norm(b.residual, shift, scale, b.split, rows.normed, rows.row_scale)
        heads, qkv = self._attention.heads(b, self._out), self._attention.rows(b).qkv
        kernels.linear_heads(rows.normed, rows.row_scale, self._qkv, b.split, heads, qkv)
        self._attention(kernels, b)

    def attended(self, b: Buffers) -> Tensor:
        """Attention's output after `attend`, float32 [S, D]."""
        return self._attention.output(b)

    def __call__(self, kernels: Operations, b: Buffers, modulation: Tensor, counts: Tensor) -> None:
        """modulation: float32 [6, 2, D]. counts: int64 [2], saturated values of q, k, v and of the hidden layer."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        rows = b.rows(self._mode.precision)
        self.attend(kernels, b, modulation)
        restored = self._attention.restored(b, 2)
        watched = _watched(self._attention.watched(b), counts[:1])
        kernels.linear_add(rows.attended, None, self._out, b.split, gate, b.residual, restored, watched)
        kernels.norm(b.residual, mlp_shift, mlp_scale, b.split, rows.normed, rows.row_scale)
        activated = kernels.linear_swiglu if self._gated else kernels.linear_gelu
        activated(rows.normed, rows.row_scale, self._up, b.split, self._inverse_hidden, rows.hidden)
        watched = _watched([rows.hidden] if self._mode.precision.quantised else [], counts[1:])
        kernels.linear_add(rows.hidden, None, self._down, b.split, mlp_gate, b.residual, None, watched)


class SingleBlock:
    """One set of weights for all rows; attention and MLP side by side, projected back together."""

    PARTS = 3
    """Of its modulation: shift, scale, gate."""

    def __init__(self, build: Build, index: int, spec: TransformerSpec) -> None:
        name, width, style = f"single_transformer_blocks.{index}", spec.hidden_size, Style.of(spec)
        self.name, self._mode = name, mode_of(build, name)
        scales = _scales_of(build, self._mode, name, (style.back,))
        own = replace(build, precision=self._mode.precision)
        outputs = [width, width, width, style.products(spec)]
        outputs = outputs if len(style.both) == len(outputs) else [sum(outputs)]
        order = torch.cat([_order(spec, build.device), 3 * width + style.order(spec).to(build.device)])
        linear = partial(own.linear, arrange=_arrange(build, self._mode), biased=spec.biased)
        self._in = linear(_of(name, [style.both]), width, outputs, order=order)
        norms, place = _norms(build.read, [f"{name}.attn.norm_{{}}"], spec), spec.num_layers + index
        self._attention = _Attention(spec, norms, scales, self._mode, place)
        wide = scales.side_by_side(width, spec.mlp_width, build.device)
        self._out = linear(_of(name, [[style.back]]), len(wide), [width], input_scales=[wide])
        self._inverse_hidden, self._gated = scales.inverse_hidden, style.gated

    def attend(self, kernels: Operations, b: Buffers, modulation: Tensor) -> None:
        """From the residual stream to attention's output and the hidden layer, side by side in `b.rows(…).wide`."""
        shift, scale, _ = modulation
        rows = b.rows(self._mode.precision)
        kernels.norm(b.residual, shift, scale, 0, rows.normed, rows.row_scale)
        heads, inverse = self._attention.heads(b, self._out), self._inverse_hidden
        both = kernels.linear_heads_swiglu if self._gated else kernels.linear_heads_gelu
        both(rows.normed, rows.row_scale, self._in, heads, self._attention.rows(b).qkv, inverse, rows.hidden)
        self._attention(kernels, b)

    def attended(self, b: Buffers) -> Tensor:
        """Attention's output after `attend`, float32 [S, D]."""
        return self._attention.output(b)

    def __call__(self, kernels: Operations, b: Buffers, modulation: Tensor, counts: Tensor, wanted: int = 0) -> None:
        """modulation: float32 [3, 1, D]. counts: as a double block's. wanted: the first row of the residual stream that
        anybody reads afterwards."""
        gate, rows = modulation[2], b.rows(self._mode.precision)
        self.attend(kernels, b, modulation)
        restored = self._attention.restored(b, 1)
        clipped = [*self._attention.watched(b), *([rows.hidden] if self._mode.precision.quantised else [])]
        watched = _watched(clipped, counts[2 - len(clipped) :])
        kernels.linear_add(rows.wide[wanted:], None, self._out, 0, gate, b.residual[wanted:], restored, watched)


def _watched(rows: Sequence[Tensor], counts: Tensor) -> Watched | None:
    return Watched(rows, counts) if rows else None


def _of(block: str, modules: Sequence[Sequence[str]]) -> list[list[str]]:
    """Full names of a block's modules."""
    return [[f"{block}.{module}" for module in stream] for stream in modules]


def _norms(read: Reader, names: Sequence[str], spec: TransformerSpec) -> Tensor:
    """RMSNorm's weights, float32 [streams, 2, head_dim]; each name has a place for "q" and "k"."""
    dim = spec.attention_head_dim
    weights = [read.shaped(f"{name.format(part)}.weight", dim) for name in names for part in "qk"]
    return torch.stack(weights).float().view(len(names), 2, dim)
