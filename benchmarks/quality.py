"""How often the tiny model draws what it is asked to.

    python -m benchmarks.quality [--n 200] [--steps 20] [--guidance 3] [--with diffusers] [--artifact A] [--json OUT]

Two sets of prompts that name an object and a background: captions of the training grammar with fresh seeds, and
object–colour pairs that training never drew. A classifier names the object, the border's pixels the colour. The
last line on stdout is JSON.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.command import report
from benchmarks.surroundings import surroundings
from fluxserve import Model, settings
from testing.judge import judge, load_judge
from training.evaluate import ask_for

if TYPE_CHECKING:
    pass

Generate = Callable[[Sequence[str], Sequence[int], int, float], Tensor]
"""(prompts, seeds, steps, guidance) → uint8 [N, H, W, 3] on the CPU."""

FIRST_SEED = 10_000  # image k of a set is drawn with seed FIRST_SEED + k
PROMPT_SEED = 2026
BARS = {"seen": (0.85, 0.95), "held_out": (0.75, 0.90)}  # object, colour


def fluxserve_generator(
    given: Mapping[str, str], device: str, batch: int = 25, size: tuple[int, int] = (128, 128)
) -> Generate:
    """Generate with our own pipeline, as the server does, up to `batch` images at a time through the transformer.

    Args:
        given: settings.Settings by name, as text: checkpoint or artifact, dtype.
    """
    return _generator(_open(given, device, batch), size)


@contextmanager
def opened(given: Mapping[str, str], device: str, batch: int, size: tuple[int, int]) -> Iterator[Generate]:
    """`fluxserve_generator` for as long as the block lasts: then its engines are closed, and the next fit."""
    with _open(given, device, batch) as model:
        yield _generator(model, size)


def _open(given: Mapping[str, str], device: str, batch: int) -> Model:
    config = settings.load({name: {"string_value": value} for name, value in given.items()})
    return Model.open(config, device, max_rows=batch)


def _generator(model: Model, size: tuple[int, int]) -> Generate:
    def generate(prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Tensor:
        fields = {"height": size[0], "width": size[1], "num_inference_steps": steps, "guidance_scale": guidance}
        requests = [model.request(prompt, seed=seed, **fields) for prompt, seed in zip(prompts, seeds, strict=True)]
        return torch.cat([torch.from_numpy(drawing.images) for drawing in model.draw(*requests)])

    return generate


def diffusers_generator(
    checkpoint: Path, dtype: torch.dtype, device: str, batch: int = 25, size: tuple[int, int] = (128, 128)
) -> Generate:
    """Generate with diffusers' own FluxPipeline, the noise drawn on the CPU from each image's seed."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(checkpoint, dtype=dtype, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Tensor:
        parts = []
        for first in range(0, len(prompts), batch):
            chunk = slice(first, first + batch)
            pixels = pipeline(
                list(prompts[chunk]),
                height=size[0],
                width=size[1],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[chunk]],
                max_sequence_length=32,
                output_type="pt",
            ).images
            parts.append((pixels.float() * 255).round().byte().permute(0, 2, 3, 1).cpu())
        return torch.cat(parts)

    return generate


def interval(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    z = 1.96
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(generate: Generate, which: str, count: int, steps: int, guidance: float) -> dict[str, object]:
    """Accuracy on one set of prompts ("seen" or "held_out"), with intervals and what went wrong."""
    prompts, pairs = ask_for(which, count, PROMPT_SEED)
    begun = time.perf_counter()
    images = generate(prompts, list(range(FIRST_SEED, FIRST_SEED + count)), steps, guidance)
    seconds = time.perf_counter() - begun
    return {**score(images, prompts, pairs), "seconds": round(seconds, 2)}


def score(images: Tensor, prompts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Accuracy of pictures that were drawn from prompts which ask for (object, colour) pairs: uint8 [N, H, W, 3]."""
    verdict = judge(load_judge(), images, pairs)
    wrong = [
        prompt
        for prompt, pair, thing, colour in zip(prompts, pairs, verdict.objects, verdict.colours, strict=True)
        if pair != (int(thing), int(colour))
    ]
    return {
        "object": verdict.object_accuracy,
        "object_interval": interval(verdict.object_accuracy, len(pairs)),
        "colour": verdict.colour_accuracy,
        "colour_interval": interval(verdict.colour_accuracy, len(pairs)),
        "wrong": wrong,
    }


def _what(artifact: Path) -> dict[str, str]:
    """What an artifact is, without where it is."""
    from fluxserve.folders.artifact import read_manifest

    manifest = read_manifest(artifact)
    return {name: manifest[name] for name in ("model", "engine", "precision")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--artifact", type=Path, help="made by `fluxserve export`, in place of the checkpoint")
    parser.add_argument("--n", type=int, default=200, help="prompts of each set")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--with", dest="runner", choices=("fluxserve", "diffusers"), default="fluxserve")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.runner == "fluxserve":
        given = {"checkpoint": str(args.checkpoint), "dtype": args.dtype}
        if args.artifact:
            given = {"artifact": str(args.artifact)}
        generate = fluxserve_generator(given, args.device, size=tuple(args.size))
    else:
        generate = diffusers_generator(args.checkpoint, getattr(torch, args.dtype), args.device, size=tuple(args.size))
    settings = {
        "with": args.runner,
        "artifact": _what(args.artifact) if args.artifact else None,
        "n": args.n,
        "steps": args.steps,
        "guidance": args.guidance,
        "dtype": None if args.artifact else args.dtype,
        "size": args.size,
    }
    result: dict = {"benchmark": "quality", **surroundings(), **settings}
    print(f"{'prompts':<10}{'object':>8}{'95% interval':>18}{'bar':>7}{'colour':>9}{'95% interval':>18}{'bar':>7}")
    for which, (object_bar, colour_bar) in BARS.items():
        found = measure(generate, which, args.n, args.steps, args.guidance)
        result[which] = found
        object_span, colour_span = ("{:.3f}–{:.3f}".format(*found[f"{k}_interval"]) for k in ("object", "colour"))
        print(
            f"{which:<10}{found['object']:>8.3f}{object_span:>18}{object_bar:>7}"
            f"{found['colour']:>9.3f}{colour_span:>18}{colour_bar:>7}"
        )
    report(result, args.json)


if __name__ == "__main__":
    main()
