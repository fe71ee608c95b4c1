"""A contender for `kernels.linear` in CUDA C++ (linear_hopper.cu), to be measured against (`benchmarks.kernels`).

Compiled by NVRTC, which comes with a CUDA build of PyTorch, in half a second; launched through the driver. Triton can
neither share a tile of weights between two SMs nor leave neighbours of a row in one thread; this can.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_uint, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.library import operations
from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.linear import RMS_EPSILON, Heads, Linear

ENDINGS = ("none", "gelu", "add", "heads")
TILE_ROWS, TILE_COLUMNS, TILE_INNER, STAGES = 128, 256, 128, 4
_SOURCE = Path(__file__).with_suffix(".cu")
_ENDINGS = _SOURCE.with_name("linear_hopper_endings.cuh")
_THREADS = 384
_SHARED = STAGES * (TILE_ROWS + TILE_COLUMNS) * TILE_INNER + 2 * STAGES * 8
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_UINT8, _SWIZZLE_128B, _PROMOTION_256B = 0, 3, 3  # of CUtensorMap
_MAP_BYTES = 128
_HEAD = 128


class _Parameters(ctypes.Structure):
    """As linear_hopper.cu has it."""

    _fields_ = [
        *((name, c_void_p) for name in ("x_scale", "w_scale", "bias", "out", "gate", "factors", "cos", "sin")),
        *((name, c_void_p) for name in ("workspace", "arrived")),
        *((name, c_float) for name in ("inverse", "epsilon")),
        *((name, c_int) for name in ("M", "N", "K", "split", "second", "out_stride")),
    ]


def neighbours() -> Tensor:
    """Which of 32 outputs stands where in the weights, so that each thread's share of a product are eight neighbours.

    wgmma leaves columns 8j + 2q and 8j + 2q + 1, for j = 0…3, in the thread with q = lane % 4; they become 8q … 8q + 7.
    """
    q, j, b = (torch.arange(n) for n in (4, 4, 2))
    order = torch.empty(32, dtype=torch.long)
    order[(8 * j[None, :, None] + 2 * q[:, None, None] + b).flatten()] = (
        8 * q[:, None, None] + 2 * j[None, :, None] + b
    ).flatten()
    return order


def permuted(w: Linear) -> Linear:
    """Weights as the kernel wants them. Scales and bias stay in the order of the outputs; both are made if missing."""
    streams, columns, inner = w.weight.shape
    if columns % TILE_COLUMNS:
        raise ValueError(f"columns: got {columns}; expected a multiple of {TILE_COLUMNS}")
    raw = w.weight.view(torch.uint8).view(streams, columns // 32, 32, inner)
    weight = raw[:, :, neighbours().to(raw.device)].reshape(streams, columns, inner).view(w.weight.dtype)
    like = {"dtype": torch.float32, "device": weight.device}
    scale = torch.ones(streams, columns, **like) if w.scale is None else w.scale
    return Linear(weight, scale, torch.zeros(streams, columns, **like) if w.bias is None else w.bias)


def launch(
    ending: str,
    x: Tensor,
    x_scale: Tensor | None,
    w: Linear,
    split: int,
    out: Tensor,
    gate: Tensor | None = None,
    heads: Heads | None = None,
    inverse: float = 1.0,
) -> None:
    """As `kernels.linear` would; `w` is `permuted`. Raises ValueError for what this contender was not built for."""
    _refuse(ending, x, out, gate, heads)
    (rows, inner), (streams, columns, _) = x.shape, w.weight.shape
    parameters = _Parameters(
        *(None if t is None else t.data_ptr() for t in (x_scale, w.scale, w.bias, out, gate)),
        *((heads.factors.data_ptr(), heads.cos.data_ptr(), heads.sin.data_ptr()) if heads else (None,) * 3),
        *(t.data_ptr() for t in _meeting_place()),
        inverse,
        RMS_EPSILON,
        rows,
        columns,
        inner,
        split,
        streams - 1,
        out.stride(0),
    )
    maps = [_map(t.data_ptr(), *t.shape, t.stride(0)) for t in (x, w.weight.view(streams * columns, inner))]
    arguments = (c_void_p * 3)(*maps, ctypes.addressof(parameters))
    stream = torch.cuda.current_stream().cuda_stream
    grid = (_programs(), 1, 1, _THREADS, 1, 1, _SHARED)
    _check(_driver().cuLaunchKernel(_function(ending), *grid, c_void_p(stream), arguments, None))


def _refuse(ending: str, x: Tensor, out: Tensor, gate: Tensor | None, heads: Heads | None) -> None:
    wanted = E4M3 if ending in ("gelu", "heads") else torch.bfloat16
    if out.dtype != wanted or out.stride(1) != 1 or out.stride(0) % 16 or out.data_ptr() % 16:
        raise ValueError(f"out: got {out.dtype}, strides {out.stride()}; expected {wanted}, rows at multiples of 16")
    if x.dtype != E4M3 or x.stride(1) != 1:
        raise ValueError(f"x: got {x.dtype}, strides {x.stride()}; expected E4M3, row by row")
    if ending == "add" and gate is None:
        raise ValueError("gate: got none; expected one for each output")
    if heads and heads.factors.shape[-1] != _HEAD:
        raise ValueError(f"head_dim: got {heads.factors.shape[-1]}; expected {_HEAD}")


@cache
def _meeting_place() -> tuple[Tensor, Tensor]:
    """Where parts of tiles meet: at most one tile's sums of each program, and a count for each warpgroup.

    One for all launches, which therefore must follow each other on one stream.
    """
    programs = _programs()
    sums = torch.empty(programs * TILE_ROWS * TILE_COLUMNS, dtype=torch.float32, device="cuda")
    return sums, torch.zeros(2 * programs, dtype=torch.int32, device="cuda")


@cache
def _programs() -> int:
    """One for each SM, in pairs."""
    return torch.cuda.get_device_properties().multi_processor_count // 2 * 2


@cache
def _map(address: int, rows: int, inner: int, stride: int) -> int:
    """Address of a CUtensorMap over a byte matrix, in tiles of 128 rows and 128 bytes; kept for good."""
    raw = ctypes.create_string_buffer(_MAP_BYTES + 64)
    aligned = -(-ctypes.addressof(raw) // 64) * 64
    _KEPT.append(raw)
    code = _driver().cuTensorMapEncodeTiled(
        c_void_p(aligned),
        c_uint(_UINT8),
        c_uint32(2),
        c_void_p(address),
        (c_uint64 * 2)(inner, rows),
        (c_uint64 * 1)(stride),
        (c_uint32 * 2)(TILE_INNER, TILE_ROWS),
        (c_uint32 * 2)(1, 1),
        c_uint(0),
        c_uint(_SWIZZLE_128B),
        c_uint(_PROMOTION_256B),
        c_uint(0),
    )
    _check(code)
    return aligned


_KEPT: list[object] = []


@cache
def _function(ending: str) -> c_void_p:
    torch.cuda.current_stream()  # PyTorch's context is this thread's
    module, function, cubin = c_void_p(), c_void_p(), compiled(ending)
    _check(_driver().cuModuleLoadData(ctypes.byref(module), c_char_p(cubin)))
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, c_char_p(b"linear")))
    _check(_driver().cuFuncSetAttribute(function, c_int(_MAX_DYNAMIC_SHARED), c_int(_SHARED)))
    return function


def compiled(ending: str) -> bytes:
    """The cubin of one ending. Raises RuntimeError with the compiler's words."""
    nvrtc, program = _nvrtc(), c_void_p()
    source = c_char_p(_SOURCE.read_bytes())
    headers, names = ((c_char_p * 1)(text) for text in (_ENDINGS.read_bytes(), _ENDINGS.name.encode()))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, c_char_p(_SOURCE.name.encode()), 1, headers, names)
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", f"-DENDING={ENDINGS.index(ending)}".encode()]
    code = nvrtc.nvrtcCompileProgram(program, len(options), (c_char_p * len(options))(*options))
    if code:
        raise RuntimeError(_text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode())
    return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)


def _text(size_of: Callable[..., int], get: Callable[..., int], program: c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _nvrtc() -> ctypes.CDLL:
    """PyTorch has loaded its own already, wherever it lies."""
    major = (torch.version.cuda or "13").split(".")[0]
    return ctypes.CDLL(f"libnvrtc.so.{major}")


def _check(code: int) -> None:
    if code:
        name = c_char_p()
        _driver().cuGetErrorName(c_int(code), ctypes.byref(name))
        raise RuntimeError(f"{_SOURCE.name}: {(name.value or b'').decode()} ({code})")


OPERATIONS = operations(launch, permuted)
