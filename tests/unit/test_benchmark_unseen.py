"""benchmarks.unseen: what is clipped when weights are changed, on the tiny model and a CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import unseen
from benchmarks.unseen import Changed
from fluxserve import settings
from fluxserve.engines.fused.weights import Reader
from fluxserve.folders import checkpoint
from tests.support.exports import Exports

pytestmark = pytest.mark.xdist_group("fused")
CPU = torch.device("cpu")


def test_matrices_of_blocks_are_changed_by_what_was_asked() -> None:
    weights = checkpoint.read(settings.default_checkpoint()).weights("transformer")
    was, changed = Reader(weights, CPU), Changed(weights, CPU, 0.25)
    for name in ("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.proj_mlp.weight"):
        difference = (changed(name) - was(name)).double()
        assert difference.norm() / was(name).double().norm() == pytest.approx(0.25, rel=1e-3)
        energy = torch.linalg.svdvals(difference).square()  # weights are stored in 16 bits: the rest is their rounding
        assert energy[: unseen.RANK - 1].sum() < 0.99 * energy.sum() < energy[: unseen.RANK].sum()
        assert torch.equal(changed(name), changed(name))
    for name in ("transformer_blocks.0.attn.to_q.bias", "x_embedder.weight"):
        assert torch.equal(changed(name), was(name))


def test_headroom_is_what_keeps_values_from_the_limit(
    export: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a command: scales half as large as what calibration saw clip, and none does as it is served."""
    artifact = export("fused", "fp8")
    asked = ["--sizes", "128x128", "--strengths", "0", "0.3", "--headroom", "0.5", "2", "--steps", "2"]
    unseen.main([str(artifact.path), *asked, "--device", "cpu", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    by_setting = {(c["strength"], c["headroom"]): c for c in result["clipped"]}
    assert len(by_setting) == 4
    for strength in (0, 0.3):
        small, served = by_setting[strength, 0.5], by_setting[strength, 2]
        assert small["heads"] > 0 and small["hidden"] > 0
        assert 0 < small["share_of_heads"] < 0.1 and 0 < small["share_of_hidden"] < 0.1
        assert served["heads"] < small["heads"] and served["hidden"] < small["hidden"]
    assert by_setting[0, 2]["heads"] == by_setting[0, 2]["hidden"] == 0
