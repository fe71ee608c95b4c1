"""FLUX.2's blocks in the fused engine against diffusers' in float32: what BF16 and FP8 may lose, and what is refused.

As test_fused.py judges FLUX.1's; on a GPU with its kernels, elsewhere with their plain references.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxserve.engines.fused.build import BF16, FP8, Precision
from fluxserve.errors import ArtifactError, CheckpointError
from fluxserve.families.flux.models import FLUX2_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.kernels.operations import LAUNCHED, PLAIN, Operations
from tests.conformance.test_fused import (
    DEVICE,
    GPU,
    SETS,
    TEXT,
    Judge,
    changed,
    foreseen,
    inputs_of,
    relative,
    transformer,
    velocity,
)
from tests.support import flux2_blocks

WIDE: list[tuple[FluxSpec, int, int]] = [(FLUX2_KLEIN_4B, 1, 1)]
if GPU:
    WIDE += [(FLUX2_KLEIN_4B, 2, 2), (FLUX2_KLEIN_9B, 1, 1), (FLUX2_KLEIN_9B, 2, 2), (FLUX2_DEV, 1, 1)]

EXACT = Precision(torch.float32, torch.float32)

pytestmark = pytest.mark.xdist_group("fused")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Two references of other sizes behind the picture."""
    folder = flux2_blocks.write(tmp_path_factory.mktemp("small"), flux2_blocks.SMALL, 2, 3)
    return Judge(folder, (16, 24), references=[(8, 16), (20, 6)])


@pytest.fixture(scope="module", params=["small", *WIDE], ids=lambda p: p if p == "small" else f"{p[0].name}-{p[1:]}")
def judge(request: pytest.FixtureRequest, small: Judge, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Two heads, or so many double and single blocks at their real widths."""
    if request.param == "small":
        return small
    folder = flux2_blocks.write(tmp_path_factory.mktemp("wide"), *request.param)
    return Judge(folder, (64, 64) if GPU else (16, 16), references=[(32, 48)] if GPU else [(8, 8)])


def test_bf16_loses_no_more_than_eager_bf16(judge: Judge) -> None:
    assert judge.error(BF16) <= 1.2 * judge.eager_bf16


@pytest.mark.parametrize("run", SETS.values(), ids=SETS)
def test_fp8_loses_no_more_than_plain_fp8(judge: Judge, run: Operations) -> None:
    """Plain: float32 around E4M3 products, one static scale per tensor. Here: BF16, so that its errors come on top.

    In few blocks that counts: each rounds as much as FLUX.1's, and what FP8 has lost by then is less.
    """
    assert judge.error(FP8, run) <= 1.1 * math.hypot(judge.plain_fp8, judge.eager_bf16)


@pytest.mark.skipif(GPU, reason="there the same products are launched")
def test_products_in_tritons_interpreter(tmp_path: Path) -> None:
    """What they are given of wider rows, and where they write: in float32, so that nothing hides it."""
    folder = flux2_blocks.write(tmp_path, flux2_blocks.SMALL, 1, 1)
    launched = {name: getattr(LAUNCHED, name) for name in ("linear_add", "linear_heads", "linear_swiglu")}
    launched["linear_heads_swiglu"] = LAUNCHED.linear_heads_swiglu
    inputs = inputs_of(folder, (6, 8), references=[(4, 2)])
    plain, got = (
        velocity(transformer(folder, EXACT, None, (16, TEXT, 1), run), inputs)
        for run in (PLAIN, replace(PLAIN, **launched))
    )
    assert relative(got, plain) < 1e-5


def test_the_judge_sees_references_and_guidance(small: Judge) -> None:
    """Each moves the velocity by much more than FP8 does."""
    other = {**small.inputs, "guidance": small.inputs["guidance"] / 2}
    moved = small.inputs["hidden_states"].clone()
    moved[:, -1] = moved[:, -2]  # the last token of the last reference
    engine = small.open(BF16)
    own = slice(0, 8 * 12)
    exact = small.expected[:, own]
    assert relative(velocity(engine, other)[:, own], exact) > 3 * small.plain_fp8
    near = velocity(engine, small.inputs)[:, own]
    assert relative(velocity(engine, {**small.inputs, "hidden_states": moved})[:, own], near) > 1e-3


def test_steps_foreseen_are_the_steps_themselves(small: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fit ahead at once, for two images with a reference; each step must be what it is alone.

    That holds of the steps that compute the means of values anew: here all of them.
    """
    engine, inputs = small.open(FP8), inputs_of(small.folder, (8, 8), rows=2, references=[(6, 4)])
    monkeypatch.setattr(engine, "steps_between_means", lambda steps, rows: 1)
    timesteps = torch.linspace(1, 0.02, 37, device=DEVICE).to(torch.bfloat16)
    seen = foreseen(engine, inputs, timesteps)
    for step in (0, 1, 15, 16, 31, 36):
        alone = velocity(engine, {**inputs, "timestep": timesteps[step].expand(2)})
        assert torch.equal(seen[step], alone), f"step {step}"


def test_means_are_held_between_the_steps_that_compute_them(small: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that computes them is what it is alone; the next differs from what it is alone, by less than FP8 does."""
    engine, inputs = small.open(FP8), inputs_of(small.folder, (8, 8), references=[(6, 4)])
    monkeypatch.setattr(engine, "steps_between_means", lambda steps, rows: 3)
    timesteps = torch.linspace(1, 0.02, 5, device=DEVICE).to(torch.bfloat16)
    for step, seen in enumerate(foreseen(engine, inputs, timesteps)):
        alone = velocity(engine, {**inputs, "timestep": timesteps[step].expand(1)})
        assert torch.equal(seen, alone) == (step in (0, 3)), f"step {step}"
        assert relative(seen, alone) < small.plain_fp8


def test_an_image_has_the_same_bytes_alone_and_in_a_batch(small: Judge) -> None:
    engine, three = small.open(FP8), inputs_of(small.folder, (8, 12), rows=3, references=[(8, 4)])
    together = velocity(engine, three)
    for row in range(3):
        one = {n: v if n.endswith("_ids") else v[row : row + 1] for n, v in three.items()}
        assert torch.equal(velocity(engine, one)[0], together[row])


def test_another_size_in_between_changes_nothing(small: Judge) -> None:
    engine, plain = small.open(FP8), inputs_of(small.folder, (8, 8))
    before = velocity(engine, plain)
    velocity(engine, inputs_of(small.folder, (32, 16), references=[(16, 16)] * 4))
    assert torch.equal(velocity(engine, plain), before)


def test_scales_of_another_model_are_refused(small: Judge) -> None:
    linears = {f"transformer_blocks.0.{mlp}.net.2": 1.0 for mlp in ("ff", "ff_context")}
    with pytest.raises(ArtifactError, match=r"no 'transformer_blocks\.0\.ff_context\.linear_out'"):
        transformer(small.folder, FP8, replace(small.ranges, linears=linears), (64, TEXT, 1))


def refused(small: Judge, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], says: str) -> None:
    folder: Checkpoint = changed(tmp_path, small.folder, "transformer", change)
    with pytest.raises(CheckpointError, match=says):
        transformer(folder, BF16, None, (64, TEXT, 1))


def test_biases_are_refused(small: Judge, tmp_path: Path) -> None:
    """There are none in FLUX.2; one that were read over would be an architecture that nobody knows."""

    def change(weights: dict[str, Tensor]) -> None:
        weights["single_transformer_blocks.0.attn.to_out.bias"] = torch.zeros(256)

    refused(small, tmp_path, change, r"does not read: single_transformer_blocks\.0\.attn\.to_out\.bias")


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("transformer_blocks.0.ff.linear_in.weight", 0),
        ("transformer_blocks.1.ff_context.linear_out.weight", 1),
        ("transformer_blocks.1.attn.to_add_out.weight", 0),
        ("single_transformer_blocks.2.attn.to_qkv_mlp_proj.weight", 0),
        ("single_transformer_blocks.0.attn.to_out.weight", 1),
        ("single_transformer_blocks.0.attn.norm_k.weight", 0),
        ("double_stream_modulation_txt.linear.weight", 0),
        ("single_stream_modulation.linear.weight", 0),
        ("time_guidance_embed.guidance_embedder.linear_1.weight", 1),
        ("norm_out.linear.weight", 0),
        ("context_embedder.weight", 1),
    ],
)
@pytest.mark.parametrize("wider", [False, True], ids=["cut", "wider"])
def test_weights_that_do_not_fit_are_refused(small: Judge, tmp_path: Path, name: str, dim: int, wider: bool) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        whole = weights[name]
        last = whole.shape[dim] - 1
        weights[name] = torch.cat([whole, whole], dim) if wider else whole.narrow(dim, 0, last)

    refused(small, tmp_path, change, f"{name}: got ")


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.1.ff.linear_out.weight",
        "single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight",
        "double_stream_modulation_img.linear.weight",
        "proj_out.weight",
    ],
)
def test_weights_that_are_missing_are_refused(small: Judge, tmp_path: Path, name: str) -> None:
    refused(small, tmp_path, lambda weights: weights.__delitem__(name), f"missing 1 tensor of .*: {name}")
