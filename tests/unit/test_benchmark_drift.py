"""benchmarks.drift: the arithmetic that FP8 had before values lost their mean."""

import json
from pathlib import Path

import pytest
import torch
from fluxserve_export.fp8 import simulated

from benchmarks import drift
from benchmarks.drift import leaving_the_mean_in, with_the_means_range
from fluxserve import settings
from fluxserve.engines.torch_eager import TorchEngine, load_module
from fluxserve.families.flux import signatures
from fluxserve.families.registry import architectures
from fluxserve.folders import checkpoint
from tests.conformance.test_fused import DEVICE, FP8, KERNELS, TEXT, Judge, relative, transformer, velocity
from tests.support.exports import Exports

pytestmark = pytest.mark.xdist_group("fused")


def test_the_mean_is_left_in() -> None:
    """Its error is that of plain FP8 arithmetic on v as it is; nothing is counted; and it is another arithmetic."""
    judge = Judge(checkpoint.read(settings.default_checkpoint()), (16, 24))
    ranges = with_the_means_range(judge.ranges)
    assert all(ranges.centred[name] == v for name, (_, _, v) in ranges.attention.items())
    engine = transformer(judge.folder, FP8, ranges, (4096, TEXT, 1), leaving_the_mean_in(KERNELS))
    before = velocity(engine, judge.inputs)
    module = load_module(judge.folder, "transformer", str(DEVICE), torch.float32)
    wrapped = architectures(judge.folder.spec)["transformer"].wrapper(module)
    with simulated("transformer", module, judge.ranges):
        plain = velocity(TorchEngine(signatures.transformer(judge.folder.spec), wrapped), judge.inputs)
    error = relative(before, judge.expected)
    assert error <= 1.1 * relative(plain, judge.expected)
    assert engine.saturated() == {}
    assert not torch.equal(before, velocity(judge.open(FP8), judge.inputs))


def test_distances_from_bf16(export: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a command, on the tiny model and a CPU; what is computed at every step is what is computed at the first."""
    artifact = export("fused", "fp8")
    asked = [
        "--sizes",
        "128x128",
        "64x96",
        "--steps",
        "1",
        "3",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "out.json"),
    ]
    drift.main([str(artifact.path), *asked])
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert [(run["size"], run["steps"]) for run in result["runs"]] == [
        ([128, 128], 1),
        ([128, 128], 3),
        ([64, 96], 1),
        ([64, 96], 3),
    ]
    for run in result["runs"]:
        ways = run["distances"]
        assert set(ways) == {"fp8, mean left in", "fp8, mean of every step", "fp8"}
        assert all(len(way["latents"]) == run["steps"] and 0 < way["latents"][0] < 0.2 for way in ways.values())
        assert ways["fp8"]["latents"][0] == ways["fp8, mean of every step"]["latents"][0]
    assert result["saturated"] == {}
