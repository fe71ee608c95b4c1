"""Compare FP8 attention over values that have a mean with float64: with the mean taken off, and left in.

    python -m benchmarks.value_means [--keys 4608 16896 ...] [--ratios 0 0.3 1 3] [--peaks 0.5 1 2] [--json OUT]

One attention of two heads at a time, from the product that makes q, k and v to what the projection behind it reads.
Text rows (512) have a mean of their own. On a GPU the kernels run; elsewhere their definitions, with attention's sums
emulated (accumulator.py), which takes a minute for each 16,000 keys. Three errors of 48 rows, all against exact
attention:

    engine      what the engine computes
    plain       E4M3 arithmetic without an accumulator's error: q, k, v, weights and output rounded, all else exact
    deviation   the same error divided by the distance of attention's output from the mean of v, which is what attention
                has to say. An engine may be right to 1% of its output and wrong to 100% of that.

The last line on stdout is JSON.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accumulator import emulated_attention
from benchmarks.command import report
from benchmarks.surroundings import surroundings
from fluxserve.kernels.attention.fused import Scales, attention, padded
from fluxserve.kernels.fp8 import E4M3, E4M3_MAX, cast, quantise_rows
from fluxserve.kernels.gemm.layers import Centre, Heads, Linear
from fluxserve.kernels.operations import LAUNCHED, PLAIN, Operations

HEADS, DIM, INNER = 2, 128, 512
WIDTH = HEADS * DIM
TEXT, JUDGED = 512, 48
Attention = Callable[[Tensor, int, int, Scales, Tensor, Tensor], None]
"""qkv, rows, heads, scales, out, and the rows of queries that are judged."""


def launched_attention(qkv: Tensor, rows: int, heads: int, scales: Scales, out: Tensor, _: Tensor) -> None:
    """cuDNN's, for all rows."""
    attention(qkv, rows, heads, scales, out)


@dataclass(frozen=True)
class Case:
    """One attention's operands, as an engine has them, and their exact values.

    Attributes:
        x, x_scale: the block's input, E4M3 [rows, INNER] and its scales.
        w: the product that makes q, k and v, in two streams; norms: factors of q's and k's numbers.
        back: the projection behind attention, before its static scale is put into it: [2, WIDTH, WIDTH].
        split: rows of text. judged: rows of queries that errors are taken of.
        v: float64 [rows, WIDTH], exactly what the operands give.
    """

    x: Tensor
    x_scale: Tensor
    w: Linear
    norms: Tensor
    back: Tensor
    split: int
    judged: Tensor
    v: Tensor

    @property
    def rows(self) -> int:
        return len(self.x)


def make(rows: int, ratio: float, peak: float, device: str, seed: int = 0) -> Case:
    """Values of spread 1 whose means are `ratio` spreads, in every channel, of text and of picture; scores of spread
    `peak`."""
    generator = torch.Generator(device).manual_seed(seed + rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    split = min(TEXT, rows // 9)
    x, x_scale = quantise_rows(normal(rows, INNER))
    weight, w_scale = quantise_rows(normal(2, 3 * WIDTH, INNER) * INNER**-0.5)
    bias = torch.zeros(2, 3 * WIDTH, device=device)
    bias[:, 2 * WIDTH :] = ratio * normal(2, WIDTH)
    w = Linear(weight, w_scale, bias)
    norms = torch.ones(2, 3, DIM, device=device)
    norms[:, 0] = peak
    judged = torch.randint(0, rows, (JUDGED,), generator=generator, device=device).unique()
    values = Linear(weight[:, 2 * WIDTH :], w_scale[:, 2 * WIDTH :], bias[:, 2 * WIDTH :])
    back = normal(2, WIDTH, WIDTH) * WIDTH**-0.5
    return Case(x, x_scale, w, norms, back, split, judged, _exact(x, x_scale, values, split))


def _exact(x: Tensor, x_scale: Tensor, w: Linear, split: int) -> Tensor:
    assert w.scale is not None and w.bias is not None
    parts = []
    for stream, rows in ((0, slice(0, split)), (1, slice(split, None))):
        y = (x[rows].double() * x_scale[rows, None].double()) @ w.weight[stream].double().T
        parts.append(y * w.scale[stream].double() + w.bias[stream].double())
    return torch.cat(parts)


def _amax(v: Tensor) -> float:
    """What a static scale is taken of: no less than values of spread 1 reach in some row of some picture."""
    return max(4.0, float(v.abs().max()))


@dataclass(frozen=True)
class Result:
    """attended: float32 [judged, WIDTH], attention's output with the mean that `restored` stands for. qkv: E4M3, as it
    was written. added: float32 [judged, WIDTH], what the projection adds to the residual stream, as E4M3 rows and
    weights give it."""

    attended: Tensor
    qkv: Tensor
    scales: Tensor
    back: Linear
    added: Tensor


def run(case: Case, kernels: Operations, attend: Attention, centred: bool) -> Result:
    """The engine's calls: the product with its heads, attention, and the projection behind it."""
    device, rows = case.x.device, case.rows
    mean = case.v.mean(dim=0) if centred else torch.zeros_like(case.v[0])
    s = [amax / E4M3_MAX for amax in (math.sqrt(DIM) * float(case.norms.max()), math.sqrt(DIM), _amax(case.v - mean))]
    scales = torch.tensor([*s, 1 / s[2]], dtype=torch.float32, device=device)
    weight, back_scale = quantise_rows(case.back * s[2])
    back = kernels.arrange(Linear(weight, back_scale, None))
    centre = None
    if centred:
        due = torch.ones(1, dtype=torch.int32, device=device)
        centre = Centre(back, 1 / s[2], due, torch.zeros(WIDTH, device=device), torch.zeros(2, WIDTH, device=device))
    turn = torch.ones(rows, DIM // 2, device=device), torch.zeros(rows, DIM // 2, device=device)
    heads = Heads(case.norms / scales[:3, None], *turn, centre)
    qkv, out = (torch.zeros(padded(rows, E4M3), n, device=device).to(E4M3) for n in (3 * WIDTH, WIDTH))
    kernels.linear_heads(case.x, case.x_scale, kernels.arrange(case.w), case.split, heads, qkv[:rows])
    attend(qkv, rows, HEADS, scales, out, case.judged)
    residual = torch.zeros(rows, WIDTH, dtype=torch.bfloat16, device=device)
    gate = torch.ones(2, WIDTH, device=device)
    kernels.linear_add(out[:rows], None, back, case.split, gate, residual, centre.restored if centre else None)
    attended = out[case.judged].float() * s[2] + (centre.mean if centre else 0.0)
    return Result(attended, qkv[:rows], scales, Linear(weight, back_scale, None), residual[case.judged].float())


def errors(case: Case, result: Result) -> dict[str, float]:
    """Of the judged rows: engine and plain over the exact output, and both over its deviation; the share by which the
    output is shrunk toward zero."""
    q, k, _ = (part.double() * float(s) for part, s in zip(result.qkv.chunk(3, dim=1), result.scales, strict=False))
    weights, exact = [], []
    for head in (slice(i * DIM, (i + 1) * DIM) for i in range(HEADS)):
        scores = q[case.judged, head] @ k[:, head].T / math.sqrt(DIM)
        weights.append(torch.exp(scores - scores.amax(dim=1, keepdim=True)))
        exact.append(weights[-1] / weights[-1].sum(dim=1, keepdim=True) @ case.v[:, head])
    expected = torch.cat(exact, dim=1)
    deviation = float((expected - case.v.mean(dim=0)).norm())
    plain, plain_centred = (_plain(case.v, weights, mean) for mean in (torch.zeros_like(case.v[0]), case.v.mean(dim=0)))
    off = result.attended.double() - expected

    def norm(x: Tensor) -> float:
        return float((x - expected).norm())

    return {
        "error": norm(result.attended.double()) / float(expected.norm()),
        "plain": norm(plain) / float(expected.norm()),
        "error_over_deviation": norm(result.attended.double()) / max(deviation, 1e-30),
        "plain_over_deviation": norm(plain) / max(deviation, 1e-30),
        "plain_centred_over_deviation": norm(plain_centred) / max(deviation, 1e-30),
        "shrunk": -float((off * expected.sign()).sum() / expected.abs().sum()),
        "projected": _projected(case, result, expected),
    }


def _plain(v: Tensor, weights: list[Tensor], mean: Tensor) -> Tensor:
    """E4M3 arithmetic of v less `mean`, which is added again; sums are exact."""
    scale = _amax(v - mean) / E4M3_MAX
    held = cast(((v - mean) / scale).float(), E4M3).double()
    parts = []
    for i, weight in enumerate(weights):
        sums = cast((weight * E4M3_MAX).float(), E4M3).double() @ held[:, i * DIM : (i + 1) * DIM]
        parts.append(sums / (E4M3_MAX * weight.sum(dim=1, keepdim=True)))
    return cast(torch.cat(parts, dim=1).float(), E4M3).double() * scale + mean


def _projected(case: Case, result: Result, expected: Tensor) -> float:
    """Error of what reaches the residual stream, against the exact output through the projection's own E4M3 weights."""
    assert result.back.scale is not None
    parts = [w.double() * s.double()[:, None] for w, s in zip(result.back.weight, result.back.scale, strict=True)]
    text, picture = (expected / float(result.scales[2]) @ part.T for part in parts)
    wanted = torch.where((case.judged < case.split)[:, None], text, picture)
    return float((result.added.double() - wanted).norm() / wanted.norm())


def measure(rows: int, ratio: float, peak: float, device: str) -> list[dict[str, Any]]:
    """With the mean taken off, and left in."""
    case, on_gpu = make(rows, ratio, peak, device), device != "cpu"
    kernels, attend = (LAUNCHED, launched_attention) if on_gpu else (PLAIN, emulated_attention)
    found = []
    for centred in (True, False):
        figures = errors(case, run(case, kernels, attend, centred))
        row = {"keys": rows, "ratio": ratio, "peak": peak, "mean": "taken off" if centred else "left in"}
        found.append(row | {name: round(value, 5) for name, value in figures.items()})
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[4608, 16896, 33280, 66048])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.3, 1.0, 3.0], help="mean over spread of v")
    parser.add_argument("--peaks", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="spread of the scores")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [
        row
        for keys in args.keys
        for peak in args.peaks
        for ratio in args.ratios
        for row in measure(keys, ratio, peak, args.device)
    ]
    emulated = args.device == "cpu"
    report({"benchmark": "value_means", **surroundings(), "emulated": emulated, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
