"""FLUX's transformer behind the seam: blocks over buffers in the arena, a CUDA graph per shape.

Images of a batch go through one after the other: one alone fills the GPU, and so its bytes are the same in a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fluxserve.engine import FLOATING, Shapes
from fluxserve.engines.fused import modulation as modulations
from fluxserve.engines.fused.arena import Arena, Buffer, Layout, size
from fluxserve.engines.fused.blocks import Buffers, DoubleBlock, Rows, SingleBlock
from fluxserve.engines.fused.build import Build, Dense
from fluxserve.engines.fused.graphs import Replayed
from fluxserve.engines.fused.modulation import AHEAD, Modulation
from fluxserve.families.flux import signatures
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.kernels.attention.fused import attention_ahead, padded
from fluxserve.kernels.attention.plan_worker import Ahead

KEPT = "kept_"
"""Before the names of buffers of blocks that stay in the compute dtype."""

_NO_BATCH = -1


class Layers:
    """Everything that is read of the folder `transformer`, on the device.

    Raises:
        CheckpointError: weights are missing, of another shape, or more than there should be.
        ArtifactError: the scales are of another model.
    """

    def __init__(self, build: Build, spec: FluxSpec) -> None:
        shape = spec.transformer
        assert build.precision.quantised == (build.ranges is not None), "ranges are for E4M3, and E4M3 needs them"
        d = shape.hidden_size
        self.image = build.dense("x_embedder", shape.in_channels, d, shape.biased)
        self.text = build.dense("context_embedder", shape.joint_attention_dim, d, shape.biased)
        self.modulation = Modulation(build, shape)
        self.double = [DoubleBlock(build, i, shape) for i in range(shape.num_layers)]
        self.single = [SingleBlock(build, i, shape) for i in range(shape.num_single_layers)]
        self.out = build.dense("proj_out", d, shape.in_channels, shape.biased)
        build.read.finish()


class FusedTransformer:
    """An Engine; see engine.py.

    Args:
        build: of the folder `transformer`; with ranges exactly if its linears are E4M3.
        most: image tokens with those of references, text tokens and images at once that the arena is sized for.
    """

    def __init__(self, spec: FluxSpec, build: Build, most: tuple[int, int, int]) -> None:
        image, text, rows = most
        ranges = {"rows": (1, rows), "image_tokens": (1, image), "text_tokens": (1, text)}
        self.signature = signatures.transformer(spec).narrowed(ranges)
        self.spec, self.precision, self.kernels = spec.transformer, build.precision, build.kernels
        self.kept = bool(build.ranges and build.ranges.kept)
        self.steps_between_means = steps_between_means
        self._largest = self.layout(self.signature.at({s: r[1] for s, r in ranges.items()}))
        self.arena = Arena(size(self._largest), build.device)
        self.weights: Layers | None = Layers(build, spec)
        blocks = self.spec.num_layers + self.spec.num_single_layers
        self.counts = torch.zeros(blocks, 2, dtype=torch.int64, device=build.device)
        self._usual = spec.text.sequence.tokens + spec.image_tokens(spec.defaults.side, spec.defaults.side)
        self._ahead: Ahead | None = None

    def bind(self, shapes: Shapes) -> "FusedBound":
        assert self.weights is not None, "bind after close"
        sizes = self.signature.resolve(shapes)
        return FusedBound(self, self.weights, self.arena.cut(self.layout(sizes)), sizes)

    def prepare_sizes(self) -> None:
        """Have another process prepare what a size never seen would wait for, until this engine is closed."""
        largest, d = self.arena.cut(self._largest), self.spec.hidden_size
        qkv, attended = largest["qkv_padded"], largest["wide_padded"][:, :d]
        self._ahead = attention_ahead(qkv, self._usual, self.spec.num_attention_heads, attended)

    def saturated(self) -> dict[str, tuple[int, int]]:
        """Waits for the device; see engine.Saturating."""
        assert self.weights is not None, "saturated after close"
        blocks: list[DoubleBlock | SingleBlock] = [*self.weights.double, *self.weights.single]
        counted = zip(blocks, self.counts.tolist(), strict=True)
        return {block.name: (heads, hidden) for block, (heads, hidden) in counted if heads or hidden}

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self.weights = None

    def layout(self, sizes: Shapes) -> Layout:
        """Buffers of a pass at these sizes: inputs and outputs by their names, and what is in between."""
        compute, linear, d = self.precision.compute, self.precision.linear, self.spec.hidden_size
        tensors = (*self.signature.inputs, *self.signature.outputs)
        dtypes = {t.name: compute if t.dtype == FLOATING else getattr(torch, t.dtype) for t in tensors}
        images, text, _ = sizes["encoder_hidden_states"]
        s, half = text + sizes["hidden_states"][1], self.spec.attention_head_dim // 2
        steering, blocks = modulations.width(self.spec), self.spec.num_layers + self.spec.num_single_layers
        return {
            **{name: Buffer(sizes[name], dtype) for name, dtype in dtypes.items()},
            "text": Buffer((images, text, d), compute),
            "cos": Buffer((s, half), torch.float32),
            "sin": Buffer((s, half), torch.float32),
            "ahead": Buffer((max(AHEAD, images), steering), torch.float32),
            "now": Buffer((images, steering), torch.float32),
            "residual": Buffer((s, d), compute),
            "due": Buffer((1,), torch.int32),
            "means": Buffer((images, blocks, d), torch.float32),
            "restored": Buffer((images, blocks, 2, d), torch.float32),
            "row_scale": Buffer((s,), torch.float32),
            **self._rows(s, linear, ""),
            **(self._rows(s, compute, KEPT) if self.kept else {}),
            "final": Buffer((s - text, d), compute),
        }

    def _rows(self, s: int, dtype: torch.dtype, prefix: str) -> Layout:
        """What a block computes on its way."""
        d = self.spec.hidden_size
        shapes = {
            "normed": (s, d),
            "qkv_padded": (padded(s, dtype), 3 * d),
            "wide_padded": (padded(s, dtype), d + self.spec.mlp_width),
        }
        return {prefix + name: Buffer(shape, dtype) for name, shape in shapes.items()}


class FusedBound:
    """A Bound and a Denoiser; see engine.py. Its buffers are the arena's, valid until another runs."""

    def __init__(self, engine: FusedTransformer, weights: Layers, buffers: Mapping[str, Tensor], sizes: Shapes) -> None:
        signature = engine.signature
        self.inputs: Mapping[str, Tensor] = {t.name: buffers[t.name] for t in signature.inputs}
        self.outputs: Mapping[str, Tensor] = {t.name: buffers[t.name] for t in signature.outputs}
        self._engine, self._weights, self._buffers = engine, weights, buffers
        self._images, self._text, _ = sizes["encoder_hidden_states"]
        self._b = Buffers(
            split=self._text,
            linear=_rows_of(buffers, "", buffers["row_scale"] if engine.precision.quantised else None),
            compute=_rows_of(buffers, KEPT, None) if engine.kept else None,
            **{name: buffers[name] for name in ("residual", "cos", "sin", "due")},
            means=buffers["means"][0],
            restored=buffers["restored"][0],
        )
        self._step = Replayed(self._launch, buffers["residual"].device)
        self._timesteps = buffers["ahead"].new_empty(0, self._images)
        self._batch = _NO_BATCH
        self._every = 1

    @torch.inference_mode()
    def begin(self, timesteps: Tensor) -> None:
        """Compute what does not depend on latents, for the steps of one loop."""
        self._begin(timesteps[:, None].expand(-1, self._images))

    @torch.inference_mode()
    def run_step(self, step: int) -> None:
        """Enqueue one pass at timesteps[step]; the means of values are computed anew at some steps."""
        row = self._modulated(step)
        self._buffers["now"].copy_(self._buffers["ahead"][row : row + self._images])
        self._b.due.fill_(step % self._every == 0)
        self._step()

    @torch.inference_mode()
    def run(self) -> None:
        """Enqueue one pass at the timesteps that the input `timestep` has."""
        self._begin(self.inputs["timestep"][None])
        self.run_step(0)

    def _begin(self, timesteps: Tensor) -> None:
        """timesteps: [steps, images]."""
        self._timesteps, self._batch = timesteps, _NO_BATCH
        self._every = self._engine.steps_between_means(len(timesteps), len(self._b.residual))
        b, given = self._buffers, self.inputs
        for text, states in zip(b["text"], given["encoder_hidden_states"], strict=True):
            _linear_into(text, states, self._weights.text)
        ids, spec = torch.cat([given["txt_ids"], given["img_ids"]]), self._engine.spec
        write_rope(ids, spec.axes_dims_rope, spec.rope_theta, b["cos"], b["sin"])
        # Attention reads these too, and another size may have left what is NaN as E4M3.
        self._b.linear.qkv_padded[len(self._b.residual) :].zero_()

    def _fill(self, timesteps: Tensor) -> None:
        """Compute the modulation of a batch of timesteps [steps, images].

        The batch is always padded to the buffer's rows by repeating the last: a product of another height may round
        differently, and a step's result must not depend on its neighbours.
        """
        out = self._buffers["ahead"]
        steps = torch.arange(len(out), device=out.device).div(self._images, rounding_mode="floor")
        steps, images = steps.clamp(max=len(timesteps) - 1), torch.arange(len(out), device=out.device) % self._images
        steering = ("guidance", "pooled_projections")
        given = {name: value[images] for name, value in self.inputs.items() if name in steering}
        self._weights.modulation(self._engine.kernels, timesteps[steps, images], given, out)

    def _modulated(self, step: int) -> int:
        """Return the first row of this step's modulation, after computing that of its batch of steps if need be."""
        steps = max(1, AHEAD // self._images)
        batch, place = divmod(step, steps)
        if batch != self._batch:
            self._fill(self._timesteps[batch * steps : (batch + 1) * steps])
            self._batch = batch
        return place * self._images

    def _launch(self) -> None:
        for image in range(self._images):
            self._draw(image)

    def _draw(self, image: int) -> None:
        kernels, w = self._engine.kernels, self._weights
        b = replace(self._b, means=self._buffers["means"][image], restored=self._buffers["restored"][image])
        double, single, final = w.modulation.split(self._buffers["now"][image])
        b.residual[: self._text].copy_(self._buffers["text"][image])
        _linear_into(b.residual[self._text :], self.inputs["hidden_states"][image], w.image)
        counts = iter(self._engine.counts)
        for block, steering in zip(w.double, double, strict=True):
            block(kernels, b, steering, next(counts))
        for i, (single_block, steering) in enumerate(zip(w.single, single, strict=True), 1):
            single_block(kernels, b, steering, next(counts), wanted=self._text if i == len(w.single) else 0)
        scale, shift = final
        kernels.norm(b.residual[self._text :], shift, scale, 0, self._buffers["final"], None)
        _linear_into(self.outputs["velocity"][image], self._buffers["final"], w.out)


def steps_between_means(steps: int, rows: int) -> int:
    """How often a loop computes the means of attention's values anew; it does so at its first step in any case.

    They drift slowly, and computing them takes 1.7 to 2% of a step of 4,608 rows. The more rows, the smaller that
    share, and the larger the bias that a stale mean leaves. So 28 steps of 1024² compute them at every seventh step,
    4 steps of 1024² at the first alone, and any number of steps of 2048² at every second.
    """
    return max(-(-4 * 4608 // rows), steps * 1200 // rows)


def _rows_of(buffers: Mapping[str, Tensor], prefix: str, row_scale: Tensor | None) -> Rows:
    named = {name: buffers[prefix + name] for name in ("normed", "qkv_padded", "wide_padded")}
    return Rows(row_scale=row_scale, **named)


def _linear_into(out: Tensor, x: Tensor, layer: Dense) -> None:
    if layer.bias is None:
        torch.mm(x, layer.weight.T, out=out)
    else:
        torch.addmm(layer.bias, x, layer.weight.T, out=out)


def write_rope(ids: Tensor, axes: Sequence[int], theta: float, cos: Tensor, sin: Tensor) -> None:
    """cos and sin [S, head_dim / 2] of positions [S, axes]: each axis turns its share of pairs.

    diffusers' FluxPosEmbed and Flux2PosEmbed; angles are products in float64, as theirs.
    """
    at = 0
    for axis, dims in enumerate(axes):
        exponents = torch.arange(0, dims, 2, dtype=torch.float64, device=ids.device) / dims
        angles = torch.outer(ids[:, axis].double(), 1.0 / theta**exponents)
        cos[:, at : at + dims // 2] = torch.cos(angles)
        sin[:, at : at + dims // 2] = torch.sin(angles)
        at += dims // 2
