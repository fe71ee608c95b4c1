"""cuDNN's plans for attention: compiled for one number of rows, kept on disk, read back in milliseconds.

cuDNN compiles the same machine code again for every number of rows, 50 to 150 ms of one core with Python's lock held;
only the parameters beside the code differ. So a plan is always made for a device that is described and not for one that
is there, which another process can do ahead (plan_worker.py), written as bytes, and run from those bytes, new or kept.
"""

import logging
from dataclasses import astuple, dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fluxserve.errors import LibraryMissing, LibraryRefused
from fluxserve.kernels.jit import disk_cache, nvrtc

log = logging.getLogger(__name__)

TILE = 128
"""Rows that cuDNN's E4M3 kernel takes at a time. A last tile that is not full makes it a sixth slower; told besides,
on the device, how many rows count, it loses a twentieth. Whole tiles, and BF16, are quickest without."""


def padded(rows: int) -> int:
    """Rows of the whole tiles that hold so many."""
    return -(-rows // TILE) * TILE


class At(IntEnum):
    """What a plan calls its tensors; LENGTH is there if the plan is told."""

    Q, K, V, OUT, Q_SCALE, K_SCALE, V_SCALE, INVERSE_OUT_SCALE, WEIGHT_SCALE, INVERSE_WEIGHT_SCALE, LENGTH = range(
        1, 12
    )


@dataclass(frozen=True)
class Form:
    """What a plan is for: `heads` heads of `dim` numbers, over `rows` rows; E4M3 takes whole tiles of them.

    dtype: "float8_e4m3fn", "bfloat16" or "float16". stride, out_stride: numbers from row to row of qkv and of out.
    told: whether a number on the device says how many of the rows count.
    """

    rows: int
    heads: int
    dim: int
    dtype: str
    stride: int
    out_stride: int
    told: bool = False


@cache
def library() -> ModuleType:
    """cuDNN's frontend on PyTorch's own cuDNN: with an older one's parts, attention was another at every call."""
    try:
        import cudnn
    except ImportError as error:
        raise LibraryMissing("cudnn", "fused") from error
    try:
        found, usual = cudnn.backend_version(), torch.backends.cudnn.version()
    except RuntimeError as error:  # PyTorch's own check, of what it was built with
        raise LibraryRefused(f"cudnn: {error}") from error
    if found != usual:
        raise LibraryRefused(
            f"cudnn: got {found} for attention; expected PyTorch's own, {usual}: "
            "a folder of LD_LIBRARY_PATH has another, take it out"
        )
    return cudnn  # type: ignore[no-any-return]


@cache
def handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return library().create_handle()


@cache
def description(device: torch.device) -> str:
    """All that cuDNN asks of a device, as JSON."""
    return str(library().create_device_properties(device.index or 0).serialize())


def place(form: Form, described: str) -> Path:
    """Where a plan is kept: by its form, the device, this file, and every library that has a part in it."""
    versions = (library().__version__, library().backend_version(), nvrtc.version())
    made_of = (repr(astuple(form)), described, repr(versions))
    return disk_cache.place("attention", ".plan", [Path(__file__).read_bytes(), *(part.encode() for part in made_of)])


def opened(form: Form, device: torch.device) -> Any:
    """A graph of cuDNN's that can be executed with addresses by their places `At`. Raises cuDNN's own errors."""
    described = description(device)
    file = place(form, described)
    found = disk_cache.find(file)
    if found is not None:
        try:
            return _read(found, device)
        except Exception as error:  # noqa: BLE001 (cuDNN's frontend has many for a file that it can't read)
            log.warning("%s is made anew, because cuDNN can't read it: %s", file, error)
    made = build(form, described)
    graph = _read(made, device)
    disk_cache.keep(file, made)
    return graph


def _read(plan: bytes, device: torch.device) -> Any:
    graph = library().pygraph(handle=handle(device))
    graph.deserialize(handle(device), plan)
    return graph


def build(form: Form, described: str) -> bytes:
    """A plan for the device of this description, which need not be there. Raises cuDNN's own errors."""
    cudnn = library()
    kinds = cudnn.data_type
    quantised = form.dtype == "float8_e4m3fn"
    kind = {"float8_e4m3fn": kinds.FP8_E4M3, "bfloat16": kinds.BFLOAT16, "float16": kinds.HALF}[form.dtype]
    graph = cudnn.pygraph(
        io_data_type=kind,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        device_property=cudnn.create_device_properties(described),
    )
    sizes, within = [1, form.heads, form.rows, form.dim], [form.dim, form.stride, 1]
    strides = [form.rows * form.stride, *within]
    q, k, v = (graph.tensor(dim=sizes, stride=strides, data_type=kind, uid=int(at)) for at in (At.Q, At.K, At.V))
    given = {"q": q, "k": k, "v": v, "is_inference": True, "attn_scale": form.dim**-0.5}
    if quantised:
        out, _, *maxima = graph.sdpa_fp8(**given, **_scalars(graph, form.told))
        for maximum in maxima:  # no output: nobody reads them, and each would be cleared before every launch
            maximum.set_dim([1] * 4).set_stride([1] * 4).set_data_type(kinds.FLOAT)
    else:
        out, _ = graph.sdpa(**given)
    strides = [form.rows * form.out_stride, form.dim, form.out_stride, 1]
    out.set_output(True).set_dim(sizes).set_stride(strides).set_data_type(kind).set_uid(int(At.OUT))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return bytes(graph.serialize(as_bytes=True))


def _scalars(graph: Any, told: bool) -> dict[str, Any]:
    """E4M3's scales, and how many rows count."""
    kinds = library().data_type

    def scalar(at: At, kind: Any) -> Any:
        return graph.tensor(dim=[1] * 4, stride=[1] * 4, data_type=kind, uid=int(at))

    places = {
        "descale_q": At.Q_SCALE,
        "descale_k": At.K_SCALE,
        "descale_v": At.V_SCALE,
        "scale_o": At.INVERSE_OUT_SCALE,
        "descale_s": At.WEIGHT_SCALE,
        "scale_s": At.INVERSE_WEIGHT_SCALE,
    }
    made: dict[str, Any] = {name: scalar(at, kinds.FLOAT) for name, at in places.items()}
    if told:
        length = scalar(At.LENGTH, kinds.INT32)
        made |= {"use_padding_mask": True, "seq_len_q": length, "seq_len_kv": length}
    return made
