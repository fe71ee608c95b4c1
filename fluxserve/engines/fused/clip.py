"""CLIP's text encoder as far as FLUX uses it: the pooled embedding. So little work that PyTorch does it, in one graph.

transformers' CLIPTextModel with quick GELU: causal attention, the final norm, and of its rows the one where text ends.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from fluxserve.engine import Shapes
from fluxserve.engines.fused.build import Build, Dense
from fluxserve.engines.fused.graphs import Replayed
from fluxserve.errors import UnsupportedArchitecture
from fluxserve.families.flux import signatures
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.checkpoint import Checkpoint

FOLDER = "text_encoder"
_QUICK_GELU = "quick_gelu"
_OLD_END = 2
"""An eos_token_id of 2 in a configuration is a mistake of old ones: the end is then where the largest id stands."""


class _Norm:
    def __init__(self, build: Build, name: str, config: Mapping[str, Any]) -> None:
        parts = (build.read.shaped(f"{name}.{part}", config["hidden_size"]) for part in ("weight", "bias"))
        self._weight, self._bias = (part.to(build.precision.compute) for part in parts)
        self._epsilon = config["layer_norm_eps"]

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self._weight, self._bias, self._epsilon)


class _Layer:
    def __init__(self, build: Build, name: str, config: Mapping[str, Any]) -> None:
        def linear(part: str, inputs: int, outputs: int) -> Dense:
            return build.dense(f"{name}.{part}", inputs, outputs)

        width, hidden = config["hidden_size"], config["intermediate_size"]
        self._heads = config["num_attention_heads"]
        self._norm = _Norm(build, f"{name}.layer_norm1", config)
        self._q, self._k, self._v = (linear(f"self_attn.{part}_proj", width, width) for part in "qkv")
        self._out = linear("self_attn.out_proj", width, width)
        self._mlp_norm = _Norm(build, f"{name}.layer_norm2", config)
        self._up, self._down = linear("mlp.fc1", width, hidden), linear("mlp.fc2", hidden, width)

    def __call__(self, x: Tensor) -> Tensor:
        normed = self._norm(x)
        q, k, v = (p(normed).unflatten(-1, (self._heads, -1)).transpose(1, 2) for p in (self._q, self._k, self._v))  # type: ignore[no-untyped-call]
        x = x + self._out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        hidden = self._up(self._mlp_norm(x))
        return x + self._down(hidden * torch.sigmoid(1.702 * hidden))


class FusedClip:
    """An Engine in the compute dtype; see engine.py."""

    def __init__(self, checkpoint: Checkpoint, build: Build) -> None:
        usual = {"layer_norm_eps": 1e-5, "hidden_act": _QUICK_GELU, "eos_token_id": _OLD_END}
        config: dict[str, Any] = {**usual, **checkpoint.config(FOLDER)}
        if config["hidden_act"] != _QUICK_GELU:
            raise UnsupportedArchitecture(f"{FOLDER}/config.json: hidden_act", config["hidden_act"], _QUICK_GELU)
        self.signature = signatures.clip(FluxSpec.of(checkpoint.spec))
        read = build.read
        self._words, self._positions = (
            read.shaped(f"embeddings.{part}_embedding.weight", config[rows], config["hidden_size"]).to(
                build.precision.compute
            )
            for part, rows in (("token", "vocab_size"), ("position", "max_position_embeddings"))
        )
        names = [f"encoder.layers.{i}" for i in range(config["num_hidden_layers"])]
        self._layers = [_Layer(build, name, config) for name in names]
        self._norm = _Norm(build, "final_layer_norm", config)
        self._end: int = config["eos_token_id"]
        read.finish()

    def bind(self, shapes: Shapes) -> "_Bound":
        assert self._layers, "bind after close"
        return _Bound(self, self.signature.resolve(shapes), self._words)

    def close(self) -> None:
        self._layers = []

    def pooled(self, ids: Tensor) -> Tensor:
        """int64 [rows, tokens] → [rows, pooled_projection_dim]."""
        x = self._words[ids] + self._positions[: ids.shape[1]]
        for layer in self._layers:
            x = layer(x)
        marks = ids if self._end == _OLD_END else (ids == self._end).int()
        at = marks.argmax(dim=-1)
        return self._norm(x)[torch.arange(len(ids), device=ids.device), at]


class _Bound:
    def __init__(self, engine: FusedClip, sizes: Shapes, like: Tensor) -> None:
        ids = torch.zeros(sizes["input_ids"], dtype=torch.int64, device=like.device)
        self.inputs: Mapping[str, Tensor] = {"input_ids": ids}
        self.outputs: Mapping[str, Tensor] = {"pooled": like.new_zeros(sizes["pooled"])}
        self._engine = engine
        self._replay = Replayed(self._launch, like.device)

    @torch.inference_mode()
    def run(self) -> None:
        self._replay()

    def _launch(self) -> None:
        self.outputs["pooled"].copy_(self._engine.pooled(self.inputs["input_ids"]))
