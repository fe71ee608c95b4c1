"""Compile every kernel for Hopper, as an engine would launch it; what comes out, as JSON. Needs no GPU.

    python -m tests.kernels.hopper

A process of its own: what Triton's interpreter has taken over can't be compiled any more.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fluxserve.kernels.attention import qk_rope, row_softmax
from fluxserve.kernels.gemm import adaln, layers, portable, saturation, value_means
from fluxserve.kernels.image import group, moments, residual
from fluxserve.kernels.norm import rms

TARGET = GPUTarget("cuda", 90, 32)
FLOAT = {"e4m3": "fp8e4nv", "bf16": "bf16", "fp32": "fp32"}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> dict[str, Any]:
    """Compile; arguments that neither dict names are 32-bit integers. Pointers are aligned, as PyTorch's are."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [
        i for i, n in enumerate(names) if signature[n].startswith("*") or n.endswith(("stride", "columns", "N", "K"))
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if signature[names[i]] != "constexpr"}
    made = triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)
    ptx = made.asm["ptx"]
    return {"shared": made.metadata.shared, "tensor_cores": "wgmma.mma_async" in ptx, **_resources(ptx)}


def _resources(ptx: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(ptx)
        command = [get_ptxas(TARGET.arch).path, "-v", "-arch=sm_90a", "k.ptx", "-o", "k.cubin"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spilled, registers = re.search(r"(\d+) bytes spill stores", said), re.search(r"Used (\d+) registers", said)
    assert spilled and registers, said
    return {"spilled": int(spilled[1]), "registers": int(registers[1])}


BYTES = {"e4m3": 1, "bf16": 2, "fp32": 4}


def linear_kernel(ending: str, dtype: str, out: str, size: tuple[int, int], bare: bool = False) -> dict[str, Any]:
    """`bare`: without gate and bias, as T5 calls it."""
    t = portable.tiling(*size, BYTES[dtype], BYTES[out])
    constants = {
        "ENDING": ending,
        "BM": t.rows,
        "BN": t.columns,
        "BK": t.inner,
        "PARTS": portable.parts(t, ending, BYTES[out]),
        "GROUP": 8,
        "HEAD": 128,
        "GATES": layers.GATES,
        "PROGRAMS": 132,
        "INTERPRETED": False,
    }
    types = {
        "x": f"tensordesc<{FLOAT[dtype]}[{t.rows}, {t.inner}]>",
        "w": f"tensordesc<{FLOAT[dtype]}[{t.columns}, {t.inner}]>",
        "out": f"*{FLOAT[out]}",
        "inverse": "fp32",
        "epsilon": "fp32",
        **dict.fromkeys(("bias", "factors", "cos", "sin", "gate"), "*fp32"),
    }
    quantised = dtype == "e4m3"
    for name in ("x_scale", "w_scale"):
        types[name] = "*fp32"
        if not quantised:
            constants[name] = None
    for name in ("gate", "bias") if bare else ("gate",) if ending != "add" else ():
        constants[name] = None
    for name in ("factors", "cos", "sin") if ending != "heads" else ():
        constants[name] = None
    return compiled(portable._linear_kernel, types, constants, num_warps=t.warps, num_stages=t.stages)


def _split(launched: dict[str, int]) -> dict[str, Any]:
    """Constants of a launch, apart from its options."""
    options = {"num_warps": launched["num_warps"]}
    return {"constants": {name: value for name, value in launched.items() if name not in options}, **options}


def main() -> None:
    found = {}
    for dtype, out in (("e4m3", "bf16"), ("bf16", "bf16")):
        endings = {"none": out, "gelu": dtype, "swiglu": dtype, "add": out, "heads": dtype}
        for ending, result in endings.items():
            for size in ((4608, 9216), (128, 3072)):
                found[f"linear {ending} {dtype} {size[0]}"] = linear_kernel(ending, dtype, result, size)
        for size in ((128, 4096), (512, 4096), (4608, 4096)):
            found[f"linear add {dtype} {size[0]} to float32"] = linear_kernel("add", dtype, "fp32", size, bare=True)
            found[f"linear none {dtype} {size[0]} to float32"] = linear_kernel("none", dtype, "fp32", size)
    pointers = {"x": "*bf16", "data": "*fp8e4nv", "epsilon": "fp32", "smallest": "fp32"}
    floats = dict.fromkeys(("shift", "scale", "row_scale", "weight", "bias", "taken", "statistics", "offset"), "*fp32")
    constants: dict[str, Any] = {"E4M3_LARGEST": 448.0, "BLOCK": 4096}
    for gate in ("", "gelu", "silu"):
        own = (
            constants
            | {"INTERPRETED": False, "GATE": gate, "BLOCK": 16384 if gate else 4096}
            | ({"weight": None} if gate else {})
        )
        found[f"rows gate={gate}"] = compiled(rms._rows_kernel, pointers | floats, own, num_warps=8)
    turned = {"x": "*bf16", "epsilon": "fp32", **dict.fromkeys(("weights", "cos", "sin"), "*fp32")}
    own = {"QUERIES": 32, "HEADS": 40, "PADDED": 64, "HALF": 64}
    found["turn"] = compiled(qk_rope._turn_kernel, turned, own, num_warps=8)
    own = {"BM": 32, "BN": 64, "BK": 128, "WIDEN": False}
    weights = {"x": "*bf16", "w": "*i8", "w_scale": "*fp32", "bias": "*fp32", "out": "*fp32"}
    found["modulation"] = compiled(adaln._modulation_kernel, weights, own, num_warps=4, num_stages=4)
    pictures = {"x": "*bf16", "y": "*bf16", "out": "*bf16", "epsilon": "fp32", **floats}
    for channels in (128, 512):
        shared = moments.constants_of(channels, 32, moments._TILE)
        found[f"statistics {channels}"] = compiled(moments._statistics_kernel, pictures, **_split(shared))
        shared = moments.constants_of(channels, 32, group._TILE) | {"SILU": True}
        found[f"group_norm {channels}"] = compiled(group._apply_kernel, pictures, **_split(shared))
        shared = moments.constants_of(channels, 32, residual._TILE)
        found[f"add {channels}"] = compiled(residual._add_kernel, pictures, **_split(shared))
        own = {"CHANNELS": channels, "PADDED": channels, "ROWS": residual._TILE // channels}
        found[f"add_upsampled {channels}"] = compiled(residual._upsampled_kernel, pictures, own, num_warps=8)
    means = {
        "x": "*fp8e4nv",
        "w": "*fp8e4nv",
        **dict.fromkeys(("x_scale", "sums", "vector", "w_scale", "bias", "out"), "*fp32"),
        "due": "*i32",
    }
    found["sums"] = compiled(value_means._sums_kernel, means, {"ROWS": 32, "COLUMNS": 128}, num_warps=4)
    own = {"STREAMS": 2, "OUTPUTS": 16, "COLUMNS": 128}
    found["products"] = compiled(value_means._products_kernel, means | {"factor": "fp32"}, own, num_warps=4)
    own = {"SAMPLE": layers.SAMPLE, "LIMIT": saturation._LIMIT, "BLOCK": 1024}
    found["saturation"] = compiled(saturation._count_kernel, {"x": "*u8", "counts": "*i64"}, own, num_warps=4)
    scores = {"scores": "*fp32", "weights": "*bf16", "factor": "fp32"}
    found["softmax"] = compiled(row_softmax._softmax_kernel, scores, {"BLOCK": row_softmax._BLOCK}, num_warps=8)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
