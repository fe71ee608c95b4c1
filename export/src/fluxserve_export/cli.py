"""fluxserve export: a checkpoint becomes an artifact that the server runs. See README.md beside this file."""

import argparse
import logging
import re
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fluxserve.errors import ArtifactUnsuited, DeviceUnsuited, ExportError, FluxserveError, LibraryMissing
from fluxserve.families.flux.models import MEMBERS
from fluxserve.families.flux.parts import FluxSpec
from fluxserve_export import console
from fluxserve_export.fp8 import KEPT
from fluxserve_export.options import (
    DTYPES,
    FP8,
    FUSED,
    GATE,
    ONNXRUNTIME,
    TENSORRT,
    TENSORRT_RTX,
    Options,
    Size,
    Sizes,
    default_sizes,
)

if TYPE_CHECKING:
    from fluxserve_export.stages import Stages

STAGES = ("onnx", "quantize", "build", "verify")
_NAMES = tuple(dict.fromkeys(name for spec in MEMBERS for name in spec.components))
_PROMPTS = Path(__file__).parent / "prompts.txt"
_EPILOG = """\
examples:
  fluxserve export checkpoints/tiny --out tiny.onnx --engine onnxruntime
  fluxserve export checkpoints/tiny --out tiny.fp8 --engine onnxruntime --precision fp8
  fluxserve export /models/FLUX.1-dev --out dev.rtx --engine tensorrt-rtx --precision fp8 --sm sm89 --sm sm120
  fluxserve export /models/FLUX.1-dev --out dev.plan --engine tensorrt --precision fp8 --max-size 1536x1536
  fluxserve serve --artifact dev.plan
stages alone; each makes what it needs and keeps it in the work folder (OUT.work, or --work):
  fluxserve export onnx CHECKPOINT --out OUT ...          the graphs
  fluxserve export quantize CHECKPOINT --out OUT ...      calibrate, and put FP8 into the graphs
  fluxserve export build CHECKPOINT --out OUT ...         engines
  fluxserve export verify ARTIFACT                        engines against the reference that the artifact carries
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit status: 0; 1 for an error or a missed gate, 2 for usage, 130 for Ctrl-C."""
    first = arguments[0] if arguments else ""
    stage, rest = (first, arguments[1:]) if first in STAGES else ("", arguments)
    options = _verify_parser().parse_args(rest) if stage == "verify" else _parser(stage).parse_args(rest)
    warnings.filterwarnings("ignore", module=r"(torch|onnx|copyreg)\b")  # the tracer's, about what it does itself
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        if stage == "verify":
            return _verify(options.artifact, options.device, not options.no_write)
        return _export(stage, options)
    except ModuleNotFoundError as error:
        missing = f"{error.name or error}: not installed; expected the extra 'export' (pip install 'fluxserve[export]')"
        print(f"fluxserve export: {missing}", file=sys.stderr)
        return 1
    except (FluxserveError, OSError) as error:
        print(f"fluxserve export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fluxserve export: stopped; what was finished is kept", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser(stage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"fluxserve export {stage}".strip(),
        description="Turn a diffusers-format checkpoint into an artifact: engines, scales, reference and manifest.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a diffusers-format folder")
    parser.add_argument(
        "--out", type=Path, required=True, help="the artifact's folder; an earlier artifact is replaced"
    )
    parser.add_argument("--work", type=Path, help="where finished stages are kept; default: OUT.work")
    parser.add_argument("--engine", choices=(ONNXRUNTIME, TENSORRT, TENSORRT_RTX, FUSED), default=ONNXRUNTIME)
    parser.add_argument("--precision", choices=(*DTYPES, FP8), default="fp32", help="default: %(default)s")
    parser.add_argument(
        "--gate",
        type=float,
        default=GATE,
        metavar="ERROR",
        help="fused, fp8: a block of the transformer that is further from float32 stays in BF16; default: %(default)s",
    )
    parser.add_argument(
        "--spell-attention-out", action="store_true", help="products and a softmax, as TensorRT 10.13 needs it"
    )
    parser.add_argument(
        "--sm", action="append", default=[], type=_architecture, metavar="SM", help="GPU architecture, such as sm89"
    )
    parser.add_argument(
        "--no-numerics",
        action="store_true",
        help="do not run the graphs through ONNX Runtime, which takes the CPU long",
    )
    if stage:
        parser.add_argument(
            "--component", action="append", choices=_NAMES, default=[], help="only this one; may be repeated"
        )
    shapes = parser.add_argument_group("shapes that the engines are built for")
    shapes.add_argument("--min-size", type=_size, metavar="HxW", help="default: the model's smallest")
    shapes.add_argument("--opt-size", type=_size, metavar="HxW", help="where it is fastest; default: the model's own")
    shapes.add_argument("--max-size", type=_size, metavar="HxW", help="default: as --opt-size")
    shapes.add_argument("--max-batch", type=int, default=1, metavar="N", help="images at once; default: %(default)s")
    calibration = parser.add_argument_group("calibration (FP8) and reference")
    calibration.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="prompts, one a line; default: CHECKPOINT/calibration.txt or ours",
    )
    calibration.add_argument(
        "--prompts", type=int, default=32, metavar="N", help="how many of them; default: %(default)s"
    )
    calibration.add_argument("--steps", type=int, metavar="N", help="default: the model's own")
    calibration.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    calibration.add_argument(
        "--method", default="max", help="max, percentile-99.999 or percentile-99.99; default: %(default)s"
    )
    calibration.add_argument("--device", default="", help="where PyTorch computes; default: a GPU if there is one")
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fluxserve export verify",
        description="Run an artifact's engines against its reference; the result goes into its manifest.",
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--device", default="", help="default: a GPU if there is one")
    parser.add_argument(
        "--no-write", action="store_true", help="leave the manifest alone, as where it can't be written"
    )
    return parser


def _architecture(text: str) -> str:
    name = text.lower()
    if not re.fullmatch(r"sm[0-9]+", name):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected one such as sm89")
    return name


def _size(text: str) -> Size:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and (width or height).isdigit()):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected HEIGHTxWIDTH, such as 1024x1024")
    return int(height), int(width or height)


def _export(stage: str, options: argparse.Namespace) -> int:
    from fluxserve_export.assemble import assemble

    begun = time.perf_counter()
    stages = _stages(options, stage)
    if stage and options.engine == FUSED:
        raise ExportError(f"{stage}: the fused engine has no such stage; it runs the checkpoint's own weights")
    own = stages.checkpoint.spec.components
    components = _components(stages, stage, tuple(getattr(options, "component", ())))
    if stage in ("", "build"):
        stages.check_engine()
    if stage:
        for component in components:
            for path in _run_stage(stages, stage, component):
                print(f"  {path}")
        return 0
    numerics = {}
    if stages.options.engine != FUSED:  # which reads the checkpoint's weights as they are
        numerics = {component: stages.numerics(component) for component in own}
        for component in own:
            stages.engines(component)
    if stages.measures:
        from fluxserve_export import measure

        print(measure.table(stages.measured().record))
    artifact = assemble(stages, numerics, options.out)
    print(
        f"exported in {console.duration(time.perf_counter() - begun)}; serve it: fluxserve serve --artifact {artifact}"
    )
    return _verify_if_possible(artifact, options)


def _components(stages: "Stages", stage: str, named: tuple[str, ...]) -> tuple[str, ...]:
    """Those that were named, or all that the stage is for. Raises ExportError."""
    own = stages.checkpoint.spec.components
    for name in named:
        if name not in own:
            raise ExportError(f"component: got {name}; {stages.checkpoint.spec.name} has {', '.join(own)}")
    return named or (tuple(name for name in KEPT if name in own) if stage == "quantize" else own)


def _run_stage(stages: "Stages", stage: str, component: str) -> list[Path]:
    if stage == "onnx":
        return [stages.onnx(component).path]
    if stage == "quantize":
        if stages.options.precision_of(component) != FP8:
            raise ExportError(f"quantize: {component}: nothing of it is quantised under {stages.options.precision}")
        return [stages.graph(component).path]
    return [result.path for result, _ in stages.engines(component).values()]


def _stages(options: argparse.Namespace, stage: str) -> "Stages":
    from fluxserve.folders import checkpoint
    from fluxserve_export.assemble import refuse_foreign
    from fluxserve_export.calibrate import METHODS, Calibration, read_prompts
    from fluxserve_export.stages import Stages
    from fluxserve_export.work import Work

    folder = checkpoint.read(options.checkpoint)
    usual = default_sizes(FluxSpec.of(folder.spec))
    opt = options.opt_size or usual.opt_size
    sizes = Sizes(options.min_size or usual.min_size, opt, options.max_size or opt, options.max_batch)
    if not options.gate > 0:
        raise ExportError(f"gate: got {options.gate}; expected a number above 0, such as {GATE}")
    for name in ("prompts", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ExportError(f"{name}: got {value}; expected 1 or more")
    if options.method not in METHODS:
        raise ExportError(f"method: got {options.method!r}; expected one of {', '.join(METHODS)}")
    own = folder.path / "calibration.txt"
    prompts = read_prompts(options.calibration or (own if own.is_file() else _PROMPTS))
    calibration = Calibration(
        prompts,
        count=min(options.prompts, len(prompts.lines)),
        steps=options.steps or folder.spec.defaults.num_inference_steps,
        seed=options.seed,
        method=options.method,
        device=_usable(options.device),
    )
    wanted = Options(
        options.engine,
        options.precision,
        sizes,
        tuple(dict.fromkeys(options.sm)),
        not options.spell_attention_out,
        not options.no_numerics,
        options.gate,
    )
    wanted.check(FluxSpec.of(folder.spec))  # before anything is made
    if not stage:
        refuse_foreign(options.out, folder.spec.name)
    out = options.out.resolve()
    work = options.work or out.with_name(f"{out.name}.work")
    return Stages(folder, wanted, calibration, Work(work))


def _usable(device: str) -> str:
    """The device that was named, or a GPU if there is one. Raises ExportError."""
    import torch

    present = torch.cuda.is_available()
    if device.startswith("cuda") and not present:
        raise ExportError(f"device: got {device}; this machine, or this build of PyTorch, has no CUDA device")
    return device or ("cuda:0" if present else "cpu")


def _verify_if_possible(artifact: Path, options: argparse.Namespace) -> int:
    """Verify what was just exported, unless its engine can't run on this machine: then say so, which is no failure."""
    try:
        return _verify(artifact, options.device)
    except (ArtifactUnsuited, DeviceUnsuited, LibraryMissing) as error:
        print(f"not verified, because it can't run here: {error}")
        print(f"  on the machine that serves it: fluxserve export verify {artifact}")
        return 0


def _verify(path: Path, device: str, write: bool = True) -> int:
    from fluxserve.folders import artifact
    from fluxserve_export.manifest import add_verification
    from fluxserve_export.verify import table, verify

    found = verify(artifact.read(path), _usable(device))
    print(table(found))
    print("passed" if found["passed"] else "FAILED: see the rows that are marked")
    if write:
        add_verification(path, found)
    return 0 if found["passed"] else 1
