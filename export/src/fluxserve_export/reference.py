"""What the float reference computes, kept in the artifact: it is verified wherever it runs, without the weights.

Two pictures are drawn with torch_eager: one from a prompt at the size that is fastest, and one from it at another size:
image-to-image, or an edit by a model that takes references. On the way the inputs and outputs of every component are
noted, the transformer's at the first, the middle and the last step. The same calls are then made by *plain* PyTorch in
the artifact's own precision (its dtype, or fp8.py): an engine is judged by that error, not by a constant.

    reference/<component>.safetensors   <case>/in/<name>, <case>/out/<name>; metadata: plain errors
    reference/images.safetensors        uint8 images; metadata: what was asked for, plain PSNR
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fluxserve.engine import Bound, Components, Engine, Shapes, Signature
from fluxserve.errors import ExportError
from fluxserve.families import registry
from fluxserve.folders.artifact import Ranges
from fluxserve.job import Job
from fluxserve.media.images import write_image
from fluxserve.pipeline import Pipeline
from fluxserve.request import DEFAULT_QUALITY
from fluxserve.spec import ModelSpec
from fluxserve.text import Tokenizers
from fluxserve_export.fp8 import simulated
from fluxserve_export.metrics import cosine, outputs_of, psnr, relative_error
from fluxserve_export.options import Sizes

IMAGES = "images"
_STRENGTH, _ROWS = 0.7, 2

WORST = 0.5
"""No relative error of plain arithmetic may be larger, or its gate would let anything pass."""

GATE, FLOOR = 1.5, 1e-4
"""An engine's relative error may be GATE times that of plain arithmetic in its precision, plus FLOOR (float32's order
of summation)."""
Images = npt.NDArray[np.uint8]


@dataclass
class Case:
    """One call of one component."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    plain: dict[str, float] = field(default_factory=dict)
    """Output → relative error of plain arithmetic in the artifact's precision."""


@dataclass(frozen=True)
class Asked:
    """A picture as a caller asks for it."""

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    seed: int
    num_images: int = 1
    strength: float | None = None
    """Of image-to-image, from the first picture."""
    edits: bool = False
    """Whether the first picture is a reference."""

    @property
    def task(self) -> str:
        return "edit" if self.edits else "text-to-image" if self.strength is None else "image-to-image"

    def job(self, spec: ModelSpec, tokenizers: Tokenizers, first: Images | None) -> Job:
        fields = {name: value for name, value in asdict(self).items() if value is not None and name != "edits"}
        if self.edits or self.strength is not None:
            assert first is not None
            fields["image"] = [write_image(first, "png", DEFAULT_QUALITY)]
        return registry.plan({**fields, "prompt": self.prompt.encode()}, spec, tokenizers)


def pictures(spec: ModelSpec, sizes: Sizes, prompts: Sequence[str], steps: int, seed: int) -> list[Asked]:
    """What is drawn: the usual picture; and from it, by another prompt at another size, up to two at once."""
    height, width = sizes.opt_size
    step = spec.size_multiple
    narrow = max(min(sizes.min_size), width * 3 // 4 // step * step)
    rows = min(sizes.max_batch, _ROWS)
    how: dict[str, Any] = {"edits": True} if spec.takes_references else {"strength": _STRENGTH}
    return [
        Asked(prompts[0], height, width, steps, seed),
        Asked(prompts[-1], height, narrow, steps, seed + 1, rows, **how),
    ]


def draw(
    asked: Sequence[Asked], pipeline: Pipeline, tokenizers: Tokenizers, first: Images | None = None
) -> list[Images]:
    """The last image [height, width, 3] of each; what is drawn from one is from `first`, or the first drawn."""
    drawn: list[Images] = []
    for each in asked:
        start = first if first is not None or not drawn else drawn[0]
        (drawing,) = pipeline.draw([each.job(pipeline.spec, tokenizers, start)])
        assert drawing is not None, "nobody can cancel it"
        drawn.append(drawing.images[-1])
    return drawn


def rows_of(asked: Sequence[Asked]) -> int:
    """How many images go through the transformer together."""
    return max(each.num_images for each in asked)


# --- noting calls -----------------------------------------------------------------------------------------------------


class Noted:
    """An engine in front of another, which keeps a few of its calls."""

    def __init__(self, engine: Engine, wanted: Sequence[int]) -> None:
        self.signature, self._engine, self._wanted = engine.signature, engine, wanted
        self.cases: list[Case] = []
        self._calls = 0

    def bind(self, shapes: Shapes) -> "_NotedBound":
        return _NotedBound(self._engine.bind(shapes), self)

    def close(self) -> None:
        self._engine.close()

    def ran(self, bound: Bound) -> None:
        if self._calls in self._wanted:
            self.cases.append(Case(_copies(bound.inputs), _copies(bound.outputs)))
        self._calls += 1


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


class _NotedBound:
    def __init__(self, bound: Bound, owner: Noted) -> None:
        self.inputs, self.outputs, self._bound, self._owner = bound.inputs, bound.outputs, bound, owner

    def run(self) -> None:
        self._bound.run()
        self._owner.ran(self._bound)


def record(
    spec: ModelSpec, components: Components, tokenizers: Tokenizers, asked: Sequence[Asked], device: str
) -> tuple[dict[str, list[Case]], list[Images]]:
    """Draw with the reference's components; their calls and the images."""
    steps = asked[0].num_inference_steps
    calls = {"transformer": (0, steps // 2, steps - 1, steps)}  # the last: the first step of the second picture
    noted = {name: Noted(engine, calls.get(name, (0, 1))) for name, engine in components.by_name.items()}
    rows = rows_of(asked)
    images = draw(asked, Pipeline(spec, Components(noted), device, rows), tokenizers)
    for name in (*components.text, "vae_encoder"):  # the pipeline calls these for one row at a time
        if rows > 1:
            noted[name].cases.append(_together(components.by_name[name], noted[name].cases, rows))
    return {name: engine.cases for name, engine in noted.items()}, images


def _together(engine: Engine, cases: Sequence[Case], rows: int) -> Case:
    """The first case's inputs and the last one's as one batch."""
    parts = [cases[0], *[cases[-1]] * (rows - 1)]
    inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in cases[0].inputs}
    return Case(inputs, call(engine, inputs))


def call(engine: Engine, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One pass of an engine over inputs of any device; copies of its outputs on the CPU."""
    bound = engine.bind({name: tuple(value.shape) for name, value in inputs.items()})
    for name, value in inputs.items():
        bound.inputs[name].copy_(value)
    bound.run()
    return _copies(bound.outputs)


# --- plain arithmetic in the artifact's precision ---------------------------------------------------------------------


@contextmanager
def in_precision(
    modules: Mapping[str, nn.Module], ranges: Mapping[str, Ranges] | None, centred: bool
) -> Iterator[None]:
    """Within, modules compute in FP8 where they have ranges; see fp8.simulated."""
    with ExitStack() as stack:
        for name, own in (ranges or {}).items():
            stack.enter_context(simulated(name, modules[name], own, centred))
        yield


def measure_plain(component: str, signature: Signature, wrapper: nn.Module, cases: Sequence[Case]) -> None:
    """Note in each case how far torch_eager's wrapper, as its module computes now, is from the reference.

    Raises:
        ExportError: too far to judge anything by: it overflows, or the ranges do not fit the model.
    """
    for case in cases:
        got = outputs_of(wrapper, signature, case.inputs)
        case.plain = {name: relative_error(got[name], case.outputs[name]) for name in got}
        for name, error in case.plain.items():
            if not error <= WORST:
                raise ExportError(
                    f"reference: {component}.{name}: plain arithmetic in this precision is off by {error:.2g};"
                    f" expected at most {WORST}: another precision, or another calibration"
                )


def compare(cases: Sequence[Case], results: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """One row for each case and output: relative error, cosine, plain arithmetic's error, what is allowed."""
    rows = []
    for index, (case, result) in enumerate(zip(cases, results, strict=True)):
        for name, expected in case.outputs.items():
            error = relative_error(result[name].float(), expected)
            rows.append(
                {
                    "case": index,
                    "output": name,
                    "shape": list(expected.shape),
                    "relative_error": error,
                    "cosine": cosine(result[name].float(), expected),
                    "plain": case.plain[name],
                    "allowed": GATE * case.plain[name] + FLOOR,
                }
            )
    return rows


# --- files ------------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    cases: Mapping[str, Sequence[Case]],
    asked: Sequence[Asked],
    images: Sequence[Images],
    plain: Sequence[Images],
) -> None:
    """Write the reference's files."""
    for component, calls in cases.items():
        tensors = {
            f"{index}/{side}/{name}": value.contiguous()
            for index, case in enumerate(calls)
            for side, values in (("in", case.inputs), ("out", case.outputs))
            for name, value in values.items()
        }
        metadata = {"plain": json.dumps([case.plain for case in calls])}
        save_file(tensors, folder / f"{component}.safetensors", metadata)
    quality = [psnr(a, b) for a, b in zip(plain, images, strict=True)]
    metadata = {"asked": json.dumps([asdict(each) for each in asked]), "plain": json.dumps(quality)}
    pixels = {str(index): torch.from_numpy(image.copy()) for index, image in enumerate(images)}
    save_file(pixels, folder / f"{IMAGES}.safetensors", metadata)


def load_cases(file: Path) -> list[Case]:
    """The calls of one component."""
    with safe_open(file, "pt") as tensors:
        plain = json.loads(tensors.metadata()["plain"])
        cases = [Case({}, {}, entry) for entry in plain]
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            index, side, name = key.split("/")
            values = cases[int(index)].inputs if side == "in" else cases[int(index)].outputs
            values[name] = tensors.get_tensor(key)
    return cases


def load_images(file: Path) -> tuple[list[Asked], list[Images], list[float]]:
    """What was asked for, what was drawn, and plain arithmetic's PSNR."""
    with safe_open(file, "pt") as tensors:
        metadata: Mapping[str, Any] = tensors.metadata()
        asked = [Asked(**entry) for entry in json.loads(metadata["asked"])]
        images = [tensors.get_tensor(str(index)).numpy() for index in range(len(asked))]
    return asked, images, json.loads(metadata["plain"])
