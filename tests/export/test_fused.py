"""Artifacts of the fused engine: the checkpoint's own weights, scales for FP8, the reference to verify with."""

import json
from pathlib import Path

import pytest
import torch
from fluxserve_export.reference import load_cases
from fluxserve_export.verify import verify

from fluxserve import source
from fluxserve.engines.fused import open as fused
from fluxserve.errors import ArtifactDamaged, DeviceUnsuited, SettingsError
from fluxserve.families.flux.models import FLUX1_DEV
from fluxserve.folders.artifact import Artifact
from fluxserve.kernels.operations import PLAIN
from fluxserve.settings import Settings
from testing import random_weights
from tests.support.exports import QUICK, SHAPES, TINY, Exports, run

pytestmark = pytest.mark.xdist_group("export")

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")


@pytest.fixture(params=["bf16", "fp8"])
def artifact(request: pytest.FixtureRequest, export: Exports) -> Artifact:
    return export("fused", request.param).artifact


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine opens on the CPU, with plain references in place of its kernels."""
    monkeypatch.setattr(fused, "usable", torch.device)
    monkeypatch.setattr(fused, "LAUNCHED", PLAIN)


@WITHOUT_GPU
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_says_that_it_was_not_verified(export: Exports, precision: str) -> None:
    made = export("fused", precision)
    assert made.status == 0
    assert "not verified, because it can't run here: fused: got cpu; expected a CUDA device" in made.said
    assert any("on the GPU is the proof" in note for note in made.artifact.manifest["notes"])


def test_what_is_in_it(artifact: Artifact) -> None:
    precision = artifact.manifest["precision"]
    assert artifact.manifest["architectures"] == ["sm90"]
    entries = artifact.manifest["components"]
    fp8 = {name for name, entry in entries.items() if entry["precision"] == "fp8"}
    assert fp8 == ({"transformer", "t5"} if precision == "fp8" else set())
    assert entries["transformer"]["engines"] == {"sm90": "checkpoint/transformer/config.json"}
    for weights in sorted(TINY.glob("*/*.safetensors")):
        copied = artifact.path / "checkpoint" / weights.relative_to(TINY)
        assert copied.read_bytes() == weights.read_bytes()
    assert ("scales.json" in artifact.manifest["files"]) == (precision == "fp8")


def test_passes_its_own_gate(artifact: Artifact, plainly: None) -> None:
    found = verify(artifact, "cpu")
    failed = [row for row in found["components"] if row["relative_error"] > row["allowed"]]
    assert found["passed"], failed


def test_random_weights_keep_digits_as_trained_ones_do(tmp_path: Path, plainly: None) -> None:
    """As deep as FLUX.1-dev and T5-XXL: the whole of it, which is what is timed on a GPU, must pass the same gates."""
    folder = random_weights.write(tmp_path / "flux", FLUX1_DEV, narrow=16)
    out, work = tmp_path / "artifact", tmp_path / "work"
    arguments = ("--engine", "fused", "--precision", "fp8", "--prompts", "1", "--steps", "1", "--opt-size", "64x64")
    status, said = run(str(folder), "--out", str(out), "--work", str(work), *arguments)
    assert status == 0 and "passed" in said, said
    for component in ("t5", "transformer"):
        (file,) = work.rglob(f"{component}.safetensors")
        assert all(error < 0.2 for case in load_cases(file) for error in case.plain.values()), component


def test_weights_that_were_changed_are_not_served(artifact: Artifact, plainly: None, tmp_path: Path) -> None:
    changed = tmp_path / "artifact"
    for file in (f for f in artifact.path.rglob("*") if f.is_file()):
        (changed / file.relative_to(artifact.path)).parent.mkdir(parents=True, exist_ok=True)
        (changed / file.relative_to(artifact.path)).write_bytes(file.read_bytes())
    (file,) = (changed / "checkpoint/transformer").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactDamaged, match="sha256"):
        source.find(Settings(artifact=str(changed))).open_components("cpu", "auto")


@WITHOUT_GPU
def test_needs_a_gpu(artifact: Artifact) -> None:
    with pytest.raises(DeviceUnsuited, match="fused: got cpu; expected a CUDA device"):
        source.find(Settings(artifact=str(artifact.path))).open_components("cpu", "auto")
    with pytest.raises(DeviceUnsuited):
        source.find(Settings(engine="fused")).open_components("cpu", "auto")
    with pytest.raises(SettingsError, match="allowed: auto or bfloat16"):
        source.find(Settings(engine="fused")).open_components("cpu", "float16")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--precision", "fp16"), "precision: got fp16; the fused engine computes in bf16 or fp8"),
        (("--precision", "fp8", "--sm", "sm89"), "sm: got sm89; the fused engine's kernels are for sm90"),
    ],
)
def test_what_it_can_not_be_asked(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    status, said = run(str(TINY), "--out", str(tmp_path / "a"), "--engine", "fused", *SHAPES, *QUICK, *arguments)
    assert status == 1
    assert says in said
    assert not (tmp_path / "a").exists()


def test_has_no_stages_of_its_own(tmp_path: Path) -> None:
    status, said = run("onnx", str(TINY), "--out", str(tmp_path / "a"), "--engine", "fused", "--precision", "bf16")
    assert status == 1
    assert "onnx: the fused engine has no such stage" in said


def test_scales_are_the_ones_that_other_engines_have(export: Exports) -> None:
    """Calibrated once in a work folder, whatever is made of it."""
    ours, theirs = (json.loads((export(e, "fp8").path / "scales.json").read_text()) for e in ("fused", "onnxruntime"))
    assert ours == theirs
