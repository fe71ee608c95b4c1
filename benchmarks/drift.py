"""Follow how far FP8's latents drift from BF16's, before and since v's mean was taken off; one GPU, the fused engine.

    python -m benchmarks.drift ARTIFACT [--sizes 1024x1024 2048x2048] [--steps N ...] [--prompt TEXT] [--json OUT]

ARTIFACT is an FP8 artifact of the fused engine, whose text encoders and VAE serve all. Transformers of the same
weights draw from the same noise: BF16; FP8 as it was, with the mean left in attention; FP8 with a mean that is
computed at every step; FP8 as it is served. After each step the relative distance of the latents from BF16's is
taken, and in the end the PSNR of the pictures, in dB. The last line on stdout is JSON.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fluxserve_export.metrics import psnr
from torch import Tensor

from benchmarks.command import report
from benchmarks.pictures import sides
from benchmarks.surroundings import surroundings
from fluxserve.engine import Components
from fluxserve.engines.fused.build import BF16, FP8, Build
from fluxserve.engines.fused.open import assemble, operations_on
from fluxserve.engines.fused.transformer import FusedTransformer
from fluxserve.families import registry
from fluxserve.families.flux import signatures
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders import artifact as artifacts
from fluxserve.folders.artifact import Artifact, Ranges
from fluxserve.job import Job
from fluxserve.kernels.gemm.layers import Heads
from fluxserve.kernels.operations import Operations
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers


def leaving_the_mean_in(kernels: Operations) -> Operations:
    """The set as it was before values lost their mean: nothing is taken off, given back or counted."""

    def as_it_was(heads: Heads) -> Heads:
        return replace(heads, centre=None)

    return replace(
        kernels,
        linear_heads=lambda x, scale, w, split, heads, out: kernels.linear_heads(
            x, scale, w, split, as_it_was(heads), out
        ),
        linear_heads_gelu=lambda x, scale, w, heads, *rest: kernels.linear_heads_gelu(
            x, scale, w, as_it_was(heads), *rest
        ),
        linear_heads_swiglu=lambda x, scale, w, heads, *rest: kernels.linear_heads_swiglu(
            x, scale, w, as_it_was(heads), *rest
        ),
        linear_add=lambda x, scale, w, split, gate, residual, *_: kernels.linear_add(
            x, scale, w, split, gate, residual
        ),
    )


def with_the_means_range(ranges: Ranges) -> Ranges:
    """Return ranges in which that of v less its mean is that of v."""
    return replace(ranges, centred={name: v for name, (_, _, v) in ranges.attention.items()})


def opened(artifact: Artifact, device: str) -> Components:
    """As it is served, on a GPU; elsewhere with the kernels' definitions. Its weights are not hashed."""
    checkpoint = replace(artifact.checkpoint, spec=artifact.spec)
    ranges = artifact.ranges("transformer")
    return assemble(checkpoint, torch.device(device), FP8, ranges, operations_on(device))


def transformers(artifact: Artifact, served: FusedTransformer, device: torch.device) -> dict[str, FusedTransformer]:
    """By name, all on the device at once, the served one the last. An artifact's kept blocks are kept in each."""
    spec, ranges = FluxSpec.of(artifact.spec), artifact.ranges("transformer")
    signature = signatures.transformer(spec)
    most = (signature.most("image_tokens"), signature.most("text_tokens"), 1)
    kernels = served.kernels
    ways = {
        "bf16": (BF16, None, kernels),
        "fp8, mean left in": (FP8, with_the_means_range(ranges), leaving_the_mean_in(kernels)),
        "fp8, mean of every step": (FP8, ranges, kernels),
    }
    weights = artifact.checkpoint.weights("transformer")
    made = {
        name: FusedTransformer(spec, Build.of(weights, device, precision, kernels, ranges), most)
        for name, (precision, ranges, kernels) in ways.items()
    }
    made["fp8, mean of every step"].steps_between_means = lambda *_: 1
    return {**made, "fp8": served}


@torch.inference_mode()
def denoised(pipeline: Pipeline, job: Job) -> list[Tensor]:
    """Latents after each step."""
    _, *steps = [x.clone() for x in pipeline.denoise([(job, job.seeds[0], pipeline.encode(job))])]
    return steps


@torch.inference_mode()
def drawn(pipeline: Pipeline, job: Job) -> tuple[list[Tensor], Any]:
    """Latents after each step, and the picture, uint8 [height, width, 3]."""
    steps = denoised(pipeline, job)
    return steps, pipeline.decode(steps[-1], job)[0].cpu().numpy()


def compared(
    artifact: Artifact,
    components: Components,
    engines: dict[str, FusedTransformer],
    size: tuple[int, int],
    steps: int,
    prompt: str,
    device: str,
) -> dict[str, Any]:
    """Distances of one size: for each way of FP8 those after each step, and the picture's."""
    fields = {"prompt": prompt.encode(), "height": size[0], "width": size[1], "num_inference_steps": steps, "seed": 0}
    job = registry.plan(fields, artifact.spec, Tokenizers(artifact.checkpoint))
    results = {
        name: drawn(Pipeline(artifact.spec, components.replacing(transformer=engine), device), job)
        for name, engine in engines.items()
    }
    latents, picture = results.pop("bf16")
    return {
        name: {
            "latents": [round(float((a - b).norm() / b.norm()), 5) for a, b in zip(own, latents, strict=True)],
            "psnr": round(psnr(shown, picture), 2),
        }
        for name, (own, shown) in results.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--sizes", type=sides, nargs="+", default=[(1024, 1024)], metavar="HxW")
    parser.add_argument("--steps", type=int, nargs="+", default=[], metavar="N", help="default: the model's own")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--prompt", default="a lighthouse on a cliff at dusk, waves below, oil on canvas")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    artifact = artifacts.read(args.artifact)
    components = opened(artifact, args.device)
    assert isinstance(components.network, FusedTransformer)
    engines = transformers(artifact, components.network, torch.device(args.device))
    found = []
    for size, steps in itertools.product(args.sizes, args.steps or [artifact.spec.defaults.num_inference_steps]):
        by_way = compared(artifact, components, engines, size, steps, args.prompt, args.device)
        found.append({"size": list(size), "steps": steps, "distances": by_way})
        for name, result in by_way.items():
            shown = "  ".join(f"{value:.4f}" for value in result["latents"])
            print(f"{size[0]} x {size[1]}, {steps} steps, {name}: {result['psnr']} dB; {shown}", flush=True)
    about = {"benchmark": "drift", **surroundings(), "model": artifact.spec.name, "prompt": args.prompt}
    report({**about, "runs": found, "saturated": engines["fp8"].saturated()}, args.json)
    for engine in engines.values():
        engine.close()
    components.close()


if __name__ == "__main__":
    main()
