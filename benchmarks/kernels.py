"""Every kernel at FLUX.1's shapes beside what it could cost at least: bytes it must move, operations it must do.

    python -m benchmarks.kernels [--only linear] [--tilings] [--json OUT]

The two ceilings are measured first: a large copy, and cuBLASLt's FP8 product of the same shape. Each kernel is captured
in a graph and replayed over several sets of buffers, so that nothing is found in the L2 cache that a real step would
not find there. --tilings tries other tiles for Triton's products. The last line on stdout is JSON.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.command import report
from benchmarks.surroundings import surroundings
from benchmarks.timing import replayed
from fluxserve.families.flux.models import FLUX1_DEV
from fluxserve.kernels.attention.fused import attention, padded
from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.gemm import portable as linears
from fluxserve.kernels.gemm.adaln import modulation
from fluxserve.kernels.gemm.layers import Heads, Linear
from fluxserve.kernels.gemm.portable import Tiling
from fluxserve.kernels.image.group import group_norm
from fluxserve.kernels.norm.modulated import norm
from fluxserve.kernels.operations import LAUNCHED

TEXT = FLUX1_DEV.text.sequence.tokens
ROWS = TEXT + FLUX1_DEV.image_tokens(1024, 1024)
D, DIM = FLUX1_DEV.transformer.hidden_size, FLUX1_DEV.transformer.attention_head_dim
HEADS = FLUX1_DEV.transformer.num_attention_heads
_SETS = 3

TILINGS = [
    Tiling(128, 256, 128, 8, 3),
    Tiling(128, 256, 128, 8, 4),
    Tiling(128, 128, 128, 4, 3, resident=2),
    Tiling(128, 128, 128, 8, 5),
    Tiling(64, 256, 128, 4, 4),
]

Case = tuple[str, Callable[[int], object], float, float]
"""Name, launch over one of _SETS sets of buffers, bytes, operations."""


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> Tensor:
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * spread
    return x.to(dtype)


def sets(make: Callable[[], Tensor]) -> list[Tensor]:
    return [make() for _ in range(_SETS)]


def products() -> Iterator[Case]:
    """The four products of a double block and the three of a single one."""
    scale = torch.rand(ROWS, device="cuda")
    angle = torch.randn(ROWS, DIM // 2, device="cuda")
    for streams, split in ((2, TEXT), (1, 0)):
        heads = Heads(torch.ones(streams, 3, DIM, device="cuda"), angle.cos(), angle.sin())
        gate = torch.rand(streams, D, device="cuda")
        shapes = {"heads": (3 * D, D), "gelu": (4 * D, D), "add": (D, 4 * D if streams == 2 else 5 * D)}
        if streams == 2:
            shapes["add, attention"] = (D, D)
        for name, (columns, inner) in shapes.items():
            x = sets(partial(draw, ROWS, inner, dtype=E4M3))
            weights = [_linear(streams, columns, inner) for _ in range(_SETS)]
            wide = name in ("heads", "gelu")
            out = sets(partial(draw, ROWS, columns, dtype=E4M3 if wide else torch.bfloat16))
            ending = name.split(",")[0]

            def launch(
                i: int,
                w: list[Linear],
                ending: str = ending,
                x: list[Tensor] = x,
                out: list[Tensor] = out,
                heads: Heads = heads,
                gate: Tensor = gate,
                split: int = split,
            ) -> None:
                if ending == "heads":
                    LAUNCHED.linear_heads(x[i], scale, w[i], split, heads, out[i])
                elif ending == "gelu":
                    LAUNCHED.linear_gelu(x[i], scale, w[i], split, 20.0, out[i])
                else:
                    LAUNCHED.linear_add(x[i], None, w[i], split, gate, out[i])

            moved = x[0].nbytes + weights[0].weight.nbytes + out[0].nbytes * (1 if wide else 2)
            ours = [LAUNCHED.arrange(w) for w in weights]
            yield f"{name}, {streams} streams", partial(launch, w=ours), moved, 2 * ROWS * columns * inner
            yield f"{name}, {streams} streams, Triton", partial(launch, w=weights), moved, 2 * ROWS * columns * inner


def _linear(streams: int, columns: int, inner: int) -> Linear:
    weight = draw(streams, columns, inner, dtype=E4M3, spread=0.05)
    return Linear(weight, torch.rand(streams, columns, device="cuda"), torch.rand(streams, columns, device="cuda"))


def others() -> Iterator[Case]:
    x, normed = sets(lambda: draw(ROWS, D)), sets(lambda: draw(ROWS, D, dtype=E4M3))
    row_scale, shift = torch.empty(ROWS, device="cuda"), torch.rand(2, D, device="cuda")
    yield (
        "norm",
        lambda i: norm(x[i], shift, shift, TEXT, normed[i], row_scale),
        x[0].nbytes + normed[0].nbytes,
        0,
    )
    memory, ones = padded(ROWS, E4M3), torch.ones(4, device="cuda")
    qkv, attended = sets(lambda: draw(memory, 3 * D, dtype=E4M3)), sets(lambda: draw(memory, 5 * D, dtype=E4M3))
    operations = 4 * ROWS**2 * D
    yield "attention", lambda i: attention(qkv[i], ROWS, HEADS, ones, attended[i][:, :D]), qkv[0].nbytes, operations
    rows = 344 * D
    weight = torch.randint(-127, 128, (rows, D), dtype=torch.int8, device="cuda")
    scale, steps = torch.rand(rows, device="cuda"), draw(28, D)
    out = torch.empty(28, rows, device="cuda")
    yield "modulation, 28 steps", lambda _: modulation(steps, weight, scale, scale, out), weight.nbytes + out.nbytes, 0
    picture = draw(1, 128, 1024, 1024).contiguous(memory_format=torch.channels_last)
    factor = torch.rand(128, device="cuda")
    yield (
        "group_norm, 1024² × 128",
        lambda _: group_norm(picture, 32, factor, factor, 1e-6, True),
        3 * picture.nbytes,
        0,
    )


def library_product(columns: int, inner: int) -> float:
    """Milliseconds of cuBLASLt's product of this shape, without an ending."""
    x, w = sets(lambda: draw(ROWS, inner, dtype=E4M3)), sets(lambda: draw(columns, inner, dtype=E4M3))
    one = torch.ones((), device="cuda")

    def launch() -> None:
        for a, b in zip(x, w, strict=True):
            torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return replayed(launch) / _SETS


def milliseconds(launch: Callable[[int], object]) -> float:
    return replayed(lambda: [launch(i) for i in range(_SETS)]) / _SETS


def row(case: Case, copy_rate: float, **more: object) -> dict[str, object]:
    name, launch, moved, operations = case
    spent = milliseconds(launch)
    result = {"kernel": name, "us": round(1000 * spent, 1), "gb_s": round(moved / spent / 1e6)}
    result["of_copy"] = round(moved / spent / 1e6 / copy_rate, 2)
    if operations:
        result["tflops"] = round(operations / spent / 1e9)
    result |= more
    print("  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    return result


def measure(only: str, tilings: bool) -> list[dict[str, object]]:
    big = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(big)
    copy_rate = 2 * big.nbytes / replayed(lambda: target.copy_(big)) / 1e6
    found: list[dict[str, object]] = [{"kernel": "copy", "gb_s": round(copy_rate)}]
    if only in ("", "library"):
        for columns, inner in ((3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (D, 5 * D)):
            spent = library_product(columns, inner)
            rate = round(2 * ROWS * columns * inner / spent / 1e9)
            found.append({"kernel": f"cuBLASLt {columns} × {inner}", "us": round(1000 * spent, 1), "tflops": rate})
            print(found[-1], flush=True)
    for case in itertools.chain(products(), others()):
        if only not in case[0]:
            continue
        found.append(row(case, copy_rate))
        for tiling in TILINGS if tilings and case[0].endswith("Triton") else []:
            with mock.patch.object(linears, "tiling", lambda *_, t=tiling: t):
                try:
                    found.append(row(case, copy_rate, tiling=str(tiling)))
                except OutOfResources as error:  # which is a result, too
                    found.append({"kernel": case[0], "tiling": str(tiling), "refused": str(error)[:200]})
                    print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose names hold this")
    parser.add_argument("--tilings", action="store_true", help="try other tiles for Triton's products")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {"benchmark": "kernels", **surroundings(), "kernels": measure(args.only, args.tilings)}
    report(result, args.json)


if __name__ == "__main__":
    main()
