"""What an image needs besides the loop, part by part: text encoders, VAE both ways, the picture's encoding.

    python -m testing.random_weights /tmp/flux1 --double 1 --single 1        # or any that it can make
    python -m benchmarks.around /tmp/flux1 [--precision fp8] [--size 1024x1024] [--profile] [--json OUT]

The fused engine's components alone, each called again and again; none of them is calibrated, so a checkpoint is
all that is needed. The last line on stdout is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import report
from benchmarks.pictures import photograph, sides
from benchmarks.steps import PRECISIONS, profiled
from benchmarks.surroundings import surroundings
from benchmarks.timing import milliseconds, summary
from fluxserve.engine import Bound, Engine
from fluxserve.engines.fused import vae
from fluxserve.engines.fused.build import Build, Precision
from fluxserve.engines.fused.clip import FusedClip
from fluxserve.engines.fused.qwen3 import FusedQwen3
from fluxserve.engines.fused.t5 import FusedT5
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders import checkpoint
from fluxserve.kernels.operations import LAUNCHED
from fluxserve.media import images as imaging
from fluxserve.spec import EncoderSpec

_DEVICE = torch.device("cuda")
Made = Callable[[], Bound]


def components(folder: checkpoint.Checkpoint, precision: str, size: tuple[int, int]) -> dict[str, Made]:
    """Name → what opens it and binds it for one image."""
    spec, p = FluxSpec.of(folder.spec), PRECISIONS[precision]
    height, width = spec.latent_size(*size)
    latents, pixels = (1, spec.vae.latent_channels, height, width), (1, 3, *size)
    texts: dict[str, Made] = {e.name: partial(_encoder, folder, e, p) for e in reversed(spec.text.encoders)}
    return {
        **texts,
        "vae decoder": lambda: vae.decoder(folder, _build(folder, vae.FOLDER, p)).bind({"latents": latents}),
        "vae encoder": lambda: vae.encoder(folder, _build(folder, vae.FOLDER, p)).bind({"pixels": pixels}),
    }


def _build(folder: checkpoint.Checkpoint, component: str, p: Precision) -> Build:
    return Build.of(folder.weights(component), _DEVICE, p, LAUNCHED)


def _encoder(folder: checkpoint.Checkpoint, encoder: EncoderSpec, p: Precision) -> Bound:
    engines: dict[str, Callable[[checkpoint.Checkpoint, Build], Engine]] = {
        "t5": FusedT5,
        "clip": FusedClip,
        "qwen3": FusedQwen3,
    }
    engine = engines[encoder.name](folder, _build(folder, encoder.folder, p))
    return engine.bind({tensor.name: (1, encoder.tokens) for tensor in engine.signature.inputs})


def fill(bound: Bound) -> None:
    """Random numbers, or ids; nothing is padding."""
    generator = torch.Generator(_DEVICE).manual_seed(0)
    for name, value in bound.inputs.items():
        if name == "attention_mask":
            value.fill_(1)
        elif value.dtype == torch.int64:
            value.random_(0, 32, generator=generator)
        else:
            value.normal_(generator=generator)


def measure(make: Made, repeats: int, profile: bool) -> dict[str, Any]:
    """Milliseconds of a run, and of the host alone to start one; seconds to load; GiB that a run takes on top."""
    begun = time.perf_counter()
    bound = make()
    torch.cuda.synchronize()
    loaded = time.perf_counter() - begun
    fill(bound)
    for _ in range(3):  # as it is, captured, replayed
        bound.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    bound.run()
    host = 1000 * (time.perf_counter() - begun)
    found = summary(milliseconds(bound.run, repeats))
    if profile:
        print(profiled(bound.run))
    finite = all(bool(torch.isfinite(out).all()) for out in bound.outputs.values())
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {"ms": found, "host_ms": round(host, 2), "load_s": round(loaded, 1), "more_gib": round(peak, 2)} | {
        "finite": finite
    }


def encoding(size: tuple[int, int], repeats: int) -> dict[str, Any]:
    """PNG of a picture with gradients and noise; the host's time."""
    image, spent = photograph(size), []
    for _ in range(repeats):
        begun = time.perf_counter()
        imaging.write_image(image, "png", 90)
        spent.append(1000 * (time.perf_counter() - begun))
    return {"ms": summary(spent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp8")
    parser.add_argument("--size", default="1024x1024", metavar="HxW")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print each kernel's share")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    height, width = sides(args.size)
    folder = checkpoint.read(args.checkpoint)
    found: dict[str, Any] = {}
    for name, make in components(folder, args.precision, (height, width)).items():
        found[name] = measure(make, args.repeats, args.profile)
        print(name, json.dumps(found[name]), flush=True)
    found["png"] = encoding((height, width), args.repeats)
    result = {"benchmark": "around", **surroundings(), "precision": args.precision, "size": args.size, "parts": found}
    report(result, args.json)


if __name__ == "__main__":
    main()
