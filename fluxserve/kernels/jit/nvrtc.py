"""Kernels in CUDA C++: compiled by NVRTC, which comes with PyTorch, kept on disk, launched through the driver.

A kernel is compiled once for its source, options and compiler: half a second, then a file (disk_cache.py).
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from fluxserve.errors import LibraryMissing
from fluxserve.kernels.jit import disk_cache

_ARCHITECTURE = "sm_90a"
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_ALL = 100
"""Per cent of an SM's memory as shared memory, whatever a kernel needs: an SM must be empty to divide it anew, and the
products need nearly all of it."""


@dataclass(frozen=True)
class Kernel:
    """A function on the device; threads and bytes of dynamic shared memory of a block."""

    function: c_void_p
    threads: int
    shared: int

    def launch(self, blocks: int, *arguments: int) -> None:
        """On the current stream. Arguments are addresses of what the kernel takes. Raises RuntimeError."""
        stream = c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = (c_void_p * len(arguments))(*arguments)
        size = (blocks, 1, 1, self.threads, 1, 1, self.shared)
        check(driver().cuLaunchKernel(self.function, *size, stream, pointers, None))


def load(source: Path, name: str, defines: Sequence[str], threads: int, shared: int) -> Kernel:
    """Compile or find, and load on the current device. Raises RuntimeError with the compiler's or driver's words."""
    torch.cuda.current_stream()  # PyTorch's context is this thread's
    module, function = c_void_p(), c_void_p()
    cubin = compiled(source, defines)
    check(driver().cuModuleLoadData(ctypes.byref(module), c_char_p(cubin)))
    check(driver().cuModuleGetFunction(ctypes.byref(function), module, c_char_p(name.encode())))
    check(driver().cuFuncSetAttribute(function, c_int(_MAX_DYNAMIC_SHARED), c_int(shared)))
    check(driver().cuFuncSetAttribute(function, c_int(_CARVEOUT), c_int(_ALL)))
    return Kernel(function, threads, shared)


def compiled(source: Path, defines: Sequence[str]) -> bytes:
    """Return the cubin of a source with these macros ("NAME=value").

    It may include the .cuh files of its own folder and of this one.
    """
    headers, options = _headers(source), _options(defines)
    parts = [source.read_bytes(), *headers.values(), *(o.encode() for o in options), repr(version()).encode()]
    return disk_cache.once(
        disk_cache.place(source.stem, ".cubin", parts), lambda: _compile(source, headers, options)[0]
    )


def examined(source: Path, defines: Sequence[str]) -> tuple[bytes, str]:
    """The same made anew, and what the assembler says of it: registers, bytes of stack and bytes spilled."""
    return _compile(source, _headers(source), [*_options(defines), "--ptxas-options=-v", "--no-cache"])


def _headers(source: Path) -> dict[str, bytes]:
    shared = sorted(Path(__file__).parent.glob("*.cuh"))
    return {file.name: file.read_bytes() for file in (*shared, *sorted(source.parent.glob("*.cuh")))}


def _options(defines: Sequence[str]) -> list[str]:
    return [f"--gpu-architecture={_ARCHITECTURE}", "--std=c++17", *(f"-D{define}" for define in defines)]


def _compile(source: Path, headers: dict[str, bytes], options: Sequence[str]) -> tuple[bytes, str]:
    """The cubin and the compiler's log. Raises RuntimeError with the log."""
    nvrtc, program, count = _nvrtc(), c_void_p(), len(headers)
    contents, names = ((c_char_p * count)(*texts) for texts in (headers.values(), (n.encode() for n in headers)))
    text = c_char_p(source.read_bytes())
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, c_char_p(source.name.encode()), count, contents, names)
    given = (c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    said = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
    if failed:
        raise RuntimeError(said)
    return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), said


def _text(size_of: Callable[..., int], get: Callable[..., int], program: c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


@cache
def processors(device: torch.device) -> int:
    """SMs of a device; of a CPU, where Triton's kernels are interpreted, as many as show that programs take turns."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 3


@cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _nvrtc() -> ctypes.CDLL:
    """PyTorch's own, which is loaded already, wherever it lies; where PyTorch has none, the one of NVIDIA's wheel."""
    name = f"libnvrtc.so.{(torch.version.cuda or '13').split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        found = _in_wheels(name)
        if found is None:
            expected = "a CUDA build of PyTorch, or the wheel nvidia-cuda-nvrtc"
            raise LibraryMissing("nvrtc", comes_with=expected) from error
    for builtins in found.parent.glob("libnvrtc-builtins.so.*"):  # which it opens by name, so that it must be there
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(found))


def _in_wheels(library: str) -> Path | None:
    """Where one of NVIDIA's wheels has put it, if any has: nvidia/cu13/lib."""
    package = find_spec("nvidia")
    folders = (package and package.submodule_search_locations) or ()
    return next((file for folder in folders for file in Path(folder).glob(f"*/lib/{library}")), None)


def version() -> tuple[int, int]:
    """NVRTC's: every release compiles anew."""
    major, minor = c_int(), c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def check(code: int) -> None:
    """Raises RuntimeError with the driver's name for what went wrong."""
    if code:
        name = c_char_p()
        driver().cuGetErrorName(c_int(code), ctypes.byref(name))
        raise RuntimeError(f"CUDA driver: {(name.value or b'').decode()} ({code})")
