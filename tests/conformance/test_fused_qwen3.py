"""The fused Qwen3 against transformers' in float32: states, mask, padding, precision, and what it refuses.

In BF16 and FP8 with its kernels on a GPU; else with their plain references, which prove the arithmetic around them.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fluxserve.engines.fused.build import BF16, FP8, Build, Precision
from fluxserve.engines.fused.qwen3 import FusedQwen3
from fluxserve.engines.torch_eager import TorchEngine, load_module
from fluxserve.errors import CheckpointError, UnsupportedArchitecture
from fluxserve.families.flux import signatures
from fluxserve.families.flux.reference import LanguageModel
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.operations import LAUNCHED, PLAIN, Operations
from tests.support import random_flux2
from tests.support.parity import relative
from tests.support.text import quantised, run

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
KERNELS = LAUNCHED if GPU else PLAIN
EXACT = Precision(torch.float32, torch.float32)
TOKENS = 24
RELATIVE = 1e-4

pytestmark = pytest.mark.xdist_group("fused")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest) -> Checkpoint:
    return random_flux2.klein(tied=request.param).checkpoint()


@pytest.fixture(scope="module")
def tied() -> Checkpoint:
    return random_flux2.klein().checkpoint()


def inputs_of(*lengths: int) -> dict[str, Tensor]:
    """A row of each length: as many random words, then padding, which are words as well."""
    ids = torch.randint(0, random_flux2.VOCABULARY, (len(lengths), TOKENS), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def eager(folder: Checkpoint, dtype: torch.dtype = torch.float32) -> tuple[TorchEngine, nn.Module]:
    module = load_module(folder, "qwen3", str(DEVICE), dtype)
    layers = folder.spec.text.sequence.layers
    return TorchEngine(signatures.language_model(folder.spec), LanguageModel(module, layers)), module


def fused(folder: Checkpoint, precision: Precision = EXACT, operations: Operations | None = None) -> FusedQwen3:
    """In float32 plainly everywhere: on a GPU the kernels' products of it would be TF32's."""
    usual = PLAIN if precision.compute == torch.float32 else KERNELS
    return FusedQwen3(folder, Build.of(folder.weights("text_encoder"), DEVICE, precision, operations or usual))


def by_state(got: Tensor, expected: Tensor) -> list[float]:
    """The error of each of the states: one that is off must not hide among the others."""
    return [relative(a, b) for a, b in zip(got.chunk(3, dim=-1), expected.chunk(3, dim=-1), strict=True)]


def test_all_states_of_all_rows(folder: Checkpoint) -> None:
    """A full row, one with padding, one of a single word; padding's own rows count as well."""
    inputs = inputs_of(TOKENS, 7, 1)
    got, expected = run(fused(folder), inputs), run(eager(folder)[0], inputs)
    for row in range(3):
        assert max(by_state(got[row], expected[row])) < RELATIVE, f"row {row}"
        assert max(by_state(got[row, 7:], expected[row, 7:])) < RELATIVE, f"row {row}'s end"


def test_the_judge_sees_each_input(tied: Checkpoint) -> None:
    """What was not read would still pass, if the reference did not care either."""
    engine, inputs = fused(tied), inputs_of(7)
    once = run(engine, inputs)
    seen = run(engine, {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    assert relative(seen[:, :7], once[:, :7]) == 0, "a word looks at no later one"
    assert relative(seen[:, 7:], once[:, 7:]) > 0.01
    assert relative(run(engine, {**inputs, "input_ids": inputs["input_ids"].flip(1)}), once) > 0.1


def test_states_in_the_order_of_the_spec(tied: Checkpoint) -> None:
    deeper = replace(tied.spec, text=tied.spec.text.changed("qwen3", layers=(30, 1, 9)))
    other = Checkpoint(tied.path, deeper)
    inputs = inputs_of(9)
    assert max(by_state(run(fused(other), inputs), run(eager(other)[0], inputs))) < RELATIVE


@pytest.mark.skipif(GPU, reason="its products of float32 are TF32's; BF16 and FP8 are launched there")
def test_launched(tied: Checkpoint) -> None:
    """In Triton's interpreter: few layers, because it is slow."""
    shallow = Checkpoint(tied.path, replace(tied.spec, text=tied.spec.text.changed("qwen3", layers=(1, 2, 3))))
    inputs = inputs_of(7)
    got = run(fused(shallow, EXACT, LAUNCHED), inputs)
    assert max(by_state(got, run(eager(shallow)[0], inputs))) < RELATIVE


@pytest.mark.parametrize("precision", [EXACT, BF16, FP8], ids=["exact", "bf16", "fp8"])
def test_a_bound_keeps_nothing_of_the_run_before(tied: Checkpoint, precision: Precision) -> None:
    """On a GPU the second run captures it, and the others replay that."""
    engine, first, second = fused(tied, precision), inputs_of(5), inputs_of(TOKENS)
    bound = engine.bind({name: tuple(value.shape) for name, value in first.items()})
    for inputs in (first, second, first, second):
        for name, value in inputs.items():
            bound.inputs[name].copy_(value)
        bound.run()
        assert torch.equal(bound.outputs["sequence"].float().cpu(), run(engine, inputs))


def test_a_row_of_nothing_but_padding_stays_finite(tied: Checkpoint) -> None:
    for precision in (EXACT, BF16):
        assert torch.isfinite(run(fused(tied, precision), inputs_of(0))).all()


def test_bf16_loses_no_more_than_eager_bf16(tied: Checkpoint) -> None:
    inputs = inputs_of(TOKENS, 7)
    expected = run(eager(tied)[0], inputs)
    theirs = by_state(run(eager(tied, torch.bfloat16)[0], inputs), expected)
    ours = by_state(run(fused(tied, BF16), inputs), expected)
    assert all(a <= 1.2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def plain_fp8(folder: Checkpoint, inputs: dict[str, Tensor]) -> Tensor:
    engine, module = eager(folder)
    with torch.inference_mode(), quantised(module):
        return run(engine, inputs)


def test_fp8_in_float32_is_plain_fp8(tied: Checkpoint) -> None:
    """But for a number here and there that lies between two of E4M3."""
    inputs = inputs_of(TOKENS, 7)
    got = run(fused(tied, Precision(torch.float32, E4M3)), inputs)
    assert max(by_state(got, plain_fp8(tied, inputs))) < 0.02


def test_fp8_loses_no_more_than_plain_fp8(tied: Checkpoint) -> None:
    """Over many rows: of two alone, either may be the better one by an eighth."""
    inputs = inputs_of(*[TOKENS] * 6, 7, 1)
    expected = run(eager(tied)[0], inputs)
    ours = relative(run(fused(tied, FP8), inputs), expected)
    assert ours <= 1.1 * relative(plain_fp8(tied, inputs), expected)


def changed(
    tmp_path: Path,
    whole: Checkpoint,
    weights: Callable[[dict[str, Tensor]], None] = lambda weights: None,
    **config: object,
) -> Checkpoint:
    """A checkpoint of this encoder alone, with other weights or another configuration."""
    folder = tmp_path / "text_encoder"
    shutil.copytree(whole.component("text_encoder"), folder)
    (file,) = folder.glob("*.safetensors")
    loaded = load_file(file)
    weights(loaded)
    save_file({name: weight.contiguous() for name, weight in loaded.items()}, file)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    return Checkpoint(tmp_path, whole.spec)


def test_an_old_configuration_and_no_prefix(tmp_path: Path, tied: Checkpoint) -> None:
    def bare(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    old = changed(tmp_path, tied, bare, rope_parameters=None, rope_theta=1e6)
    inputs = inputs_of(7)
    assert torch.equal(run(fused(old), inputs), run(fused(tied), inputs))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*'gelu'.*silu"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type.*'yarn'.*default"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type.*'linear'"),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, tied: Checkpoint, config: Any, says: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=says):
        fused(changed(tmp_path, tied, **config))


LAYER = "model.layers.26"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop(f"{LAYER}.self_attn.q_norm.weight"), "missing 1 .*: layers.26.self_attn.q_norm"),
        (
            lambda w: w.update({f"{LAYER}.mlp.up_proj.extra": torch.ones(2)}),
            "does not read: model.layers.26.mlp.up_proj.extra",
        ),
        (lambda w: w.update({"model.layers.30.mlp.up_proj.weight": torch.ones(2)}), "does not read: model.layers.30"),
        (lambda w: w.update({"visual.weight": torch.ones(2)}), "does not read: visual.weight"),
        (lambda w: w.update({f"{LAYER}.self_attn.k_proj.weight": torch.ones(64, 48)}), r"got \(64, 48\); .*\(32, 48\)"),
        (lambda w: w.update({"model.embed_tokens.weight": torch.ones(511, 48)}), r"got \(511, 48\); .*\(512, 48\)"),
    ],
)
def test_weights_that_are_others_are_refused(
    tmp_path: Path, tied: Checkpoint, change: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        fused(changed(tmp_path, tied, change))
