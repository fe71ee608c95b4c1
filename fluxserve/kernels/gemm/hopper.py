"""`gemm.portable` in CUDA C++ for E4M3 (hopper.cu): what FLUX's blocks run on a Hopper GPU.

Triton can neither share a tile of weights between two SMs nor leave neighbours of a row in one thread; this can. It
takes weights whose rows were put into another order (`arranged`); everything else of `gemm.portable`'s contract holds.
"""

import ctypes
from concurrent.futures import Executor, Future
from ctypes import c_float, c_int, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.gemm.layers import RMS_EPSILON, SAMPLE, Arranged, Centre, Heads, Linear, Watched
from fluxserve.kernels.jit import nvrtc
from fluxserve.kernels.jit.tensor_map import tensor_map

ENDINGS = ("none", "gelu", "add", "heads_gelu", "swiglu", "heads_swiglu")
"""The kernels that are compiled. "heads" is "heads_gelu" without anything behind the heads."""
RUN = 8
"""Neighbours of a row that one thread has, as hopper.cu says."""
TILE_ROWS, TILE_COLUMNS, TILE_INNER, STAGES = 128, 256, 128, 4
_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS = 384
_BARRIERS = 2 * STAGES + 4
VECTOR = 8 * 512
"""Numbers of the vector that the spare warps hold at once; a longer one is taken in parts."""
_SHARED = STAGES * (TILE_ROWS + TILE_COLUMNS) * TILE_INNER + 2 * 3 * TILE_COLUMNS * 4 + _BARRIERS * 8
_ALIGNMENT = 16  # bytes, of a row that TMA reads
_HEAD = 128


class _Centre(ctypes.Structure):
    """`Centre` of hopper.cu."""

    _fields_ = [
        *((name, c_void_p) for name in ("due", "x", "w", "back", "back_scale", "mean", "restored", "sums", "arrived")),
        ("inverse", c_float),
        *((name, c_int) for name in ("x_stride", "back_columns", "back_inner", "back_streams")),
    ]


class _Watched(ctypes.Structure):
    """`Watched` of hopper.cu."""

    _fields_ = [("at", c_void_p), ("count", c_void_p), *((name, c_int) for name in ("rows", "columns", "stride"))]


class _Parameters(ctypes.Structure):
    """`Parameters` of hopper.cu."""

    _fields_ = [
        *((name, c_void_p) for name in ("x_scale", "w_scale", "bias", "out", "gate", "factors", "cos", "sin")),
        *((name, c_void_p) for name in ("hidden", "workspace", "arrived", "restored")),
        *((name, c_float) for name in ("inverse", "epsilon")),
        *((name, c_int) for name in ("M", "N", "K", "split", "second", "out_stride", "hidden_stride", "heads")),
        ("centre", _Centre),
        ("watched", _Watched * 2),
    ]


def neighbours() -> Tensor:
    """Which of 4 · RUN outputs stands where in the weights, so that a thread's share of a product are RUN neighbours.

    wgmma leaves columns 8j + 2q and 8j + 2q + 1, for each j, in the thread with q = lane % 4; they become those from
    RUN · q on.
    """
    return torch.arange(4 * RUN).view(4, RUN // 2, 2).transpose(0, 1).flatten()


def arranged(w: Linear) -> Linear:
    """For this kernel, if it takes it: E4M3, outputs in whole tiles, rows that TMA can read. Else as it was."""
    streams, columns, inner = w.weight.shape
    if w.weight.dtype != E4M3 or columns % TILE_COLUMNS or inner % _ALIGNMENT:
        return w
    raw = w.weight.view(torch.uint8).view(streams, -1, 4 * RUN, inner)
    weight = raw[:, :, neighbours().to(raw.device)].reshape(streams, columns, inner).view(w.weight.dtype)
    zeros = torch.zeros(streams, columns, dtype=torch.float32, device=weight.device)
    return Arranged(weight, zeros + 1 if w.scale is None else w.scale, zeros if w.bias is None else w.bias)


def launch(
    ending: str,
    x: Tensor,
    x_scale: Tensor | None,
    w: Linear,
    split: int,
    out: Tensor,
    *,
    gate: Tensor | None = None,
    heads: Heads | None = None,
    inverse: float = 1.0,
    hidden: Tensor | None = None,
    restored: Tensor | None = None,
    watched: Watched | None = None,
) -> None:
    """As `gemm.portable` would; `hidden` is what "heads_gelu" and "heads_swiglu" write behind the heads.

    Raises:
        ValueError: what this kernel was not built for.
    """
    _refuse(ending, x, w, out, gate, heads, hidden)
    (rows, inner), (streams, columns, _) = x.shape, w.weight.shape
    parameters = _Parameters(
        *(None if t is None else t.data_ptr() for t in (x_scale, w.scale, w.bias, out, gate)),
        *((heads.factors.data_ptr(), heads.cos.data_ptr(), heads.sin.data_ptr()) if heads else (None,) * 3),
        None if hidden is None else hidden.data_ptr(),
        *(t.data_ptr() for t in _meeting_place(x.device)),
        None if restored is None else restored.data_ptr(),
        inverse,
        RMS_EPSILON,
        rows,
        columns,
        inner,
        split,
        streams - 1,
        out.stride(0),
        0 if hidden is None else hidden.stride(0),
        out.shape[1],
        _centre(x, w, heads.centre) if heads and heads.centre else _Centre(),
        _watched(watched),
    )
    maps = [
        tensor_map(t.data_ptr(), *t.shape, t.stride(0), TILE_ROWS) for t in (x, w.weight.view(streams * columns, inner))
    ]
    _kernel(ending).launch(_programs(x.device), *(m.address for m in maps), ctypes.addressof(parameters))


def _centre(x: Tensor, w: Linear, centre: Centre) -> _Centre:
    """Raises ValueError: `back` lies another way."""
    back = centre.back
    if not isinstance(back, Arranged):
        raise ValueError(f"centre: got {tuple(back.weight.shape)} as it is; expected it `arranged`")
    assert back.scale is not None, "arranged weights have a scale"
    streams, columns, inputs = back.weight.shape
    places = (back.weight, back.scale, centre.mean, centre.restored)
    addresses = (centre.due, x, w.weight, *places, *_sums(x.shape[1], x.device))
    return _Centre(*(t.data_ptr() for t in addresses), centre.inverse, x.stride(0), columns, inputs, streams)


def _watched(watched: Watched | None) -> ctypes.Array[_Watched]:
    entries = [
        _Watched(t.data_ptr(), count.data_ptr(), *t.shape, t.stride(0))
        for t, count in (zip(watched.rows, watched.counts, strict=True) if watched else ())
    ]
    return (_Watched * 2)(*entries)


def _refuse(
    ending: str,
    x: Tensor,
    w: Linear,
    out: Tensor,
    gate: Tensor | None,
    heads: Heads | None,
    hidden: Tensor | None,
) -> None:
    if not isinstance(w, Arranged):
        raise ValueError(f"w: got {tuple(w.weight.shape)} as it is; expected it `arranged`")
    wanted = torch.bfloat16 if ending in ("none", "add") else E4M3
    for name, written in {"out": out, "hidden": hidden}.items():
        if written is not None and (written.dtype != wanted or not _in_sixteens(written)):
            got = f"{written.dtype}, strides {written.stride()}"
            raise ValueError(f"{name}: got {got}; expected {wanted}, rows at multiples of 16")
    widths = [t.shape[1] for t in (out, hidden) if t is not None]
    columns = sum(widths) + (widths[-1] if ending.endswith("swiglu") else 0)  # of which two become one
    if columns != w.weight.shape[1]:
        raise ValueError(f"out: got {widths} columns of {columns}; expected {w.weight.shape[1]}")
    if x.dtype != E4M3 or x.stride(1) != 1:
        raise ValueError(f"x: got {x.dtype}, strides {x.stride()}; expected E4M3, row by row")
    if ending == "add" and gate is None:
        raise ValueError("gate: got none; expected one for each output")
    if heads and heads.factors.shape[-1] != _HEAD:
        raise ValueError(f"head_dim: got {heads.factors.shape[-1]}; expected {_HEAD}")
    if heads and out.shape[1] // 3 % TILE_COLUMNS:
        raise ValueError(f"heads: got {out.shape[1] // 3} columns; expected a multiple of {TILE_COLUMNS}")


def _in_sixteens(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0


@cache
def _meeting_place(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where parts of tiles meet: at most one tile's sums of each program, and a count for each warpgroup.

    One for all launches, which therefore must follow each other on one stream.
    """
    programs = _programs(device)
    sums = torch.empty(programs * TILE_ROWS * TILE_COLUMNS, dtype=torch.float32, device=device)
    return sums, torch.zeros(2 * programs, dtype=torch.int32, device=device)


@cache
def _sums(inner: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Integers that the columns of x are added up in, for two streams, and the counters of programs that have arrived.

    Every launch leaves both at 0. One for all launches of x with as many columns, as `_meeting_place` is.
    """
    sums = torch.zeros(2 * inner, dtype=torch.int64, device=device)
    return sums, torch.zeros(3 * 32, dtype=torch.int32, device=device)


def _programs(device: torch.device) -> int:
    """One for each SM, in pairs."""
    return nvrtc.processors(device) // 2 * 2


@cache
def _kernel(ending: str) -> nvrtc.Kernel:
    ending = "heads_gelu" if ending == "heads" else ending
    return nvrtc.load(_SOURCE, _name(ending), _defines(ending), _THREADS, _SHARED + _spare_bytes(ending))


def compiling(pool: Executor) -> list[Future[bytes]]:
    """Every ending that is not kept yet is compiled on a thread of its own: NVRTC lets go of Python's lock."""
    return [pool.submit(nvrtc.compiled, _SOURCE, _defines(ending)) for ending in ENDINGS]


def _name(ending: str) -> str:
    return f"linear_{ending}"


def _defines(ending: str) -> list[str]:
    values = {"ENDING": ENDINGS.index(ending), "NAME": _name(ending), "SAMPLE": SAMPLE}
    values |= {"VECTOR": VECTOR, "SPARE_BYTES": _spare_bytes(ending)}
    return [f"{name}={value}" for name, value in values.items()]


def _spare_bytes(ending: str) -> int:
    """Shared memory of the spare warps: the vector in two halves; behind it, for each warp, three pieces of weights."""
    return VECTOR * 4 + _ALIGNMENT + 2 * 3 * 2048 if ending.startswith("heads") else _ALIGNMENT
