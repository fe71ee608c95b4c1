"""What tracing and quantising the whole of FLUX.1-dev's transformer takes on this machine: seconds, and memory.

    python -m benchmarks.full_size [--folder DIR] [--json OUT]

11.9 B parameters, all zero: the checkpoint is a sparse file, so that no weights are needed. Neither time nor memory
looks at values. Needs 40 GB of disk below the folder. Memory is the process's anonymous memory, sampled; pages of files
that are read come and go as the system likes. The last line on stdout is JSON.
"""

import argparse
import json
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from fluxserve_export import quantize, trace
from fluxserve_export.fp8 import attention_modules, quantised_linears
from fluxserve_export.options import ATTENTION_OPSET, default_sizes, ranges
from torch import nn

from benchmarks.command import report
from benchmarks.surroundings import surroundings
from fluxserve import settings
from fluxserve.families.flux.models import FLUX1_DEV
from fluxserve.folders.artifact import Ranges
from fluxserve.folders.checkpoint import Checkpoint

COMPONENT = "transformer"


def write_sparse(module: nn.Module, file: Path) -> int:
    """A safetensors file of zeros for every parameter, in bfloat16; its size."""
    header, offset = {}, 0
    for name, parameter in module.named_parameters():
        size = 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
    return offset


def anonymous_gb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (row for row in status.splitlines() if row.startswith("RssAnon"))
    return int(line.split()[1]) / 1e6


def measured(run: Callable[[], object]) -> dict[str, float]:
    """Run; seconds and the largest anonymous memory meanwhile."""
    peak, done, begun = [anonymous_gb()], threading.Event(), time.perf_counter()

    def watch() -> None:
        while not done.wait(0.05):
            peak.append(anonymous_gb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return {"seconds": round(time.perf_counter() - begun, 1), "memory_gb": round(max(peak), 2)}


def measure(folder: Path) -> dict[str, object]:
    """Trace, write and quantise; every step's cost, and the files' sizes."""
    own = folder / "checkpoint"
    shutil.copytree(settings.default_checkpoint(), own, ignore=shutil.ignore_patterns("samples"))
    shutil.rmtree(own / COMPONENT)
    with init_empty_weights():
        module = FluxTransformer2DModel(guidance_embeds=True)
    module.save_config(own / COMPONENT)
    read = write_sparse(module, own / COMPONENT / "diffusion_pytorch_model.safetensors")
    found = Checkpoint(own, FLUX1_DEV)  # not read: the tiny model's other components do not belong to it
    shapes = ranges(COMPONENT, found.spec, default_sizes(found.spec))
    names = attention_modules(COMPONENT, module)
    linears = dict.fromkeys(quantised_linears(COMPONENT, module), 1.0)
    measured_ranges = Ranges(linears, dict.fromkeys(names, (1.0, 1.0, 1.0)), dict.fromkeys(names, 1.0))
    plain, quantised = folder / "plain.onnx", folder / "fp8.onnx"

    def export() -> None:
        trace.save(trace.trace(found, COMPONENT, shapes, torch.bfloat16, ATTENTION_OPSET), plain)

    def quantise() -> None:
        model = quantize.load(plain)
        quantize.quantise(model, measured_ranges)
        trace.save(model, quantised)

    steps = {"onnx": measured(export), "quantize": measured(quantise)}
    sizes = {file.name: Path(f"{file}.data").stat().st_size for file in (plain, quantised)}
    return {"model": found.spec.name, "checkpoint_bytes": read, "bytes": sizes, **steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the disk has room; default: the system's temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = {"benchmark": "full_size", **surroundings(), **measure(Path(folder))}
    for step in ("onnx", "quantize"):
        print(f"{step:<10}{result[step]['seconds']:>8.0f} s{result[step]['memory_gb']:>8.2f} GB")
    report(result, args.json)


if __name__ == "__main__":
    main()
