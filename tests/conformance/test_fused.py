"""The fused transformer against diffusers' in float32: how much its BF16 and its FP8 may lose.

On a GPU with its kernels; elsewhere with every kernel's plain reference, which proves the arithmetic around them.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fluxserve_export.calibrate import watched
from fluxserve_export.fp8 import simulated
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxserve import settings
from fluxserve.engine import Bound
from fluxserve.engines.fused import clip, t5, vae
from fluxserve.engines.fused.arena import Buffer
from fluxserve.engines.fused.build import BF16, FP8, Build, Precision
from fluxserve.engines.fused.transformer import FusedTransformer
from fluxserve.engines.torch_eager import TorchEngine, load_module
from fluxserve.errors import ArtifactError, CheckpointError, ShapeError
from fluxserve.families.flux import signatures, tokens
from fluxserve.families.flux.models import FLUX1_DEV
from fluxserve.families.registry import architectures
from fluxserve.folders import checkpoint
from fluxserve.folders.artifact import Ranges
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.kernels.operations import Operations, as_they_are
from testing import random_weights
from tests.support.fused import KERNELS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
SETS = {"served": KERNELS}
if GPU:
    SETS["Triton"] = replace(KERNELS, arrange=as_they_are)
TEXT = 32

pytestmark = pytest.mark.xdist_group("fused")


def inputs_of(
    folder: Checkpoint,
    size: tuple[int, int],
    rows: int = 1,
    seed: int = 0,
    references: Sequence[tuple[int, int]] = (),
) -> dict[str, Tensor]:
    """Random latents and text; sizes are in latent pixels.

    Timestep and guidance are such that a thousand times them is a BF16 number: diffusers rounds that product before it
    takes sines of it, which makes 3504 of guidance 3.5, and hides every other error.
    """
    spec, generator = folder.spec.transformer, torch.Generator().manual_seed(seed)
    axes = len(spec.axes_dims_rope)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    image = np.concatenate([tokens.image_ids(*size, axes), tokens.reference_ids(references, axes)])
    inputs = {
        "hidden_states": draw(rows, len(image), spec.in_channels),
        "encoder_hidden_states": draw(rows, TEXT, spec.joint_attention_dim),
        "pooled_projections": draw(rows, spec.pooled_projection_dim or 0),
        "timestep": torch.linspace(0.5, 0.25, rows).to(DEVICE),
        "guidance": torch.full((rows,), 4.0, device=DEVICE),
        "img_ids": torch.from_numpy(image).to(DEVICE),
        "txt_ids": torch.from_numpy(tokens.text_ids(TEXT, axes)).to(DEVICE),
    }
    return {tensor.name: inputs[tensor.name] for tensor in signatures.transformer(folder.spec).inputs}


def write(bound: Bound, inputs: dict[str, Tensor]) -> None:
    for name, value in inputs.items():
        bound.inputs[name].copy_(value)


def foreseen(engine: FusedTransformer, inputs: dict[str, Tensor], timesteps: Tensor) -> list[Tensor]:
    """Velocities of these steps, told ahead."""
    bound = engine.bind({name: tuple(value.shape) for name, value in inputs.items()})
    write(bound, inputs)
    bound.begin(timesteps)
    seen = []
    for step in range(len(timesteps)):
        bound.run_step(step)
        seen.append(bound.outputs["velocity"].float().clone())
    return seen


def velocity(engine: FusedTransformer | TorchEngine, inputs: dict[str, Tensor]) -> Tensor:
    bound = engine.bind({name: tuple(value.shape) for name, value in inputs.items()})
    write(bound, inputs)
    bound.run()
    return bound.outputs["velocity"].float().clone()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def transformer(
    folder: Checkpoint,
    precision: Precision,
    ranges: Ranges | None,
    most: tuple[int, int, int],
    run: Operations = KERNELS,
) -> FusedTransformer:
    build = Build.of(folder.weights("transformer"), DEVICE, precision, run, ranges)
    return FusedTransformer(folder.spec, build, most)


def built(folder: Checkpoint, component: str, precision: Precision = BF16, run: Operations = KERNELS) -> Build:
    return Build.of(folder.weights(component), DEVICE, precision, run)


class Judge:
    """One checkpoint: what diffusers computes in float32, and the error of its own BF16 and of plain FP8."""

    def __init__(self, folder: Checkpoint, size: tuple[int, int], references: Sequence[tuple[int, int]] = ()) -> None:
        self.folder, self.inputs = folder, inputs_of(folder, size, references=references)
        module = load_module(folder, "transformer", str(DEVICE), torch.float32)
        wrapped = architectures(folder.spec)["transformer"].wrapper(module)
        eager = TorchEngine(signatures.transformer(folder.spec), wrapped)
        with watched("transformer", module) as seen:
            self.expected = velocity(eager, self.inputs)
        self.ranges: Ranges = seen.ranges("max")
        with simulated("transformer", module, self.ranges, centred=True):
            self.plain_fp8 = relative(velocity(eager, self.inputs), self.expected)
        module.to(torch.bfloat16)
        self.eager_bf16 = relative(velocity(eager, self.inputs), self.expected)

    def open(
        self, precision: Precision, run: Operations = KERNELS, kept: frozenset[str] = frozenset()
    ) -> FusedTransformer:
        ranges = replace(self.ranges, kept=kept) if precision.quantised else None
        return transformer(self.folder, precision, ranges, (4096, TEXT, 3), run)

    def error(self, precision: Precision, run: Operations = KERNELS, kept: frozenset[str] = frozenset()) -> float:
        return relative(velocity(self.open(precision, run, kept), self.inputs), self.expected)


@pytest.fixture(scope="module")
def tiny() -> Judge:
    return Judge(checkpoint.read(settings.default_checkpoint()), (16, 24))


@pytest.fixture(scope="module", params=["tiny", (1, 1), (2, 2)] if GPU else ["tiny", (1, 1)], ids=str)
def judge(request: pytest.FixtureRequest, tiny: Judge, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """tiny's trained weights, or random ones at FLUX.1-dev's widths in so many double and single blocks."""
    if request.param == "tiny":
        return tiny
    folder = random_weights.write(tmp_path_factory.mktemp("wide") / "flux", FLUX1_DEV, *request.param, text_layers=1)
    return Judge(checkpoint.read(folder), (64, 64) if GPU else (16, 16))


def test_bf16_loses_no_more_than_eager_bf16(judge: Judge) -> None:
    assert judge.error(BF16) <= 1.2 * judge.eager_bf16


@pytest.mark.parametrize("run", SETS.values(), ids=SETS)
def test_fp8_loses_no_more_than_plain_fp8(judge: Judge, run: Operations) -> None:
    """Plain: float32 around E4M3 products, one static scale per tensor. Here: BF16, and INT8 modulation."""
    assert judge.error(FP8, run) <= 1.1 * judge.plain_fp8


def test_what_is_kept_in_bf16_loses_less(judge: Judge) -> None:
    """Every attention, then every block: the error comes down to what BF16 and the modulation's INT8 lose."""
    attention = frozenset(judge.ranges.attention)
    blocks = frozenset(name.removesuffix(".attn") for name in attention)
    quantised = judge.error(FP8)
    assert judge.error(FP8, kept=attention) <= 1.02 * quantised
    assert judge.error(FP8, kept=blocks) <= 0.5 * quantised
    one = frozenset({"transformer_blocks.0", "single_transformer_blocks.0.attn"})
    assert judge.error(FP8, kept=one) <= 1.02 * quantised


def test_saturated_values_are_counted_where_they_are(tiny: Judge) -> None:
    engine = tiny.open(FP8)
    velocity(engine, tiny.inputs)
    assert engine.saturated() == {}, "calibrated on these very inputs, with an octave to spare"
    block = "single_transformer_blocks.2"
    linears = {**tiny.ranges.linears, f"{block}.proj_out": tiny.ranges.linears[f"{block}.proj_out"] / 16}
    centred = {**tiny.ranges.centred, f"{block}.attn": tiny.ranges.centred[f"{block}.attn"] / 16}
    for change, kind in ((replace(tiny.ranges, linears=linears), 1), (replace(tiny.ranges, centred=centred), 0)):
        small = transformer(tiny.folder, FP8, change, (4096, TEXT, 3))
        velocity(small, tiny.inputs)
        assert list(small.saturated()) == [block]
        assert small.saturated()[block][kind] > 0 == small.saturated()[block][1 - kind]


def test_steps_foreseen_are_the_steps_themselves(tiny: Judge) -> None:
    """More than fit ahead at once, for two images; each step must be what it is alone."""
    engine, inputs = tiny.open(BF16), inputs_of(tiny.folder, (8, 8), rows=2)
    timesteps = torch.linspace(1, 0.02, 37, device=DEVICE).to(torch.bfloat16)
    seen = foreseen(engine, inputs, timesteps)
    for step in (0, 1, 15, 16, 31, 36):
        alone = velocity(engine, {**inputs, "timestep": timesteps[step].expand(2)})
        assert torch.equal(seen[step], alone), f"step {step}"


def test_an_image_has_the_same_bytes_alone_and_in_a_batch(tiny: Judge) -> None:
    engine, three = tiny.open(FP8), inputs_of(tiny.folder, (8, 12), rows=3)
    together = velocity(engine, three)
    for row in range(3):
        one = {n: v if n.endswith("_ids") else v[row : row + 1] for n, v in three.items()}
        assert torch.equal(velocity(engine, one)[0], together[row])


@pytest.mark.skipif(not GPU, reason="needs a GPU: a megapixel's rows, and programs that race")
@pytest.mark.parametrize("precision", [BF16, FP8], ids=["bf16", "fp8"])
def test_a_megapixel_has_the_same_bytes_every_time(judge: Judge, precision: Precision) -> None:
    """As it is launched the first time, captured, and replayed."""
    engine, inputs = judge.open(precision), inputs_of(judge.folder, (128, 128))
    bound = engine.bind({name: tuple(value.shape) for name, value in inputs.items()})
    seen = []
    for _ in range(12):
        write(bound, inputs)
        bound.run()
        seen.append(bound.outputs["velocity"].clone())
    assert all(torch.equal(seen[0], again) for again in seen)


def test_another_size_in_between_changes_nothing(tiny: Judge) -> None:
    """All sizes live in one arena: what one leaves there must not reach the next."""
    engine, small, large = tiny.open(FP8), inputs_of(tiny.folder, (8, 8)), inputs_of(tiny.folder, (32, 16))
    before = velocity(engine, small)
    velocity(engine, large)
    assert torch.equal(velocity(engine, small), before)


def test_what_lies_behind_the_rows_does_not_count(tiny: Judge) -> None:
    """FP8 attention reads whole tiles of rows: whatever was left in the arena, NaN included, is nothing to it."""
    engine, inputs = tiny.open(FP8), inputs_of(tiny.folder, (8, 8))
    before = velocity(engine, inputs)
    whole = engine.arena.cut({"all": Buffer((engine.arena.bytes,), torch.uint8)})["all"]
    whole.fill_(0xFF)
    assert torch.equal(velocity(engine, inputs), before)
    bound = engine.bind({name: tuple(value.shape) for name, value in inputs.items()})
    whole.fill_(0xFF)
    write(bound, inputs)
    bound.begin(inputs["timestep"])
    assert not bound._b.linear.qkv_padded[len(bound._b.residual) :].view(torch.uint8).any()
    bound.run_step(0)
    assert torch.equal(bound.outputs["velocity"].float(), before)


def test_beyond_its_arena_is_refused(tiny: Judge) -> None:
    with pytest.raises(ShapeError, match="image_tokens from 1 to 4096"):
        velocity(tiny.open(BF16), inputs_of(tiny.folder, (130, 130)))


def test_scales_of_another_model_are_refused(tiny: Judge) -> None:
    with pytest.raises(ArtifactError, match="no 'transformer_blocks"):
        transformer(tiny.folder, FP8, Ranges({}, {}, {}), (64, TEXT, 1))


def changed(
    folder: Path, checkpoint: Checkpoint, component: str, change: Callable[[dict[str, Tensor]], None]
) -> Checkpoint:
    """A checkpoint of this component alone, with other weights."""
    shutil.copytree(checkpoint.component(component), folder / component)
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    return Checkpoint(folder, checkpoint.spec)


@pytest.mark.parametrize(
    ("change", "says"), [("drop", "missing 1 tensor"), ("add", "does not read"), ("unbias", "missing 1 .*bias")]
)
def test_weights_that_are_others_are_refused(tmp_path: Path, tiny: Judge, change: str, says: str) -> None:
    def apply(weights: dict[str, Tensor]) -> None:
        if change == "add":
            weights["transformer_blocks.99.attn.to_q.weight"] = torch.zeros(2, 2)
        elif change == "unbias":  # of one stream: a kernel would read beyond the other's
            del weights["transformer_blocks.0.ff.net.2.bias"]
        else:
            del weights["transformer_blocks.0.attn.norm_added_k.weight"]

    folder = changed(tmp_path, tiny.folder, "transformer", apply)
    with pytest.raises(CheckpointError, match=says):
        transformer(folder, BF16, None, (64, TEXT, 1))


OPENED = {
    "transformer": lambda folder: transformer(folder, BF16, None, (64, TEXT, 1)),
    "text_encoder": lambda folder: clip.FusedClip(folder, built(folder, "text_encoder")),
    "text_encoder_2": lambda folder: t5.FusedT5(folder, built(folder, "text_encoder_2")),
    "decoder": lambda folder: vae.decoder(folder, built(folder, "vae")),
    "encoder": lambda folder: vae.encoder(folder, built(folder, "vae")),
}


@pytest.mark.parametrize("wider", [False, True], ids=["cut", "wider"])
@pytest.mark.parametrize(
    ("part", "name", "dim"),
    [
        ("transformer", "transformer_blocks.0.attn.norm_added_k.weight", 0),
        ("transformer", "transformer_blocks.0.attn.to_q.weight", 0),
        ("transformer", "transformer_blocks.0.ff_context.net.0.proj.bias", 0),
        ("transformer", "single_transformer_blocks.1.proj_mlp.weight", 0),
        ("transformer", "single_transformer_blocks.1.proj_out.weight", 1),
        ("transformer", "x_embedder.weight", 1),
        ("transformer", "context_embedder.weight", 0),
        ("transformer", "time_text_embed.guidance_embedder.linear_1.weight", 1),
        ("transformer", "time_text_embed.text_embedder.linear_2.bias", 0),
        ("transformer", "proj_out.weight", 0),
        ("text_encoder", "embeddings.position_embedding.weight", 1),
        ("text_encoder", "encoder.layers.0.self_attn.k_proj.weight", 0),
        ("text_encoder", "encoder.layers.1.mlp.fc2.weight", 1),
        ("text_encoder", "final_layer_norm.bias", 0),
        ("text_encoder_2", "encoder.block.1.layer.0.SelfAttention.v.weight", 0),
        ("text_encoder_2", "encoder.block.0.layer.1.DenseReluDense.wo.weight", 1),
        ("decoder", "decoder.conv_in.weight", 1),
        ("decoder", "decoder.mid_block.attentions.0.to_v.weight", 0),
        ("decoder", "decoder.mid_block.attentions.0.to_out.0.bias", 0),
        ("decoder", "decoder.up_blocks.2.resnets.0.conv_shortcut.weight", 0),
        ("decoder", "decoder.up_blocks.3.resnets.1.norm2.weight", 0),
        ("encoder", "encoder.down_blocks.0.downsamplers.0.conv.weight", 0),
        ("encoder", "encoder.conv_out.weight", 2),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, tiny: Judge, part: str, name: str, dim: int, wider: bool
) -> None:
    """Larger ones as well: what is only too long would be read in part, and nobody would notice."""
    shapes = []

    def apply(weights: dict[str, Tensor]) -> None:
        whole = weights[name]
        last = whole.shape[dim] - 1
        weights[name] = torch.cat([whole, whole], dim) if wider else whole.narrow(dim, 0, last)
        shapes.extend(tuple(weight.shape) for weight in (weights[name], whole))

    component = "vae" if part in ("decoder", "encoder") else part
    folder = changed(tmp_path, tiny.folder, component, apply)
    with pytest.raises(CheckpointError) as caught:
        OPENED[part](folder)
    got, expected = shapes
    assert f"{name.removeprefix(f'{part}.')}: got {got}; expected {expected}" in str(caught.value)
