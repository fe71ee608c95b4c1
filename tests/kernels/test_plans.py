"""Attention's plans: kept, read back, built ahead by a process that ends with its parent. cuDNN is a stand-in."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxserve import process
from fluxserve.kernels import ahead, cuda, kept, plans
from fluxserve.kernels.plans import TILE, Form

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
LIKE = Form(TILE, heads=2, dim=128, dtype="float8_e4m3fn", stride=768, out_stride=1024)

CUDNN = '''
"""A library with cuDNN's names: a plan is what was said to the graph, and takes as long as the device's JSON says."""
import json, time
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
    monkeypatch.setattr(kept, "FOLDER", tmp_path / ".cache" / "fluxserve" / "kernels")
    monkeypatch.setattr(cuda, "version", lambda: (13, 0))
    monkeypatch.setattr(plans, "handle", lambda _: "handle")
    described(monkeypatch, seconds=0)
    plans.library.cache_clear()
    yield tmp_path
    plans.library.cache_clear()
    sys.modules.pop("cudnn", None)


def described(monkeypatch: pytest.MonkeyPatch, **device: float) -> None:
    monkeypatch.setattr(plans, "description", lambda _: json.dumps(device))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def built(home: Path) -> list[Path]:
    return sorted((home / ".cache" / "fluxserve" / "kernels").glob("attention-*.plan"))


def test_forms_are_all_that_may_be_asked_for_the_usual_first() -> None:
    found = ahead.forms(LIKE, most=5 * TILE, usual=3 * TILE)
    assert {(form.rows, form.told) for form in found} == {(t * TILE, told) for t in range(1, 6) for told in (0, 1)}
    assert [form.rows // TILE for form in found[:2]] == [3, 3] and found[-1].rows in (TILE, 5 * TILE)
    assert all((form.heads, form.dim, form.stride, form.out_stride) == (2, 128, 768, 1024) for form in found)


def test_only_a_plan_that_is_told_asks_how_many_rows_count(home: Path) -> None:
    said = {
        told: plans.build(Form(**{**vars(LIKE), "told": told}), plans.description(DEVICE)) for told in (True, False)
    }
    assert b"seq_len_kv" in said[True] and b'"uid": 11' in said[True]
    assert b"seq_len_kv" not in said[False] and b'"uid": 11' not in said[False]


def test_a_plan_is_built_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plans.opened(LIKE, DEVICE)
    monkeypatch.setattr(plans, "build", lambda *_: pytest.fail("built again"))
    assert plans.opened(LIKE, DEVICE).said == first.said
    assert len(built(home)) == 1


@pytest.mark.parametrize("change", ["rows", "heads", "stride", "out_stride", "told", "device", "library"])
def test_what_it_is_made_of_has_changed(home: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    form, before = LIKE, plans.place(LIKE, "{}")
    if change == "library":
        monkeypatch.setattr(plans.library(), "__version__", "1.1")
    elif change != "device":
        form = Form(**{**vars(LIKE), change: True if change == "told" else 4096})
    assert plans.place(form, '{"deviceVer": 900}' if change == "device" else "{}") != before


def test_a_damaged_file_is_made_anew_and_told(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    plans.opened(LIKE, DEVICE)
    (file,) = built(home)
    whole = file.read_bytes()
    file.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        plans.opened(LIKE, DEVICE)
    assert file.read_bytes() == whole
    assert f"{file} is made anew, because cuDNN can't read it: parse error" in caplog.text


def test_what_can_not_be_built_is_told_in_the_librarys_words(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described(monkeypatch, seconds=-1)
    with pytest.raises(RuntimeError, match="no such device"):
        plans.opened(LIKE, DEVICE)


def test_a_process_of_its_own_builds_what_is_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ahead.forms(LIKE, most=3 * TILE, usual=TILE)
    plans.opened(wanted[0], DEVICE)
    started = ahead.Ahead(wanted, DEVICE)
    until(lambda: len(built(home)) == len(wanted))
    started.close()
    monkeypatch.setattr(plans, "build", lambda *_: pytest.fail("built again"))
    for form in wanted:
        plans.opened(form, DEVICE)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is missing"))
    ahead.Ahead(wanted, DEVICE).close()


def test_it_ends_when_it_is_closed(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    described(monkeypatch, seconds=0.2)
    started = ahead.Ahead(ahead.forms(LIKE, most=200 * TILE, usual=TILE), DEVICE)
    until(lambda: built(home))
    with caplog.at_level(logging.WARNING):
        started.close()
    assert not caplog.records
    assert started._process is not None and started._process.returncode == 0
    assert 0 < len(built(home)) < 400


def test_it_ends_with_the_process_that_started_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""
import time, torch
from fluxserve.kernels import ahead, cuda, plans
cuda.version = lambda: (13, 0)
plans.description = lambda _: '{{"seconds": 0.2}}'
like = plans.Form(128, heads=2, dim=128, dtype="float8_e4m3fn", stride=768, out_stride=1024)
print(ahead.Ahead(ahead.forms(like, 200 * 128, 128), torch.device("{DEVICE}"))._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until(lambda: built(home))
        parent.send_signal(signal.SIGKILL)
    until(lambda: not process.started(child))


def test_a_process_that_fails_costs_a_line_in_the_log(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    described(monkeypatch, seconds=-1)
    with caplog.at_level(logging.WARNING):
        started = ahead.Ahead([LIKE], DEVICE)
        until(lambda: caplog.records)
        started.close()
    (record,) = caplog.records
    assert record.getMessage().endswith("the process for it ended with 1")


def test_nothing_to_build_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is missing"))
    ahead.Ahead([], DEVICE).close()


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
