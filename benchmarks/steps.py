"""A model's denoise loop in the fused engine, whole and sustained, with each set of kernels in turn.

    python -m benchmarks.steps [--model flux.1-dev] [--sets cuda triton] [--precision fp8 bf16] [--steps N]
        [--reference HxW] [--repeats N] [--profile] [--json OUT]

Random weights, drawn on the GPU: no checkpoint, no text encoders. Every set runs the same steps from the same inputs,
loop by loop in turn; how far its velocity is from the first set's is printed beside its time. At a GPU's power limit
kernels that spare energy are fast, so that what counts is all steps in a row and not a kernel alone. The last line on
stdout is JSON.
"""

import argparse
import json
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor

from benchmarks import floor
from benchmarks.command import report
from benchmarks.drift import leaving_the_mean_in
from benchmarks.pictures import sides
from benchmarks.surroundings import surroundings
from benchmarks.timing import milliseconds, summary
from fluxserve.engines.fused.build import BF16, FP8, Build, Precision
from fluxserve.engines.fused.transformer import FusedBound, FusedTransformer
from fluxserve.engines.fused.weights import Reader
from fluxserve.families.flux import tokens
from fluxserve.families.flux.models import FLUX1_DEV
from fluxserve.families.flux.parts import FluxSpec, TransformerSpec
from fluxserve.folders.artifact import Ranges
from fluxserve.kernels.operations import LAUNCHED, as_they_are
from testing import published

SETS = {
    "cuda": LAUNCHED,
    "mean-left-in": leaving_the_mean_in(LAUNCHED),
    "triton": replace(LAUNCHED, arrange=as_they_are),
}
"""As served; as served until v's mean was taken off; with Triton's products, as BF16 always has them."""
PRECISIONS = {"fp8": FP8, "bf16": BF16}
_DEVICE = torch.device("cuda")


class RandomReader(Reader):
    """A transformer's tensors, drawn when they are asked for; the same for the same name."""

    def __init__(self, spec: FluxSpec) -> None:
        with init_empty_weights():
            module = published.module(spec, "transformer")
        self._shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.device, self._folder, self._prefix, self._unread = _DEVICE, Path("random"), "", set()
        self._extremes = {}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __call__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:  # norms near 1, biases near 0
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16, device=_DEVICE)
        generator = torch.Generator(_DEVICE).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=_DEVICE)
        return drawn * shape[1] ** -0.5


def usual_ranges(spec: TransformerSpec) -> Ranges:
    """Return ranges for random weights of unit spread: nothing is clipped, nothing vanishes.

    RMSNorm bounds q and k by the root of head_dim, 11.3.
    """
    blocks = [f"transformer_blocks.{i}" for i in range(spec.num_layers)]
    singles = [f"single_transformer_blocks.{i}" for i in range(spec.num_single_layers)]
    down, out = ("net.2", "proj_out") if spec.generation == 1 else ("linear_out", "attn.to_out")
    linears = {f"{b}.{mlp}.{down}": 12.0 for b in blocks for mlp in ("ff", "ff_context")}
    linears |= {f"{b}.{out}": 12.0 for b in singles}
    attention = [f"{b}.attn" for b in (*blocks, *singles)]
    return Ranges(linears, dict.fromkeys(attention, (12.0, 12.0, 12.0)), dict.fromkeys(attention, 12.0))


Sizes = Sequence[tuple[int, int]]
"""Of the picture, and of a reference if there is one."""


def inputs_of(spec: FluxSpec, taken: Iterable[str], sizes: Sizes) -> dict[str, Tensor]:
    """One image's random inputs, of those that are taken."""
    generator, shape = torch.Generator(_DEVICE).manual_seed(0), spec.transformer
    axes, (latents, *references) = len(shape.axes_dims_rope), [spec.latent_size(*size) for size in sizes]
    image = torch.from_numpy(np.concatenate([tokens.image_ids(*latents, axes), tokens.reference_ids(references, axes)]))
    text = torch.from_numpy(tokens.text_ids(spec.text.sequence.tokens, axes))

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=_DEVICE)

    known = {
        "hidden_states": draw(1, len(image), shape.in_channels),
        "encoder_hidden_states": draw(1, len(text), shape.joint_attention_dim),
        "pooled_projections": draw(1, shape.pooled_projection_dim or 0),
        "timestep": torch.ones(1, device=_DEVICE),
        "guidance": torch.full((1,), spec.defaults.guidance_scale, device=_DEVICE),
        "img_ids": image,
        "txt_ids": text,
    }
    return {name: known[name] for name in taken}


def bound_of(engine: FusedTransformer, spec: FluxSpec, sizes: Sizes) -> FusedBound:
    """Bound and filled."""
    inputs = inputs_of(spec, (tensor.name for tensor in engine.signature.inputs), sizes)
    bound = engine.bind({name: tuple(value.shape) for name, value in inputs.items()})
    for name, value in inputs.items():
        bound.inputs[name].copy_(value)
    return bound


class Contender:
    """One set of kernels with a model of its own, ready to run its loop."""

    def __init__(self, spec: FluxSpec, name: str, precision: Precision, sizes: Sizes, steps: int) -> None:
        begun, before = time.perf_counter(), torch.cuda.memory_allocated()
        ranges = usual_ranges(spec.transformer) if precision.quantised else None
        most = (sum(spec.image_tokens(*size) for size in sizes), spec.text.sequence.tokens, 1)
        engine = FusedTransformer(spec, Build(RandomReader(spec), precision, SETS[name], ranges), most)
        torch.cuda.synchronize()
        self.name, self.steps, self.spent = name, steps, list[float]()
        self._about = {
            "weights_gib": round((torch.cuda.memory_allocated() - before - engine.arena.bytes) / 2**30, 2),
            "arena_gib": round(engine.arena.bytes / 2**30, 2),
            "load_s": round(time.perf_counter() - begun, 1),
        }
        self._bound = bound_of(engine, spec, sizes)
        self._times = torch.linspace(1, 1 / steps, steps, device=_DEVICE).to(torch.bfloat16)
        self._bound.begin(self._times)
        self._bound.run_step(0)
        self.velocity = self._bound.outputs["velocity"].float().clone()
        self.loop()  # captured by now

    def loop(self) -> None:
        self._bound.begin(self._times)
        for step in range(self.steps):
            self._bound.run_step(step)

    def summary(self, first: Tensor, floor_ms: float) -> dict[str, Any]:
        """Milliseconds, memory, and how far the first velocity is from that of the first set."""
        found = summary(self.spent)
        return {
            "set": self.name,
            "loop_ms": found,
            "step_ms": round(found["median"] / self.steps, 2),
            **self._about,
            "apart": round(float((self.velocity - first).norm() / first.norm()), 5),
            "finite": bool(torch.isfinite(self.velocity).all()),
            "of_floor": round(found["median"] / floor_ms, 3),
        }


def profiled(loop: Any) -> str:
    """Where a loop's time goes, kernel by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loop()
        torch.cuda.synchronize()
    return str(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=published.MODELS, default=FLUX1_DEV.name, help="default: %(default)s")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["cuda", "triton"])
    parser.add_argument("--precision", choices=PRECISIONS, default="fp8")
    parser.add_argument("--size", type=sides, default=(1024, 1024), metavar="HxW")
    parser.add_argument("--reference", type=sides, metavar="HxW", help="of an image to draw after; default: none")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--repeats", type=int, default=5, help="loops of each set, in turn; default: %(default)s")
    parser.add_argument("--profile", action="store_true", help="print each kernel's share")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.precision == "bf16" and args.sets != ["triton"]:
        parser.error("--precision bf16 is for --sets triton: CUDA's products are FP8 alone")
    spec, sizes = published.MODELS[args.model], [size for size in (args.size, args.reference) if size]
    steps = args.steps or spec.defaults.num_inference_steps
    tokens = spec.text.sequence.tokens + sum(spec.image_tokens(*size) for size in sizes)
    under = floor.measure(spec.transformer, tokens, steps)
    print(f"floor     {under['total_ms']:>8.1f} ms  {under['step_ms']:>6.2f} a step", flush=True)
    contenders = [Contender(spec, name, PRECISIONS[args.precision], sizes, steps) for name in args.sets]
    for _ in range(args.repeats):
        for contender in contenders:  # in turn, so that the GPU's temperature and power are the same for all
            contender.spent += milliseconds(contender.loop, repeats=1, warm_up=0)
    if args.profile:
        print(*(f"{contender.name}\n{profiled(contender.loop)}" for contender in contenders), sep="\n")
    found = [contender.summary(contenders[0].velocity, under["total_ms"]) for contender in contenders]
    print(*(json.dumps(result) for result in found), sep="\n", flush=True)
    asked = {"model": spec.name, "precision": args.precision}
    result = {"benchmark": "steps", **surroundings(), **asked, "floor": under, "sets": found}
    report(result, args.json)


if __name__ == "__main__":
    main()
