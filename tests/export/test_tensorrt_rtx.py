"""TensorRT-RTX plans for real: all components, built on the CPU for GPUs that are not here."""

from pathlib import Path

import pytest

from fluxserve.families.flux.models import FLUX1_SCHNELL
from fluxserve.folders import artifact as artifacts
from fluxserve.folders.artifact import Artifact
from testing import random_weights
from tests.support.exports import TINY, Exports, run

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 alone")

pytestmark = [pytest.mark.xdist_group("export-rtx"), pytest.mark.timeout(900)]

ADA, BLACKWELL = ("--sm", "sm89"), ("--sm", "sm120")
BOTH = (*ADA, *BLACKWELL)
DOUBLE, SINGLE = 1, 1
"""Blocks of the slice at real width: one of each kind."""


def built(artifact: Artifact, component: str, architecture: str) -> dict[str, int]:
    record: dict[str, int] = artifact.manifest["components"][component]["built"][architecture]
    return record


@pytest.mark.parametrize(
    ("precision", "architectures"), [("fp32", BOTH), ("fp16", ADA), ("bf16", BLACKWELL), ("fp8", BOTH)]
)
def test_all_components(export: Exports, precision: str, architectures: tuple[str, ...]) -> None:
    made = export("tensorrt-rtx", precision, *architectures)
    assert made.status == 0, made.said
    assert "not verified, because it can't run here" in made.said
    artifact = made.artifact
    named = [word for word in architectures if word != "--sm"]
    assert artifact.manifest["architectures"] == named
    for name in artifact.spec.components:
        component = artifact.component(name)
        assert set(component.engines) == set(named)
        for architecture, file in component.engines.items():
            assert artifact.file(file).stat().st_size == built(artifact, name, architecture)["bytes"] > 0
        assert artifact.manifest["components"][name]["numerics"]["cases"], "the ONNX that it was built from was run"


def test_fp8_reaches_the_engine(export: Exports) -> None:
    """All 37 linears of the blocks and all 6 attentions; the text encoders' linears; nothing in the VAE."""
    artifact = export("tensorrt-rtx", "fp8", *BOTH).artifact
    for architecture in ("sm89", "sm120"):
        transformer = built(artifact, "transformer", architecture)
        assert (transformer["fp8_matmuls"], transformer["fp8_attentions"]) == (37, 6)
        assert built(artifact, "t5", architecture)["fp8_matmuls"] == 14
        assert built(artifact, "clip", architecture)["fp8_matmuls"] == 12
        assert built(artifact, "vae_decoder", architecture)["fp8_matmuls"] == 0


def test_an_attention_that_is_not_counted_on_fails_the_build(tmp_path: Path, export: Exports) -> None:
    """Six of the graph's attentions are in FP8: a build that expects another number must not go through."""
    from fluxserve_export import build
    from fluxserve_export.stages import ONNX

    from fluxserve.engines import tensorrt_library
    from fluxserve.errors import ExportError

    (graph,) = (
        f for f in export.work.glob("quantize-transformer-*") if '"opset": 23' in (f / "stage.json").read_text()
    )
    tokens = {"hidden_states": (1, 16, 64), "img_ids": (16, 3)}
    with pytest.raises(ExportError, match=r"6 attentions .* expected 5"):
        build.build(
            tensorrt_library.load("tensorrt-rtx"),
            graph / ONNX,
            {name: (shape, shape, shape) for name, shape in tokens.items()},
            tmp_path / "plan",
            architecture="sm89",
            fp8_attentions=5,
        )
    assert not (tmp_path / "plan").exists()


def test_a_slice_at_real_width(tmp_path: Path) -> None:
    """From weights on disk to FP8 plans, every graph compared with PyTorch on the way."""
    folder = random_weights.write(tmp_path / "wide", FLUX1_SCHNELL, DOUBLE, SINGLE, text_layers=1)
    shapes = ("--min-size", "64x64", "--opt-size", "64x64", "--max-size", "1024x1024", "--prompts", "1", "--steps", "1")
    prompts = ("--calibration", str(TINY / "calibration.txt"))
    given = ("--engine", "tensorrt-rtx", "--precision", "fp8", *ADA, *shapes, *prompts)
    status, said = run(str(folder), "--out", str(tmp_path / "out"), *given)
    assert status == 0, said
    artifact = artifacts.read(tmp_path / "out")
    record = built(artifact, "transformer", "sm89")
    assert record["fp8_attentions"] == DOUBLE + SINGLE
    assert record["fp8_matmuls"] == 12 * DOUBLE + 5 * SINGLE
    half = sum(f.stat().st_size for f in (folder / "transformer").glob("*.safetensors"))
    assert record["bytes"] < 0.8 * half, "weights are stored in FP8"
