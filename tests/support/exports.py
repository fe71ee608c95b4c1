"""The tiny model exported in every way that a machine without a GPU can, each once in a run of the tests.

Stages are kept in one work folder for all workers of a run: whoever comes first makes a stage, the others find it.
"""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fluxserve import settings
from fluxserve.engine import Components, Engine
from fluxserve.folders import artifact as artifacts
from fluxserve.folders.artifact import Artifact

if TYPE_CHECKING:
    from tests.support.random_flux import RandomFlux

TINY = settings.default_checkpoint()
SHAPES = ("--max-size", "256x256", "--max-batch", "2")
QUICK = ("--prompts", "8", "--steps", "4")
"""Less to calibrate on, and to compare, than by default."""


@dataclass(frozen=True)
class Exported:
    """One run of `fluxserve export`."""

    path: Path
    status: int
    said: str

    @property
    def artifact(self) -> Artifact:
        return artifacts.read(self.path)


class Exports:
    """Makes exports on demand."""

    def __init__(self, folder: Path, own: Path) -> None:
        self.work, self._own = folder / "work", own
        self._made: dict[tuple[str, ...], Exported] = {}

    def __call__(self, engine: str, precision: str, *arguments: str, checkpoint: Path = TINY) -> Exported:
        key = (str(checkpoint), engine, precision, *arguments)
        if key not in self._made:
            out = self._own / f"{len(self._made)}-{engine}-{precision}"
            given = ("--engine", engine, "--precision", precision, *SHAPES, *QUICK, *arguments)
            status, said = run(str(checkpoint), "--out", str(out), "--work", str(self.work), *given)
            self._made[key] = Exported(out, status, said)
        return self._made[key]


class OnnxOf:
    """Opens random weights with ONNX Runtime: traced as `fluxserve export` does it, without an artifact around."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._traced: dict[int, dict[str, Engine]] = {}

    def __call__(self, flux: "RandomFlux") -> Components:
        if id(flux) not in self._traced:
            self._traced[id(flux)] = self._trace(flux, self._folder / str(len(self._traced)))
        return Components(self._traced[id(flux)])

    def _trace(self, flux: "RandomFlux", folder: Path) -> dict[str, Engine]:
        import torch
        from fluxserve_export import options, trace

        from fluxserve.engines.onnxruntime import OrtEngine
        from fluxserve.families.flux import signatures
        from fluxserve.folders.checkpoint import Checkpoint

        flux.save(folder)
        sizes = options.Sizes((64, 64), (128, 128), (256, 256), 4)
        engines: dict[str, Engine] = {}
        for name in flux.spec.components:
            ranges = options.ranges(name, flux.spec, sizes)
            file = folder / f"{name}.onnx"
            trace.save(trace.trace(Checkpoint(folder, flux.spec), name, ranges, torch.float32, 22), file)
            narrowed = signatures.BY_COMPONENT[name](flux.spec).narrowed(
                {symbol: (r[0], r[2]) for symbol, r in ranges.items()}
            )
            engines[name] = OrtEngine(narrowed, str(file), "float32")
        return engines


def run(*arguments: str) -> tuple[int, str]:
    """`fluxserve export` in this process: its status and what it said."""
    from fluxserve_export import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = cli.main(arguments)
    return status, out.getvalue()


def make(factory: pytest.TempPathFactory) -> Exports:
    base = factory.getbasetemp()
    common = (base.parent if base.name.startswith("popen-") else base) / "exports"
    common.mkdir(exist_ok=True)
    return Exports(common, factory.mktemp("exported"))
