"""fluxserve_export.options: what may be asked for, and the shapes that follow from it."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fluxserve_export.calibrate import METHODS, read_prompts
from fluxserve_export.options import (
    ATTENTION_OPSET,
    DTYPES,
    FP8,
    FUSED,
    ONNXRUNTIME,
    SPELLED_OUT_OPSET,
    TENSORRT,
    TENSORRT_RTX,
    Options,
    Size,
    Sizes,
    default_sizes,
    example,
    profile,
    ranges,
)

from fluxserve.engine import Dim
from fluxserve.errors import ExportError, InvalidRequest
from fluxserve.families.flux import signatures
from fluxserve.families.flux.models import (
    FLUX1_DEV,
    FLUX1_SCHNELL,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    MEMBERS,
    TINY,
)
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.folders.artifact import Artifact
from fluxserve.folders.checkpoint import Checkpoint
from tests.support.jobs import parse

USUAL = default_sizes(TINY)
NAMES = [spec.name for spec in MEMBERS]
ENGINES = (ONNXRUNTIME, TENSORRT, TENSORRT_RTX)
LESS = (64, 64)


def options(engine: str = ONNXRUNTIME, precision: str = "fp32", sizes: Sizes = USUAL, *architectures: str) -> Options:
    return Options(engine, precision, sizes, architectures)


def refusal(asked: Sizes | Options, spec: FluxSpec = TINY) -> str:
    with pytest.raises(ExportError) as caught:
        asked.check(spec)
    return str(caught.value)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", MEMBERS, ids=NAMES)
def test_default_sizes(spec: FluxSpec) -> None:
    sizes, side = default_sizes(spec), spec.defaults.side
    assert sizes == Sizes((spec.limits.min_side,) * 2, (side, side), (side, side), max_batch=1)
    sizes.check(spec)


def test_default_sizes_of_the_published_models() -> None:
    assert default_sizes(FLUX1_DEV) == default_sizes(FLUX1_SCHNELL) == Sizes((64, 64), (1024, 1024), (1024, 1024), 1)


@pytest.mark.parametrize("name", ["min_size", "opt_size", "max_size"])
@pytest.mark.parametrize("size", [(48, 64), (64, 528), (100, 128), (128, 129), (0, 64), (-64, -64), (65536, 65536)])
def test_sizes_that_the_model_has_not(name: str, size: Size) -> None:
    got = f"{size[0]}x{size[1]}"
    expected = f"{name}: got {got}; tiny allows multiples of 16 from 64 to 512"
    assert refusal(replace(USUAL, **{name: size})) == expected
    assert refusal(options(sizes=replace(USUAL, **{name: size}))) == expected


def test_the_message_has_the_models_own_limits() -> None:
    message = refusal(replace(default_sizes(FLUX1_DEV), max_size=(2064, 1024)), FLUX1_DEV)
    assert message == "max_size: got 2064x1024; flux.1-dev allows multiples of 16 from 64 to 2048"


def test_areas_that_the_model_has_not() -> None:
    small = replace(TINY, limits=replace(TINY.limits, max_pixels=256 * 256))
    replace(USUAL, max_size=(512, 128)).check(small)
    assert refusal(replace(USUAL, max_size=(512, 144)), small).startswith("max_size: got 512x144; ")


@pytest.mark.parametrize(
    "sizes",
    [
        ((128, 128), LESS, (256, 256)),
        (LESS, (256, 256), (128, 128)),
        ((256, 256), (256, 256), LESS),
        (LESS, (64, 512), (256, 256)),  # a longer side than any it should hold, though the areas grow
        ((96, 96), (64, 256), (256, 256)),  # a shorter one
        (LESS, (256, 256), (64, 512)),  # the area shrinks
    ],
)
def test_sizes_that_do_not_hold_each_other(sizes: tuple[Size, Size, Size]) -> None:
    got = ", ".join(f"{h}x{w}" for h, w in sizes)
    assert refusal(Sizes(*sizes)) == f"min, opt, max size: got {got}; expected each to hold the one before"


@pytest.mark.parametrize(
    "sizes",
    [
        (LESS, LESS, LESS),
        ((512, 512), (512, 512), (512, 512)),
        (LESS, (96, 160), (160, 96)),  # whichever way round: any side may be any of the sizes'
        (LESS, (64, 512), (64, 512)),
        ((80, 64), (128, 128), (128, 256)),
    ],
)
def test_sizes_that_hold_each_other(sizes: tuple[Size, Size, Size]) -> None:
    Sizes(*sizes).check(TINY)


@pytest.mark.parametrize("sizes", [((128, 128), (128, 256), (64, 512)), ((64, 512), (128, 256), (128, 256))])
def test_sizes_that_are_not_among_those_that_are_built(sizes: tuple[Size, Size, Size]) -> None:
    refusal(Sizes(*sizes))


@pytest.mark.parametrize("batch", [0, -1, 65])
def test_batches(batch: int) -> None:
    assert refusal(replace(USUAL, max_batch=batch)) == f"max_batch: got {batch}; expected 1 to 64"
    replace(USUAL, max_batch=8).check(TINY)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
def test_what_onnxruntime_takes(precision: str) -> None:
    options(ONNXRUNTIME, precision).check(TINY)


@pytest.mark.parametrize("precision", [*DTYPES, FP8])
def test_what_tensorrt_takes(precision: str) -> None:
    options(TENSORRT, precision).check(FLUX1_DEV if precision == "fp8" else TINY)
    options(TENSORRT, precision, USUAL, "sm90").check(TINY)
    options(TENSORRT_RTX, precision, USUAL, "sm89", "sm120").check(TINY)


def test_refused_options() -> None:
    assert refusal(options(ONNXRUNTIME, "bf16")) == (
        "precision: got bf16; ONNX Runtime on a CPU computes in fp32, fp16 or (simulated) fp8"
    )
    assert refusal(options(TENSORRT_RTX, "fp8")) == (
        "sm: got none; expected the GPU architectures to build for, such as sm89 or sm120"
    )
    assert refusal(options(ONNXRUNTIME, "fp32", USUAL, "sm89", "sm90")) == (
        "sm: got sm89, sm90; ONNX Runtime's files are for any machine"
    )


@pytest.mark.parametrize(
    ("engine", "precision", "dtype"),
    [
        *((engine, "fp32", torch.float32) for engine in ENGINES),
        *((engine, "fp16", torch.float16) for engine in ENGINES),
        *((engine, "bf16", torch.bfloat16) for engine in ENGINES),
        (ONNXRUNTIME, "fp8", torch.float32),
        (TENSORRT, "fp8", torch.bfloat16),
        (TENSORRT_RTX, "fp8", torch.bfloat16),
    ],
)
def test_what_graphs_compute_in(engine: str, precision: str, dtype: torch.dtype) -> None:
    assert options(engine, precision).dtype == dtype


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", DTYPES)
def test_one_precision_for_all(engine: str, precision: str) -> None:
    assert {options(engine, precision).precision_of(name) for name in TINY.components} == {precision}


@pytest.mark.parametrize(("engine", "rest"), [(ONNXRUNTIME, "fp32"), (TENSORRT, "bf16"), (TENSORRT_RTX, "bf16")])
def test_fp8_is_not_for_the_vae(engine: str, rest: str) -> None:
    found = {name: options(engine, FP8).precision_of(name) for name in TINY.components}
    assert found == {"clip": "fp8", "t5": "fp8", "transformer": "fp8", "vae_encoder": rest, "vae_decoder": rest}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", [*DTYPES, FP8])
@pytest.mark.parametrize("component", TINY.components)
def test_dialects_of_onnx(engine: str, precision: str, component: str) -> None:
    """Attention is one operator where a kernel is for it: in the transformer, by a TensorRT, not in float32."""
    fused = component == "transformer" and engine != ONNXRUNTIME and precision != "fp32"
    asked = options(engine, precision)
    assert asked.onnx_opset(component) == (ATTENTION_OPSET if fused else SPELLED_OUT_OPSET)
    assert replace(asked, fused_attention=False).onnx_opset(component) == SPELLED_OUT_OPSET
    assert ATTENTION_OPSET > SPELLED_OUT_OPSET


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_ranges_of_every_component() -> None:
    sizes = Sizes((64, 80), (256, 192), (256, 512), max_batch=3)
    sides = {"latent_height": (8, 32, 64), "latent_width": (8, 24, 64)}
    expected = {
        "clip": {"tokens": (77, 77, 77)},
        "t5": {"tokens": (32, 32, 32)},
        "transformer": {"image_tokens": (16, 192, 512), "text_tokens": (32, 32, 32)},
        "vae_encoder": sides,
        "vae_decoder": sides,
    }
    found = {name: ranges(name, TINY, sizes) for name in TINY.components}
    assert found == {name: {"rows": (1, 1, 3), **each} for name, each in expected.items()}


@pytest.mark.parametrize(("spec", "text"), [(FLUX1_DEV, 512), (FLUX1_SCHNELL, 256)], ids=["dev", "schnell"])
def test_ranges_of_the_published_models(spec: FluxSpec, text: int) -> None:
    sizes = default_sizes(spec)
    assert ranges("transformer", spec, sizes) == {
        "rows": (1, 1, 1),
        "image_tokens": (16, 64 * 64, 64 * 64),
        "text_tokens": (text,) * 3,
    }
    assert ranges("t5", spec, sizes)["tokens"] == (text,) * 3
    assert ranges("vae_decoder", spec, sizes)["latent_width"] == (8, 128, 128)


@pytest.mark.parametrize(("spec", "component"), [(spec, name) for spec in MEMBERS for name in spec.components])
def test_ranges_are_for_the_symbols_of_the_signature(spec: FluxSpec, component: str) -> None:
    """And inside of what it allows at all."""
    signature = signatures.BY_COMPONENT[component](spec)
    dims = {d.symbol: d for t in signature.inputs for d in t.dims if isinstance(d, Dim)}
    found = ranges(component, spec, default_sizes(spec))
    assert found.keys() == dims.keys()
    for symbol, (least, typical, most) in found.items():
        assert dims[symbol].least <= least <= typical <= most <= dims[symbol].most


SEVERAL = [
    USUAL,
    Sizes((64, 64), (64, 512), (64, 512)),
    Sizes((80, 64), (96, 160), (160, 96), 2),
    Sizes((128, 256), (256, 256), (256, 400)),
    Sizes((208, 208), (208, 208), (208, 208)),
    Sizes((64, 64), (96, 96), (96, 96)),
    Sizes((96, 96), (112, 96), (144, 128)),
]


@pytest.mark.parametrize("sizes", SEVERAL, ids=str)
def test_whatever_a_request_may_ask_for_is_built(sizes: Sizes) -> None:
    """The other way round: what the narrowed model accepts fits the engines, and its default is among it."""
    sizes.check(TINY)
    shapes = {name: list(getattr(sizes, name)) for name in ("min_size", "opt_size", "max_size")}
    network = {"precision": "fp32", "compute_dtype": "float32", "engines": {"any": "transformer/any/model.onnx"}}
    network["shapes"] = ranges("transformer", TINY, sizes)
    manifest = {"shapes": shapes, "components": {"transformer": network}}
    spec = Artifact(Path(), manifest, Checkpoint(Path(), TINY)).spec
    assert spec.limits.max_passes <= sizes.max_batch
    tokens = ranges("transformer", TINY, sizes)["image_tokens"]
    latents = ranges("vae_decoder", TINY, sizes)
    accepted = []
    for height, width in itertools.product(range(16, 528, 16), repeat=2):
        try:
            parse({"prompt": b"a fox", "height": height, "width": width}, spec)
        except InvalidRequest:
            continue
        accepted.append((height, width))
        assert tokens[0] <= spec.image_tokens(height, width) <= tokens[2]
        for symbol, side in zip(("latent_height", "latent_width"), spec.latent_size(height, width), strict=True):
            assert latents[symbol][0] <= side <= latents[symbol][2]
    usual = parse({"prompt": b"a fox"}, spec)
    assert {(usual.height, usual.width), sizes.min_size, sizes.opt_size, sizes.max_size} <= set(accepted)


def test_profiles() -> None:
    shapes = {"rows": (1, 2, 3), "tokens": (4, 5, 6)}
    assert [profile(shapes, which) for which in range(3)] == [
        {"rows": 1, "tokens": 4},
        {"rows": 2, "tokens": 5},
        {"rows": 3, "tokens": 6},
    ]


@pytest.mark.parametrize("component", TINY.components)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("spec", "sizes"),
    [*((spec, default_sizes(spec)) for spec in MEMBERS), *((TINY, sizes) for sizes in SEVERAL)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_examples(component: str, batch: int, spec: FluxSpec, sizes: Sizes) -> None:
    """Inside the ranges; never 0 or 1 where a dimension varies; whole patches."""
    shapes = ranges(component, spec, replace(sizes, max_batch=batch))
    found = example(shapes)
    assert found.keys() == shapes.keys()
    for symbol, (least, _, most) in shapes.items():
        assert least <= found[symbol] <= most
        assert found[symbol] > 1 or least == most
        assert not symbol.startswith("latent") or found[symbol] % 2 == 0


def test_an_example_of_the_smallest_sides() -> None:
    assert example({"rows": (1, 1, 1), "latent_height": (1, 4, 8), "latent_width": (3, 4, 8)}) == {
        "rows": 1,
        "latent_height": 2,
        "latent_width": 4,
    }


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", MEMBERS, ids=NAMES)
def test_the_prompts_that_come_with_the_export(spec: FluxSpec) -> None:
    """What a real model is calibrated with, if it brings no prompts of its own."""
    file = Path(__file__).parents[2] / "export/src/fluxserve_export/prompts.txt"
    prompts = read_prompts(file).lines
    assert file.read_text(encoding="utf-8").startswith("# ")
    assert (len(prompts), len(set(prompts))) == (128, 128)
    assert [parse({"prompt": prompt.encode()}, spec).prompt for prompt in prompts] == list(prompts)
    assert min(map(len, prompts)) < 20 and max(map(len, prompts)) > 300, "short and long"


def test_prompts_are_lines_that_are_not_comments(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("# what for\n\n  a fox \r\n# no\nein Fuchs, größer\n\n".encode())
    prompts = read_prompts(file)
    assert prompts.lines == ("a fox", "ein Fuchs, größer")
    before = prompts.sha256
    file.write_bytes(b"a fox\n")
    assert read_prompts(file).sha256 != before


def test_prompts_that_can_not_be_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    for content, reason in ((None, "unreadable ("), (b"\xff", "unreadable ("), (b"", "no prompts"), (b"# a", "no pr")):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ExportError) as caught:
            read_prompts(file)
        assert str(caught.value).startswith(f"{file}: {reason}") and "one" in str(caught.value)


def test_methods() -> None:
    assert METHODS[0] == "max"
    assert all(0 < float(name.removeprefix("percentile-")) < 100 for name in METHODS[1:])


# --- FLUX.2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [FLUX2_KLEIN_4B, FLUX2_KLEIN_9B], ids=lambda s: s.name)
@pytest.mark.parametrize("engine", ENGINES)
def test_flux2_is_exported_for_the_fused_engine_alone(engine: str, spec: FluxSpec) -> None:
    expected = f"{engine}: {spec.name} is not exported yet; fused and torch_eager run it"
    assert refusal(options(engine, "fp32"), spec) == expected


@pytest.mark.parametrize("precision", ["bf16", FP8])
def test_what_the_fused_engine_takes(precision: str) -> None:
    for spec in (TINY, FLUX1_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B):
        options(FUSED, precision, default_sizes(spec)).check(spec)
    expected = "fused: flux.2-dev has mistral3, which torch_eager alone runs"
    assert refusal(options(FUSED, precision, default_sizes(FLUX2_DEV)), FLUX2_DEV) == expected


def test_precisions_of_a_klein() -> None:
    found = {name: options(FUSED, FP8).precision_of(name) for name in FLUX2_KLEIN_4B.components}
    assert found == {"qwen3": "fp8", "transformer": "fp8", "vae_encoder": "bf16", "vae_decoder": "bf16"}


def test_ranges_with_references() -> None:
    """Four of a megapixel add to the picture's tokens; one may be longer than any picture, or smaller."""
    spec, sizes = FLUX2_KLEIN_4B, Sizes((128, 128), (256, 256), (1280, 1280))
    assert ranges("transformer", spec, sizes)["image_tokens"] == (64, 256, 80 * 80 + 4 * 64 * 64)
    assert ranges("vae_decoder", spec, sizes)["latent_width"] == (16, 32, 160)
    assert ranges("vae_encoder", spec, sizes)["latent_width"] == (8, 32, 2896 // 8)
