"""source.find: the settings name a checkpoint or an artifact, or contradict each other."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fluxserve import source
from fluxserve.cli import main as cli
from fluxserve.engine import Components
from fluxserve.engines import tensorrt
from fluxserve.engines.open import ARTIFACTS, ENGINES, WEIGHTS
from fluxserve.errors import (
    ArtifactDamaged,
    ArtifactError,
    CheckpointError,
    EngineError,
    LibraryRefused,
    SettingsError,
    UnknownEngine,
)
from fluxserve.families.flux.models import TINY
from fluxserve.pipeline import Pipeline
from fluxserve.settings import Settings, default_checkpoint
from fluxserve.source import Source
from tests.support import artifacts as made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made.write(tmp_path / "tiny.onnx")


def refusal(config: Settings, kind: type[Exception] = SettingsError) -> str:
    with pytest.raises(kind) as caught:
        source.find(config)
    return str(caught.value)


# --- which of them ---------------------------------------------------------------------------------------------------


def test_nothing_said_is_the_tiny_model() -> None:
    found = source.find(Settings())
    assert (found.engine, found.checkpoint.path, found.artifact) == ("torch_eager", default_checkpoint(), None)
    assert found.spec == found.checkpoint.spec and found.spec.limits == TINY.limits


@pytest.mark.parametrize("engine", ["", "torch_eager"])
def test_a_checkpoint(engine: str) -> None:
    found = source.find(Settings(checkpoint=str(default_checkpoint()), engine=engine, dtype="float16"))
    assert (found.engine, found.artifact) == ("torch_eager", None)


@pytest.mark.parametrize("engine", ["", "onnxruntime"])
@pytest.mark.parametrize("checkpoint", ["", "/nowhere"])
def test_an_artifact_in_place_of_a_checkpoint(folder: Path, engine: str, checkpoint: str) -> None:
    found = source.find(Settings(artifact=str(folder), engine=engine, checkpoint=checkpoint))
    assert found.artifact and found.artifact.path == folder
    assert (found.engine, found.checkpoint.path) == ("onnxruntime", folder / "checkpoint")


def test_its_spec_is_the_narrowed_one(folder: Path) -> None:
    found = source.find(Settings(artifact=str(folder)))
    assert (found.spec.limits.max_side, found.checkpoint.spec.limits.max_side) == (256, 512)


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_the_artifact_says_which_engine(tmp_path: Path, engine: str) -> None:
    folder = made.write(tmp_path / "plans", engine, ["sm90"])
    assert source.find(Settings(artifact=str(folder))).engine == engine


# --- contradictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch_eager", "tensorrt", "tensorrt-rtx", "nonsense"])
def test_an_engine_that_the_artifact_is_not_for(folder: Path, engine: str) -> None:
    message = refusal(Settings(artifact=str(folder), engine=engine))
    assert message == f"engine: got {engine!r}; allowed: onnxruntime, which {folder} is for; or nothing"


@pytest.mark.parametrize("engine", sorted(set(ARTIFACTS) - set(WEIGHTS)))
def test_an_engine_that_wants_an_artifact(engine: str) -> None:
    expected = (
        f"artifact: got ''; allowed: the folder of an artifact, which {engine} runs: `fluxserve export` makes one"
    )
    assert refusal(Settings(engine=engine)) == expected
    assert refusal(Settings(engine=engine, checkpoint="/nowhere")) == expected, "before any folder is looked over"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_beside_an_artifact(folder: Path, dtype: str) -> None:
    message = refusal(Settings(artifact=str(folder), dtype=dtype))
    assert message == f"dtype: got {dtype!r}; allowed: auto beside an artifact: its precision was chosen at export"


def test_a_model_that_is_named(folder: Path) -> None:
    assert source.find(Settings(model="tiny")).spec == source.find(Settings()).spec
    assert "model: got 'flux.1-dev'; expected tiny, by its" in refusal(Settings(model="flux.1-dev"), CheckpointError)
    assert source.find(Settings(artifact=str(folder), model="tiny")).spec.name == "tiny"
    message = refusal(Settings(artifact=str(folder), model="flux.1-dev"))
    assert message == f"model: got 'flux.1-dev'; allowed: tiny, which {folder} is; or nothing"


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_fused_engine_compiles_where_it_runs(engine: str) -> None:
    """So no other needs a compiler, or a cache that may be executed, to write its PNGs."""
    assert Source(engine, source.find(Settings()).checkpoint).compiles == (engine == "fused")


def test_the_fused_engine_runs_weights_and_artifacts() -> None:
    assert source.find(Settings(engine="fused")).artifact is None
    assert "fused" in ARTIFACTS


@pytest.mark.parametrize("engine", ["nonsense", "TORCH_EAGER", "onnx"])
def test_an_unknown_engine(engine: str) -> None:
    message = refusal(Settings(engine=engine, checkpoint="/nowhere"), UnknownEngine)
    assert message == f"engine: got {engine!r}; known engines: fused, onnxruntime, tensorrt, tensorrt-rtx, torch_eager"
    assert all(name in message for name in ENGINES)


def test_folders_that_can_not_be_served(folder: Path, tmp_path: Path) -> None:
    assert "/nowhere: no such folder" in refusal(Settings(checkpoint="/nowhere"), CheckpointError)
    assert "manifest.json: missing" in refusal(Settings(artifact=str(tmp_path / "nowhere")), ArtifactError)
    assert "manifest.json: missing" in refusal(Settings(artifact=str(default_checkpoint())), ArtifactError)
    assert "no weights" in refusal(Settings(checkpoint=str(folder / "checkpoint")), CheckpointError)
    (folder / "t5/any/model.onnx").write_text("cut")
    assert "3 bytes; the manifest says" in refusal(Settings(artifact=str(folder)), ArtifactDamaged)


# --- where and how it runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "offered", "device"),
    [
        ("onnxruntime", "cuda:0", "cpu"),
        ("onnxruntime", "cpu", "cpu"),
        ("torch_eager", "cuda:1", "cuda:1"),
        ("torch_eager", "cpu", "cpu"),
        ("tensorrt", "cuda:0", "cuda:0"),
        ("tensorrt-rtx", "cpu", "cpu"),
    ],
)
def test_devices(engine: str, offered: str, device: str) -> None:
    assert Source(engine, source.find(Settings()).checkpoint).device(offered) == device


def test_an_artifact_is_opened_by_its_engine(folder: Path) -> None:
    """Which then finds that this one's engines are no ONNX files."""
    found = source.find(Settings(artifact=str(folder)))
    with pytest.raises(LibraryRefused) as caught:
        found.open_components("cpu", "auto")
    assert str(caught.value).startswith(f"onnxruntime: {folder / 'clip/any/model.onnx'}: ")
    with pytest.raises(ArtifactError, match="onnxruntime runs it on the CPU; got the device cuda:0"):
        found.open_components("cuda:0", "auto")


def test_an_engine_is_hashed_before_it_is_opened(folder: Path) -> None:
    found = source.find(Settings(artifact=str(folder)))
    file = folder / "clip/any/model.onnx"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(ArtifactDamaged, match=r"clip/any/model\.onnx: sha256 "):
        found.open_components("cpu", "auto")


def test_what_the_cpu_can_not_compute_in(folder: Path) -> None:
    made.put(folder, ["components", "clip", "compute_dtype"], "bfloat16")
    with pytest.raises(ArtifactError, match="clip computes in bfloat16; ONNX Runtime's CPU provider has float32"):
        source.find(Settings(artifact=str(folder))).open_components("cpu", "auto")


def test_an_onnx_file_for_one_architecture_only(tmp_path: Path) -> None:
    folder = made.write(tmp_path / "odd", "onnxruntime", ["sm90"])
    with pytest.raises(ArtifactError):
        source.find(Settings(artifact=str(folder))).open_components("cpu", "auto")


def test_weights_are_opened_by_torch() -> None:
    components = source.find(Settings()).open_components("cpu", "float32")
    assert type(components.network).__module__ == WEIGHTS["torch_eager"]
    components.close()


def test_a_checkpoint_is_not_opened_by_an_engine_of_artifacts() -> None:
    found = replace(source.find(Settings()), engine="onnxruntime")
    with pytest.raises(
        EngineError, match="onnxruntime runs an artifact, not a checkpoint; expected one of torch_eager"
    ):
        found.open_components("cpu", "auto")


class Stub:
    """An engine that knows only what it could be bound to."""

    def __init__(self, signature: object) -> None:
        self.signature = signature


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows(folder: Path, rows: int) -> None:
    """`max_rows` can't be more than the transformer was built for, which is 2 here."""
    found = source.find(Settings(artifact=str(folder), max_rows=rows))
    assert found.artifact
    engines = {n: Stub(found.artifact.component(n).signature(found.spec)) for n in found.spec.components}
    components = Components(engines)  # type: ignore[arg-type]
    if rows <= made.ROWS[-1]:
        assert Pipeline(found.spec, components, max_rows=rows)
        return
    with pytest.raises(SettingsError) as caught:
        Pipeline(found.spec, components, max_rows=rows)
    assert str(caught.value) == "max_rows: got 3; allowed: 1 to 2, which this engine takes"


@pytest.mark.parametrize(("gpu", "library", "reason"), [
    ("", "", "runs it on a GPU; got the device cpu"),
    ("sm89", "", "this GPU is sm89; clip was built for sm90"),
    ("sm90", "", "not installed; expected"),
    ("sm90", "9.9.0", "got tensorrt 9.9.0; built by tensorrt 10.13.3, whose plans need 10.13.x"),
    ("sm90", "10.13.9", ""),
])  # fmt: skip
def test_doctor_says_whether_an_artifact_can_be_opened_here(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpu: str,
    library: str,
    reason: str,
) -> None:
    path = made.write(tmp_path / "tiny.trt", "tensorrt", ["sm90"])
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["made"]["versions"]["tensorrt"] = "10.13.3"
    (path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(tensorrt, "Cuda", lambda device: SimpleNamespace(architecture=gpu))
    module = ModuleType("tensorrt")
    vars(module).update(__version__=library, ILogger=object)
    monkeypatch.setitem(sys.modules, "tensorrt", module if library else None)  # type: ignore[arg-type]
    assert cli.main(["doctor", "--artifact", str(path)]) == int(bool(reason))
    said = [line for line in capsys.readouterr().out.splitlines() if "engine:" in line]
    assert len(said) == 1 and reason in said[0] and said[0].split()[0] == ("FAIL" if reason else "ok")


@pytest.mark.parametrize("command", ["serve", "demo", "doctor"])
def test_the_command_line_takes_one_of_them(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--checkpoint", "a", "--artifact", "b"])
    assert caught.value.code == 2
    assert "argument --artifact: not allowed with argument --checkpoint" in capsys.readouterr().err
