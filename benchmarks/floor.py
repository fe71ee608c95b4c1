"""The floor under a denoise step: its products and attentions alone, back to back, nothing between them.

    python -m benchmarks.floor [--model flux.1-dev] [--steps N] [--text N] [--size 1024x1024] [--reference HxW]
        [--json OUT]

FP8 products through cuBLASLt (torch._scaled_mm, one scale per tensor, the fast accumulator) and cuDNN's FP8 attention,
random data, captured as one CUDA graph and replayed for as many steps as an image has: sustained, because a GPU's power
limit, not its peak, is what holds it back. A reference's tokens are beside the picture's in every step. No engine that
does this arithmetic with these libraries can be faster. The last line on stdout is JSON.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.command import report
from benchmarks.pictures import sides
from benchmarks.surroundings import surroundings
from benchmarks.timing import captured, milliseconds
from fluxserve.families.flux.models import FLUX1_DEV
from fluxserve.families.flux.parts import TransformerSpec
from fluxserve.kernels.attention.fused import attention, padded
from fluxserve.kernels.fp8 import E4M3
from testing.published import MODELS

_COPIES = 6
"""Of each weight: more than the L2 cache holds, so that every product reads its own from memory."""


@dataclass(frozen=True)
class Product:
    """`count` products a step of [tokens, inner] by [inner, columns]."""

    count: int
    columns: int
    inner: int


def products(spec: TransformerSpec) -> list[Product]:
    """Of one step: text and image rows together, without modulation, embedders and the last projection.

    FLUX.2's MLPs are SwiGLU: a gate for every feature is multiplied beside it.
    """
    d, double, single = spec.hidden_size, spec.num_layers, spec.num_single_layers
    mlp, gated = spec.mlp_width, 1 if spec.generation == 1 else 2
    return [
        Product(double + single, 3 * d, d),
        Product(double, d, d),
        Product(double + single, gated * mlp, d),
        Product(double, d, mlp),
        Product(single, d, d + mlp),
    ]


def flops(spec: TransformerSpec, tokens: int) -> float:
    """Floating-point operations of one step's products and attentions."""
    attentions = (spec.num_layers + spec.num_single_layers) * 4 * tokens**2 * spec.hidden_size
    return attentions + sum(2 * p.count * tokens * p.columns * p.inner for p in products(spec))


class Step:
    """One step's launches, in the order of the blocks."""

    def __init__(self, spec: TransformerSpec, tokens: int) -> None:
        self._spec = spec
        self._one = torch.ones((), device="cuda")
        self._weights = {
            p: [_random(p.columns, p.inner, 0.05) for _ in range(min(p.count, _COPIES))] for p in products(spec)
        }
        self._inputs = {p: _random(tokens, p.inner) for p in self._weights}
        memory = padded(tokens, E4M3)
        self._tokens, self._qkv = tokens, _random(memory, 3 * spec.hidden_size)
        self._attended = torch.empty(memory, spec.hidden_size, dtype=E4M3, device="cuda")
        self._scales = torch.ones(4, device="cuda")

    def __call__(self) -> None:
        blocks = self._spec.num_layers + self._spec.num_single_layers
        for block in range(blocks):
            for product, index in self._of_block(block, blocks):
                weights = self._weights[product]
                torch._scaled_mm(
                    self._inputs[product],
                    weights[index % len(weights)].T,
                    scale_a=self._one,
                    scale_b=self._one,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )
            attention(self._qkv, self._tokens, self._spec.num_attention_heads, self._scales, self._attended)

    def _of_block(self, block: int, blocks: int) -> Iterator[tuple[Product, int]]:
        for product in self._weights:
            first, last = (at * product.count // blocks for at in (block, block + 1))
            yield from ((product, index) for index in range(first, last))


def _random(rows: int, columns: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * spread).to(E4M3)


def measure(spec: TransformerSpec, tokens: int, steps: int, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of all steps, and what rate that is."""
    step = Step(spec, tokens)
    graph = captured(step)

    def loop() -> None:
        for _ in range(steps):
            graph.replay()

    total = statistics.median(milliseconds(loop, repeats))
    rate = flops(spec, tokens) * steps / total / 1e9
    return {"steps": steps, "tokens": tokens, "total_ms": round(total, 1), "step_ms": round(total / steps, 2)} | {
        "tflops": round(rate)
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", choices=MODELS, default=FLUX1_DEV.name, help="default: %(default)s")
    made.add_argument("--steps", type=int, help="default: the model's own")
    made.add_argument("--text", type=int, help="text tokens; default: the model's own")
    made.add_argument("--size", type=sides, default=(1024, 1024), metavar="HxW")
    made.add_argument("--reference", type=sides, metavar="HxW", help="of an image to draw after; default: none")
    made.add_argument("--json", type=Path)
    return made


def main() -> None:
    args = parser().parse_args()
    spec = MODELS[args.model]
    tokens = (args.text or spec.text.sequence.tokens) + spec.image_tokens(*args.size)
    if args.reference:
        tokens += spec.image_tokens(*args.reference)
    found = measure(spec.transformer, tokens, args.steps or spec.defaults.num_inference_steps)
    result = {"benchmark": "floor", **surroundings(), "model": spec.name, **found}
    report(result, args.json)


if __name__ == "__main__":
    main()
