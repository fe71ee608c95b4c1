"""The tiny model exported in every way that a machine without a GPU can, each once in a run of the tests.

Stages are kept in one work folder for all workers of a run: whoever comes first makes a stage, the others find it.
"""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from fluxserve import artifact as artifacts
from fluxserve import settings
from fluxserve.artifact import Artifact

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


def run(*arguments: str) -> tuple[int, str]:
    """`fluxserve export` in this process: its status and what it said."""
    from export import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = cli.main(arguments)
    return status, out.getvalue()


def make(factory: pytest.TempPathFactory) -> Exports:
    base = factory.getbasetemp()
    common = (base.parent if base.name.startswith("popen-") else base) / "exports"
    common.mkdir(exist_ok=True)
    return Exports(common, factory.mktemp("exported"))
