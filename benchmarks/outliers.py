"""What E4M3 loses to outliers and to peaked scores, and its accumulator to means; on any machine.

    python -m benchmarks.outliers [--json OUT]

Products: rows of 4,096 numbers of spread 1, of which 4 are `factor` times as large, are multiplied with weights of
spread 1; both take a scale from each row. The error is taken of the whole product, and of a product whose weights are 0
for the outliers, so that only the small numbers count: T5, Qwen3, hidden layers and massive channels look like this.

Attention: q and k of RMSNorm with weights such that scores have a spread of `peak`, in E4M3 with a static scale and a
headroom of 2, against float64; v is exact. The error is relative to attention's distance from the mean of v, as export
measures it. One row of numbers is for norms whose weights are equal, another for weights that differ by channel.

Accumulator: a product of E4M3's values, added up as Hopper's tensor cores do (accumulator.py) and as gemm.hopper has
them do, against its exact sum. Inputs are behind GELU, with outliers of 1 or 100; each row of weights has a mean of
`mean` of its spread, and all have the same sign.

The last line on stdout is JSON.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from fluxserve_export.metrics import relative_error
from torch import Tensor
from torch.nn.functional import gelu

from benchmarks.accumulator import accumulated
from benchmarks.command import report
from benchmarks.surroundings import surroundings
from fluxserve.engines.fused.scales import static
from fluxserve.kernels.fp8 import E4M3, cast, quantise_rows

FACTORS = (1, 10, 100, 1000, 10_000, 100_000)
PEAKS = (0.5, 1, 2, 4, 8)
ROWS, INNER, OUTPUTS, OUTLIERS = 256, 4096, 512, 4
QUERIES, KEYS, DIM = 128, 4608, 128
INNERS, MEANS, PRODUCTS = (3 * 1024, 15 * 1024, 32 * 1024), (0.0, 0.1, 0.3, 1.0), 64
_NORM_SPREAD = 0.3
"""Of the logarithm of the norms' weights, where they differ."""


def product_errors(factor: float) -> dict[str, float]:
    """Relative errors of a product: whole, and with weights that leave the outliers out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, INNER, generator=generator)
    x[:, :OUTLIERS] *= factor
    weight = torch.randn(OUTPUTS, INNER, generator=generator)
    without = weight.clone()
    without[:, :OUTLIERS] = 0
    return {"whole": _product_error(x, weight), "small numbers": _product_error(x, without)}


def _product_error(x: Tensor, weight: Tensor) -> float:
    held = [rows.double() * scale[:, None].double() for rows, scale in map(quantise_rows, (x, weight))]
    return relative_error(held[0] @ held[1].T, x.double() @ weight.double().T)


def attention_error(peak: float, uneven: bool) -> float:
    """‖got − exact‖ / ‖exact − mean of v‖."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def normed(rows: int) -> Tensor:
        x = normal(rows, DIM)
        weight = torch.exp(_NORM_SPREAD * normal(DIM)) if uneven else torch.ones(DIM, dtype=torch.float64)
        return x / x.square().mean(dim=1, keepdim=True).sqrt() * weight

    q, k, v = normed(QUERIES), normed(KEYS), normal(KEYS, DIM)
    q = q * (peak / float((q @ k.T / math.sqrt(DIM)).std()))
    exact, got = (torch.softmax(a @ b.T / math.sqrt(DIM), dim=1) @ v for a, b in ((q, k), (_rounded(q), _rounded(k))))
    return relative_error(got - v.mean(dim=0), exact - v.mean(dim=0))


def _rounded(x: Tensor) -> Tensor:
    scale = static(float(x.abs().max()))
    return cast((x / scale).float(), E4M3).double() * scale


def accumulator_errors(inner: int, mean: float, factor: float) -> dict[str, float]:
    """Relative error of the sums, and the share that they are shrunk by."""
    generator = torch.Generator().manual_seed(inner)
    x = gelu(torch.randn(PRODUCTS, inner, generator=generator))
    x[:, :: inner // OUTLIERS] *= factor
    weight = torch.randn(PRODUCTS, inner, generator=generator) + mean
    left, right = (quantise_rows(rows)[0].double() for rows in (x, weight))
    exact = left @ right.T
    got = accumulated(left, right.T)
    return {"error": relative_error(got, exact), "shrunk": 1 - float((got * exact).sum() / exact.square().sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    products: list[dict[str, Any]] = [{"factor": factor, **product_errors(factor)} for factor in FACTORS]
    scores: list[dict[str, Any]] = [
        {"peak": peak, "even": attention_error(peak, False), "uneven": attention_error(peak, True)} for peak in PEAKS
    ]
    sums: list[dict[str, Any]] = [
        {"inner": inner, "mean": mean, "factor": factor, **accumulator_errors(inner, mean, factor)}
        for inner, mean, factor in itertools.product(INNERS, MEANS, (1, 100))
    ]
    for row in products + scores + sums:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    found = {"products": products, "attention": scores, "accumulator": sums}
    report({"benchmark": "outliers", **surroundings(), **found}, args.json)


if __name__ == "__main__":
    main()
