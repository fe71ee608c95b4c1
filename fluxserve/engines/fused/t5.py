"""T5's encoder over the same kernels: FP8 or BF16 products, a float32 residual stream, one CUDA graph per length.

transformers' T5EncoderModel with gated GELU (v1.1, XXL): no bias anywhere, no factor before the softmax, one table of
relative positions that all layers add to their scores. Every activation takes its scale from its own row, so nothing is
calibrated. T5's residual stream grows large; it stays in float32, which costs 8 MB of traffic a layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fluxserve.engine import Shapes
from fluxserve.engines.fused.build import Build
from fluxserve.engines.fused.graphs import Replayed
from fluxserve.errors import UnsupportedArchitecture
from fluxserve.families.flux import signatures
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.checkpoint import Checkpoint

FOLDER = "text_encoder_2"


@dataclass(frozen=True)
class _Shape:
    layers: int
    heads: int
    epsilon: float
    buckets: int
    max_distance: int
    inner: int
    """Features of all heads together."""
    hidden: int
    """Features between the MLP's layers."""

    @staticmethod
    def of(config: dict[str, Any]) -> "_Shape":
        if (kind := config.get("feed_forward_proj", "relu")) != "gated-gelu":
            raise UnsupportedArchitecture(f"{FOLDER}/config.json: feed_forward_proj", kind, "gated-gelu")
        return _Shape(
            config["num_layers"],
            config["num_heads"],
            config.get("layer_norm_epsilon", 1e-6),
            config.get("relative_attention_num_buckets", 32),
            config.get("relative_attention_max_distance", 128),
            config["num_heads"] * config["d_kv"],
            config["d_ff"],
        )


class _Layer:
    def __init__(self, build: Build, index: int, width: int, shape: _Shape) -> None:
        read = build.read
        block = f"encoder.block.{index}.layer"
        attention, mlp = f"{block}.0.SelfAttention", f"{block}.1.DenseReluDense"
        self.norm = read.shaped(f"{block}.0.layer_norm.weight", width).float()
        inner, hidden = shape.inner, shape.hidden
        self.qkv = build.linear([[f"{attention}.{part}" for part in "qkv"]], width, [inner] * 3)
        self.out = build.linear([[f"{attention}.o"]], inner, [width])
        self.mlp_norm = read.shaped(f"{block}.1.layer_norm.weight", width).float()
        self.up = build.linear([[f"{mlp}.wi_0", f"{mlp}.wi_1"]], width, [hidden] * 2)
        self.down = build.linear([[f"{mlp}.wo"]], hidden, [width])


class FusedT5:
    """An Engine; see engine.py."""

    def __init__(self, checkpoint: Checkpoint, build: Build) -> None:
        self.shape, self.precision, self.kernels = _Shape.of(checkpoint.config(FOLDER)), build.precision, build.kernels
        self.signature = signatures.t5(FluxSpec.of(checkpoint.spec))
        read = build.read
        self.embedding = read("shared.weight").to(self.precision.compute)
        width = self.embedding.shape[1]
        table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        self.positions = read.shaped(table, self.shape.buckets, self.shape.heads).float()
        self.layers: list[_Layer] = [_Layer(build, i, width, self.shape) for i in range(self.shape.layers)]
        self.norm = read.shaped("encoder.final_layer_norm.weight", width).float()
        read.finish()

    def bind(self, shapes: Shapes) -> "_Bound":
        assert self.layers, "bind after close"
        return _Bound(self, self.signature.resolve(shapes))

    def close(self) -> None:
        self.layers = []


class _Bound:
    """Rows go through one after the other."""

    def __init__(self, engine: FusedT5, sizes: Shapes) -> None:
        compute, linear = engine.precision.compute, engine.precision.linear
        device, (_, width) = engine.embedding.device, engine.embedding.shape
        rows, tokens = sizes["input_ids"]
        inner, hidden = engine.shape.inner, engine.shape.hidden

        def empty(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(tokens, columns, dtype=dtype, device=device)

        self._engine, self._heads = engine, engine.shape.heads
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        self.inputs: Mapping[str, Tensor] = {"input_ids": ids}
        self.outputs: Mapping[str, Tensor] = {"sequence": engine.embedding.new_zeros(rows, tokens, width)}
        self._residual = empty(width, torch.float32)
        self._normed, self._qkv, self._attended = empty(width, linear), empty(3 * inner, compute), empty(inner, linear)
        self._up, self._hidden = empty(2 * hidden, compute), empty(hidden, linear)
        self._scale = empty(1, torch.float32).view(-1) if engine.precision.quantised else None
        bias = position_bias(engine.positions, tokens, engine.shape.max_distance)
        self._bias = bias.to(compute).contiguous()  # or PyTorch has no fused kernel for it
        self._replay = Replayed(self._launch, device)

    @torch.inference_mode()
    def run(self) -> None:
        self._replay()

    def _launch(self) -> None:
        for row, ids in enumerate(self.inputs["input_ids"]):
            self._residual.copy_(self._engine.embedding[ids])
            for layer in self._engine.layers:
                self._layer(layer)
            shape = self._engine.shape
            self._engine.kernels.rms_rows(
                self._residual, self._engine.norm, shape.epsilon, self.outputs["sequence"][row], None
            )

    def _layer(self, layer: _Layer) -> None:
        kernels, scale, epsilon = self._engine.kernels, self._scale, self._engine.shape.epsilon
        kernels.rms_rows(self._residual, layer.norm, epsilon, self._normed, scale)
        kernels.linear(self._normed, scale, layer.qkv, 0, self._qkv)
        kernels.rows(self._attend(), self._attended, scale)
        kernels.linear_add(self._attended, scale, layer.out, 0, None, self._residual)
        kernels.rms_rows(self._residual, layer.mlp_norm, epsilon, self._normed, scale)
        kernels.linear(self._normed, scale, layer.up, 0, self._up)
        kernels.gated_rows(self._up, self._hidden, scale)
        kernels.linear_add(self._hidden, scale, layer.down, 0, None, self._residual)

    def _attend(self) -> Tensor:
        """[tokens, heads · head_dim]; a hundredth of T5's time, so left to PyTorch."""
        tokens = len(self._qkv)
        q, k, v = self._qkv.view(1, tokens, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=self._bias, scale=1.0)
        return attended.permute(0, 2, 1, 3).reshape(tokens, -1)


def position_bias(table: Tensor, tokens: int, max_distance: int) -> Tensor:
    """What is added to the scores, [1, heads, tokens, tokens], of a table [buckets, heads].

    T5Attention._relative_position_bucket, both directions: half of the buckets are for keys behind the query; of each
    half, the first half holds one distance each, the other grows by a constant factor up to max_distance.
    """
    position = torch.arange(tokens, device=table.device)
    relative = position[None, :] - position[:, None]
    half = len(table) // 2
    exact = half // 2
    distance = relative.abs()
    growth = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp_max(half - 1)
    bucket = torch.where(distance < exact, distance, far) + torch.where(relative > 0, half, 0)
    return table[bucket].permute(2, 0, 1)[None]
