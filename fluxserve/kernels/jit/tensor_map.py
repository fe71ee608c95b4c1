"""What the copy engine (TMA) must know of a matrix to fetch tiles of it, swizzled as the tensor cores want them."""

import ctypes
from ctypes import c_uint, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import lru_cache

from fluxserve.kernels.jit import nvrtc

_UINT8, _SWIZZLE_128B, _PROMOTION_256B = 0, 3, 3  # of CUtensorMap
_SWIZZLED_BYTES = 128
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


@dataclass(frozen=True)
class Map:
    """A CUtensorMap, which wants an address at a multiple of 64, and the memory that it lies in."""

    address: int
    memory: object


@lru_cache(2048)
def tensor_map(address: int, rows: int, inner: int, stride: int, box_rows: int) -> Map:
    """Over a byte matrix [rows, inner], in tiles of box_rows rows and 128 bytes. A launch takes a copy.

    Raises:
        RuntimeError: the driver refuses it.
    """
    memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    aligned = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    code = nvrtc.driver().cuTensorMapEncodeTiled(
        c_void_p(aligned),
        c_uint(_UINT8),
        c_uint32(2),
        c_void_p(address),
        (c_uint64 * 2)(inner, rows),
        (c_uint64 * 1)(stride),
        (c_uint32 * 2)(_SWIZZLED_BYTES, box_rows),
        (c_uint32 * 2)(1, 1),
        c_uint(0),
        c_uint(_SWIZZLE_128B),
        c_uint(_PROMOTION_256B),
        c_uint(0),
    )
    nvrtc.check(code)
    return Map(aligned, memory)
