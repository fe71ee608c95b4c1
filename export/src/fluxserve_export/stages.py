"""The stages of an export over a work folder: onnx → calibrate → quantize → build, and the reference beside them."""

import gc
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxserve.engine import Components
from fluxserve.engines import tensorrt_library, torch_eager
from fluxserve.engines.tensorrt import Cuda
from fluxserve.errors import ExportError
from fluxserve.families import registry
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.artifact import ANYWHERE, SCALES, Extent, Ranges
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers
from fluxserve_export import build, calibrate, numerics, quantize, reference, trace
from fluxserve_export.console import Line, size
from fluxserve_export.fp8 import ATTENTION, KEPT
from fluxserve_export.inputs import calls_to_keep, load_inputs, save_inputs
from fluxserve_export.options import (
    ATTENTION_OPSET,
    FP8,
    FUSED,
    FUSED_ARCHITECTURES,
    ONNXRUNTIME,
    Options,
    profile,
    ranges,
)
from fluxserve_export.work import Make, Result, Work

ONNX = "model.onnx"
PLAN = "model.plan"
INPUTS = "inputs.safetensors"
"""Of the transformer, beside SCALES: what blocks are measured on."""
_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


def refuse_misses(component: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise ExportError if an ONNX file is further from the reference than plain arithmetic allows."""
    for row in rows:
        if not row["relative_error"] <= row["allowed"]:
            got = f"relative error {row['relative_error']:.2e} of {row['output']} {row['shape']}"
            raise ExportError(f"numerics: {component}: {got}; expected at most {row['allowed']:.2e}")


def _refuse_lost_fp8(component: str, architecture: str, got: int, record: Mapping[str, Any]) -> None:
    """Raise ExportError if the parser found fewer products of two E4M3 factors than were put into the graph."""
    spelled_out = 2 * len(record.get("attention", ())) if record["opset"] < ATTENTION_OPSET else 0
    expected = len(record.get("linears", ())) + spelled_out
    if got != expected:
        raise ExportError(f"build: {component} {architecture}: {got} products in FP8; expected {expected}")


def _judging(make: Make) -> Make:
    """A stage that runs PyTorch: float32 is float32 (cuDNN's convolutions would use TF32), the same twice; and
    afterwards a GPU's memory is free for others, because TensorRT allocates by itself."""

    def run(folder: Path, line: Line) -> dict[str, Any]:
        try:
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                return make(folder, line)
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    return run


class Stages:
    """One export: a checkpoint, what is wanted of it, and where results are kept."""

    def __init__(
        self, checkpoint: Checkpoint, options: Options, calibration: calibrate.Calibration, work: Work
    ) -> None:
        options.check(FluxSpec.of(checkpoint.spec))
        self.checkpoint, self.options, self.calibration, self.work = checkpoint, options, calibration, work

    def check_engine(self) -> None:
        """Raise now what a build would raise in an hour: the library is missing, too old, or knows no such GPU."""
        if self.options.engine in (ONNXRUNTIME, FUSED):
            return
        for architecture in self.architectures:
            build.check_architecture(self._library, architecture)
        fused = any(self.options.onnx_opset(name) >= ATTENTION_OPSET for name in ATTENTION)
        if fused and not self._library.has("IAttention", "normalization_quantize_scale"):
            got = f"{self._library}, which has no attention operator with FP8"
            raise ExportError(f"engine: got {got}; expected 10.16 or newer, or --spell-attention-out")

    # --- what the stages are keyed by ---------------------------------------------------------------------------------

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of every file of the checkpoint that counts."""
        return self.work.hashes(self.checkpoint.path)

    @cached_property
    def _libraries(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in _LIBRARIES}

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of everything that an artifact is made with."""
        found = dict(self._libraries)
        if self.options.engine not in (ONNXRUNTIME, FUSED):
            found[self.options.engine] = self._library.version
        return {"python": platform.python_version(), **found}

    def ranges(self, component: str) -> dict[str, Extent]:
        return ranges(component, FluxSpec.of(self.checkpoint.spec), self.options.sizes)

    def _weights(self, components: Iterable[str]) -> dict[str, str]:
        found = registry.architectures(self.checkpoint.spec)
        folders = tuple(f"{found[name].folder}/" for name in components)
        return {name: digest for name, digest in self.hashes.items() if name.startswith(folders)}

    @cached_property
    def _library(self) -> tensorrt_library.Library:
        return tensorrt_library.load(self.options.engine)

    # --- onnx ---------------------------------------------------------------------------------------------------------

    def onnx(self, component: str) -> Result:
        """The component's graph, and how far it is from the module."""
        dtype, opset, shapes = self.options.dtype, self.options.onnx_opset(component), self.ranges(component)

        def make(folder: Path, line: Line) -> dict[str, Any]:
            line.say("tracing")
            model = trace.trace(self.checkpoint, component, shapes, dtype, opset)
            trace.save(model, folder / ONNX, line.progress)
            return {"opset": opset, "dtype": str(dtype).removeprefix("torch."), "nodes": len(list(model.graph))}

        inputs = {
            "weights": self._weights([component]),
            "shapes": shapes,
            "dtype": str(dtype),
            "opset": opset,
            "versions": self._libraries,
        }
        return self.work.stage(f"onnx {component}", inputs, make)

    # --- calibrate ----------------------------------------------------------------------------------------------------

    def scales(self) -> Result:
        """SCALES: the amax of everything that is quantised, for every engine."""
        asked = self.calibration

        def make(folder: Path, line: Line) -> dict[str, Any]:
            line.say("loading")
            spec, modules = self.checkpoint.spec, self._modules(calibrate.dtype_on(asked.device))
            engines = dict(self._components(modules).by_name)
            wanted = calls_to_keep(asked.steps, spec.takes_references)
            engines["transformer"] = noted = reference.Noted(engines["transformer"], wanted)
            pipeline = Pipeline(spec, Components(engines), asked.device)
            found = calibrate.calibrate(
                pipeline, Tokenizers(self.checkpoint), modules, asked, self.options.sizes.opt_size, line.progress
            )
            save_inputs([case.inputs for case in noted.cases], folder / INPUTS)
            content = {
                "format": "e4m3",
                "method": asked.method,
                "components": {name: seen.ranges(asked.method).to_json() for name, seen in found.items()},
            }
            (folder / SCALES).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            return {}

        inputs = {
            "weights": self.hashes,
            "calibration": asdict(asked) | {"prompts": asked.prompts.sha256},
            "size": self.options.sizes.opt_size,
            "versions": self._libraries,
        }
        return self.work.stage("calibrate", inputs, _judging(make))

    def _calibration(self) -> dict[str, Any]:
        """What calibration measured, before anything was decided by it."""
        content: dict[str, Any] = json.loads((self.scales().path / SCALES).read_text(encoding="utf-8"))
        return content

    def calibrated(self, component: str) -> Ranges:
        """Return a component's ranges, with what measuring its blocks has kept in the compute dtype."""
        return Ranges.from_json(self.decided()["components"][component])

    # --- measure ------------------------------------------------------------------------------------------------------

    @property
    def measures(self) -> bool:
        """Whether blocks are measured: with the fused engine, whose arithmetic runs on any machine."""
        return self.options.engine == FUSED and self.options.precision == FP8

    def measured(self) -> Result:
        """Each block of the transformer in FP8, BF16 and float32; what is kept follows from it.

        Raises:
            LibraryMissing: the engine's kernels can't be imported here, though only their definitions may be run.
        """
        from fluxserve.engines.fused.open import operations_on
        from fluxserve_export import measure

        asked, name = self.calibration, measure.COMPONENT
        ranges, run = Ranges.from_json(self._calibration()["components"][name]), operations_on(asked.device)

        def make(_: Path, line: Line) -> dict[str, Any]:
            batches = load_inputs(self.scales().path / INPUTS)
            blocks = measure.measure(self.checkpoint, batches, ranges, asked.device, run, line.progress)
            return measure.record(blocks, self.options.gate)

        keyed = {
            "weights": self._weights([name]),
            "scales": self.scales().files,
            "gate": self.options.gate,
            "device": asked.device,
            "versions": self._libraries,
        }
        return self.work.stage("measure", keyed, _judging(make))

    def decided(self) -> dict[str, Any]:
        """The content of SCALES in the artifact."""
        content = self._calibration()
        if self.measures:
            kept = self.measured().record["kept"]
            content["components"][ATTENTION[0]]["kept"] = kept
        return content

    # --- quantize -----------------------------------------------------------------------------------------------------

    def graph(self, component: str) -> Result:
        """The ONNX that an engine is made of: quantised, if the precision says so."""
        source = self.onnx(component)
        if self.options.precision_of(component) != FP8:
            return source
        ranges = self.calibrated(component)

        def make(folder: Path, line: Line) -> dict[str, Any]:
            model = quantize.load(source.path / ONNX)
            report = quantize.quantise(model, ranges.quantised)
            trace.save(model, folder / ONNX, line.progress)
            return {**source.record, "linears": report.linears, "attention": report.attention}

        return self.work.stage(f"quantize {component}", {"onnx": source.files, "ranges": ranges.to_json()}, make)

    # --- numerics -----------------------------------------------------------------------------------------------------

    def numerics(self, component: str) -> Result:
        """The ONNX file through ONNX Runtime against the reference's calls, which have two shapes."""
        graph, kept = self.graph(component), self.reference()
        signature = registry.of(self.checkpoint.spec).signatures(self.checkpoint.spec)[component]
        needed, free = numerics.memory_needed(graph.path / ONNX), numerics.memory_free()
        fits = needed < free

        def make(folder: Path, line: Line) -> dict[str, Any]:
            if not self.options.check_numerics:
                return {"skipped": "it was not wanted (--no-numerics)"}
            if not fits:
                return {"skipped": f"it needs about {size(needed)} of memory, and {size(free)} were free"}
            cases = reference.load_cases(kept.path / f"{component}.safetensors")
            file = graph.path / ONNX
            wide = self.options.dtype == torch.bfloat16
            if wide:
                line.say("widening bfloat16")
                file = folder / ONNX
                numerics.widened(graph.path / ONNX, file)
            line.say("running")
            results = numerics.run_onnx(file, signature, [case.inputs for case in cases])
            for made in folder.iterdir():
                made.unlink()
            rows = reference.compare(cases, results)
            refuse_misses(component, rows)
            return {"widened": wide, "cases": rows}

        keyed = {"graph": graph.files, "reference": kept.files, "fits": fits, "wanted": self.options.check_numerics}
        keyed["versions"] = self._libraries
        return self.work.stage(f"numerics {component}", keyed, make)

    # --- build --------------------------------------------------------------------------------------------------------

    def engine(self, component: str, architecture: str) -> Result:
        """The component's plan for one GPU architecture; its graph is checked first."""
        self.numerics(component)
        graph, shapes = self.graph(component), self.ranges(component)
        signature = registry.of(self.checkpoint.spec).signatures(self.checkpoint.spec)[component]
        points = [signature.at(profile(shapes, which)) for which in range(3)]
        inputs = {t.name: (points[0][t.name], points[1][t.name], points[2][t.name]) for t in signature.inputs}
        attention = (
            len(graph.record.get("attention", ())) if self.options.onnx_opset(component) >= ATTENTION_OPSET else 0
        )

        def make(folder: Path, line: Line) -> dict[str, Any]:
            report = build.build(
                self._library,
                graph.path / ONNX,
                inputs,
                folder / PLAN,
                architecture=architecture,
                fp8_attentions=attention,
                progress=lambda phase, step, steps: line.say(f"{phase} {step}/{steps}"),
            )
            _refuse_lost_fp8(component, architecture, report.fp8_matmuls, graph.record)
            return asdict(report)

        keyed = {
            "graph": graph.files,
            "shapes": {name: [list(point) for point in three] for name, three in inputs.items()},
            "architecture": architecture,
            "library": [self._library.flavour, self._library.version],
            "attention": attention,
        }
        return self.work.stage(f"build {component} {architecture}", keyed, make)

    def engines(self, component: str) -> dict[str, tuple[Result, str]]:
        """Architecture (or ANYWHERE) → the stage that made the engine, and its main file."""
        if self.options.engine == ONNXRUNTIME:
            return {ANYWHERE: (self.graph(component), ONNX)}
        return {a: (self.engine(component, a), PLAN) for a in self.architectures}

    @property
    def architectures(self) -> tuple[str, ...]:
        """What to build for; full TensorRT builds for the GPU that is present, unless it is told."""
        if self.options.engine == FUSED:
            return FUSED_ARCHITECTURES
        if self.options.architectures or self.options.engine == ONNXRUNTIME:
            return self.options.architectures
        return (Cuda("cuda:0").architecture,)

    # --- reference ----------------------------------------------------------------------------------------------------

    def reference(self) -> Result:
        """What the float32 reference computes, and plain arithmetic's error in the export's precision."""
        spec, sizes, device = self.checkpoint.spec, self.options.sizes, self.calibration.device
        calibration = self.calibration
        asked = reference.pictures(spec, sizes, calibration.prompts.lines, calibration.steps, calibration.seed)
        quantised = [n for n in KEPT if n in spec.components and self.options.precision_of(n) == FP8]
        ranges = {name: self.calibrated(name) for name in quantised} or None

        def make(folder: Path, line: Line) -> dict[str, Any]:
            line.say("drawing in float32")
            tokenizers, modules = Tokenizers(self.checkpoint), self._modules(torch.float32)
            components = self._components(modules)
            cases, images = reference.record(spec, components, tokenizers, asked, device)
            line.say(f"drawing plainly in {self.options.precision}")
            if self.options.dtype != torch.float32:
                del modules, components
                modules = self._modules(self.options.dtype)
            with reference.in_precision(modules, ranges, centred=self.options.engine == FUSED):
                signatures = registry.of(spec).signatures(spec)
                for name, each in registry.architectures(spec).items():
                    signature, wrapper = signatures[name], each.wrapper(modules[name])
                    reference.measure_plain(name, signature, wrapper, cases[name])
                pipeline = self._pipeline(modules, reference.rows_of(asked))
                plain = reference.draw(asked, pipeline, tokenizers, images[0])
            reference.save(folder, cases, asked, images, plain)
            return {}

        keyed = {
            "weights": self.hashes,
            "asked": [asdict(each) for each in asked],
            "dtype": str(self.options.dtype),
            "ranges": {name: each.to_json() for name, each in ranges.items()} if ranges else None,
            "centred": self.options.engine == FUSED,
            "device": device,
            "versions": self._libraries,
        }
        return self.work.stage("reference", keyed, _judging(make))

    def _modules(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        device = self.calibration.device
        names = [name for name in self.checkpoint.spec.components if name != "vae_encoder"]  # the decoder's module
        modules = {name: torch_eager.load_module(self.checkpoint, name, device, dtype) for name in names}
        return {**modules, "vae_encoder": modules["vae_decoder"]}

    def _components(self, modules: Mapping[str, nn.Module]) -> Components:
        return torch_eager.from_modules(self.checkpoint.spec, modules)

    def _pipeline(self, modules: Mapping[str, nn.Module], rows: int = 1) -> Pipeline:
        return Pipeline(self.checkpoint.spec, self._components(modules), self.calibration.device, rows)
