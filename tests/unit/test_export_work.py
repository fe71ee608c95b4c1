"""fluxserve_export.work: a stage is made once, kept as long as nothing it was made from changes, and never half."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fluxserve_export import work as module
from fluxserve_export.console import Line
from fluxserve_export.work import Work

from fluxserve import process
from fluxserve.errors import ExportError
from fluxserve.folders.artifact import sha256

ROOT = Path(__file__).parents[2]
INPUTS = {"weights": {"a": "1"}, "shapes": {"rows": (1, 1, 2)}}


class Maker:
    """Makes a stage of two files and counts how often."""

    def __init__(self, content: str = "engine") -> None:
        self.content, self.made = content, 0

    def __call__(self, folder: Path, line: Line) -> dict[str, Any]:
        self.made += 1
        (folder / "sub").mkdir()
        (folder / "model.onnx").write_text(self.content)
        (folder / "sub" / "data").write_bytes(b"\0" * 1_500_000)
        line.say("making")
        return {"nodes": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "work"


@pytest.fixture
def make() -> Maker:
    return Maker()


def stages(folder: Path) -> list[Path]:
    """Every folder of a work folder, finished or not."""
    return sorted(f for f in folder.iterdir() if f.is_dir())


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'export/src'}"},
    )


# --- kept or made ----------------------------------------------------------------------------------------------------


def test_a_stage_is_made_once_and_then_kept(folder: Path, make: Maker) -> None:
    work = Work(folder)
    first = work.stage("onnx clip", INPUTS, make)
    assert re.fullmatch(r"onnx-clip-[0-9a-f]{16}", first.path.name) and first.path.parent == folder
    assert first.files == {name: sha256(first.path / name) for name in ("model.onnx", "sub/data")}
    assert (first.record, make.made) == ({"nodes": 3}, 1) and first.seconds >= 0
    assert work.stage("onnx clip", INPUTS, make) is first
    again = Work(folder).stage("onnx clip", INPUTS, make)
    assert (again, make.made, stages(folder)) == (first, 1, [first.path])


def test_what_it_was_made_from_is_written_down(folder: Path, make: Maker) -> None:
    result = Work(folder).stage("x", INPUTS, make)
    stage = json.loads((result.path / "stage.json").read_text())
    assert stage["inputs"] == json.loads(json.dumps(INPUTS))
    assert (stage["files"], stage["record"], stage["seconds"]) == (result.files, result.record, result.seconds)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("onnx t5", INPUTS),
        ("onnx clip", {**INPUTS, "more": None}),
        ("onnx clip", {**INPUTS, "weights": {"a": "2"}}),
        ("onnx clip", {**INPUTS, "shapes": {"rows": (1, 1, 3)}}),
        ("onnx clip", {}),
    ],
)
def test_other_inputs_make_another(folder: Path, make: Maker, name: str, inputs: dict[str, Any]) -> None:
    work = Work(folder)
    first = work.stage("onnx clip", INPUTS, make)
    second = work.stage(name, inputs, make)
    assert (make.made, stages(folder)) == (2, sorted([first.path, second.path]))


def test_the_order_of_inputs_makes_no_other(folder: Path, make: Maker) -> None:
    Work(folder).stage("x", {"a": 1, "b": {"c": [2], "d": 3}}, make)
    Work(folder).stage("x", {"b": {"d": 3, "c": (2,)}, "a": 1}, make)
    assert make.made == 1


def test_other_code_makes_another(folder: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Work(folder).stage("x", INPUTS, make)
    monkeypatch.setattr(module, "_code", lambda: "another version")
    assert Work(folder).stage("x", INPUTS, make).path != first.path
    assert make.made == 2


def test_the_code_is_every_file_of_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = module._code()
    packages = [tmp_path / str(index) for index in range(len(module._PACKAGES))]
    for package, copy in zip(module._PACKAGES, packages, strict=True):
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "_PACKAGES", packages)
    assert module._code() == before
    python = ("trace.py", "flux/models.py", "torch_eager.py", "folders/checkpoint.py", "fused/scales.py")
    for name in (*python, "hopper.cu"):
        before = module._code()
        (file,) = tmp_path.glob(f"*/**/{name}")
        with file.open("a") as f:
            f.write("\n")
        assert module._code() != before


# --- what fails or is killed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ExportError("numerics"), OSError("no space"), KeyboardInterrupt(), ValueError()])
def test_a_stage_that_fails_leaves_nothing(folder: Path, make: Maker, error: BaseException) -> None:
    def fail(target: Path, line: Line) -> dict[str, Any]:
        make(target, line)
        raise error

    with pytest.raises(type(error)) as caught:
        Work(folder).stage("x", INPUTS, fail)
    assert caught.value is error
    assert list(folder.iterdir()) == []
    assert Work(folder).stage("x", INPUTS, make).record == {"nodes": 3}


def test_a_record_that_is_no_json_leaves_nothing(folder: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        Work(folder).stage("x", INPUTS, lambda *_: {"path": Path()})
    assert list(folder.iterdir()) == []


# Makes a stage, and waits for ever: in the middle of it, or when all that it still lacks is its name.
STUCK = """
import sys
from pathlib import Path
from fluxserve_export import work

def wait(*_):
    print("there", flush=True)
    sys.stdin.read()

def make(folder, line):
    (folder / "model.onnx").write_text("half")
    if sys.argv[2] == "middle":
        wait()
    return {}

if sys.argv[2] == "name":
    work._name = wait
work.Work(Path(sys.argv[1])).stage("x", {}, make)
"""


@pytest.mark.parametrize("where", ["middle", "name"])
def test_a_process_that_is_killed(folder: Path, make: Maker, where: str) -> None:
    """Nothing that it leaves looks finished; the next removes it, but not what a living one is at."""
    with start(STUCK, folder, where) as killed, start(STUCK, folder, where) as living:
        for each in (killed, living):
            assert each.stdout and each.stdout.readline() == "there\n"
        prefixes = [process.prefix(each.pid) for each in (killed, living)]
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        (left,) = (f for f in stages(folder) if f.name.startswith(prefixes[0]))
        assert (left / "model.onnx").read_text() == "half"
        assert not [f for f in stages(folder) if not f.name.startswith(tuple(prefixes))]

        work = Work(folder)
        (other,) = stages(folder)
        assert other.name.startswith(prefixes[1])
        result = work.stage("x", {}, make)
        assert (make.made, (result.path / "model.onnx").read_text()) == (1, "engine")
        assert stages(folder) == sorted([other, result.path])
        living.kill()


# Makes a stage that is as large as the others', once everybody is at it; prints what came of it.
TOGETHER = """
import json, sys
from pathlib import Path
from fluxserve_export.work import Work

def make(folder, line):
    (folder / "model.onnx").write_text("the same")
    print("there", flush=True)
    sys.stdin.readline()
    return {"nodes": 1}

result = Work(Path(sys.argv[1])).stage("x", {}, make)
print(json.dumps([str(result.path), result.files, result.record]), flush=True)
"""


def test_two_processes_that_make_the_same_both_succeed(folder: Path, make: Maker) -> None:
    with start(TOGETHER, folder) as one, start(TOGETHER, folder) as other:
        for each in (one, other):
            assert each.stdout and each.stdout.readline() == "there\n"
        assert len(stages(folder)) == 2, "both are at it"
        said = [each.communicate("go\n")[0].splitlines()[-1] for each in (one, other)]
        assert (one.returncode, other.returncode) == (0, 0)
    kept = Work(folder).stage("x", {}, make)
    assert (make.made, stages(folder)) == (0, [kept.path])
    assert [json.loads(line) for line in said] == [[str(kept.path), kept.files, kept.record]] * 2


def test_who_comes_second_goes_on_with_the_files_of_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders are not deterministic: two engines of the same inputs differ."""

    def overtaken(target: Path, line: Line) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(process, "own_prefix", lambda: process.prefix(os.getppid()))
            Work(folder).stage("x", INPUTS, Maker("the first"))
        return Maker("the second")(target, line)

    result = Work(folder).stage("x", INPUTS, overtaken)
    assert (result.path / "model.onnx").read_text() == "the first"
    assert result.files["model.onnx"] == sha256(result.path / "model.onnx")


# --- what was changed behind its back --------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["another engine", "ENGINE", None], ids=["longer", "as long", "gone"])
@pytest.mark.parametrize("looked_at", [False, True])
def test_a_kept_file_that_was_changed(folder: Path, make: Maker, content: str | None, looked_at: bool) -> None:
    result = Work(folder).stage("x", INPUTS, make)
    if looked_at:
        Work(folder).stage("x", INPUTS, make)  # so that hashes are remembered
    file, advice = result.path / "model.onnx", f"remove {result.path} to make it again"
    file.unlink()
    if content:
        file.write_text(content)
        os.utime(file, ns=(1, 1))
    with pytest.raises(ExportError) as caught:
        Work(folder).stage("x", INPUTS, make)
    assert str(caught.value) == f"{file}: not the file that was made; {advice}"
    assert make.made == 1


@pytest.mark.parametrize("content", ["", "{", "[" * 5])
def test_a_record_that_was_cut(folder: Path, make: Maker, content: str) -> None:
    result = Work(folder).stage("x", INPUTS, make)
    (result.path / "stage.json").write_text(content)
    with pytest.raises(ExportError, match=re.escape(f"{result.path / 'stage.json'}")):
        Work(folder).stage("x", INPUTS, make)


# --- hashes ----------------------------------------------------------------------------------------------------------


class Counted:
    """Stands before sha256."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        monkeypatch.setattr(module, "sha256", self)

    def __call__(self, file: Path) -> str:
        self.files.append(file.name)
        return sha256(file)


def test_hashes_are_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, file = Counted(monkeypatch), tmp_path / "weights"
    file.write_text("one")
    os.utime(file, ns=(1, 1))
    for _ in range(3):
        assert Work(folder).hash(file) == sha256(file)
    assert counted.files == ["weights"]
    os.utime(file, ns=(1, 2))
    assert Work(folder).hash(file) == sha256(file)
    assert counted.files == ["weights"] * 2, "another time of change"
    file.write_text("three")
    os.utime(file, ns=(1, 2))
    assert Work(folder).hash(file) == sha256(file)
    assert counted.files == ["weights"] * 3, "another size"
    assert sorted(f.name for f in folder.iterdir()) == ["hashes.json"]


def test_a_link_is_remembered_as_what_it_leads_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, work = Counted(monkeypatch), Work(folder)
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(1, 1))
    link = tmp_path / "link"
    link.symlink_to("one")
    assert work.hash(link) == work.hash(tmp_path / "one") == sha256(tmp_path / "one")
    assert len(counted.files) == 1
    link.unlink()
    link.symlink_to("two")
    assert work.hash(link) == sha256(tmp_path / "two")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_memory_that_can_not_be_read_is_none(folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights").write_text("one")
    work = Work(folder)
    (folder / "hashes.json").write_bytes(content)
    assert work.hash(tmp_path / "weights") == sha256(tmp_path / "weights")
    assert json.loads((folder / "hashes.json").read_text()).keys() == {str(tmp_path / "weights")}


@pytest.mark.parametrize("content", ["[]", '{{"{file}": 5}}'])
def test_nor_is_one_of_another_type(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "weights").write_text("one")
    work = Work(folder)
    (folder / "hashes.json").write_text(content.format(file=tmp_path / "weights"))
    assert work.hash(tmp_path / "weights") == sha256(tmp_path / "weights")


def test_hashes_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    flux = tmp_path / "flux"
    (flux / "vae").mkdir(parents=True)
    (tmp_path / "stored").write_text("weights")
    counting = ("vae/a.safetensors", "model_index.json", "vae/merges.txt", "vae/spiece.model")
    for name in (*counting, "README.md", "vae/a.bin", "sample.png"):
        (flux / name).write_text(name)
    (flux / "vae" / "linked.safetensors").symlink_to(tmp_path / "stored")
    found = Work(folder).hashes(flux)
    assert found == {name: sha256(flux / name) for name in (*counting, "vae/linked.safetensors")}


def test_a_checkpoint_whose_folders_are_links(folder: Path, tmp_path: Path) -> None:
    """Two models often share their text encoders like this."""
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "model.safetensors").write_text("weights")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "text_encoder_2").symlink_to(tmp_path / "stored")
    assert Work(folder).hashes(tmp_path / "flux").keys() == {"text_encoder_2/model.safetensors"}


# --- what an operator sees -------------------------------------------------------------------------------------------


def test_progress(folder: Path, make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work(folder)
    work.stage("onnx clip", INPUTS, make)
    said = capsys.readouterr()
    assert re.fullmatch(r"onnx clip: \d+\.\d s, 1\.5 MB\n", said.out), "one line; what is fast has no other"
    work.stage("onnx clip", INPUTS, make)
    assert capsys.readouterr().out == "", "this export has said so already"
    Work(folder).stage("onnx clip", INPUTS, make)
    kept = capsys.readouterr().out
    assert re.fullmatch(r"onnx clip: kept, its inputs have not changed \(\d+\.\d s saved\)\n", kept)
    assert said.err == ""


def test_progress_of_a_stage_that_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(target: Path, line: Line) -> dict[str, Any]:
        raise ExportError("numerics")

    with pytest.raises(ExportError):
        Work(folder).stage("x", INPUTS, fail)
    assert capsys.readouterr().out == "", "no line says that it was done"


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_are_rewritten_on_a_terminal_and_rare_elsewhere(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(module.console.time, "perf_counter", lambda: now)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    with module.console.line("x") as line:
        for now in (100.0, 104.9, 105.0, 109.9, 110.5):  # noqa: B007 (the clock reads it)
            line.progress(1, 3)
        line.end("made")
    shown = (0, 5, 5, 10, 10) if terminal else (5, 10)
    start, end = ("\r\x1b[K", "") if terminal else ("", "\n")
    notes = "".join(f"{start}x … 1 of 3, {s} s{end}" for s in shown)
    assert capsys.readouterr().out == f"{notes}{start}x: made\n"
