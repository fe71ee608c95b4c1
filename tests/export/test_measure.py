"""Each block measured against float32, and what export keeps in BF16 by it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fluxserve_export import measure
from fluxserve_export.inputs import calls_to_keep, load_inputs, save_inputs
from fluxserve_export.measure import Errors, Measured
from fluxserve_export.verify import verify
from torch import Tensor

from fluxserve import settings
from fluxserve.engines.fused import open as fused
from fluxserve.engines.fused.probe import Kept
from fluxserve.engines.torch_eager import load_module
from fluxserve.errors import ExportError
from fluxserve.families.registry import architectures
from fluxserve.folders import checkpoint
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.kernels.operations import PLAIN
from tests.conformance.test_fused import Judge, inputs_of
from tests.support import flux2_blocks
from tests.support.exports import TINY, Exports, run

pytestmark = pytest.mark.xdist_group("export")


@pytest.fixture(scope="module")
def tiny() -> Judge:
    return Judge(checkpoint.read(settings.default_checkpoint()), (16, 24))


@pytest.fixture(scope="module", params=["tiny", "flux.2"])
def judge(request: pytest.FixtureRequest, tiny: Judge, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    if request.param == "tiny":
        return tiny
    folder = flux2_blocks.write(tmp_path_factory.mktemp("small"), flux2_blocks.SMALL, 1, 2)
    return Judge(folder, (16, 24), references=[(8, 16)])


def on_cpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in inputs.items()}


def test_errors_of_each_block(judge: Judge) -> None:
    """BF16's are a fraction of FP8's; attention in BF16 lies between; two batches give the worst of both."""
    one, two = on_cpu(judge.inputs), on_cpu(inputs_of(judge.folder, (8, 8), rows=2))
    done: list[tuple[int, int]] = []
    blocks = measure.measure(
        judge.folder, [one, two], judge.ranges, "cpu", PLAIN, lambda *progress: done.append(progress)
    )
    spec = judge.folder.spec.transformer
    assert len(blocks) == spec.num_layers + spec.num_single_layers
    assert done[-1] == (2 * len(blocks), 2 * len(blocks))
    for block in blocks:
        fp8, attention, bf16 = (block.errors[kept] for kept in Kept)
        assert bf16.block < 0.5 * fp8.block and bf16.attention < 0.5 * fp8.attention
        assert attention.block < 1.1 * fp8.block and attention.attention < 1.1 * fp8.attention
        assert 0.005 < fp8.block < 0.2
        assert not block.milliseconds, "a CPU's times say nothing"
    alone = measure.measure(judge.folder, [one], judge.ranges, "cpu", PLAIN)
    assert all(b.errors[k].block >= a.errors[k].block for a, b in zip(alone, blocks, strict=True) for k in Kept)


def test_the_reference_is_the_module_and_frees_what_has_run(tiny: Judge) -> None:
    weights = tiny.folder.weights("transformer")
    reference = measure._Reference(tiny.folder, weights, torch.device("cpu"))
    passed: list[measure._Passed] = []
    reference.run(on_cpu(tiny.inputs), passed.append)
    assert [p.block for p in passed] == list(reference.blocks)
    module = load_module(tiny.folder, "transformer", "cpu", torch.float32)
    seen: list[Tensor] = []
    for name, owner in module.named_modules():
        if name in reference.blocks:
            owner.register_forward_hook(lambda _, __, result: seen.append(torch.cat(result, dim=1)))
    architectures(tiny.folder.spec)["transformer"].wrapper(module)(**on_cpu(tiny.inputs))
    assert all(torch.equal(p.after, s) for p, s in zip(passed, seen, strict=True))
    left = {parameter.device.type for block in reference._owners.values() for parameter in block.parameters()}
    assert left == {"meta"}


Pair = tuple[float, float]


def measured(name: str, fp8: Pair, attention: Pair, bf16: Pair = (0.01, 0.01)) -> Measured:
    errors = {Kept.NOTHING: Errors(*fp8), Kept.ATTENTION: Errors(*attention), Kept.ALL: Errors(*bf16)}
    return Measured(name, errors, {Kept.NOTHING: 1.0, Kept.ATTENTION: 1.5, Kept.ALL: 2.25})


def test_what_is_kept_is_the_least_that_is_within_the_gate() -> None:
    blocks = [
        measured("a", (0.19, 0.09), (0.05, 0.05)),
        measured("b", (0.21, 0.09), (0.05, 0.05)),
        measured("c", (0.1, 0.11), (0.05, 0.09)),
        measured("d", (0.1, 0.2), (0.05, 0.15)),
        measured("e", (0.3, 0.05), (0.25, 0.05)),
    ]
    assert [block.kept(0.1) for block in blocks] == [
        Kept.NOTHING,
        Kept.ATTENTION,
        Kept.ATTENTION,
        Kept.ALL,
        Kept.ALL,
    ]
    found = measure.record(blocks, 0.1)
    assert found["kept"] == ["b.attn", "c.attn", "d", "e"]
    assert found["kept_ms_per_step"] == 0.5 + 0.5 + 1.25 + 1.25
    assert found["errors"]["block"]["fp8"] == {"median": 0.09, "worst": 0.2, "where": "d"}
    shown = measure.table(found)
    assert "Kept in BF16: b.attn, c.attn, d, e" in shown and "costs 3.5 ms a step" in shown
    untimed = measure.table(measure.record([replace(block, milliseconds={}) for block in blocks], 0.1))
    assert "costs an unknown time a step" in untimed
    assert "Kept in BF16: nothing" in measure.table(measure.record(blocks[:1], 0.1))


def test_nothing_is_kept_where_bf16_is_hardly_better() -> None:
    """Attention that says nothing beside the mean of v is far off in any precision."""
    assert measured("a", (0.35, 0.09), (0.3, 0.09), (0.25, 0.02)).kept(0.1) == Kept.NOTHING
    assert measured("b", (0.4, 0.09), (0.3, 0.09), (0.25, 0.02)).kept(0.1) == Kept.ATTENTION
    assert measured("c", (0.4, 0.2), (0.3, 0.2), (0.25, 0.12)).kept(0.1) == Kept.ALL
    with pytest.raises(ExportError, match=r"d: got .*nan"):
        measured("d", (0.1, 0.1), (0.1, 0.1), (math.nan, math.nan)).kept(0.01)


def test_which_calls_are_kept_and_in_what_batches(tmp_path: Path) -> None:
    assert calls_to_keep(28, edits=False) == (0, 14, 27)
    assert calls_to_keep(4, edits=True) == (0, 2, 3, 4, 6, 7)
    assert calls_to_keep(1, edits=False) == (0,)

    def call(tokens: int, value: float) -> dict[str, Tensor]:
        ids = torch.arange(tokens)[:, None]
        return {"hidden_states": torch.full((2, tokens, 4), value), "img_ids": ids, "timestep": torch.ones(2)}

    save_inputs([call(6, 1.0), call(9, 2.0), call(6, 3.0)], tmp_path / "inputs.safetensors")
    first, second = load_inputs(tmp_path / "inputs.safetensors")
    assert first["hidden_states"][:, 0, 0].tolist() == [1.0, 3.0] and first["img_ids"].shape == (6, 1)
    assert second["hidden_states"].shape == (1, 9, 4) and second["timestep"].shape == (1,)


def test_export_says_what_it_kept_and_the_engine_keeps_it(export: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that some blocks miss: table, manifest and scales agree, and the artifact passes its own verification."""
    usual = export("fused", "fp8").artifact.manifest["measured"]
    assert usual["kept"] == [] and usual["gate"] == 0.1
    worst = usual["errors"]["block"]["fp8"]
    made = export("fused", "fp8", "--gate", str(0.98 * worst["worst"]))
    assert made.status == 0, made.said
    kept = made.artifact.manifest["measured"]["kept"]
    assert any(name.startswith(worst["where"]) for name in kept)
    assert f"Kept in BF16: {', '.join(kept)}" in made.said
    assert made.artifact.ranges("transformer").kept == frozenset(kept)
    monkeypatch.setattr(fused, "usable", torch.device)
    monkeypatch.setattr(fused, "LAUNCHED", PLAIN)
    found = verify(made.artifact, "cpu")
    assert found["passed"] and found["saturated"] == {}


def test_other_engines_are_not_measured(export: Exports) -> None:
    made = export("onnxruntime", "fp8")
    assert "measure" not in made.said and "measured" not in made.artifact.manifest


@pytest.mark.parametrize("gate", ["0", "-1"])
def test_a_gate_that_nothing_can_pass_is_refused(tmp_path: Path, gate: str) -> None:
    status, said = run(str(TINY), "--out", str(tmp_path / "a"), "--engine", "fused", "--gate", gate)
    assert status == 1 and f"gate: got {float(gate)}; expected a number above 0, such as 0.1" in said


def test_scales_from_before_values_lost_their_mean_are_refused(tiny: Judge) -> None:
    from fluxserve.errors import ArtifactError

    old = replace(tiny.ranges, centred={})
    with pytest.raises(ArtifactError, match="export the model again"):
        measure.measure(Checkpoint(tiny.folder.path, tiny.folder.spec), [on_cpu(tiny.inputs)], old, "cpu", PLAIN)
