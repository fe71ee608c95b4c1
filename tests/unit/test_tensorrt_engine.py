"""The TensorRT engine on a fake library: what it refuses, and in which order it calls."""

import gc
import hashlib
import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fluxserve import settings
from fluxserve.engine import FLOATING, Components, Dim, Signature, TensorSpec
from fluxserve.engines import open as engines
from fluxserve.engines import tensorrt, tensorrt_library
from fluxserve.errors import ArtifactDamaged, ArtifactError, LibraryMissing, LibraryRefused, ShapeError
from fluxserve.folders import checkpoint as checkpoints
from fluxserve.folders.artifact import Artifact
from tests.support import fake_tensorrt as fake

SHAPES = {
    "clip": {"rows": [1, 1, 2], "tokens": [77, 77, 77]},
    "t5": {"rows": [1, 1, 2], "tokens": [32, 32, 32]},
    "transformer": {"rows": [1, 1, 2], "image_tokens": [16, 64, 256], "text_tokens": [32, 32, 32]},
    "vae_encoder": {"rows": [1, 1, 2], "latent_height": [8, 16, 32], "latent_width": [8, 16, 32]},
    "vae_decoder": {"rows": [1, 1, 2], "latent_height": [8, 16, 32], "latent_width": [8, 16, 32]},
}
TRANSFORMER = {
    "hidden_states": (1, 64, 64), "encoder_hidden_states": (1, 32, 128), "pooled_projections": (1, 128),
    "timestep": (1,), "guidance": (1,), "img_ids": (64, 3), "txt_ids": (32, 3),
}  # fmt: skip


@dataclass
class Built:
    """An artifact of fake plans, and the fake library that runs it."""

    module: Any
    artifact: Artifact
    cache: Path

    def open(self) -> Components:
        return tensorrt.open_artifact(self.artifact, "cuda:0", self.cache)

    @property
    def trace(self) -> fake.Trace:
        return self.module.trace  # type: ignore[no-any-return]

    def replan(self, name: str, **changes: Any) -> None:
        """Replace a component's plan, in the manifest too."""
        signature = self.artifact.component(name).signature(self.artifact.spec)
        self.write(name, fake.plan_of(self.module, signature, "bfloat16", **changes))

    def write(self, name: str, plan: bytes) -> None:
        file = f"{name}/sm90.engine"
        (self.artifact.path / file).parent.mkdir(exist_ok=True)
        (self.artifact.path / file).write_bytes(plan)
        entry = {"sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan)}
        self.artifact.manifest["files"][file] = entry


@pytest.fixture(params=fake.VERSIONS)
def built(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    return build(request.param, tmp_path, monkeypatch)


@pytest.fixture
def rtx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    return build(fake.RTX, tmp_path, monkeypatch)


def build(key: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    module = fake.make(key)
    flavour = "tensorrt-rtx" if key == fake.RTX else "tensorrt"
    monkeypatch.setitem(sys.modules, flavour.replace("-", "_"), module)
    monkeypatch.setattr(tensorrt, "Cuda", lambda device: fake.HostCuda(module.trace))
    fake.MEMORY.clear()
    manifest = {
        "engine": flavour,
        "shapes": {"min_size": [64, 64], "opt_size": [128, 128], "max_size": [256, 256], "max_batch": 2},
        "files": {},
        "made": {"versions": {flavour: module.__version__}},
        "components": {
            name: {"precision": "bf16", "compute_dtype": "bfloat16", "shapes": shapes,
                   "engines": {"sm90": f"{name}/sm90.engine"}}
            for name, shapes in SHAPES.items()
        },
    }  # fmt: skip
    artifact = Artifact(folder, manifest, checkpoints.read(settings.default_checkpoint(), weights=False))
    made = Built(module, artifact, folder / "cache")
    for size, name in enumerate(SHAPES):
        made.replan(name, scratch=fake.SCRATCH * (size + 1))
    return made


def test_a_bound_computes_at_fixed_addresses(built: Built) -> None:
    bound = built.open().network.bind(TRANSFORMER)
    addresses = [t.data_ptr() for t in (*bound.inputs.values(), *bound.outputs.values())]
    for value in (1.0, 3.0):
        bound.inputs["hidden_states"].fill_(value)
        bound.inputs["guidance"].fill_(2.0)
        bound.run()
        velocity = bound.outputs["velocity"]
        assert velocity.shape == (1, 64, 64) and velocity.dtype == torch.bfloat16
        assert torch.all(velocity == fake.expected(bound.inputs))
    assert addresses == [t.data_ptr() for t in (*bound.inputs.values(), *bound.outputs.values())]


def test_every_component_opens_by_its_name(built: Built) -> None:
    components = engines.open_artifact(built.artifact, "cuda:0")
    ids = components.text["clip"].bind({"input_ids": (2, 77)})
    assert ids.inputs["input_ids"].dtype == torch.int64 and ids.outputs["pooled"].shape == (2, 128)
    encoded = components.vae_encoder.bind({"pixels": (1, 3, 64, 128)})
    encoded.run()
    assert encoded.outputs["mean"].shape == (1, 16, 8, 16)
    assert torch.all(encoded.outputs["std"] == 1)  # the second output of a fake is one more than the first


def test_capture_comes_after_a_warm_up_that_was_waited_for(built: Built) -> None:
    clip = built.open().text["clip"]
    built.trace.calls.clear()
    bound = clip.bind({"input_ids": (1, 77)})
    names = [call[0] for call in built.trace.calls]
    assert names == ["context", "scratch", "synchronize", "execute", "synchronize", "capture", "execute"]
    assert {call[2] for call in built.trace.named("execute")} == {7}  # never the default stream
    bound.run()
    assert [call[0] for call in built.trace.calls[len(names) :]] == ["execute"]


def test_a_context_for_each_bound_and_one_scratch_for_all(built: Built) -> None:
    components = built.open()
    kept = [
        components.text["clip"].bind({"input_ids": (1, 77)}),
        components.text["clip"].bind({"input_ids": (2, 77)}),
        components.vae_decoder.bind({"latents": (1, 16, 8, 8)}),
    ]
    assert len({call[1] for call in built.trace.named("execute")}) == len(kept)
    assert {call[1] for call in built.trace.named("context")} == {"USER_MANAGED"}
    ((_, address, size),) = set(built.trace.named("scratch"))
    assert address % 256 == 0 and size == fake.SCRATCH * len(SHAPES)  # the hungriest


def test_a_bound_waits_before_it_goes(built: Built) -> None:
    bound = built.open().text["clip"].bind({"input_ids": (1, 77)})
    built.trace.calls.clear()
    del bound
    gc.collect()
    assert [call[0] for call in built.trace.calls] == ["synchronize"]


def test_an_input_that_the_model_does_not_use(built: Built) -> None:
    built.replan("transformer", without=("guidance",))
    bound = built.open().network.bind(TRANSFORMER)
    bound.inputs["guidance"].fill_(1000.0)
    bound.run()
    assert torch.all(bound.outputs["velocity"] == 0)


def test_shapes_outside_the_profile(built: Built) -> None:
    components = built.open()
    with pytest.raises(ShapeError, match="expected rows from 1 to 2"):
        components.text["clip"].bind({"input_ids": (3, 77)})
    with pytest.raises(ShapeError, match="expected tokens from 77 to 77"):
        components.text["clip"].bind({"input_ids": (1, 76)})


def test_a_cpu_is_no_gpu(built: Built) -> None:
    with pytest.raises(ArtifactError, match="on a GPU; got the device cpu"):
        tensorrt.open_artifact(built.artifact, "cpu")


def test_another_architecture_is_refused_before_the_library_is_touched(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "Cuda", lambda device: fake.HostCuda(built.trace, "sm89"))
    monkeypatch.setattr(tensorrt_library, "load", lambda flavour: pytest.fail("touched"))
    with pytest.raises(ArtifactError, match="this GPU is sm89; clip was built for sm90"):
        built.open()


@pytest.mark.parametrize(
    ("version", "message"), [("9.9.0", "got tensorrt.* built by tensorrt.* 9.9.0"), (None, "which")]
)
def test_another_version(built: Built, version: str | None, message: str) -> None:
    versions = built.artifact.manifest["made"]["versions"]
    versions.clear()
    if version:
        versions[built.artifact.engine] = version
    with pytest.raises(ArtifactError, match=message):
        built.open()
    assert built.trace.calls == []


def test_another_patch_of_the_same_version_is_the_librarys_to_judge(built: Built) -> None:
    versions = built.artifact.manifest["made"]["versions"]
    for flavour, version in versions.items():
        versions[flavour] = ".".join(version.split(".")[:2]) + ".99"
    assert built.open()


def test_a_truncated_plan_has_the_librarys_words(built: Built) -> None:
    built.write("t5", (built.artifact.path / "t5/sm90.engine").read_bytes()[:40])
    with pytest.raises(
        LibraryRefused, match=r"t5/sm90.engine: tensorrt.* can't load it: Serialization assertion failed"
    ):
        built.open()


def test_a_tampered_plan_never_reaches_the_library(built: Built) -> None:
    (built.artifact.path / "clip/sm90.engine").write_bytes(b"something else")
    with pytest.raises(ArtifactDamaged, match="sha256"):
        built.open()
    assert built.trace.named("deserialize") == []


def test_tensors_that_differ_from_the_signature(built: Built) -> None:
    plan = built.artifact.path / "clip/sm90.engine"
    signature = built.artifact.component("clip").signature(built.artifact.spec)
    other = replace(signature, inputs=(*signature.inputs, TensorSpec("mask", "int64", (Dim("rows", 1, 2), 77))))
    fewer = replace(signature, inputs=(replace(signature.inputs[0], dims=(Dim("rows", 1, 1), Dim("tokens", 77, 77))),))
    wider = replace(signature, outputs=(replace(signature.outputs[0], dims=(Dim("rows", 1, 2), 129)),))
    for changed, dtype, message in (
        (other, "bfloat16", "mask: the engine has it; input_ids, pooled expected"),
        (fewer, "bfloat16", r"input_ids \[rows, tokens\]: built for 1 to 1; the manifest says rows from 1 to 2"),
        (wider, "bfloat16", r"pooled \[rows, 128\]: the engine has \(-1, 129\)"),
        (signature, "float16", r"pooled \[rows, 128\]: dtype HALF; expected bfloat16"),
    ):
        built.write("clip", fake.plan_of(built.module, changed, dtype))
        with pytest.raises(ArtifactError, match=message):
            built.open()
    for changes, message in (
        ({"without": ("pooled",)}, r"pooled \[rows, 128\]: the engine has no such output"),
        ({"profiles": 2}, "2 optimisation profiles; expected one"),
    ):
        built.replan("clip", **changes)
        with pytest.raises(ArtifactError, match=message) as caught:
            built.open()
        assert str(plan) in str(caught.value)


def test_an_output_of_another_size(built: Built) -> None:
    """A dimension that varies is compared when it is known."""
    built.replan("t5")
    signature = built.artifact.component("t5").signature(built.artifact.spec)
    rows, tokens, channels = signature.outputs[0].dims
    assert isinstance(tokens, Dim)
    odd = replace(signature.outputs[0], dims=(rows, replace(tokens, multiple=2), channels))
    built.write("t5", fake.plan_of(built.module, replace(signature, outputs=(odd,)), "bfloat16"))
    with pytest.raises(ArtifactError, match=r"sequence: the engine gives \(1, 64, 128\); expected \(1, 32, 128\)"):
        built.open().text["t5"].bind({"input_ids": (1, 32)})


def test_an_execution_that_fails_while_binding(built: Built) -> None:
    built.replan("clip", fails="Cuda Runtime (out of memory)")
    with pytest.raises(LibraryRefused, match=r"out of memory"):
        built.open().text["clip"].bind({"input_ids": (1, 77)})


def test_rtx_refuses_what_can_not_be_captured(rtx: Built) -> None:
    rtx.replan("clip", allocates=True)
    with pytest.raises(LibraryRefused, match="can't be captured"):
        rtx.open().text["clip"].bind({"input_ids": (1, 77)})


def test_rtx_keeps_its_kernels_between_starts(rtx: Built) -> None:
    file = rtx.cache / rtx.artifact.manifest["files"]["clip/sm90.engine"]["sha256"]
    for expected in (b"cache:k", b"cache:kk"):
        components = rtx.open()
        components.text["clip"].bind({"input_ids": (1, 77)})
        components.close()
        assert file.read_bytes() == expected
    assert ("cache read", b"cache:k") in rtx.trace.calls
    assert len(list(rtx.cache.iterdir())) == len(SHAPES)


@pytest.mark.parametrize("content", [b"garbage", None])
def test_rtx_goes_on_without_a_damaged_cache(
    rtx: Built, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = rtx.cache / rtx.artifact.manifest["files"]["clip/sm90.engine"]["sha256"]
    rtx.cache.mkdir()
    if content is None:
        file.mkdir()  # can't be read, nor replaced
    else:
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        components = rtx.open()
        components.text["clip"].bind({"input_ids": (1, 77)})
        assert "kernels are compiled again" in caplog.text
        components.close()
    if content is None:
        assert "not written" in caplog.text
    else:
        assert file.read_bytes() == b"cache:k"


def test_libraries_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, message in (("tensorrt", "comes|container"), ("tensorrt_rtx", r"fluxserve\[tensorrt-rtx\]")):
        monkeypatch.delitem(sys.modules, name, raising=False)

        def missing(got: str, name: str = name) -> None:
            raise ModuleNotFoundError(f"No module named {got!r}", name=name)

        monkeypatch.setattr(tensorrt_library, "importlib", SimpleNamespace(import_module=missing))
        with pytest.raises(LibraryMissing, match=message):
            tensorrt_library.load(name.replace("_", "-"))

    def broken(got: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(tensorrt_library, "importlib", SimpleNamespace(import_module=broken))
    with pytest.raises(LibraryRefused, match=r"tensorrt: installed, but .*libcuda.so.1"):
        tensorrt_library.load("tensorrt")


def test_a_library_has_one_logger(built: Built) -> None:
    """TensorRT ignores every logger of a process but the first."""
    load = tensorrt_library.load
    assert load(built.artifact.engine).logger is load(built.artifact.engine).logger


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_at_all() -> None:
    with pytest.raises(LibraryRefused, match="cuda:0: no CUDA device: "):
        tensorrt.Cuda("cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.xdist_group("gpu")
@pytest.mark.parametrize("key", fake.VERSIONS)
def test_a_real_graph(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake enqueues on the engine's stream; CUDA records it, and replays it on whichever stream is current."""
    real = tensorrt.Cuda

    class Registered(real):  # type: ignore[misc, valid-type]
        def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return fake.allocate(shape, dtype, "cuda:0")

    made = build(key, tmp_path, monkeypatch)
    architecture = real("cuda:0").architecture
    monkeypatch.setattr(tensorrt, "Cuda", Registered)
    for entry in made.artifact.manifest["components"].values():
        entry["engines"] = {architecture: entry["engines"]["sm90"]}
    components = made.open()
    bounds = [components.network.bind(TRANSFORMER), components.vae_decoder.bind({"latents": (1, 16, 8, 16)})]
    executed = len(made.trace.named("execute"))
    for value, stream in ((1.0, torch.cuda.default_stream()), (3.0, torch.cuda.Stream())):
        with torch.cuda.stream(stream):
            for bound in bounds:
                (first, *_), (output,) = bound.inputs.values(), bound.outputs.values()
                first.fill_(value)
                bound.run()
                wanted = fake.expected(bound.inputs).to(output.dtype)
                assert torch.all(output == wanted).item() and output.float().mean().item() == value
    assert len(made.trace.named("execute")) == executed  # the host only launched
    del bound, bounds
    gc.collect()
    components.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.xdist_group("gpu")
def test_a_capture_that_fails() -> None:
    def refuse() -> None:
        torch.cuda.synchronize()  # not allowed in a capture

    with pytest.raises(LibraryRefused, match=r"CUDA graph: .*captur"):
        tensorrt.Cuda("cuda:0").capture(refuse)


def test_floating_is_what_the_component_computes_in() -> None:
    signature = Signature((TensorSpec("x", FLOATING, (Dim("rows", 1, 2),)),), (TensorSpec("y", "float32", (3,)),))
    plan = fake.make(fake.RTX)
    library = SimpleNamespace(module=plan)
    engine = plan.ICudaEngine(fake_plan(plan, signature, "float16"), None)
    tensorrt.check_plan(library, engine, signature, "float16", Path("plan"))  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"x \[rows\]: dtype HALF; expected float32"):
        tensorrt.check_plan(library, engine, signature, "float32", Path("plan"))  # type: ignore[arg-type]


def fake_plan(module: Any, signature: Signature, compute_dtype: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(fake.plan_of(module, signature, compute_dtype)[len(b"FAKEPLAN") :])
    return plan
