"""What a user would run instead: diffusers' own pipeline in BF16, as it is and with regional compilation.

    python -m benchmarks.peers CHECKPOINT [--modes eager compiled] [--n 5] [--steps N] [--size 1024x1024]
        [--reference HxW] [--json OUT]

The pipeline is the checkpoint's: FluxPipeline or Flux2KleinPipeline. From the prompt to Pillow's image; the PNG that
Pillow writes of it is timed apart, because it takes the better part of a second. Everything is on the GPU that fits,
attention pinned to cuDNN's kernel, the fastest that PyTorch has. Compilation is `compile_repeated_blocks`, as its
documentation recommends it; its first picture is timed apart. The last line on stdout is JSON.
"""

import argparse
import io
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.command import report
from benchmarks.pictures import photograph, sides
from benchmarks.surroundings import surroundings
from benchmarks.timing import summary
from fluxserve.folders import checkpoint

PROMPT = "a photograph of a fox that reads a newspaper in a café, morning light, shallow depth of field"
MODES = ("eager", "compiled")


class Peer:
    """A checkpoint's pipeline on one device, and how long its loop takes.

    Args:
        reference: height and width of an image to draw after.
    """

    def __init__(self, folder: Path, device: str, reference: tuple[int, int] | None = None) -> None:
        self._spec = checkpoint.read(folder).spec
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self._device = torch.device(device)
        self._marks: list[float] = []
        self._given = {"image": [Image.fromarray(photograph(reference))]} if reference else {}

    def compile(self) -> None:
        self._pipe.transformer.compile_repeated_blocks(fullgraph=True)

    def draw(self, steps: int, size: tuple[int, int], seed: int) -> "Drawn":
        begun = time.perf_counter()
        picture = self.picture(steps, size, seed)
        drawn = time.perf_counter()
        picture.save(io.BytesIO(), "png")
        ended = time.perf_counter()
        return Drawn(*(1000 * seconds for seconds in (drawn - begun, ended - drawn, self._marks[-1] - self._marks[0])))

    def picture(self, steps: int, size: tuple[int, int], seed: int) -> Image.Image:
        self._marks.clear()
        with self._attention():
            (image,) = self._pipe(
                prompt=PROMPT,
                **self._given,
                height=size[0],
                width=size[1],
                num_inference_steps=steps,
                guidance_scale=self._spec.defaults.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed),
                max_sequence_length=self._spec.text.sequence.tokens,
                callback_on_step_end=self._mark,
            ).images
        drawn: Image.Image = image
        return drawn

    def _mark(self, *called_with: Any) -> dict[str, Any]:
        """diffusers calls it after each step with itself, the step, the timestep and tensors; the ends are timed."""
        if self._device.type == "cuda" and called_with[1] in (0, self._pipe.num_timesteps - 1):
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())
        return {}

    def _attention(self) -> Any:
        if self._device.type == "cpu":
            return nullcontext()
        others = [
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]  # T5's mask, VAE's head of 512
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True)


@dataclass(frozen=True)
class Drawn:
    """Milliseconds from the prompt to Pillow's image, from there to its PNG, and of the steps but the first."""

    picture: float
    file: float
    loop: float


def measure(peer: Peer, modes: list[str], n: int, steps: int, size: tuple[int, int]) -> dict[str, Any]:
    """Of each mode: seconds of the first picture, milliseconds of the others."""
    found = {}
    for mode in modes:
        if mode == "compiled":
            peer.compile()
        first = peer.draw(steps, size, 0)
        drawn = [peer.draw(steps, size, 1 + i) for i in range(n)]
        found[mode] = {
            "first_s": round(first.picture / 1000, 1),
            "picture_ms": summary([each.picture for each in drawn]),
            "file_ms": summary([each.file for each in drawn]),
            "step_ms": round(statistics.median(each.loop for each in drawn) / max(1, steps - 1), 2),
        }
        if torch.cuda.is_available():
            found[mode]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(mode, json.dumps(found[mode]), flush=True)
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    made.add_argument("--n", type=int, default=5, help="pictures of each; default: %(default)s")
    made.add_argument("--steps", type=int, help="default: the model's own")
    made.add_argument("--size", default="", metavar="HxW", help="default: the model's own")
    made.add_argument("--reference", type=sides, metavar="HxW", help="of an image to draw after; default: none")
    made.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    made.add_argument("--json", type=Path)
    return made


def main() -> None:
    args = parser().parse_args()
    spec = checkpoint.read(args.checkpoint).spec
    steps = args.steps or spec.defaults.num_inference_steps
    size = sides(args.size) if args.size else (spec.defaults.side,) * 2
    found = measure(Peer(args.checkpoint, args.device, args.reference), args.modes, args.n, steps, size)
    asked = {"checkpoint": spec.name, "steps": steps, "size": list(size), "reference": args.reference}
    result = {"benchmark": "peers", **surroundings(), **asked, "modes": found}
    report(result, args.json)


if __name__ == "__main__":
    main()
