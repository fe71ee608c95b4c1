"""artifact.read: an artifact that can't be what it says is refused, and the message names the field or the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluxserve.errors import ArtifactError, InvalidRequest, ShapeError
from fluxserve.families.flux.models import TINY
from fluxserve.folders import artifact as artifacts
from fluxserve.folders import checkpoint as checkpoints
from fluxserve.folders.artifact import MANIFEST, Ranges
from fluxserve.settings import default_checkpoint
from tests.support import artifacts as made
from tests.support.jobs import parse

ENGINE = "transformer/any/model.onnx"
CONFIG = "checkpoint/vae/config.json"
SHA = "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made.write(tmp_path / "tiny.onnx")


def refusal(folder: Path, kind: type[ArtifactError] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        artifacts.read(folder)
    assert str(folder) in str(caught.value), "the message says where"
    return str(caught.value)


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_a_valid_one_passes(folder: Path) -> None:
    """So that every refusal below is for its own reason."""
    read = artifacts.read(folder)
    assert (read.path, read.engine, read.checkpoint.path) == (folder, "onnxruntime", folder / "checkpoint")
    assert dict(read.versions) == {"torch": "2.9.0"}
    assert read.checkpoint.spec == checkpoints.read(default_checkpoint()).spec


def test_engines_for_architectures(tmp_path: Path) -> None:
    read = artifacts.read(made.write(tmp_path / "plans", "tensorrt-rtx", ["sm89", "sm120"]))
    assert read.engine == "tensorrt-rtx"
    assert read.component("t5").engines == {"sm89": "t5/sm89/model.plan", "sm120": "t5/sm120/model.plan"}


CALIBRATION = {"prompts": 2, "prompts_sha256": SHA, "steps": 4, "seed": 0, "method": "max", "scales": "scales.json"}


def test_what_only_some_manifests_have(folder: Path) -> None:
    made.put(folder, ["calibration"], {**CALIBRATION, "size": [128, 96]})
    made.put(folder, ["verified"], [{"passed": True, "anything": [1, None]}])
    extra = {"seconds": {"onnx": 1.5}, "built": {"sm89": {"layers": 3}}, "quantised": ["a.b"], "numerics": {"x": 1}}
    made.change(folder, lambda content: content["components"]["t5"].update(extra))
    assert artifacts.read(folder).manifest["verified"][0]["passed"] is True


@pytest.mark.parametrize("name", TINY.components)
def test_components(folder: Path, name: str) -> None:
    """Their ranges, which are those of their engine's signature."""
    read = artifacts.read(folder)
    component = read.component(name)
    assert (component.name, component.precision, component.compute_dtype) == (name, "fp32", "float32")
    assert component.shapes == made.RANGES[name]
    assert component.engines == {"any": f"{name}/any/model.onnx"}
    signature = component.signature(read.spec)
    for symbol, (least, typical, most) in component.shapes.items():
        others = {s: r[1] for s, r in component.shapes.items()}
        for value in (least, typical, most):
            shapes = signature.at({**others, symbol: value})
            signature.resolve({t.name: shapes[t.name] for t in signature.inputs})
        for value in (least - 1, most + 1):
            shapes = signature.at({**others, symbol: value})
            with pytest.raises(ShapeError, match=f"expected {symbol} from {least} to {most}"):
                signature.resolve({t.name: shapes[t.name] for t in signature.inputs})


# --- ranges ----------------------------------------------------------------------------------------------------------

MEASURED = {"linears": {"a": 3}, "attention": {"b.attn": [2.0, 4.0, 8.0]}, "centred": {"b.attn": 1.5}, "kept": ["c"]}


def with_ranges(folder: Path, content: object) -> Path:
    made.write_file(folder / "scales.json", json.dumps({"components": {"transformer": content}}))
    return made.relist(folder)


@pytest.mark.parametrize(("version", "root"), [(1, 128**0.25), (2, 1.0)])
def test_ranges_are_read_as_they_were_measured(folder: Path, version: int, root: float) -> None:
    """An artifact of format 1 holds those of q and k times head_dim^-1/4."""
    read = artifacts.read(made.put(with_ranges(folder, MEASURED), ["format"], version))
    assert read.checkpoint.config("transformer")["attention_head_dim"] == 128
    attention = {"b.attn": (2.0 * root, 4.0 * root, 8.0)}
    assert read.ranges("transformer") == Ranges({"a": 3.0}, attention, {"b.attn": 1.5}, frozenset({"c"}))


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf"), "3", None, True, [1]])
@pytest.mark.parametrize("kind", ["linears", "attention", "centred"])
def test_a_range_is_a_finite_number_above_0(folder: Path, kind: str, value: object) -> None:
    entry = {"b.attn": [2.0, value, 8.0] if kind == "attention" else value}
    read = artifacts.read(with_ranges(folder, {**MEASURED, kind: entry}))
    with pytest.raises(ArtifactError) as caught:
        read.ranges("transformer")
    got = f"got a range of {value!r}; expected a finite number above 0"
    assert str(caught.value) == f"{folder / 'scales.json'}: no ranges of transformer ({got})"


# --- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "value", "field", "reason"),
    [
        (["format"], 0, "format", "0 is not one of [1, 2]"),
        (["format"], 3, "format", "3 is not one of [1, 2]"),
        (["format"], True, "format", "True is not one of [1, 2]"),
        (["model"], 5, "model", "5 is not of type 'string'"),
        (["engine"], "torch_eager", "engine", "'torch_eager' is not one of ['onnxruntime', 'tensorrt',"),
        (["precision"], "int8", "precision", "'int8' is not one of ['fp32', 'fp16', 'bf16', 'fp8']"),
        (["architectures"], "sm89", "architectures", "'sm89' is not of type 'array'"),
        (["architectures"], ["sm89", "ada"], "architectures[1]", "'ada' does not match"),
        (["architectures"], ["sm89", "sm89"], "architectures", "['sm89', 'sm89'] has non-unique elements"),
        (["shapes"], [], "shapes", "[] is not of type 'object'"),
        (["shapes", "max_size"], [128], "shapes.max_size", "[128] is too short"),
        (["shapes", "max_size"], [128, 128, 3], "shapes.max_size", "is too long"),
        (["shapes", "min_size"], [8, 64], "shapes.min_size[0]", "8 is less than the minimum of 16"),
        (["shapes", "opt_size"], ["128", 128], "shapes.opt_size[0]", "'128' is not of type 'integer'"),
        (["shapes", "max_batch"], 0, "shapes.max_batch", "0 is less than the minimum of 1"),
        (["shapes", "max_batch"], 1.5, "shapes.max_batch", "1.5 is not of type 'integer'"),
        (["shapes", "steps"], 4, "shapes", "('steps' was unexpected)"),
        (["comment"], "x", "$", "('comment' was unexpected)"),
        (["components", "unet"], {}, "components", "'unet'"),
        (["components", "t5"], None, "components.t5", "None is not of type 'object'"),
        (["components", "t5", "speed"], 1, "components.t5", "('speed' was unexpected)"),
        (["components", "t5", "precision"], "fp4", "components.t5.precision", "'fp4' is not one of"),
        (["components", "t5", "compute_dtype"], "fp16", "components.t5.compute_dtype", "'fp16' is not one of"),
        (["components", "t5", "shapes", "rows"], [1, 2], "components.t5.shapes.rows", "[1, 2] is too short"),
        (["components", "t5", "shapes", "rows"], [0, 1, 2], "components.t5.shapes.rows[0]", "0 is less than"),
        (["components", "t5", "engines"], {}, "components.t5.engines", "{} should be non-empty"),
        (["components", "t5", "engines", "any"], 7, "components.t5.engines.any", "7 is not of type 'string'"),
        (["components", "t5", "numerics"], [], "components.t5.numerics", "[] is not of type 'object'"),
        (["components", "t5", "seconds"], {"onnx": "1"}, "components.t5.seconds.onnx", "'1' is not of type 'number'"),
        (["components", "t5", "built"], {"sm89": 1}, "components.t5.built.sm89", "1 is not of type 'object'"),
        (["components", "t5", "quantised"], [3], "components.t5.quantised[0]", "3 is not of type 'string'"),
        (["files"], [], "files", "[] is not of type 'object'"),
        (["files", "a"], {"sha256": SHA}, "files.a", "'bytes' is a required property"),
        (["files", "a"], {"bytes": 1}, "files.a", "'sha256' is a required property"),
        (["files", "a"], {"sha256": SHA, "bytes": -1}, "files.a.bytes", "-1 is less than the minimum of 0"),
        (["files", "a"], {"sha256": SHA, "bytes": "1"}, "files.a.bytes", "'1' is not of type 'integer'"),
        (["files", "a"], {"sha256": "0" * 63, "bytes": 1}, "files.a.sha256", "does not match"),
        (["files", "a"], {"sha256": "G" * 64, "bytes": 1}, "files.a.sha256", "does not match"),
        (["files", "a"], {"sha256": SHA, "bytes": 1, "mode": 7}, "files.a", "('mode' was unexpected)"),
        (["checkpoint"], {"vae": "x"}, "checkpoint.vae", "'x' does not match"),
        (["calibration"], "max", "calibration", "'max' is not of type 'object', 'null'"),
        (["calibration"], {**CALIBRATION, "prompts": 0}, "calibration.prompts", "0 is less than the minimum of 1"),
        (["calibration"], {**CALIBRATION, "size": [1]}, "calibration.size", "[1] is too short"),
        (["calibration"], {**CALIBRATION, "mood": "x"}, "calibration", "('mood' was unexpected)"),
        (["calibration"], {"prompts": 1}, "calibration", "is a required property"),
        (["made", "versions"], {"torch": 2}, "made.versions.torch", "2 is not of type 'string'"),
        (["made", "by"], "me", "made", "('by' was unexpected)"),
        (["verified"], [1], "verified[0]", "1 is not of type 'object'"),
    ],
)  # fmt: skip
def test_violations_name_their_field(folder: Path, where: list[str], value: object, field: str, reason: str) -> None:
    message = refusal(made.put(folder, where, value))
    assert message.startswith(f"{folder / MANIFEST}: {field}: "), message
    assert reason in message


def test_components_of_another_model(folder: Path) -> None:
    entry = made.manifest(folder)["components"]["t5"] | {"engines": {"any": CONFIG}}
    made.put(folder, ["components", "qwen3"], entry)
    assert refusal(folder) == f"{folder / MANIFEST}: components: 'qwen3' is no part of tiny"


@pytest.mark.parametrize(
    ("where", "field"),
    [
        *(([name], "$") for name in ("format", "model", "engine", "precision", "architectures", "shapes", "components",
          "files", "checkpoint", "calibration", "made")),
        *((["shapes", name], "shapes") for name in ("min_size", "opt_size", "max_size", "max_batch")),
        *((["components", name], "components") for name in TINY.components),
        *((["components", "clip", name], "components.clip") for name in
          ("precision", "compute_dtype", "shapes", "engines", "numerics")),
        *((["made", name], "made") for name in ("fluxserve", "commit", "when", "versions")),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_nothing_may_be_missing(folder: Path, where: list[str], field: str) -> None:
    message = refusal(made.drop(folder, where))
    assert message == f"{folder / MANIFEST}: {field}: {where[-1]!r} is a required property"


@pytest.mark.parametrize(
    "name",
    ["../elsewhere", "a/../../elsewhere", "..", ".", "a/..", "/etc/hostname", "//a", "a//b", "a/", "", ".hidden",
     "a/.hidden", "a\\..\\b", "C:\\a", "a b", "a\nb", "ä", "-rf", "a/-rf", "~/a"],
)  # fmt: skip
def test_paths_stay_inside(folder: Path, name: str) -> None:
    (folder.parent / "elsewhere").write_text("x")
    message = refusal(made.put(folder, ["files", name], {"sha256": SHA, "bytes": 1}))
    assert message.startswith(f"{folder / MANIFEST}: files: {name!r} does not match"), message


@pytest.mark.parametrize("name", ["../elsewhere", "t5/any/other.onnx", "/etc/hostname", "t5//any/model.onnx", ""])
def test_an_engine_that_is_not_listed(folder: Path, name: str) -> None:
    (folder / "t5/any/other.onnx").write_text("x")
    (folder.parent / "elsewhere").write_text("x")
    message = refusal(made.put(folder, ["components", "t5", "engines", "any"], name))
    assert message == f"{folder / MANIFEST}: t5 names {name}, which is not among its files"


def test_no_manifest(folder: Path) -> None:
    expected = f"{folder / MANIFEST}: missing; expected an artifact made by `fluxserve export`"
    (folder / MANIFEST).unlink()
    assert refusal(folder) == expected
    assert refusal(folder / "nowhere") == expected.replace(str(folder), str(folder / "nowhere"))
    (folder / MANIFEST).mkdir()
    assert f"{folder / MANIFEST}: unreadable" in refusal(folder)
    assert "unreadable" in refusal(folder / ENGINE), "a file is no artifact"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": "\xff"}', b"[" * 100_000, b'{"format":' * 100_000])
def test_a_manifest_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert refusal(folder).startswith(f"{folder / MANIFEST}: unreadable (")


@pytest.mark.parametrize("content", ["[]", '"x"', "5", "null"])
def test_a_manifest_of_another_type(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    assert refusal(folder) == f"{folder / MANIFEST}: $: {json.loads(content)!r} is not of type 'object'"


@pytest.mark.parametrize("field", ["engine", "calibration"])
def test_a_manifest_that_is_just_not_too_deep_to_be_read(folder: Path, field: str) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ArtifactError):
        artifacts.check_manifest({**made.manifest(folder), field: nested}, folder / MANIFEST)


def test_the_model_is_that_of_the_configurations(folder: Path) -> None:
    made.put(folder, ["model"], "flux.1-dev")
    assert refusal(folder) == f"{folder / MANIFEST}: model 'flux.1-dev'; the configurations are of 'tiny'"


def test_configurations_of_another_model(folder: Path) -> None:
    file = folder / "checkpoint/transformer/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_layers": 2}))
    made.relist(folder)
    assert refusal(folder) == f"{folder / MANIFEST}: model 'tiny'; the configurations are of 'custom'"


def test_configurations_that_can_not_be_served(folder: Path) -> None:
    file = folder / "checkpoint/model_index.json"
    file.write_text(json.dumps({"_class_name": "OtherPipeline"}))
    made.relist(folder)
    message = refusal(folder)
    assert message.startswith(f"{folder}: {file}: _class_name: got 'OtherPipeline'; expected FluxPipeline")


# --- the model that is served ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "sides", "pixels", "default"),
    [
        (((64, 64), (128, 128), (256, 256)), (64, 256), 256 * 256, 128),
        (((64, 64), (128, 128), (512, 512)), (64, 512), 512 * 512, 128),
        (((256, 256), (256, 256), (256, 512)), (256, 512), 256 * 512, 256),  # the default is too small
        (((64, 64), (96, 96), (96, 96)), (64, 96), 96 * 96, 96),  # it is too large
        (((64, 64), (96, 160), (96, 160)), (64, 160), 96 * 160, 96),  # its sides fit, its area does not
        (((64, 64), (64, 128), (64, 256)), (64, 256), 128 * 128, 128),  # it just fits
        (((96, 64), (128, 128), (128, 256)), (64, 256), 128 * 256, 128),  # whichever side is the shorter
        (((16, 16), (128, 128), (1024, 1024)), (64, 512), 512 * 512, 128),  # no more than the model can
    ],
)
def test_the_spec_is_narrowed(
    folder: Path, sizes: tuple[Any, Any, Any], sides: tuple[int, int], pixels: int, default: int
) -> None:
    for name, size in zip(("min_size", "opt_size", "max_size"), sizes, strict=True):
        made.put(folder, ["shapes", name], list(size))
    read = artifacts.read(folder)
    limits = read.spec.limits
    assert (limits.min_side, limits.max_side, limits.max_pixels) == (*sides, pixels)
    assert read.spec.defaults.side == default
    assert default * default <= pixels and sides[0] <= default <= sides[1]
    assert limits.max_images == TINY.limits.max_images
    assert read.spec.defaults.num_inference_steps == TINY.defaults.num_inference_steps
    assert (read.spec.name, read.spec.vae) == ("tiny", read.checkpoint.spec.vae)
    assert read.checkpoint.spec.limits == TINY.limits, "the checkpoint's own stay"


@pytest.mark.parametrize(("rows", "passes"), [(1, 1), (2, 2), (8, 2)])
def test_a_network_of_one_row_takes_one_pass_a_step(folder: Path, rows: int, passes: int) -> None:
    made.put(folder, ["components", "transformer", "shapes", "rows"], [1, 1, rows])
    spec = artifacts.read(folder).spec
    assert spec.limits.max_passes == passes
    fields = {"prompt": b"a fox", "negative_prompt": b"", "true_cfg_scale": 4.0}
    if passes == 2:
        parse(fields, spec)
        return
    with pytest.raises(InvalidRequest, match=r"^true_cfg_scale: got 4; allowed: at most 1: .* one row.*--max-batch 2"):
        parse(fields, spec)


def test_a_network_that_reads_weights_takes_two(folder: Path) -> None:
    """The fused engine is not built for a number of rows, whatever pictures its artifact was verified with."""
    made.put(folder, ["components", "transformer", "shapes", "rows"], [1, 1, 1])
    made.put(folder, ["components", "transformer", "engines"], {"any": "checkpoint/transformer/config.json"})
    assert artifacts.read(folder).spec.limits.max_passes == 2
