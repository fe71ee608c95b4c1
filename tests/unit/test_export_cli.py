"""fluxserve export: what it refuses, at once, with a message that says what was expected."""

import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxserve.cli import main as cli
from fluxserve.errors import ArtifactDamaged, FluxserveError, LibraryRefused, ShapeError
from fluxserve.folders import artifact as artifacts
from fluxserve.folders.artifact import MANIFEST
from fluxserve.settings import default_checkpoint
from tests.support import artifacts as made

ROOT = Path(__file__).parents[2]
TINY = str(default_checkpoint())
STAGES = ("onnx", "quantize", "build")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """The program sets up logging for a process of its own."""
    logger = logging.getLogger("torch.onnx")
    level, showwarning = logger.level, warnings.showwarning
    yield
    logging.captureWarnings(False)
    logger.setLevel(level)
    warnings.showwarning = showwarning


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "tiny.onnx"


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


def usage(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a usage error; its status is 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", *arguments])
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, "")
    return said.err.splitlines()[-1]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that is said on stderr; the status is 1."""
    assert cli.main(["export", *map(str, arguments)]) == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("fluxserve export: ") and said.out == ""
    return line.removeprefix("fluxserve export: ")


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["", *STAGES])
def test_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", *filter(None, [stage]), "--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert said.startswith(f"usage: fluxserve export {stage}".rstrip() + " [-h]")
    for name in ("--out", "--engine", "--precision", "--sm", "--max-size", "--calibration", "--method", "--device"):
        assert name in said
    assert ("--component" in said) == bool(stage)
    examples = re.findall(r"^  fluxserve export (.*)$", said, re.MULTILINE)
    assert any(line.startswith("checkpoints/tiny") for line in examples)
    assert {name for line in examples for name in [line.split()[0]] if name.isalpha()} == {*STAGES, "verify"}


def test_help_of_verify(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "verify", "--help"])
    said = capsys.readouterr().out
    assert (caught.value.code, said.split("[")[0]) == (0, "usage: fluxserve export verify ")
    assert "artifact" in said and "--device" in said and "--engine" not in said


def test_export_is_among_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "export" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: checkpoint, --out"),
        ([TINY], "the following arguments are required: --out"),
        (["--out", "x"], "the following arguments are required: checkpoint"),
        (["onnx", "--out", "x"], "the following arguments are required: checkpoint"),
        (["build", TINY], "the following arguments are required: --out"),
        (["verify"], "the following arguments are required: artifact"),
        (["verify", "a", "b"], "unrecognized arguments: b"),
        (["verify", "a", "--out", "b"], "unrecognized arguments: --out b"),
        ([TINY, "--out", "x", "--speed"], "unrecognized arguments: --speed"),
        ([TINY, "--out", "x", "--component", "t5"], "unrecognized arguments: --component t5"),
        (["onnx", TINY, "--out", "x", "--component", "unet"], "argument --component: invalid choice: 'unet'"),
        ([TINY, "--out", "x", "--engine", "torch_eager"], "argument --engine: invalid choice: 'torch_eager'"),
        ([TINY, "--out", "x", "--precision", "int8"], "argument --precision: invalid choice: 'int8'"),
        ([TINY, "--out", "x", "--max-batch", "many"], "argument --max-batch: invalid int value: 'many'"),
        ([TINY, "--out", "x", "--sm", "90"], "argument --sm: got '90'; expected one such as sm89"),
        ([TINY, "--out", "x", "--sm", "sm"], "argument --sm: got 'sm'; expected one such as sm89"),
        *(
            ([TINY, "--out", "x", f"--{name}-size={size}"],
             f"argument --{name}-size: got '{size}'; expected HEIGHTxWIDTH, such as 1024x1024")
            for name in ("min", "opt", "max")
            for size in ("", "x", "x128", "128x128x3", "-64x64", "64,64", "1.5x2", "big")
        ),
    ],
    ids=lambda value: "_".join(value).replace(TINY, "TINY") if isinstance(value, list) else "",
)  # fmt: skip
def test_usage_errors(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reason in usage(capsys, *arguments)


def test_abbreviated_stages_are_checkpoints(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "onn", "--out", out).startswith("onn: no such folder")


# --- refused before anything is made ---------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ([], *([name] for name in STAGES)):
        message = refusal(capsys, *stage, tmp_path / "nowhere", "--out", out)
        assert message.startswith(f"{tmp_path / 'nowhere'}: no such folder; expected a diffusers-format checkpoint")
    assert content(tmp_path) == {}


def test_an_artifact_is_no_checkpoint(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.write(tmp_path / "artifact")
    assert "model_index.json: missing" in refusal(capsys, folder, "--out", out)
    assert "no weights; expected .safetensors" in refusal(capsys, folder / "checkpoint", "--out", out)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "checkpoint"])
def test_out_is_somebody_elses(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "precious"
    if kind == "file":
        out.write_text("thesis")
    else:
        out.mkdir()
    if kind == "folder":
        (out / "thesis.txt").write_text("thesis")
    if kind == "checkpoint":
        (out / "model_index.json").write_text("{}")
    before = content(tmp_path)
    message = refusal(capsys, TINY, "--out", out)
    assert message == f"{out}: exists and is not an artifact; expected a new folder, or one to replace"
    assert content(tmp_path) == before


def test_an_earlier_artifact_stays_when_its_successor_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made.write(tmp_path / "tiny.onnx")
    before = content(out)
    assert "method: got" in refusal(capsys, TINY, "--out", out, "--method", "median")
    assert content(out) == before


REFUSED = [
    (["--method", "median"], r"method: got 'median'; expected one of max, percentile-99\.9.*"),
    (["--method", "percentile-"], r"method: got 'percentile-'; expected one of .*"),
    (["--min-size", "48"], r"min_size: got 48x48; tiny allows multiples of 16 from 64 to 512"),
    (["--opt-size", "100x128"], r"opt_size: got 100x128; tiny allows multiples of 16 from 64 to 512"),
    (["--max-size", "128X1024"], r"max_size: got 128x1024; tiny allows multiples of 16 from 64 to 512"),
    (["--max-size", "64"], r"min, opt, max size: got 64x64, 128x128, 64x64; expected each to hold the one before"),
    (["--max-batch", "0"], r"max_batch: got 0; expected 1 to 64"),
    (["--precision", "bf16"], r"precision: got bf16; ONNX Runtime on a CPU computes in fp32, fp16 or .*"),
    (["--sm", "SM89", "--sm", "sm120", "--sm", "sm89"], r"sm: got sm89, sm120; ONNX Runtime's files are for any .*"),
    (["--engine", "tensorrt-rtx"], r"sm: got none; expected the GPU architectures to build for, such as sm89 or .*"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
@pytest.mark.parametrize("stage", ["", *STAGES])
def test_what_can_not_be_built(
    stage: str, arguments: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, *filter(None, [stage]), TINY, "--out", out, *arguments)
    assert re.fullmatch(message, said), said
    assert not out.exists()


def test_what_is_refused_leaves_nothing(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal(capsys, TINY, "--out", out, "--max-batch", "0")
    assert content(tmp_path) == {}


@pytest.mark.parametrize(("name", "value"), [("prompts", "0"), ("prompts", "-1"), ("steps", "0")])
def test_how_much_is_calibrated_with(
    name: str, value: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_refused(*_: object) -> None:
        pytest.fail(f"--{name} {value} was not refused")

    monkeypatch.setattr("fluxserve_export.stages.Stages.onnx", not_refused)
    assert refusal(capsys, TINY, "--out", out, f"--{name}", value).startswith(
        f"{name}: got {value}; expected 1 or more"
    )


def test_out_may_be_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made.write(tmp_path / "tiny.onnx"))
    assert "max_batch: got 0" in refusal(capsys, TINY, "--out", ".", "--max-batch", "0")


def test_prompts_that_can_not_be_read(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    assert refusal(capsys, TINY, "--out", out, "--calibration", file).startswith(f"{file}: unreadable (")
    file.write_text("# nothing\n")
    assert refusal(capsys, TINY, "--out", out, "--calibration", file) == f"{file}: no prompts; expected one a line"
    assert content(tmp_path) == {"prompts.txt": b"# nothing\n"}


# --- libraries that are not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "module", "expected"),
    [
        (
            "tensorrt",
            "tensorrt",
            "expected its Python bindings, in the version of the container's libnvinfer: docker/README.md",
        ),
        ("tensorrt-rtx", "tensorrt_rtx", "expected the extra 'tensorrt-rtx' (pip install 'fluxserve[tensorrt-rtx]')"),
    ],
)
@pytest.mark.parametrize("stage", ["", "build"])
def test_an_engine_whose_library_is_missing(
    stage: str,
    engine: str,
    module: str,
    expected: str,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ("--out", out, "--engine", engine, "--sm", "sm89")
    message = refusal(capsys, *filter(None, [stage]), TINY, *arguments)
    assert message == f"{module}: not installed; {expected}"
    assert not out.exists()
    assert [f for f in out.parent.glob("*/*") if f.is_dir()] == [], "no stage was made for nothing"


def without(module: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """The program in a process that lacks a library."""
    script = (
        f"import sys; sys.modules[{module!r}] = None; from fluxserve.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/export/src"},
    )


def test_the_extra_is_missing(out: Path) -> None:
    done = without("onnx", "export", TINY, "--out", out)
    expected = "onnx: not installed; expected the extra 'export' (pip install 'fluxserve[export]')"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"fluxserve export: {expected}\n")


def test_help_needs_no_extra() -> None:
    done = without("onnx", "export", "--help")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: fluxserve export")


def test_a_module_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fluxserve_export.cli", None)
    message = refusal(capsys, TINY, "--out", "x")
    assert message.endswith("not installed; expected the extra 'export' (pip install 'fluxserve[export]')")


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_without_an_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "missing; expected an artifact made by `fluxserve export`"
    assert refusal(capsys, "verify", tmp_path) == f"{tmp_path / MANIFEST}: {expected}"


def test_verify_an_artifact_that_does_not_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.write(tmp_path / "tiny.onnx")
    before = content(folder)
    assert refusal(capsys, "verify", folder).startswith(f"onnxruntime: {folder / 'clip/any/model.onnx'}: ")
    (folder / "clip/any/model.onnx").write_text("x")
    assert refusal(capsys, "verify", folder).startswith(f"{folder / 'clip/any/model.onnx'}: 1 bytes; the manifest says")
    assert (folder / MANIFEST).read_bytes() == before[MANIFEST], "nothing was measured"


def exported(monkeypatch: pytest.MonkeyPatch, out: Path, engine: str, *architectures: str, without: str = "") -> int:
    """The status of an export whose stages do nothing, and which ends with this artifact."""

    def assemble(stages: object, numerics: object, target: Path) -> Path:
        made.write(target, engine, architectures)
        if without:
            (target / without).unlink()
        return target

    monkeypatch.setattr("fluxserve_export.assemble.assemble", assemble)
    for name in ("engines", "numerics"):
        monkeypatch.setattr(f"fluxserve_export.stages.Stages.{name}", lambda *_: None)
    return cli.main(["export", TINY, "--out", str(out), "--device", "cpu"])


def test_an_engine_that_can_not_run_here_is_no_failure(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is built on one machine for another."""
    assert exported(monkeypatch, out, "tensorrt", "sm90") == 0
    done, why, where = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"exported in \S+ s; serve it: fluxserve serve --artifact {re.escape(str(out))}", done)
    assert why == f"not verified, because it can't run here: {out}: tensorrt runs it on a GPU; got the device cpu"
    assert where == f"  on the machine that serves it: fluxserve export verify {out}"


def test_an_export_that_is_damaged_is_a_failure(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exported(monkeypatch, out, "onnxruntime", without="checkpoint/transformer/config.json") == 1
    assert "config.json: missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [LibraryRefused("tensorrt: out of memory"), ShapeError("latents: got (1,)"), ArtifactDamaged(Path("x"), "y")],
)
def test_an_engine_that_fails_where_it_should_run_is_a_failure(
    error: FluxserveError, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("fluxserve_export.verify.verify", refuse)
    assert exported(monkeypatch, out, "onnxruntime") == 1
    assert str(error) in capsys.readouterr().err


def test_what_is_measured_is_shown_even_if_it_can_not_be_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest on a read-only mount, and numbers that JSON has not."""
    row = {"component": "clip", "output": "pooled", "shape": [1], "cosine": 0.0, "plain": 0.1, "allowed": 0.2}
    found = {"components": [{**row, "relative_error": float("inf"), "passed": False}], "images": [], "passed": False}
    monkeypatch.setattr("fluxserve_export.verify.verify", lambda *_: found)
    folder = made.write(tmp_path / "tiny")
    before = content(folder)
    assert cli.main(["export", "verify", str(folder), "--no-write"]) == 1
    assert content(folder) == before
    assert cli.main(["export", "verify", str(folder)]) == 1
    assert capsys.readouterr().out.count("FAILED") == 4
    assert artifacts.read_manifest(folder)["verified"][0]["components"][0]["relative_error"] is None


@pytest.mark.parametrize("module", ["onnx_ir", "onnxscript", "polygraphy"])
def test_verify_needs_no_extra_of_the_export(module: str, tmp_path: Path) -> None:
    """The image that serves an artifact has only what serves it."""
    done = without(module, "export", "verify", made.write(tmp_path / "tiny"))
    assert done.returncode == 1 and "model.onnx" in done.stderr and "not installed" not in done.stderr
