"""Kernels in CUDA C++: what the compiler makes of each for Hopper, which needs no GPU; and that none is made twice."""

import logging
import re
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from triton.backends.nvidia.compiler import get_ptxas

from fluxserve.errors import LibraryMissing
from fluxserve.families.flux.models import FLUX1_DEV, FLUX2_DEV, FLUX2_KLEIN_9B, TINY
from fluxserve.kernels.gemm import hopper
from fluxserve.kernels.jit import disk_cache, nvrtc
from fluxserve.kernels.norm import modulated
from tests.kernels.hopper import TARGET
from tests.kernels.test_compiled import SHARED_MEMORY

REGISTERS = 65536
"""That a block may have on compute capability 9.0."""

KNOWN = (13, 0)
"""Each NVRTC allots registers anew; with this one no more is spilled than SPILLED says."""

FEW = 80
"""Bytes a thread that may be spilled: once in a tile, behind thousands of products. `linear_heads` spills up to 72, and
how many depends on what else its source holds."""


@dataclass(frozen=True)
class Variant:
    """What an engine asks `cuda.load` for."""

    source: Path
    name: str
    defines: Sequence[str]
    threads: int
    shared: int

    def __str__(self) -> str:
        return " ".join((self.name, *self.defines))


def variants() -> list[Variant]:
    """Every kernel as a model launches it; klein-4B is as wide as FLUX.1."""
    asked: list[Variant] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "load", lambda *given: asked.append(Variant(*given)))
        for ending in hopper.ENDINGS:
            hopper._kernel.__wrapped__(ending)
        for spec in (FLUX1_DEV, FLUX2_KLEIN_9B, FLUX2_DEV, TINY):
            for quantised in (True, False):
                modulated._kernel.__wrapped__(spec.transformer.hidden_size, 2, quantised)
    return asked


VARIANTS = variants()


def test_endings_are_compiled_ahead_as_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "compiled", lambda source, defines: (source, defines))
    with ThreadPoolExecutor() as pool:
        found = [task.result() for task in hopper.compiling(pool)]
    assert found == [(v.source, v.defines) for v in VARIANTS if v.name.startswith("linear_")]


def test_heads_alone_are_launched_by_the_kernel_that_has_an_activation_behind_them() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "load", lambda *given: given)
        assert hopper._kernel.__wrapped__("heads") == hopper._kernel.__wrapped__("heads_gelu")


@pytest.fixture(scope="module")
def compiler_library() -> None:
    try:
        nvrtc._nvrtc()
    except LibraryMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def examined(compiler_library: None) -> Callable[[Variant], tuple[bytes, str]]:
    made: dict[str, tuple[bytes, str]] = {}

    def examine(variant: Variant) -> tuple[bytes, str]:
        if str(variant) not in made:
            made[str(variant)] = nvrtc.examined(variant.source, variant.defines)
        return made[str(variant)]

    return examine


def number(pattern: str, said: str) -> int:
    (found,) = re.findall(pattern, said)
    return int(found)


def test_every_variant_is_there() -> None:
    assert len({str(variant) for variant in VARIANTS}) == len(hopper.ENDINGS) + 8


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_they_fit(variant: Variant, examined: Callable[[Variant], tuple[bytes, str]]) -> None:
    """A block with its threads and its memory can be launched."""
    _, said = examined(variant)
    assert f"'{variant.name}' for 'sm_90a'" in said
    assert "setmaxnreg" not in said, "the compiler ignores how registers are shared out"
    assert number(r"Used (\d+) registers", said) * variant.threads <= REGISTERS
    assert variant.shared <= SHARED_MEMORY


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_they_hardly_spill(variant: Variant, examined: Callable[[Variant], tuple[bytes, str]]) -> None:
    _, said = examined(variant)
    if nvrtc.version() != KNOWN:
        pytest.skip(f"registers were counted with NVRTC {KNOWN}")
    assert number(r"(\d+) bytes spill stores", said) <= FEW


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name != "layer_norm"], ids=str)
def test_products_use_the_tensor_cores(
    variant: Variant, examined: Callable[[Variant], tuple[bytes, str]], tmp_path: Path
) -> None:
    cubin, said = examined(variant)
    assert "serialized" not in said, "the compiler waits for every product"
    (tmp_path / "k.cubin").write_bytes(cubin)
    disassemble = [Path(get_ptxas(TARGET.arch).path).with_name("nvdisasm"), "k.cubin"]
    done = subprocess.run(disassemble, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(re.findall(r"\wGMMA\S+", done.stdout)) == {"QGMMA.64x256x32.F32.E4M3.E4M3"}


def test_what_does_not_compile_is_told_in_the_words_of_the_compiler(compiler_library: None, tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void wrong() { return nothing; }')
    with pytest.raises(RuntimeError, match='identifier "nothing" is undefined'):
        nvrtc.examined(source, [])


# --- where the compiler is, and what it has made already --------------------------------------------------------------


def refuse(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def test_without_a_compiler_it_says_what_brings_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", refuse)
    monkeypatch.setattr(nvrtc, "find_spec", lambda _: None)
    with pytest.raises(LibraryMissing, match="a CUDA build of PyTorch, or the wheel nvidia-cuda-nvrtc"):
        nvrtc._nvrtc.__wrapped__()


def test_the_wheels_compiler_is_found_and_its_built_ins_are_loaded_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc.alt.so.13", "libnvrtc-builtins.alt.so.13.0"):
        (folder / name).touch()
    package = ModuleSpec("nvidia", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path / "nvidia")]
    opened: list[str] = []

    def open_(name: str) -> None:
        if "/" not in name:
            refuse(name)
        opened.append(name)

    monkeypatch.setattr(nvrtc.torch.version, "cuda", None)
    monkeypatch.setattr(nvrtc, "find_spec", lambda _: package)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", open_)
    nvrtc._nvrtc.__wrapped__()
    assert opened == [str(folder / "libnvrtc-builtins.so.13.0"), str(folder / "libnvrtc.so.13")]


class Compiler:
    """In place of NVRTC: says what it was given, and counts."""

    def __init__(self) -> None:
        self.version, self.calls = (13, 0), 0

    def __call__(self, source: Path, headers: dict[str, bytes], options: Sequence[str]) -> tuple[bytes, str]:
        self.calls += 1
        return repr((source.read_bytes(), headers, options, self.version)).encode(), ""


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(nvrtc, "_compile", made)
    monkeypatch.setattr(nvrtc, "version", lambda: made.version)
    monkeypatch.setenv("FLUXSERVE_CACHE", str(tmp_path / "cache"))
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "kernel.cu").write_text("one")
    (tmp_path / "common.cuh").write_text("two")
    return tmp_path / "kernel.cu"


def test_a_kernel_is_compiled_once(compiler: Compiler, source: Path) -> None:
    first = nvrtc.compiled(source, ["D=1"])
    assert nvrtc.compiled(source, ["D=1"]) == first
    assert compiler.calls == 1
    (file,) = disk_cache.folder(disk_cache.KERNELS).iterdir()
    assert file.read_bytes() == first


def _header(compiler: Compiler, source: Path) -> None:
    source.with_name("common.cuh").write_text("three")


def _another_header(compiler: Compiler, source: Path) -> None:
    source.with_name("more.cuh").write_text("two")


def _source(compiler: Compiler, source: Path) -> None:
    source.write_text("four")


def _version(compiler: Compiler, source: Path) -> None:
    compiler.version = (13, 1)


@pytest.mark.parametrize("change", [_header, _another_header, _source, _version])
def test_what_it_is_made_of_has_changed(compiler: Compiler, source: Path, change: Callable[..., Any]) -> None:
    before = nvrtc.compiled(source, ["D=1"])
    change(compiler, source)
    after = nvrtc.compiled(source, ["D=1"])
    assert compiler.calls == 2 and after != before
    assert nvrtc.compiled(source, ["D=1"]) == after
    assert compiler.calls == 2


def test_another_option_is_another_kernel(compiler: Compiler, source: Path) -> None:
    """Also where options, put behind each other, are the same letters."""
    asked = (["D=1"], ["D=2"], ["D=1", "E=1"], ["D=1-DE=1"], [])
    assert len({nvrtc.compiled(source, defines) for defines in asked}) == compiler.calls == len(asked)


def test_a_cache_that_can_not_be_written_costs_a_line_in_the_log(
    compiler: Compiler, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLUXSERVE_CACHE", str(source / "cache"))  # below a file
    with caplog.at_level(logging.WARNING):
        assert nvrtc.compiled(source, []) == nvrtc.compiled(source, [])
    assert compiler.calls == 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and re.match(r"kernel-[0-9a-f]{64}\.cubin is made at every start: ", said[0])
