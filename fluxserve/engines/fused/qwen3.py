"""Qwen3 as FLUX.2-klein reads it, over the same kernels as T5: as deep as its last state that is wanted, no deeper.

transformers' Qwen3Model: RMSNorm before each half of a layer, and of each head of q and k; RoPE; several query heads
share a key's; SwiGLU. Attention is causal, and nobody looks at padding; rows of padding are computed all the same,
because the transformer reads them too. What comes out is the residual stream after the spec's `layers`, with no norm.
It is in float32, as T5's: a few of its channels grow to thousands. Every activation takes its scale from its own row.
"""

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

_NAME = "qwen3"
_THETA = 1e4
"""transformers' default, where a configuration has none."""


@dataclass(frozen=True)
class _Shape:
    width: int
    words: int
    heads: int
    key_heads: int
    head_dim: int
    hidden: int
    """Features between the MLP's layers."""
    epsilon: float
    theta: float

    @staticmethod
    def of(folder: str, config: Mapping[str, Any]) -> "_Shape":
        """Raises UnsupportedArchitecture: an option that the layers here know nothing of."""
        old = config.get("rope_scaling") or {}
        rope = {"rope_theta": config.get("rope_theta", _THETA), **old, **(config.get("rope_parameters") or {})}
        options = {
            "hidden_act": (config.get("hidden_act", "silu"), "silu"),
            "use_sliding_window": (config.get("use_sliding_window", False), False),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        }
        for name, (got, expected) in options.items():
            if got != expected:
                raise UnsupportedArchitecture(f"{folder}/config.json: {name}", got, str(expected))
        return _Shape(
            config["hidden_size"],
            config["vocab_size"],
            config["num_attention_heads"],
            config.get("num_key_value_heads") or config["num_attention_heads"],
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            config["intermediate_size"],
            config.get("rms_norm_eps", 1e-6),
            rope["rope_theta"],
        )

    @property
    def inner(self) -> int:
        """Features of all query heads together; need not be the width."""
        return self.heads * self.head_dim

    @property
    def key_inner(self) -> int:
        """Features of all heads of keys, or of values."""
        return self.key_heads * self.head_dim


class _Layer:
    def __init__(self, build: Build, index: int, shape: _Shape) -> None:
        read = build.read
        layer, width, hidden = f"layers.{index}", shape.width, shape.hidden
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        self.norm = read.shaped(f"{layer}.input_layernorm.weight", width).float()
        parts = [f"{attention}.{part}_proj" for part in "qkv"]
        self.qkv = build.linear([parts], width, [shape.inner, shape.key_inner, shape.key_inner])
        norms = [read.shaped(f"{attention}.{part}_norm.weight", shape.head_dim).float() for part in "qk"]
        self.head_norms = torch.stack(norms)
        self.out = build.linear([[f"{attention}.o_proj"]], shape.inner, [width])
        self.mlp_norm = read.shaped(f"{layer}.post_attention_layernorm.weight", width).float()
        self.up = build.linear([[f"{mlp}.gate_proj", f"{mlp}.up_proj"]], width, [hidden] * 2)
        self.down = build.linear([[f"{mlp}.down_proj"]], hidden, [width])


class FusedQwen3:
    """An Engine; see engine.py. Of a folder of Qwen3ForCausalLM, or of a Qwen3Model.

    Raises:
        CheckpointError: weights are missing, have other shapes, or nobody knows them.
        UnsupportedArchitecture.
    """

    def __init__(self, checkpoint: Checkpoint, build: Build) -> None:
        encoder = checkpoint.spec.text.named(_NAME)
        config = checkpoint.config(encoder.folder)
        self.shape, self.precision = _Shape.of(encoder.folder, config), build.precision
        self.kernels = build.kernels
        self.signature, self.taken = signatures.language_model(FluxSpec.of(checkpoint.spec)), encoder.layers
        read = build.read
        words = read.shaped("embed_tokens.weight", self.shape.words, self.shape.width)
        self.embedding = words.to(self.precision.compute)
        self.layers: list[_Layer] = [_Layer(build, index, self.shape) for index in range(max(encoder.layers))]
        read.finish()

    def bind(self, shapes: Shapes) -> "_Bound":
        assert self.layers, "bind after close"
        return _Bound(self, self.signature.resolve(shapes))

    def close(self) -> None:
        self.layers = []


class _Bound:
    """Rows go through one after the other."""

    def __init__(self, engine: FusedQwen3, sizes: Shapes) -> None:
        shape, device = engine.shape, engine.embedding.device
        compute, linear = engine.precision.compute, engine.precision.linear
        rows, tokens = sizes["input_ids"]

        def empty(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(tokens, columns, dtype=dtype, device=device)

        def ones() -> Tensor:
            return torch.ones(rows, tokens, dtype=torch.int64, device=device)

        self._engine = engine
        self.inputs: Mapping[str, Tensor] = {"input_ids": ones(), "attention_mask": ones()}
        self.outputs: Mapping[str, Tensor] = {"sequence": engine.embedding.new_zeros(sizes["sequence"])}
        self._residual = empty(shape.width, torch.float32)
        self._normed, self._attended = empty(shape.width, linear), empty(shape.inner, linear)
        self._qkv = empty(shape.inner + 2 * shape.key_inner, compute)
        self._up, self._hidden = empty(2 * shape.hidden, compute), empty(shape.hidden, linear)
        self._scale = empty(1, torch.float32).view(-1) if engine.precision.quantised else None
        self._cos, self._sin = angles(tokens, shape.head_dim, shape.theta, device)
        # Half of the largest number: what a kernel makes of it, times 1.44 or less a score, is finite as well.
        self._never = torch.finfo(compute).min / 2
        never = torch.full((tokens, tokens), self._never, dtype=compute, device=device)
        self._causal = never.triu(1)
        self._bias = never.repeat(shape.heads // shape.key_heads, 1)
        self._replay = Replayed(self._launch, device)

    @torch.inference_mode()
    def run(self) -> None:
        self._replay()

    def _launch(self) -> None:
        engine, width = self._engine, self._engine.shape.width
        for row, (ids, mask) in enumerate(zip(self.inputs["input_ids"], self.inputs["attention_mask"], strict=True)):
            self._residual.copy_(engine.embedding[ids])
            padding = (mask == 0).to(self._causal.dtype) * self._never
            tall = self._bias.view(-1, *self._causal.shape)
            tall.copy_(torch.minimum(self._causal, padding))
            for depth, layer in enumerate(engine.layers, 1):
                self._layer(layer)
                if depth in engine.taken:
                    at = engine.taken.index(depth) * width
                    self.outputs["sequence"][row, :, at : at + width].copy_(self._residual)

    def _layer(self, layer: _Layer) -> None:
        kernels, scale, shape = self._engine.kernels, self._scale, self._engine.shape
        kernels.rms_rows(self._residual, layer.norm, shape.epsilon, self._normed, scale)
        kernels.linear(self._normed, scale, layer.qkv, 0, self._qkv)
        turned = self._qkv[:, : shape.inner + shape.key_inner]
        kernels.turn(turned, shape.heads, layer.head_norms, shape.epsilon, self._cos, self._sin)
        kernels.rows(self._attend(), self._attended, scale)
        kernels.linear_add(self._attended, scale, layer.out, 0, None, self._residual)
        kernels.rms_rows(self._residual, layer.mlp_norm, shape.epsilon, self._normed, scale)
        kernels.linear(self._normed, scale, layer.up, 0, self._up)
        kernels.swiglu_rows(self._up, self._hidden, scale)
        kernels.linear_add(self._hidden, scale, layer.down, 0, None, self._residual)

    def _attend(self) -> Tensor:
        """[tokens, heads · head_dim]; a few hundredths of the work, so left to PyTorch.

        The query heads that share a key's are laid one below the other, as one head of so many times the tokens:
        PyTorch promises no fused kernel for a bias and groups together, and so keys and values need no copies.
        """
        shape, tokens = self._engine.shape, len(self._qkv)
        q, k, v = self._qkv.split([shape.inner, shape.key_inner, shape.key_inner], dim=1)  # type: ignore[no-untyped-call]
        tall = q.view(tokens, shape.key_heads, -1, shape.head_dim).permute(1, 2, 0, 3)
        k, v = (part.view(1, tokens, shape.key_heads, -1).transpose(1, 2) for part in (k, v))
        attended = scaled_dot_product_attention(tall.flatten(1, 2)[None], k, v, attn_mask=self._bias[None, None])
        return attended.view(tall.shape).permute(2, 0, 1, 3).reshape(tokens, -1)


def angles(tokens: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, float32 [tokens, head_dim / 2]: Qwen3RotaryEmbedding's."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    turns = torch.arange(tokens, device=device).float()[:, None] * frequencies
    return turns.cos(), turns.sin()
