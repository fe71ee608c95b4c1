"""Count what static FP8 scales clip when the engine meets what calibration never saw: prompts, sizes, changed weights.

    python -m benchmarks.unseen ARTIFACT [--sizes 1024x1024 2048x2048] [--strengths 0 0.1 0.3] [--headroom 1 2 4]
        [--steps N] [--device cuda:0] [--json OUT]

ARTIFACT is an FP8 artifact of the fused engine. Its scales are kept, and every matrix of the blocks is changed as a
LoRA changes it: a product of rank 16 is added, whose norm is `strength` of the matrix's. A static scale allows
`headroom` times the largest value that calibration saw. The share of values at E4M3's limit is printed for each; the
engine serves with a headroom of 2. The last line on stdout is JSON.
"""

import argparse
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import report
from benchmarks.drift import denoised, opened
from benchmarks.pictures import sides
from benchmarks.surroundings import surroundings
from fluxserve.engine import Components
from fluxserve.engines.fused.build import FP8, Build
from fluxserve.engines.fused.open import operations_on
from fluxserve.engines.fused.scales import HEADROOM
from fluxserve.engines.fused.transformer import FusedTransformer
from fluxserve.engines.fused.weights import Reader
from fluxserve.families import registry
from fluxserve.families.flux import signatures
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders import artifact as artifacts
from fluxserve.folders.artifact import Artifact, Ranges
from fluxserve.folders.weights import Weights
from fluxserve.kernels.gemm.layers import SAMPLE
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers

RANK = 16
PROMPTS = (
    "a page of handwritten sheet music, ink on yellowed paper, macro photograph",
    "neon signs in the rain, crowded street, wide angle, motion blur",
)


class Changed(Reader):
    """A component's tensors, the matrices of its blocks changed by a random product of rank 16.

    Args:
        strength: ‖product‖ / ‖matrix‖.
    """

    def __init__(self, weights: Weights, device: torch.device, strength: float) -> None:
        super().__init__(weights, device)
        self._strength = strength

    def __call__(self, name: str) -> Tensor:
        tensor = super().__call__(name)
        if tensor.ndim < 2 or "blocks." not in name or not self._strength:
            return tensor
        seeded = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
        rows, columns = tensor.shape
        up, down = (
            torch.randn(size, generator=seeded, device=tensor.device) for size in ((rows, RANK), (RANK, columns))
        )
        product = up @ down
        scaled = product * (self._strength * tensor.float().norm() / product.norm())
        return (tensor.float() + scaled).to(tensor.dtype)


def _normal(seeded: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=seeded, device=seeded.device)


def with_headroom(ranges: Ranges, headroom: float) -> Ranges:
    """Return ranges of which the engine makes scales with this headroom instead of its own."""
    by = headroom / HEADROOM
    return replace(
        ranges,
        linears={name: amax * by for name, amax in ranges.linears.items()},
        attention={name: (q * by, k * by, v * by) for name, (q, k, v) in ranges.attention.items()},
        centred={name: amax * by for name, amax in ranges.centred.items()},
    )


def clipped(
    pipeline: Pipeline, engine: FusedTransformer, artifact: Artifact, size: tuple[int, int], steps: int
) -> dict[str, Any]:
    """How many of the values that were looked at lie at the limit: q, k and v, and hidden layers."""
    spec, before = FluxSpec.of(artifact.spec), _counts(engine)
    for seed, prompt in enumerate(PROMPTS):
        sized = {"height": size[0], "width": size[1], "num_inference_steps": steps, "seed": 1000 + seed}
        denoised(pipeline, registry.plan({"prompt": prompt.encode(), **sized}, spec, Tokenizers(artifact.checkpoint)))
    heads, hidden = (_counts(engine) - before).tolist()
    rows = -(-(spec.text.sequence.tokens + spec.image_tokens(*size)) // SAMPLE)
    own = spec.transformer
    looked = rows * steps * len(PROMPTS) * (own.num_layers + own.num_single_layers) * own.hidden_size
    return {
        "heads": heads,
        "hidden": hidden,
        "share_of_heads": heads / (3 * looked),
        "share_of_hidden": hidden / (own.mlp_ratio * looked),
    }


def _counts(engine: FusedTransformer) -> Tensor:
    return engine.counts.sum(dim=0).cpu()


def transformer(artifact: Artifact, read: Reader, ranges: Ranges) -> FusedTransformer:
    signature = signatures.transformer(FluxSpec.of(artifact.spec))
    most = (signature.most("image_tokens"), signature.most("text_tokens"), 1)
    build = Build(read, FP8, operations_on(str(read.device)), ranges)
    return FusedTransformer(FluxSpec.of(artifact.spec), build, most)


def measured(artifact: Artifact, components: Components, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All combinations of strengths, headrooms and sizes."""
    weights, ranges, found = artifact.checkpoint.weights("transformer"), artifact.ranges("transformer"), []
    for strength, headroom in itertools.product(args.strengths, args.headroom):
        read = Changed(weights, torch.device(args.device), strength)
        engine = transformer(artifact, read, with_headroom(ranges, headroom))
        pipeline = Pipeline(artifact.spec, components.replacing(transformer=engine), args.device)
        for size in args.sizes:
            counted = clipped(pipeline, engine, artifact, size, args.steps)
            found.append({"strength": strength, "headroom": headroom, "size": list(size), **counted})
            shares = f"heads {counted['share_of_heads']:.2e}, hidden {counted['share_of_hidden']:.2e}"
            print(f"change {strength:.0%}, headroom {headroom}, {size[0]} x {size[1]}: {shares}", flush=True)
        engine.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--sizes", type=sides, nargs="+", default=[(1024, 1024)], metavar="HxW")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--headroom", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    artifact = artifacts.read(args.artifact)
    components = opened(artifact, args.device)
    about = {"benchmark": "unseen", **surroundings(), "model": artifact.spec.name, "prompts": PROMPTS}
    report({**about, "rank": RANK, "steps": args.steps, "clipped": measured(artifact, components, args)}, args.json)
    components.close()


if __name__ == "__main__":
    main()
