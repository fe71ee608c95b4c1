"""`python -m benchmarks.distance`, whole but small: three precisions of the tiny model, a manifest, a sheet."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import distance
from fluxserve.folders import artifact as artifacts
from fluxserve.folders.artifact import MANIFEST
from tests.support.exports import Exports

COUNT, STEPS = 4, 8

pytestmark = pytest.mark.xdist_group("export")


def test_one_command_compares_precisions(export: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FP8's pictures are farther from float32's than BF16's, and much closer than another seed's."""
    folder, kept, sheet = tmp_path / "fp8", tmp_path / "distance.json", tmp_path / "sheet.png"
    shutil.copytree(export("onnxruntime", "fp8").path, folder)
    how = ("--n", str(COUNT), "--steps", str(STEPS), "--yardstick", "4", "--device", "cpu")
    status = distance.main(["bfloat16", str(folder), *how, "--write", "--json", str(kept), "--sheet", str(sheet)])
    said = capsys.readouterr().out.splitlines()
    result = json.loads(kept.read_text())
    assert status == 0 and json.loads(said[-1]) == result
    assert f"written: {folder / MANIFEST}" in said and "passed: FP8 lost no more than 1 point of accuracy" in said

    bf16, fp8, between = (pair["distances"] for pair in result["pairs"])
    other = result["yardstick"]
    assert (result["pictures"], result["prompts"], other["pictures"]) == (2 * COUNT, 2 * COUNT, 4)
    assert other["psnr"]["median"] + 6 < fp8["psnr"]["median"] < bf16["psnr"]["median"]
    assert other["ms_ssim"]["median"] < fp8["ms_ssim"]["median"] < bf16["ms_ssim"]["median"]
    assert other["features"]["median"] / 3 > fp8["features"]["median"] > bf16["features"]["median"]
    assert between["psnr"]["median"] < bf16["psnr"]["median"]

    (entry,) = artifacts.read(folder).manifest["quality"]
    assert [each["model"] for each in entry["against"]] == ["torch_eager fp32", "torch_eager bf16"]
    assert entry["against"][0]["distances"]["psnr"]["median"] == fp8["psnr"]["median"]
    assert entry["passed"] and entry["accuracy"]["seen"]["object"] >= 0.75
    with Image.open(sheet) as image:
        assert image.width == 8 + 5 * (256 + 8)


def test_a_reference_may_be_an_artifact(export: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any prompts, which no judge knows: there is no accuracy, and nothing fails."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\nan owl\n")
    reference = str(export("onnxruntime", "fp32").path)
    given = ["float32", "--reference", reference, "--prompts", str(prompts), "--n", "3", "--steps", "2"]
    assert distance.main([*given, "--yardstick", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    result = json.loads(said[-1])
    assert said[-2] == "accuracy of FP8: not decided; no judge knows these pictures"
    assert (result["pictures"], result["prompts"], result["models"][1]["accuracy"]) == (3, 2, {})
    assert result["pairs"][0]["models"] == ["onnxruntime fp32", "torch_eager fp32"]
    assert result["pairs"][0]["distances"]["psnr"]["worst"] > 50, "both compute in float32"


def test_a_model_that_nobody_judges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FLUX.1's own weights are compared: prompts of the export, without features unless a file brings them."""
    monkeypatch.setattr(distance, "JUDGED", "another")
    sheet = tmp_path / "sheet.png"
    given = ["bfloat16", "--n", "2", "--steps", "2", "--yardstick", "1", "--device", "cpu", "--sheet", str(sheet)]
    assert distance.main(given) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["measures"]) == {"psnr", "ms_ssim"} == set(result["pairs"][0]["distances"])
    assert result["pairs"][0]["distances"]["psnr"]["prompt"] in distance.PROMPTS.read_text().splitlines()
    assert sheet.stat().st_size > 0
