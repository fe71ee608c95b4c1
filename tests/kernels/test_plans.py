"""Attention's plans: kept, read back, built ahead by a process that ends with its parent. cuDNN is a stand-in."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxserve import process
from fluxserve.kernels.attention import plan_cache, plan_worker
from fluxserve.kernels.attention.plan_cache import TILE, Form
from fluxserve.kernels.jit import disk_cache, nvrtc

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
LIKE = Form(TILE, heads=2, dim=128, dtype="float8_e4m3fn", stride=768, out_stride=1024)
MANY = plan_worker.forms(LIKE, most=200 * TILE, usual=TILE)

CUDNN = '''
"""A library with cuDNN's names: a plan is what was said to the graph, and takes as long as the device's JSON says."""
import ctypes, json, time
from types import SimpleNamespace

__version__ = "1.0"
data_type = SimpleNamespace(**{name: name for name in ("FLOAT", "INT32", "HALF", "BFLOAT16", "FP8_E4M3")})
heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")


def backend_version():
    import torch

    return torch.backends.cudnn.version()


def create_device_properties(described):
    text = described if isinstance(described, str) else json.dumps({"seconds": 0})
    return SimpleNamespace(serialize=lambda: text, **json.loads(text))


def create_handle():
    return "handle"


class Tensor:
    def __getattr__(self, name):
        return lambda *_: self


class pygraph:
    def __init__(self, **given):
        self.given, self.said = given, []

    def tensor(self, **given):
        self.said.append(["tensor", given])
        return Tensor()

    def sdpa_fp8(self, **given):
        self.said.append(["sdpa_fp8", sorted(given)])
        return Tensor(), None, Tensor()

    def build_plans(self):
        device = self.given["device_property"]
        if device.seconds < 0:
            raise RuntimeError("no such device")
        if getattr(device, "deaf", ""):
            open(device.deaf, "w").close()
            ctypes.PyDLL(None).sleep(int(device.seconds))  # with Python's lock, as cuDNN's frontend compiles
        time.sleep(device.seconds)

    def serialize(self, as_bytes):
        return json.dumps(self.said).encode()

    def deserialize(self, handle, data):
        self.said = json.loads(data) if data.startswith(b"[[") else self.broken()

    def broken(self):
        raise RuntimeError("parse error")

    def __getattr__(self, name):
        return lambda *_: None
'''


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home of this test's own, and the stand-in where this process and others find it."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "cudnn.py").write_text(CUDNN)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "library"), *sys.path]))
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.delitem(sys.modules, "cudnn", raising=False)
    monkeypatch.setenv("FLUXSERVE_CACHE", "")
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(plan_cache, "handle", lambda _: "handle")
    described(monkeypatch, seconds=0)
    plan_cache.library.cache_clear()
    yield tmp_path
    plan_cache.library.cache_clear()
    sys.modules.pop("cudnn", None)


def described(monkeypatch: pytest.MonkeyPatch, **device: float | str) -> None:
    monkeypatch.setattr(plan_cache, "description", lambda _: json.dumps(device))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def refuse(*_: object, **__: object) -> None:
    raise OSError("no space left")


def built(home: Path) -> list[Path]:
    return sorted((home / ".cache" / "fluxserve" / "kernels").glob("attention-*.plan"))


def test_forms_are_all_that_may_be_asked_for_the_usual_first() -> None:
    found = plan_worker.forms(LIKE, most=5 * TILE, usual=3 * TILE)
    assert {(form.rows, form.told) for form in found} == {(t * TILE, told) for t in range(1, 6) for told in (0, 1)}
    assert [form.rows // TILE for form in found[:2]] == [3, 3] and found[-1].rows in (TILE, 5 * TILE)
    assert all((form.heads, form.dim, form.stride, form.out_stride) == (2, 128, 768, 1024) for form in found)
    assert plan_worker.forms(LIKE, most=5 * TILE, usual=3 * TILE - 1)[0].rows == 3 * TILE, "which it takes"


def test_only_a_plan_that_is_told_asks_how_many_rows_count(home: Path) -> None:
    said = {told: plan_cache.build(replace(LIKE, told=told), plan_cache.description(DEVICE)) for told in (True, False)}
    assert b"seq_len_kv" in said[True] and b'"uid": 11' in said[True]
    assert b"seq_len_kv" not in said[False] and b'"uid": 11' not in said[False]


def test_a_plan_is_built_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan_cache.opened(LIKE, DEVICE)
    monkeypatch.setattr(plan_cache, "build", lambda *_: pytest.fail("built again"))
    assert plan_cache.opened(LIKE, DEVICE).said == first.said
    assert len(built(home)) == 1


@pytest.mark.parametrize("name", [field.name for field in fields(Form)])
def test_another_form_is_another_plan(home: Path, name: str) -> None:
    other = {"dtype": "bfloat16", "told": True}.get(name, 4096)
    assert plan_cache.place(replace(LIKE, **{name: other}), "{}") != plan_cache.place(LIKE, "{}")


@pytest.mark.parametrize("change", ["device", "frontend", "cudnn", "compiler", "source"])
def test_what_it_is_made_with_has_changed(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    before = plan_cache.place(LIKE, "{}")
    if change == "frontend":
        monkeypatch.setattr(plan_cache.library(), "__version__", "1.1")
    elif change == "cudnn":
        monkeypatch.setattr(plan_cache.library(), "backend_version", lambda: 91901)
    elif change == "compiler":
        monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    elif change == "source":
        (tmp_path / "plans.py").write_text("another")
        monkeypatch.setattr(plan_cache, "__file__", str(tmp_path / "plans.py"))
    assert plan_cache.place(LIKE, '{"deviceVer": 900}' if change == "device" else "{}") != before


def test_a_damaged_file_is_made_anew_and_told(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan_cache.opened(LIKE, DEVICE)
    (file,) = built(home)
    whole = file.read_bytes()
    file.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        plan_cache.opened(LIKE, DEVICE)
    assert file.read_bytes() == whole
    assert f"{file} is made anew, because cuDNN can't read it: parse error" in caplog.text


def test_a_damaged_file_that_stays_is_no_reason_to_fail(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = plan_cache.opened(LIKE, DEVICE).said
    (file,) = built(home)
    file.write_bytes(b"damaged")
    monkeypatch.setattr(disk_cache, "write", refuse)
    with caplog.at_level(logging.WARNING):
        assert plan_cache.opened(LIKE, DEVICE).said == whole
    assert "is made at every start: no space left" in caplog.text


def test_what_can_not_be_written_leaves_nothing_behind(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        disk_cache.write(disk_cache.folder(disk_cache.KERNELS) / "x.plan", b"x")
    assert list(disk_cache.folder(disk_cache.KERNELS).iterdir()) == []


def test_what_can_not_be_built_is_told_in_the_librarys_words(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described(monkeypatch, seconds=-1)
    with pytest.raises(RuntimeError, match="no such device"):
        plan_cache.opened(LIKE, DEVICE)


def test_a_process_of_its_own_builds_what_is_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plan_worker.forms(LIKE, most=3 * TILE, usual=TILE)
    plan_cache.opened(wanted[0], DEVICE)
    with closing(plan_worker.Ahead(wanted, DEVICE)):
        until(lambda: len(built(home)) == len(wanted))
    monkeypatch.setattr(plan_cache, "build", lambda *_: pytest.fail("built again"))
    for form in wanted:
        plan_cache.opened(form, DEVICE)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is missing"))
    plan_worker.Ahead(wanted, DEVICE).close()


def test_it_ends_when_it_is_closed(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    described(monkeypatch, seconds=0.2)
    with caplog.at_level(logging.WARNING), closing(plan_worker.Ahead(MANY, DEVICE)) as started:
        until(lambda: built(home))
    assert not caplog.records
    assert started._process is not None and started._process.returncode is not None
    assert 0 < len(built(home)) < len(MANY)


def test_closing_does_not_wait_for_a_plan_that_is_being_built(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building one may hold Python's lock for seconds, and then nothing in the process can hear that it should end."""
    described(monkeypatch, seconds=600, deaf=str(home / "deaf"))
    started = plan_worker.Ahead(MANY, DEVICE)
    until((home / "deaf").exists)
    begun = time.monotonic()
    started.close()
    assert time.monotonic() - begun < 20
    assert started._process is not None and started._process.returncode is not None


def test_it_ends_with_the_process_that_started_it(home: Path) -> None:
    script = f"""
import time, torch
from fluxserve.kernels.attention import plan_cache, plan_worker
from fluxserve.kernels.jit import nvrtc
nvrtc.version = lambda: (13, 0)
plan_cache.description = lambda _: '{{"seconds": 0.2}}'
like = plan_cache.Form(128, heads=2, dim=128, dtype="float8_e4m3fn", stride=768, out_stride=1024)
print(plan_worker.Ahead(plan_worker.forms(like, 200 * 128, 128), torch.device("{DEVICE}"))._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            until(lambda: built(home))
        finally:
            parent.kill()
    until(lambda: not process.started(child))


def test_a_process_that_fails_costs_a_line_in_the_log(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    described(monkeypatch, seconds=-1)
    with caplog.at_level(logging.WARNING), closing(plan_worker.Ahead([LIKE], DEVICE)):
        until(lambda: caplog.records)
    (record,) = caplog.records
    assert record.getMessage().endswith("the process for it ended with 1")


@pytest.mark.parametrize("interpreter", ["", "/nowhere/python3", "/bin/false"])
def test_a_process_that_does_not_start_costs_a_line_in_the_log(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, interpreter: str
) -> None:
    """A stub embeds Python, and says of its interpreter what it guesses."""
    monkeypatch.setattr(sys, "executable", interpreter)
    monkeypatch.setenv("PATH", "/nowhere")
    with caplog.at_level(logging.WARNING), closing(plan_worker.Ahead([LIKE], DEVICE)):
        until(lambda: caplog.records)
    assert [r.getMessage().startswith("attention's plans are built when they are asked for: ") for r in caplog.records]


def test_a_process_that_never_heard_what_to_build_is_closed_in_peace(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(
        plan_worker.Ahead, "_attend", lambda _, process, asked: process.stdin.write(asked) and process.wait()
    )
    started = plan_worker.Ahead([LIKE], DEVICE)
    assert started._process is not None
    started._process.wait()
    started.close()


def test_nothing_to_build_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is missing"))
    plan_worker.Ahead([], DEVICE).close()


def test_the_stand_in_has_the_librarys_names() -> None:
    """Where the library is installed."""
    cudnn: Any = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    made: dict[str, Any] = {}
    exec(CUDNN, made)
    for name in ("pygraph", "create_device_properties", "create_handle", "backend_version", "data_type", "heur_mode"):
        assert hasattr(cudnn, name)
    for name in ("tensor", "sdpa_fp8", "build_plans", "serialize", "deserialize", "get_workspace_size", "execute"):
        assert hasattr(cudnn.pygraph, name)
    assert all(hasattr(cudnn.data_type, name) for name in vars(made["data_type"]))
