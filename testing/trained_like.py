"""Random weights of a FLUX transformer with what training leaves in a network, to show what FP8 loses there.

Merely random numbers have no means and no outliers, and every rounding suits them. This module adds:

- Massive channels of the residual stream. Few channels are tens of times a typical one, with one sign for all tokens
  (massive activations: Sun et al. 2024, arXiv 2402.17762).
- Outliers of hidden layers. Few features are far above the others, and the weights behind them are small (Dettmers et
  al. 2022, arXiv 2208.07339; SmoothQuant, arXiv 2211.10438; for FLUX's activations SVDQuant, arXiv 2411.05007).
- Peaked scores. The weights of q's and k's norms are above 1 and differ by channel (QK-normalisation in SD3, arXiv
  2403.03206, and FLUX's published architecture).
- Means of values. A tenth of v's energy is in its static mean on this repository's trained model, so that the mean is a
  third of the spread (benchmarks/results/value-means-cpu-2026-11-22.txt). adaLN's shift is the same for every row: its
  part of the mean moves with the noise level, and in FLUX.1 with the pooled prompt.

Biases hold in FLUX.1 what is constant. FLUX.2 has no biases: a few steady channels have shifts that keep their sign,
the first block's outliers read these channels, and write the massive channels.

Rounding must not grow from layer to layer, because in a trained network it does not either. Gates therefore leave each
block a small share of the stream, and weights behind a norm restore what the massive channels take from typical ones.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import silu

_HEAD = 128
"""Each head has this many channels."""

# Massive channels: 30 to 100 times a typical channel in every block, as in arXiv 2402.17762.
_MASSIVE = 75.0
"""A massive channel holds this, where a typical channel's spread begins with 1."""
_MASSIVE_TEXT = 0.85
"""A massive channel of FLUX.1's text holds this share, because the means of text and picture differ."""
_WIDTH_OF_MASSIVE = 1024
"""A stream has a massive channel for each such width."""
_TYPICAL = {True: 1.5, False: 1.2}
"""A typical channel's energy has grown to this halfway through the blocks, with biases and without."""

# Outliers: 50 to 100 times the other features, as in arXiv 2208.07339 and 2411.05007, before columns that are small.
_OUTLIER = 60.0
"""An outlier is about this large; the other features' root mean square is below 1."""
_OUTLIER_COLUMN = 1 / 80
"""Weights behind an outlier keep this share: SmoothQuant (arXiv 2211.10438) moves scale between the two."""
_OUTLIER_ROW = {True: 6.0, False: 0.5}
"""An outlier varies with the token by this factor, with biases and without: SwiGLU multiplies two such numbers."""
_WIDTH_OF_OUTLIER = 768
"""A hidden layer has an outlier for each such width."""
_WRITERS = 8
"""FLUX.2's massive channels are written by at least this number of outliers, so that their roundings even out."""

# Peaked scores: between 1 and 4 behind the root of the head's width, by the norms of arXiv 2403.03206.
_SCORES = (1.5, 3.4)
"""A block's scores spread between these over keys, if nothing is common to all keys."""
_NORMS = 0.3
"""The logarithm of a norm's weights spreads by this over channels."""

# Means of v: a third of the spread on the trained model, and up to the spread here, so that a loss is seen.
_VALUE_BIAS, _VALUE_CONSTANT = 0.35, {True: 0.3, False: 0.35}
"""FLUX.1's bias, and constant channels with biases and without, give v's mean these shares of v's spread."""
_BEGINNING = 1.6
"""Constant channels give the mean more by this factor in FLUX.2's first block, which reads no massive channels."""
_HEADS = 0.3
"""The logarithm of a head's factor on the mean is at most this."""

# adaLN. Its shift is common to all rows, so that it moves v's mean.
_SHIFT, _SCALE, _GATE = 0.2, 0.25, {True: 1.4, False: 1.0}
"""adaLN's parts spread by these over channels as the step wants; gates do by this over the root of all branches."""
_SHIFT_BIAS, _GATE_BIAS, _TOKEN_BIAS = 0.15, 0.8, 0.2
"""FLUX.1's biases of shifts, of gates over the root of all branches, and of embedded tokens spread by these."""
_SILU = 0.6
"""Numbers whose spread is 1 have this root mean square behind SiLU."""
_EMBEDDED, _EMBEDDED_BIAS = {"timestep_embedder": 0.6, "guidance_embedder": 0.3, "text_embedder": 0.3}, 0.5
"""FLUX.1's embedding of step and prompt has parts of these spreads, and a constant part of the last one."""
_SLOW = 600.0
"""Sines of the noise level count less, the faster they turn: less by half at the frequency that is one over this.
bfloat16 rounds a thousand times the guidance to a multiple of 16, which turns fast sines anywhere."""

# Steady channels of FLUX.2.
_STEADY, _STEADY_TOKENS = 8, 0.1
"""At least this number of channels is steady, and embedded tokens keep the share behind it there."""
_STEADY_SHIFT, _STEADY_GATE = 3.0, 0.35
"""Steady channels are shifted by the first, and the massive ones are written through the other as their gate."""
_STEADY_NOISE, _STEADY_DRIFT = (1.0, 0.6), 0.05
"""Shift and gate are larger by this share at the first noise level, and smaller at the other."""

_FREQUENCIES = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
_PARTS = {6: ("shift", "scale", "gate", "shift", "scale", "gate"), 3: ("shift", "scale", "gate"), 2: ("scale", "shift")}
"""diffusers orders adaLN's parts like this: in a double block's stream, in a single block, in the last norm."""
_BLOCK = re.compile(r"(?:single_)?transformer_blocks\.\d+(?:\.ff_context)?")

Rule = TypeVar("Rule")
Draw = Callable[[str, torch.Size], Tensor]
"""It takes a weight's name and shape, and returns random bfloat16 numbers of spread 1, which the caller may change."""


class TrainedLike:
    """The weights of one transformer, which are found by name and are bfloat16.

    Args:
        width: channels of the residual stream.
        branches: how often a token's stream is added to.
        biased: whether linears have biases, as in FLUX.1.
    """

    def __init__(self, width: int, branches: int, biased: bool, draw: Draw) -> None:
        self._width, self._biased, self._draw = width, biased, draw
        self._hidden = width * (4 if biased else 3)
        self._branch = branches**-0.5
        few = max(1, round(width / _WIDTH_OF_MASSIVE))
        self._massive = _spread_out(few, width)
        steady = 0 if biased else max(_STEADY, width // _HEAD) - few
        self._steady = torch.cat([self._massive, _spread_out(steady, width) + 1])
        signs = 1.0 - 2.0 * (torch.arange(len(self._steady)) % 2)
        self._massive_values = _MASSIVE * signs[:few]
        self._shifts = _STEADY_SHIFT * signs * _uneven("shifts", len(signs))
        self._norm = math.sqrt(_TYPICAL[biased] + few * _MASSIVE**2 / width)
        self._restores = self._norm / math.sqrt(_TYPICAL[biased])
        self._matrices: Mapping[str, Callable[[str, Tensor], None]] = {
            r"(timestep|guidance)_embedder\.linear_1": self._sines,
            r"text_embedder\.linear_1": self._usual,
            r"(timestep|guidance|text)_embedder\.linear_2": self._embedding,
            r"(norm(1|1_context|_out)?|\w+_modulation(_img|_txt)?)\.linear": self._modulation,
            r"(x|context)_embedder": self._tokens,
            r"attn\.(to_[qkv]|add_[qkv]_proj|to_qkv_mlp_proj)|proj_mlp|net\.0\.proj|linear_in": self._reading,
            r"attn\.(to_out(\.0)?|to_add_out)|net\.2|linear_out|\d+\.proj_out": self._writing,
            r"proj_out": self._reading,
        }
        self._vectors: Mapping[str, Callable[[str, int], Tensor]] = {
            r"attn\.norm_(added_)?[qk]\.weight": self._norms,
            r"(x|context)_embedder\.bias": self._token_bias,
            r"attn\.(to_v|add_v_proj)\.bias": self._value_bias,
            r"(proj_mlp|net\.0\.proj)\.bias": self._outlier_bias,
            r"timestep_embedder\.linear_2\.bias": self._embedding_bias,
            r"\d+\.norm\w*\.linear\.bias": self._modulation_bias,
            r"bias": self._no_bias,
        }

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """Draw the weight or the bias of this name, on the device that `draw` uses or on the CPU."""
        if len(shape) == 1:
            return _rule(self._vectors, name)(name, shape[0]).bfloat16()
        weight = self._draw(name, shape)
        _rule(self._matrices, name.removesuffix(".weight"))(name, weight)
        return weight

    # --- what steers the blocks -------------------------------------------------------------------------------------

    def _usual(self, _: str, weight: Tensor) -> None:
        """Keep a layer's output as wide as its input."""
        weight.mul_(weight.shape[1] ** -0.5)

    def _sines(self, _: str, weight: Tensor) -> None:
        """Let slow sines count more, so that the embedding drifts along a trajectory and does not jump."""
        shares = 1 / (1 + _SLOW * _FREQUENCIES)
        weight.mul_(_like((shares / shares.norm()).repeat(2), weight))

    def _embedding(self, name: str, weight: Tensor) -> None:
        part = _EMBEDDED[name.split(".")[1]] if self._biased else 1.0
        weight.mul_(part / _SILU * self._width**-0.5)

    def _modulation(self, _: str, weight: Tensor) -> None:
        """Scale adaLN's parts, and hold FLUX.2's steady channels in those of double blocks."""
        parts = _PARTS[len(weight) // self._width]
        spreads = {"shift": _SHIFT / self._restores, "scale": _SCALE, "gate": _GATE[self._biased] * self._branch}
        held = not self._biased and len(parts) == len(_PARTS[6])
        for index, (part, rows) in enumerate(zip(parts, weight.chunk(len(parts)), strict=True)):
            rows.mul_(spreads[part] / _SILU * self._width**-0.5)
            if part == "scale":  # else the massive channels would follow the step
                rows[self._steady] *= 0.2
            elif held and part == "shift":
                self._hold(rows, self._steady, self._shifts)
            elif held and index == len(parts) - 1:
                self._hold(rows, self._massive, torch.full(self._massive.shape, _STEADY_GATE))

    def _hold(self, rows: Tensor, channels: Tensor, level: Tensor) -> None:
        """Change a modulation's rows as little as gives outputs about `level`, which drift with the noise level."""
        wanted = level[:, None] * torch.tensor([1 + _STEADY_DRIFT, 1 - _STEADY_DRIFT], dtype=torch.float64)
        rows[channels] *= 0.1  # else the outputs would be held at those two levels alone
        missing = wanted - rows[channels].cpu().double() @ self._steering
        rows[channels] += _like(missing @ self._steering.pinverse(), rows)

    @cached_property
    def _steering(self) -> Tensor:
        """Return the inputs of FLUX.2's modulations at two noise levels, [width, 2].

        They are float64 on the CPU, so that the same bytes are written on every device.
        """
        angles = 1000 * _FREQUENCIES[:, None] * torch.tensor(_STEADY_NOISE, dtype=torch.float64)
        x = torch.cat([torch.cos(angles), torch.sin(angles)])
        for layer in ("linear_1", "linear_2"):
            weight = self(f"time_guidance_embed.timestep_embedder.{layer}.weight", torch.Size((self._width, len(x))))
            x = silu(weight.cpu().double() @ x)
        return x

    # --- what reads and writes the stream ---------------------------------------------------------------------------

    def _tokens(self, name: str, weight: Tensor) -> None:
        self._usual(name, weight)
        if not self._biased:
            weight[self._steady] *= _STEADY_TOKENS

    def _begins(self, name: str) -> bool:
        """Say whether a layer is of the block that writes the massive channels, which FLUX.1's embedders write."""
        return not self._biased and name.startswith("transformer_blocks.0.")

    def _constant(self, name: str) -> Tensor:
        """Return the constant part of a layer's normed and shifted input: few channels, and 0 in all others."""
        constant = torch.zeros(self._width)
        if not self._begins(name):
            constant[self._massive] = self._massive_values / self._norm
        if not self._biased and name.startswith("transformer_blocks"):
            constant[self._steady] += self._shifts
        return constant

    def _reading(self, name: str, weight: Tensor) -> None:
        """Scale what reads normed tokens: columns of constant channels are small, and give outputs a mean."""
        constant, begins = self._constant(name), self._begins(name)
        restores = 1.0 if begins else self._restores
        weight.mul_(restores * self._width**-0.5)
        mean = torch.full((len(weight), 1), _VALUE_CONSTANT[self._biased] * (_BEGINNING if begins else 1.0))
        if (values := self._values(name)) is not None:
            mean[values : values + self._width, 0] *= self._of_heads(name)
        share = mean * self._width**0.5 / (restores * constant.norm())
        weight[:, constant.nonzero().flatten()] *= _like(share, weight)
        if re.search(r"to_qkv_mlp_proj|proj_mlp|net\.0\.proj|linear_in", name):
            self._read_constant(name, weight, constant)

    def _values(self, name: str) -> int | None:
        """Return the row at which those of v begin, or None if a layer has none."""
        if "to_qkv_mlp_proj" in name:
            return 2 * self._width
        return 0 if re.search(r"\.(to_v|add_v_proj)\.", name) else None

    def _of_heads(self, name: str) -> Tensor:
        """Draw each head's share of the means, repeated for the head's channels."""
        uniform = torch.rand(self._width // _HEAD, generator=_generator(f"heads of {name}"))
        return torch.exp(_HEADS * (2 * uniform - 1)).repeat_interleave(_HEAD)

    def _outliers(self, name: str) -> Tensor:
        """Draw the outliers of the hidden layer that a linear gives or reads."""
        block = _BLOCK.match(name)
        assert block, name
        count = max(_WRITERS if self._begins(name) else 1, self._hidden // _WIDTH_OF_OUTLIER)
        return torch.randperm(self._hidden, generator=_generator(block.group()))[:count]

    def _read_constant(self, name: str, weight: Tensor, constant: Tensor) -> None:
        """Have outliers read their level from the constant channels; FLUX.1's have the other half from a bias."""
        begin, factors = (3 * self._width if "to_qkv_mlp_proj" in name else 0), (1 if self._biased else 2)
        level = _OUTLIER / 2 if self._biased else math.sqrt(_OUTLIER)
        at, outliers = constant.nonzero().flatten(), self._outliers(name)
        for factor in range(factors):  # SwiGLU's gate and value
            rows = begin + factor * self._hidden + outliers
            weight[rows] *= _OUTLIER_ROW[self._biased]
            read = constant[at] * _uneven(f"{factor} of {name}", len(rows), len(at))
            weight[rows[:, None], at] = _like(level * read / (read @ constant[at])[:, None], weight)

    def _writing(self, name: str, weight: Tensor) -> None:
        """Scale what writes to the stream: columns behind outliers are small, but where they write massive channels."""
        self._usual(name, weight)
        begin = weight.shape[1] - self._hidden
        if begin < 0:  # attention alone
            return
        columns = begin + self._outliers(name)
        weight[:, columns] *= _OUTLIER_COLUMN
        if self._begins(name):
            shares = _uneven(name, len(self._massive), len(columns))
            shares *= (self._massive_values / (_STEADY_GATE * _OUTLIER) / shares.sum(dim=1))[:, None]
            weight[self._massive[:, None], columns] = _like(shares, weight)

    # --- vectors ----------------------------------------------------------------------------------------------------

    def _norms(self, name: str, size: int) -> Tensor:
        """Draw weights of q's or k's norm, about the root of the spread that the block's scores have."""
        least, most = _SCORES
        place = float(torch.rand(1, generator=_generator(f"scores of {name.rpartition('.attn')[0]}")))
        return math.sqrt(least * (most / least) ** place) * torch.exp(_NORMS * _numbers(name, size) - _NORMS**2)

    def _token_bias(self, name: str, size: int) -> Tensor:
        bias = _TOKEN_BIAS * _numbers(name, size)
        bias[self._massive] = self._massive_values * (_MASSIVE_TEXT if name.startswith("context") else 1.0)
        return bias

    def _value_bias(self, name: str, size: int) -> Tensor:
        return _VALUE_BIAS * self._of_heads(name) * _numbers(name, size)

    def _outlier_bias(self, name: str, size: int) -> Tensor:
        return torch.zeros(size).index_fill(0, self._outliers(name), _OUTLIER / 2)

    def _embedding_bias(self, name: str, size: int) -> Tensor:
        return _EMBEDDED_BIAS * _numbers(name, size)

    def _modulation_bias(self, name: str, size: int) -> Tensor:
        spreads = {"shift": _SHIFT_BIAS / self._restores, "scale": 0.0, "gate": _GATE_BIAS * self._branch}
        parts = torch.tensor([spreads[part] for part in _PARTS[size // self._width]])
        return parts.repeat_interleave(self._width) * _numbers(name, size)

    def _no_bias(self, _: str, size: int) -> Tensor:
        return torch.zeros(size)


def _rule(rules: Mapping[str, Rule], name: str) -> Rule:
    """Find the first rule whose pattern is how the name ends."""
    return next(rule for pattern, rule in rules.items() if re.search(rf"(^|\.)({pattern})$", name))


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _numbers(name: str, size: int) -> Tensor:
    return torch.randn(size, generator=_generator(name))


def _uneven(name: str, *shape: int) -> Tensor:
    """Draw numbers about 1. FP8 rounds equal numbers alike, and uneven ones to about the right sum."""
    return 0.5 + torch.rand(shape, generator=_generator(name))


def _spread_out(count: int, width: int) -> Tensor:
    """Return indices of channels that are far from each other."""
    return (2 * torch.arange(count) + 1) * width // (2 * max(1, count))


def _like(numbers: Tensor, weight: Tensor) -> Tensor:
    return numbers.to(device=weight.device, dtype=weight.dtype)
