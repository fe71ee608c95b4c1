"""Artifacts of a FLUX.2 for the fused engine: every block's scales, a reference that edits, what is not exported."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fluxserve_export import calibrate, verify
from fluxserve_export.reference import load_cases

from fluxserve.engine import Components
from fluxserve.engines import torch_eager
from fluxserve.engines.fused import open as fused
from fluxserve.engines.fused.scales import of_block
from fluxserve.families import registry
from fluxserve.families.flux.models import FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders import checkpoint
from fluxserve.folders.artifact import Artifact
from fluxserve.job import Job
from fluxserve.kernels.operations import PLAIN
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers
from testing import random_weights
from tests.support import random_flux2
from tests.support.exports import QUICK, SHAPES, TINY, Exports, run
from tests.support.jobs import parse

pytestmark = pytest.mark.xdist_group("export-klein")

SMALL = ("--prompts", "1", "--steps", "1", "--opt-size", "64x64", "--max-size", "128x128")


@pytest.fixture(params=["bf16", "fp8"])
def artifact(request: pytest.FixtureRequest, export: Exports) -> Artifact:
    made = export("fused", request.param, *SMALL, checkpoint=random_flux2.klein().folder)
    assert made.status == 0, made.said
    return made.artifact


def test_what_is_in_it(artifact: Artifact) -> None:
    precision = artifact.manifest["precision"]
    entries = artifact.manifest["components"]
    assert set(entries) == {"qwen3", "transformer", "vae_encoder", "vae_decoder"}
    fp8 = {name for name, entry in entries.items() if entry["precision"] == "fp8"}
    assert fp8 == ({"transformer", "qwen3"} if precision == "fp8" else set())
    assert entries["qwen3"]["engines"] == {"sm90": "checkpoint/text_encoder/config.json"}
    folder = random_flux2.klein().folder
    for weights in sorted(folder.glob("*/*.safetensors")):
        assert (artifact.path / "checkpoint" / weights.relative_to(folder)).read_bytes() == weights.read_bytes()
    assert ("scales.json" in artifact.manifest["files"]) == (precision == "fp8")


def test_its_tokenizer_is_the_checkpoints(artifact: Artifact) -> None:
    """With its template, which may be a file of its own."""
    ours, theirs = (
        Tokenizers(folder)("a fox") for folder in (artifact.checkpoint, random_flux2.klein().checkpoint(512))
    )
    assert ours["qwen3"].ids.tolist() == theirs["qwen3"].ids.tolist()


def test_scales_of_every_block(export: Exports) -> None:
    """Of what the fused engine asks for, and nothing that is not quantised."""
    artifact = export("fused", "fp8", *SMALL, checkpoint=random_flux2.klein().folder).artifact
    ranges, shape = artifact.ranges("transformer"), artifact.spec.transformer
    for index in range(shape.num_layers):
        found = of_block(ranges, f"transformer_blocks.{index}", ("ff.linear_out", "ff_context.linear_out"))
        assert min(found.q, found.k, found.v, found.hidden) > 0
    for index in range(shape.num_single_layers):
        assert of_block(ranges, f"single_transformer_blocks.{index}", ("attn.to_out",)).hidden > 0
    of_blocks = re.compile(r"(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context)\.\w+(\.0)?")
    assert all(of_blocks.fullmatch(name) for name in ranges.linears), sorted(ranges.linears)
    assert len(ranges.linears) == 12 * shape.num_layers + 2 * shape.num_single_layers
    assert len(artifact.ranges("qwen3").linears) == 7 * max(artifact.spec.text.sequence.layers)


def test_the_reference_edits(artifact: Artifact) -> None:
    """The second picture is drawn after the first: the transformer's last case has its tokens too."""
    cases = load_cases(artifact.path / "reference/transformer.safetensors")
    tokens = [case.inputs["hidden_states"].shape[1] for case in cases]
    own = artifact.spec.image_tokens(64, 64)
    assert tokens[0] == own and tokens[-1] == 2 * own
    assert load_cases(artifact.path / "reference/vae_encoder.safetensors")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's modules in the artifact's dtype stand in for the engine that it is for."""

    def open_artifact(artifact: Artifact, device: str) -> Components:
        return torch_eager.open_components(artifact.checkpoint, device, "bfloat16")

    monkeypatch.setattr(verify, "open_artifact", open_artifact)


def test_verify_judges_each_component_and_both_pictures(artifact: Artifact, eager: None) -> None:
    found = verify.verify(artifact, "cpu")
    assert found["passed"], [row for row in [*found["components"], *found["images"]] if not row["passed"]]
    assert {row["component"] for row in found["components"]} == set(artifact.spec.components)
    assert [row["task"] for row in found["images"]] == ["text-to-image", "edit"]


def test_verify_notices_a_block_that_is_left_out(
    artifact: Artifact, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = torch_eager.load_module

    def one_less(folder: checkpoint.Checkpoint, name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
        module = load(folder, name, device, dtype)
        if name == "transformer":
            del module.single_transformer_blocks[-1]  # type: ignore[operator,union-attr]
        return module

    monkeypatch.setattr(torch_eager, "load_module", one_less)
    found = verify.verify(artifact, "cpu")
    assert {row["component"] for row in found["components"] if not row["passed"]} == {"transformer"}


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused engine opens on the CPU, with plain references in place of its kernels."""
    monkeypatch.setattr(fused, "usable", torch.device)
    monkeypatch.setattr(fused, "LAUNCHED", PLAIN)


def test_passes_its_own_gate(artifact: Artifact, plainly: None) -> None:
    found = verify.verify(artifact, "cpu")
    assert found["passed"], [row for row in [*found["components"], *found["images"]] if not row["passed"]]


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_other_engines_are_refused_before_anything_is_made(tmp_path: Path, engine: str) -> None:
    folder = random_flux2.klein().folder
    status, said = run(str(folder), "--out", str(tmp_path / "a"), "--engine", engine, *SHAPES, *QUICK)
    assert status == 1
    assert f"{engine}: custom is not exported yet; fused and torch_eager run it" in said
    assert not list(tmp_path.iterdir())


def test_a_component_that_the_model_has_not(tmp_path: Path) -> None:
    status, said = run("onnx", str(TINY), "--out", str(tmp_path / "a"), "--component", "qwen3")
    assert status == 1
    assert "component: got qwen3; tiny has clip, t5, transformer, vae_encoder, vae_decoder" in said


def test_calibration_edits_what_it_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    """References pass through the blocks as well, and may be larger there than noise."""
    folder, seen = random_flux2.klein().checkpoint(), []
    names = [name for name in folder.spec.components if name != "vae_encoder"]
    modules = {name: torch_eager.load_module(folder, name, "cpu", torch.float32) for name in names}
    modules["vae_encoder"] = modules["vae_decoder"]
    pipeline = Pipeline(folder.spec, torch_eager.from_modules(folder.spec, modules))
    asked = calibrate.Calibration(calibrate.Prompts(("a fox", "a hat"), ""), 2, 1, 0, "max", "cpu")

    plan = registry.plan

    def noted(fields: dict[str, Any], *others: Any) -> Job:
        request = parse(fields, folder.spec)
        seen.append((request.prompt, [(image.height, image.width) for image in request.images]))
        return plan(fields, *others)

    monkeypatch.setattr(registry, "plan", noted)
    found = calibrate.calibrate(pipeline, Tokenizers(folder), modules, asked, (64, 80))
    assert seen == [("a fox", []), ("a fox", [(64, 80)]), ("a hat", []), ("a hat", [(64, 80)])]
    assert set(found) == {"transformer", "qwen3"}


@pytest.mark.parametrize("spec", [FLUX2_KLEIN_4B, FLUX2_KLEIN_9B], ids=lambda spec: spec.name)
def test_random_weights_keep_digits_as_trained_ones_do(tmp_path: Path, spec: FluxSpec, plainly: None) -> None:
    """As deep as a klein, with its vocabulary: what is timed on a GPU must pass the same gates."""
    folder = random_weights.write(tmp_path / "klein", spec, narrow=32)
    out = tmp_path / "artifact"
    status, said = run(str(folder), "--out", str(out), "--engine", "fused", "--precision", "fp8", *SMALL)
    assert status == 0, said
    cases = {file.stem: load_cases(file) for file in (out / "reference").glob("*.safetensors") if file.stem != "images"}
    assert all(error < 0.2 for calls in cases.values() for case in calls for error in case.plain.values())
    assert run("verify", str(out))[0] == 0
