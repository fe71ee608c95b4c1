"""FLUX.1-dev's denoise loop in the fused engine, whole and sustained, with each set of kernels in turn.

    python -m benchmarks.steps [--sets cuda triton] [--precision fp8 bf16] [--profile] [--json OUT]

Random weights, made on the GPU: no checkpoint, no text encoders. Every set runs the same steps from the same inputs;
how far its velocity is from the first set's is printed beside its time. At a GPU's power limit kernels that spare
energy are fast, so that what counts is 28 steps in a row and not a kernel alone. The last line on stdout is JSON.
"""

import argparse
import gc
import json
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import Tensor

from benchmarks import floor
from benchmarks.surroundings import surroundings
from benchmarks.timing import milliseconds, summary
from fluxserve import flow
from fluxserve.artifact import Scales
from fluxserve.engines.fused.open import BF16, FP8
from fluxserve.engines.fused.transformer import FusedBound, FusedTransformer
from fluxserve.engines.fused.weights import Precision, Reader
from fluxserve.kernels.operations import LAUNCHED, as_they_are
from fluxserve.spec import FLUX1_DEV, TransformerSpec

SETS = {
    "cuda": LAUNCHED,
    "triton": replace(LAUNCHED, arrange=as_they_are),
}
"""As served; with Triton's products, as BF16 always has them."""
PRECISIONS = {"fp8": FP8, "bf16": BF16}
_DEVICE = torch.device("cuda")


class RandomReader(Reader):
    """A transformer's tensors, drawn when they are asked for; the same for the same name."""

    def __init__(self, spec: TransformerSpec) -> None:
        with init_empty_weights():
            module = FluxTransformer2DModel(
                num_layers=spec.num_layers,
                num_single_layers=spec.num_single_layers,
                guidance_embeds=spec.guidance_embeds,
            )
        self._shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.device, self._folder, self._prefix, self._unread = _DEVICE, Path("random"), "", set()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __call__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:  # norms near 1, biases near 0
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16, device=_DEVICE)
        generator = torch.Generator(_DEVICE).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=_DEVICE)
        return drawn * shape[1] ** -0.5


def usual_scales(spec: TransformerSpec) -> Scales:
    """What random weights of unit spread lead to: nothing is clipped, nothing vanishes."""
    blocks = [f"transformer_blocks.{i}" for i in range(spec.num_layers)]
    singles = [f"single_transformer_blocks.{i}" for i in range(spec.num_single_layers)]
    linears = {f"{b}.{mlp}.net.2": 12.0 for b in blocks for mlp in ("ff", "ff_context")}
    linears |= {f"{b}.proj_out": 12.0 for b in singles}
    return Scales(linears, {f"{b}.attn": (4.0, 4.0, 12.0) for b in (*blocks, *singles)})


def bound_of(engine: FusedTransformer, size: tuple[int, int]) -> FusedBound:
    """Bound and filled with one image's random inputs."""
    spec, generator = FLUX1_DEV, torch.Generator(_DEVICE).manual_seed(0)
    image = torch.from_numpy(flow.image_ids(*spec.latent_size(*size)))
    text = torch.from_numpy(flow.text_ids(spec.text.sequence.tokens))
    shape = spec.transformer

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=_DEVICE)

    inputs = {
        "hidden_states": draw(1, len(image), shape.in_channels),
        "encoder_hidden_states": draw(1, len(text), shape.joint_attention_dim),
        "pooled_projections": draw(1, shape.pooled_projection_dim),
        "timestep": torch.ones(1, device=_DEVICE),
        "guidance": torch.full((1,), 3.5, device=_DEVICE),
        "img_ids": image,
        "txt_ids": text,
    }
    bound = engine.bind({name: tuple(value.shape) for name, value in inputs.items()})
    for name, value in inputs.items():
        bound.inputs[name].copy_(value)
    return bound


def measure(name: str, precision: Precision, size: tuple[int, int], steps: int, profile: bool) -> dict[str, Any]:
    """One set's loop: milliseconds, memory, its first velocity."""
    spec, begun = FLUX1_DEV, time.perf_counter()
    scales = usual_scales(spec.transformer) if precision.quantised else None
    most = (spec.image_tokens(*size), spec.text.sequence.tokens, 1)
    read = RandomReader(spec.transformer)
    engine = FusedTransformer(spec, read, _DEVICE, precision, scales, SETS[name], most)
    torch.cuda.synchronize()
    loaded, weights = time.perf_counter() - begun, torch.cuda.memory_allocated() - engine.arena.bytes
    bound = bound_of(engine, size)
    times = torch.linspace(1, 1 / steps, steps, device=_DEVICE).to(torch.bfloat16)

    def loop() -> None:
        bound.prepare(times)
        for _ in range(steps):
            bound.run()

    bound.prepare(times)
    bound.run()
    velocity = bound.outputs["velocity"].float().clone()
    found = summary(milliseconds(loop, repeats=5))
    if profile:
        print(profiled(loop))
    return {
        "set": name,
        "loop_ms": found,
        "step_ms": round(found["median"] / steps, 2),
        "weights_gib": round(weights / 2**30, 2),
        "arena_gib": round(engine.arena.bytes / 2**30, 2),
        "load_s": round(loaded, 1),
        "velocity": velocity,
    }


def profiled(loop: Any) -> str:
    """Where a loop's time goes, kernel by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loop()
        torch.cuda.synchronize()
    return str(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--precision", choices=PRECISIONS, default="fp8")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--steps", type=int, default=FLUX1_DEV.defaults.num_inference_steps)
    parser.add_argument("--profile", action="store_true", help="print each kernel's share")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.precision == "bf16" and args.sets != ["triton"]:
        parser.error("--precision bf16 is for --sets triton: CUDA's products are FP8 alone")
    height, width = (int(side) for side in args.size.split("x"))
    tokens = FLUX1_DEV.text.sequence.tokens + FLUX1_DEV.image_tokens(height, width)
    under = floor.measure(FLUX1_DEV.transformer, tokens, args.steps)
    print(f"floor     {under['total_ms']:>8.1f} ms  {under['step_ms']:>6.2f} a step", flush=True)
    found: list[dict[str, Any]] = []
    first: Tensor | None = None
    for name in args.sets:
        gc.collect()
        torch.cuda.empty_cache()
        result = measure(name, PRECISIONS[args.precision], (height, width), args.steps, args.profile)
        velocity = result.pop("velocity")
        first = velocity if first is None else first
        result["apart"] = round(float((velocity - first).norm() / first.norm()), 5)
        result["finite"] = bool(torch.isfinite(velocity).all())
        result["of_floor"] = round(result["loop_ms"]["median"] / under["total_ms"], 3)
        print(json.dumps(result), flush=True)
        found.append(result)
    result = {"benchmark": "steps", **surroundings(), "precision": args.precision, "floor": under, "sets": found}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
