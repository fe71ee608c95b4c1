"""What products take besides their rows: weights, and what becomes of attention's heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RMS_EPSILON = 1e-6
GATES = 32
"""So many gates of SwiGLU, then as many values: see `in_turns`."""


@dataclass(frozen=True)
class Linear:
    """weight: [streams, N, K], E4M3 or the compute dtype; scale, bias: float32 [streams, N] (scale None: all 1)."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Arranged(Linear):
    """A Linear whose weights lie as `gemm.hopper` wants them; scales and bias stay in the order of the outputs."""


@dataclass(frozen=True)
class Centre:
    """The buffers that carry the mean of v around E4M3 attention.

    Attention's weights add up to 1, so attention of v − m, plus m, equals attention of v for any m. `linear_heads`
    takes a mean off v before it rounds v, and `linear_add` adds what the projection behind attention makes of that mean
    to the projection's bias. Rounding then spends E4M3's bits on what differs between rows, and no sum over keys has
    terms that all pull one way (docs/quality.md has the measurements).

    Attributes:
        back: the projection that reads attention's output as the first heads · head_dim of its inputs.
        inverse: 1 / s_out, by which attention's output is multiplied before it is rounded.
        due: int32 [1], whether `linear_heads` computes the mean over all rows anew before it takes it off.
        mean: float32 [heads · head_dim].
        restored: float32 [streams of `back`, outputs].
    """

    back: Linear
    inverse: float
    due: Tensor
    mean: Tensor
    restored: Tensor


@dataclass(frozen=True)
class Heads:
    """What becomes of q, k and v.

    factors: float32 [streams, 3, head_dim], what each number is multiplied with: RMSNorm's weights of q and of k, 1 for
    v, each over its static scale. cos, sin: float32 [rows, head_dim / 2]. The two numbers that RoPE turns stand half a
    head apart, here and in the weights: see `in_halves`. centre: None leaves the mean of v where it is.
    """

    factors: Tensor
    cos: Tensor
    sin: Tensor
    centre: Centre | None = None


@dataclass(frozen=True)
class Watched:
    """E4M3 rows in which values at the limit are counted: those of ±448, and NaN.

    Attributes:
        rows: up to two tensors [rows, columns] of any row stride; every SAMPLE-th row is read.
        counts: int64, one number for each tensor, added to.
    """

    rows: Sequence[Tensor]
    counts: Tensor


SAMPLE = 31
"""Rows from one that is read for `Watched` to the next. It is odd, so that the rows fall on all columns of a
picture."""


def in_halves(head_dim: int) -> Tensor:
    """Where each number of a head comes from: first of every pair, then second of every pair.

    FLUX rotates neighbours. Attention does not mind the order of numbers in a head as long as q and k have the same,
    and a kernel writes two runs of half a head faster than it weaves them together.
    """
    return torch.arange(head_dim).view(-1, 2).T.flatten()


def in_turns(width: int) -> Tensor:
    """Where each output of a gated product comes from, of so many gates and, behind them, as many values.

    GATES gates, then the values that they are multiplied with, and so on: whoever has a tile of the product has both,
    and in hopper.cu even one thread has. Raises ValueError if the width is not a multiple of GATES.
    """
    if width % GATES:
        raise ValueError(f"an MLP that is {width} wide: expected a multiple of {GATES}")
    return torch.arange(2 * width).view(2, -1, GATES).transpose(0, 1).flatten()


def divided(w: Linear, at: int) -> tuple[Linear, Linear]:
    """Of one stream: its outputs before `at`, and those from there on."""
    assert w.weight.shape[0] == 1, "one stream"

    def part(outputs: slice) -> Linear:
        scale, bias = (None if t is None else t[:, outputs] for t in (w.scale, w.bias))
        return Linear(w.weight[:, outputs], scale, bias)

    return part(slice(0, at)), part(slice(at, None))
