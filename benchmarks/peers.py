"""What a user would run instead: diffusers' FluxPipeline in BF16, as it is and with regional compilation.

    python -m benchmarks.peers CHECKPOINT [--modes eager compiled] [--n 5] [--steps N] [--size 1024x1024] [--json OUT]

From the prompt to PNG bytes, everything on the GPU that fits there, attention pinned to cuDNN's kernel, which is the
fastest that PyTorch has. Compilation is `compile_repeated_blocks`, as diffusers' documentation recommends it; its first
picture is timed apart. The last line on stdout is JSON.
"""

import argparse
import io
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.surroundings import surroundings
from benchmarks.timing import summary
from fluxserve import checkpoint

PROMPT = "a photograph of a fox that reads a newspaper in a café, morning light, shallow depth of field"
MODES = ("eager", "compiled")


class Peer:
    """A FluxPipeline on one device, and how long its loop takes."""

    def __init__(self, folder: Path, device: str) -> None:
        self._spec = checkpoint.read(folder).spec
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self._device = torch.device(device)
        self._marks: list[float] = []

    def compile(self) -> None:
        self._pipe.transformer.compile_repeated_blocks(fullgraph=True)

    def draw(self, steps: int, size: tuple[int, int], seed: int) -> tuple[float, float]:
        """Milliseconds from prompt to PNG, and of the steps but the first."""
        self._marks.clear()
        begun = time.perf_counter()
        with self._attention():
            (image,) = self._pipe(
                PROMPT,
                height=size[0],
                width=size[1],
                num_inference_steps=steps,
                guidance_scale=self._spec.defaults.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed),
                max_sequence_length=self._spec.text.sequence.tokens,
                callback_on_step_end=self._mark,
            ).images
        image.save(io.BytesIO(), "png")
        spent = 1000 * (time.perf_counter() - begun)
        return spent, 1000 * (self._marks[-1] - self._marks[0])

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


def measure(folder: Path, modes: list[str], n: int, steps: int, size: tuple[int, int], device: str) -> dict[str, Any]:
    """Of each mode: seconds of the first picture, milliseconds of the others."""
    peer, found = Peer(folder, device), {}
    for mode in modes:
        if mode == "compiled":
            peer.compile()
        first, _ = peer.draw(steps, size, 0)
        drawn = [peer.draw(steps, size, 1 + i) for i in range(n)]
        found[mode] = {
            "first_s": round(first / 1000, 1),
            "total_ms": summary([total for total, _ in drawn]),
            "step_ms": round(statistics.median(loop for _, loop in drawn) / max(1, steps - 1), 2),
        }
        if device != "cpu":
            found[mode]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(mode, json.dumps(found[mode]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--n", type=int, default=5, help="pictures of each; default: %(default)s")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--size", default="", metavar="HxW", help="default: the model's own")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    spec = checkpoint.read(args.checkpoint).spec
    steps = args.steps or spec.defaults.num_inference_steps
    height, width = (int(s) for s in args.size.split("x")) if args.size else (spec.defaults.side,) * 2
    found = measure(args.checkpoint, args.modes, args.n, steps, (height, width), args.device)
    asked = {"checkpoint": spec.name, "steps": steps, "size": [height, width]}
    result = {"benchmark": "peers", **surroundings(), **asked, "modes": found}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
