"""What benchmarks have in common as commands: which model is served and what it is asked for, where the result goes."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pictures import sides

_MODEL = ("artifact", "checkpoint", "engine")


@dataclass(frozen=True)
class Served:
    """model: what was given of it, "" where nothing was. fields: of each request, by contract name."""

    model: dict[str, str]
    fields: dict[str, int]

    @property
    def options(self) -> dict[str, str]:
        """For TritonServer."""
        return {name: value for name, value in self.model.items() if value}


def add_served(parser: argparse.ArgumentParser) -> None:
    for name in _MODEL:
        parser.add_argument(f"--{name}", default="", help="as `fluxserve serve` takes it")
    parser.add_argument("--size", type=sides, metavar="HxW", help="default: the model's own")
    parser.add_argument("--steps", type=int, help="default: the model's own")


def served(args: argparse.Namespace) -> Served:
    """Of what `add_served` added."""
    fields = {"num_inference_steps": args.steps} if args.steps else {}
    if args.size:
        fields["height"], fields["width"] = args.size
    return Served({name: getattr(args, name) for name in _MODEL}, fields)


def report(result: Mapping[str, Any], file: Path | None) -> None:
    """Write it, if a file was named; its line on stdout is the last."""
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
