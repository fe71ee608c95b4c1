"""Measure each block of the transformer in FP8 against float32, on the user's weights, and decide what FP8 is for.

diffusers' own module runs in float32 on inputs that calibration met. Its blocks are loaded one at a time, before they
run, and dropped behind, so that the memory of one block is enough. Behind each, the fused engine's block runs on the
same rows: in FP8, with its attention alone in BF16, and in BF16 whole. Two errors are taken of each:

    block       ‖got − exact‖ / ‖exact‖ of what the block adds to the residual stream
    attention   ‖got − exact‖ / ‖exact − mean of v‖: of what attention says beside the mean that it would give anyway

The gate bounds the first; the second may be twice as large, because a block adds its MLP's output besides. A block that
is beyond either keeps its attention in BF16, and is kept whole if that is not enough. Where BF16 whole is hardly better
than FP8, nothing is gained by it: FP8 is always allowed one and a half times BF16's error.
"""

import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn import functional

from fluxserve.engines.fused.blocks import DoubleBlock, SingleBlock
from fluxserve.engines.fused.build import FP8, Build
from fluxserve.engines.fused.probe import Image, Kept, Probe
from fluxserve.engines.fused.weights import Reader
from fluxserve.errors import ExportError
from fluxserve.families import registry
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.artifact import Ranges
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.folders.weights import Weights
from fluxserve.kernels.operations import Operations
from fluxserve_export.fp8 import watched_attention
from fluxserve_export.inputs import Inputs
from fluxserve_export.metrics import relative_error

COMPONENT = "transformer"
_BLOCK = re.compile(r"(single_)?transformer_blocks\.[0-9]+")
_OF_ATTENTION = 2.0
"""How many times the gate attention's own error may be."""
_OF_BF16 = 1.5
"""How many times BF16's error any may be. Few tokens that are alike leave attention little to say beside the mean of v,
and then BF16 is far off, too."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Errors:
    """attention, block: the worst over all rows of inputs."""

    attention: float
    block: float


@dataclass(frozen=True)
class Measured:
    """One block: its errors by what is kept, and the milliseconds that it took, where that was timed."""

    block: str
    errors: Mapping[Kept, Errors]
    milliseconds: Mapping[Kept, float]

    def kept(self, gate: float) -> Kept:
        """Return the least that brings the block within the gate, or near to what BF16 gives.

        Raises:
            ExportError: BF16's error is not a number.
        """
        best = self.errors[Kept.ALL]
        block, attention = max(gate, _OF_BF16 * best.block), max(_OF_ATTENTION * gate, _OF_BF16 * best.attention)
        for kept, errors in self.errors.items():
            if errors.block <= block and errors.attention <= attention:
                return kept
        raise ExportError(f"measure: {self.block}: got {best} in BF16; expected numbers")


def measure(
    checkpoint: Checkpoint,
    inputs: Sequence[Inputs],
    ranges: Ranges,
    device: str,
    run: Operations,
    progress: Progress = lambda *_: None,
) -> list[Measured]:
    """Run every block on every batch of the transformer's inputs.

    Args:
        inputs: batches, each of one picture size.
        device: where float32 and the engine's operations run.

    Raises:
        CheckpointError, ArtifactError: weights or ranges are of another model.
    """
    weights, place = checkpoint.weights(registry.architectures(checkpoint.spec)[COMPONENT].folder), torch.device(device)
    build = Build.of(weights, place, FP8, run)
    probe, reference = Probe(FluxSpec.of(checkpoint.spec), build, ranges), _Reference(checkpoint, weights, place)
    found: list[Measured] = []
    for given in inputs:
        judge, total = _Judge(probe, probe.images(given)), len(reference.blocks) * len(inputs)

        def see(passed: _Passed, judge: _Judge = judge, total: int = total) -> None:
            found.append(judge(passed))
            progress(len(found), total)

        reference.run(given, see)
    return [_together([m for m in found if m.block == name]) for name in reference.blocks]


def record(blocks: Sequence[Measured], gate: float) -> dict[str, Any]:
    """What the manifest says: worst and median of each kind and precision, what is kept, and what that costs a step."""
    kinds = {}
    for kind in ("attention", "block"):
        kinds[kind] = {
            precision: _summary(blocks, kept, kind) for precision, kept in (("fp8", Kept.NOTHING), ("bf16", Kept.ALL))
        }
    kept = {block.block: block.kept(gate) for block in blocks}
    timed = [b.milliseconds[kept[b.block]] - b.milliseconds[Kept.NOTHING] for b in blocks if b.milliseconds]
    return {
        "gate": gate,
        "blocks": len(blocks),
        "errors": kinds,
        "kept": sorted(name for block, what in kept.items() for name in what.names(block)),
        "kept_ms_per_step": round(sum(timed), 2) if timed else None,
        "by_block": {b.block: {kept.value: _rounded(errors) for kept, errors in b.errors.items()} for b in blocks},
    }


def table(measured: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = [f"{measured['blocks']} blocks against float32:{'':<14}{'median':>9}{'worst':>9}   where"]
    for kind, precisions in measured["errors"].items():
        for precision, found in precisions.items():
            numbers = f"{found['median']:>9.2%}{found['worst']:>9.2%}"
            lines.append(f"  {kind + ', ' + precision:<36}{numbers}   {found['where']}")
    cost = measured["kept_ms_per_step"]
    names = ", ".join(measured["kept"]) or "nothing"
    lines.append(f"  allowed of a block: {measured['gate']:.0%}. Kept in BF16: {names}")
    if measured["kept"]:
        lines.append(f"  costs {'an unknown time' if cost is None else f'{cost} ms'} a step" + _where_timed(cost))
    return "\n".join(lines)


def _where_timed(cost: float | None) -> str:
    return ": it is timed on a GPU with the engine's kernels" if cost is None else ", at the size that was measured"


def _summary(blocks: Sequence[Measured], kept: Kept, kind: str) -> dict[str, Any]:
    errors = {block.block: float(getattr(block.errors[kept], kind)) for block in blocks}
    where = max(errors, key=lambda name: errors[name])
    return {"median": round(statistics.median(errors.values()), 5), "worst": round(errors[where], 5), "where": where}


def _rounded(errors: Errors) -> dict[str, float]:
    return {kind: round(value, 5) for kind, value in asdict(errors).items()}


def _together(measured: Sequence[Measured]) -> Measured:
    """One block on several batches: the worst errors, the first batch's times."""
    first = measured[0]
    worst = {
        kept: Errors(*(max(getattr(m.errors[kept], kind) for m in measured) for kind in ("attention", "block")))
        for kept in first.errors
    }
    return replace(first, errors=worst)


# --- the reference, one block in memory -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Passed:
    """A batch that passed a block in float32. B images, S rows of text and picture, D = hidden_size.

    before, after: the residual stream [B, S, D]. attended: attention's output [B, S, D]. mean: of v over the rows
    [B, 1, D].
    """

    block: str
    before: Tensor
    after: Tensor
    attended: Tensor
    mean: Tensor


class _Reference:
    """diffusers' transformer in float32, whose blocks have weights only while they run.

    blocks: their names, in the order of the passes.
    """

    def __init__(self, checkpoint: Checkpoint, weights: Weights, device: torch.device) -> None:
        architecture = registry.architectures(checkpoint.spec)[COMPONENT]
        cls: Any = architecture.module
        with init_empty_weights(include_buffers=False):
            self._module: nn.Module = cls.from_config(cls.load_config(str(weights.folder)))
        self._wrapper, self._device = architecture.wrapper(self._module).eval(), device
        self._read = Reader(weights, device)
        owners = {name: m for name, m in self._module.named_modules() if _BLOCK.fullmatch(name)}
        self.blocks, self._owners = tuple(owners), owners
        for name, _ in list(self._module.named_parameters()):
            if not name.startswith(tuple(f"{block}." for block in owners)):
                self._load(name)
        self._attention: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def run(self, inputs: Inputs, see: Callable[[_Passed], None]) -> None:
        """One pass; `see` is called behind each block."""
        given = {name: self._floating(value.to(self._device)) for name, value in inputs.items()}
        with ExitStack() as stack:
            for name, block in self._owners.items():
                stack.enter_context(self._loaded_while_it_runs(name, block, see))
            stack.enter_context(watched_attention(COMPONENT, self._module, self._attend))
            self._wrapper(**given)

    @staticmethod
    def _floating(value: Tensor) -> Tensor:
        return value.float() if value.is_floating_point() else value

    def _attend(self, _: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, heads, S, head_dim], as it would be computed anyway."""
        out: Tensor = functional.scaled_dot_product_attention(q, k, v)
        mean = v.mean(dim=2, keepdim=True)
        self._attention.append((out.transpose(1, 2).flatten(2), mean.transpose(1, 2).flatten(2)))
        return out

    @contextmanager
    def _loaded_while_it_runs(self, name: str, block: nn.Module, see: Callable[[_Passed], None]) -> Iterator[None]:
        def load(*_: object) -> None:
            for parameter, _tensor in list(block.named_parameters()):
                self._load(f"{name}.{parameter}")

        def passed(_: nn.Module, __: object, given: Mapping[str, Any], result: Any) -> None:
            block.to("meta")
            before = _rows(given.get("encoder_hidden_states"), given["hidden_states"])
            after = _rows(*result) if isinstance(result, tuple) else result
            see(_Passed(name, before, after, *self._attention.pop()))

        hooks = [block.register_forward_pre_hook(load), block.register_forward_hook(passed, with_kwargs=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _load(self, name: str) -> None:
        set_module_tensor_to_device(self._module, name, self._device, value=self._read(name), dtype=torch.float32)


def _rows(text: Tensor | None, picture: Tensor) -> Tensor:
    """The residual stream: text's rows, then the others."""
    return picture if text is None else torch.cat([text, picture], dim=1)


# --- the engine's blocks on the reference's rows ----------------------------------------------------------------------


class _Judge:
    """Runs the engine's block, in each precision, on the rows of a batch."""

    def __init__(self, probe: Probe, images: Sequence[Image]) -> None:
        self._probe, self._images = probe, images

    def __call__(self, passed: _Passed) -> Measured:
        errors, milliseconds = {}, {}
        for kept in Kept:
            block = self._probe.open(passed.block, kept)
            each = [self._errors(block, row, image, passed) for row, image in enumerate(self._images)]
            errors[kept] = Errors(max(e.attention for e in each), max(e.block for e in each))
            if passed.before.is_cuda:
                milliseconds[kept] = self._probe.milliseconds(block, self._images[0], passed.before[0])
        return Measured(passed.block, errors, milliseconds)

    def _errors(self, block: DoubleBlock | SingleBlock, row: int, image: Image, passed: _Passed) -> Errors:
        """The engine's stream begins as BF16's rounding of the reference's; what counts is what the block adds."""
        before, exact = passed.before[row], passed.attended[row]
        got, added = self._probe(block, image, before), passed.after[row] - before
        attention = relative_error(got.attended - passed.mean[row], exact - passed.mean[row])
        return Errors(attention, relative_error(got.residual - before.to(torch.bfloat16).float(), added))
