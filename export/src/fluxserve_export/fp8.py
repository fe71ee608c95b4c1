"""FP8 as plain PyTorch: what the quantised graphs compute, spelled out. The judge of every FP8 engine.

Format: E4M3 (float8_e4m3fn), largest value 448, no infinity; values are clamped before the cast, which rounds to the
nearest even. A tensor x is held as q·s with one float scale s = amax/448 per tensor, for activations and weights alike;
amax is the largest |x|: of weights as they are, of activations as calibration measured it (folders.artifact.Ranges).
This arithmetic is written apart from the engines', because it judges them.

    linear      DQ(Q(x)) · DQ(Q(W))ᵀ + b                             products accumulated in the compute dtype
    attention   q and k are multiplied by d^-1/4 first, and so is their amax, so that no factor stands between DQ and
                the product; softmax is in 0..1 and has the fixed scale 1/448:
                DQ(Q(softmax(DQ(Q(q)) · DQ(Q(k))ᵀ))) · DQ(Q(v))
                centred, as the fused engine computes it: v less its mean m over all tokens, and m added to the result

Which linears: all but those that `KEPT` names. Their inputs are few rows or their outputs steer everything behind
them: embedders, adaLN modulation (which fused engines compute once for all steps anyway) and the last projection; the
same set that NVIDIA's published FLUX recipe leaves alone. The VAE stays in high precision whole; README.md has the
numbers.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fluxserve.folders.artifact import Ranges

E4M3_MAX = 448.0
SOFTMAX_AMAX = 1.0

KEPT = {
    "transformer": r"(x_embedder|context_embedder|time_(text|guidance)_embed\..*|.*norm1(_context)?\.linear"
    r"|.*\.norm\.linear|(double_stream_modulation_(img|txt)|single_stream_modulation)\.linear|norm_out\.linear|proj_out)",
    "t5": r"$",
    "clip": r"$",
    "qwen3": r"$",
}
"""Component → regular expression for the names of linears that stay in high precision. Others have no FP8 at all."""

ATTENTION = ("transformer",)
"""Components whose attention is in FP8. The text encoders' have a bias or a mask, and take a thousandth of the time."""


def quantised_linears(component: str, module: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a component that FP8 is for, by name."""
    if component not in KEPT:
        return {}
    kept = re.compile(KEPT[component])
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    return {name: linear for name, linear in linears.items() if not kept.fullmatch(name)}


def attention_modules(component: str, module: nn.Module) -> dict[str, nn.Module]:
    """The modules that call scaled_dot_product_attention in FP8, by name."""
    if component not in ATTENTION:
        return {}
    return {name: m for name, m in module.named_modules() if name.rpartition(".")[2] == "attn"}


def scale_of(amax: float) -> float:
    """Return what a tensor is divided by before it is rounded to E4M3; its largest value becomes 448."""
    return amax / E4M3_MAX


def fake_quantise(x: Tensor, amax: float) -> Tensor:
    """Q followed by DQ, in x's dtype. amax > 0."""
    scale = scale_of(amax)
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


def root_scale(head_dim: int) -> float:
    """Return what q and k are each multiplied by: d^-1/4."""
    return 1.0 / math.sqrt(math.sqrt(head_dim))


def with_root(amax: tuple[float, float, float], head_dim: int) -> tuple[float, float, float]:
    """Return the amax of q and k times d^-1/4, and of v, from those of q, k and v."""
    root = root_scale(head_dim)
    return amax[0] * root, amax[1] * root, amax[2]


def attention(
    q: Tensor, k: Tensor, v: Tensor, amax: tuple[float, float, float], centred: float | None = None
) -> Tensor:
    """Compute FP8 attention of q, k, v [.., heads, tokens, head_dim] plainly.

    Args:
        amax: of q, k and v as they are.
        centred: amax of v less its mean, which is then taken off; None leaves the mean in.
    """
    root = root_scale(q.shape[-1])
    mean = torch.zeros_like(v[..., :1, :]) if centred is None else v.mean(dim=-2, keepdim=True)
    largest = with_root((*amax[:2], amax[2] if centred is None else centred), q.shape[-1])
    q, k, v = (fake_quantise(x, m) for x, m in zip((q * root, k * root, v - mean), largest, strict=True))
    weights = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
    return fake_quantise(weights, SOFTMAX_AMAX) @ v + mean


@contextmanager
def simulated(component: str, module: nn.Module, ranges: Ranges, centred: bool = False) -> Iterator[None]:
    """Within, the module computes as its FP8 graph does, or as the fused engine (`centred`). What `ranges` keeps stays
    as it is. Weights are swapped, and put back."""
    kept, ranges = set(ranges.linears) - set(ranges.quantised.linears), ranges.quantised
    linears = {name: linear for name, linear in quantised_linears(component, module).items() if name not in kept}
    originals = {name: linear.weight for name, linear in linears.items()}
    hooks = []
    for name, linear in linears.items():
        linear.weight = nn.Parameter(fake_quantise(linear.weight, amax_of(linear.weight)), requires_grad=False)
        hooks.append(linear.register_forward_pre_hook(_quantise_input(ranges.linears[name])))

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if name not in ranges.attention:
            return None
        return attention(q, k, v, ranges.attention[name], ranges.centred[name] if centred else None)

    watch = watched_attention(component, module, attend)
    try:
        with watch:
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in originals.items():
            linears[name].weight = weight


def amax_of(x: Tensor) -> float:
    return max(float(x.detach().abs().max()), 1e-12)


def _quantise_input(amax: float) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, inputs: (fake_quantise(inputs[0], amax), *inputs[1:])


AttentionCall = Callable[[str, Tensor, Tensor, Tensor], Tensor | None]
"""(module name, q, k, v) → what is returned in the call's place, or None to let it be."""


@contextmanager
def watched_attention(component: str, module: nn.Module, call: AttentionCall) -> Iterator[None]:
    """Within, scaled_dot_product_attention of the component's attention modules goes through `call`."""
    current: list[str] = []
    hooks = []
    for name, attn in attention_modules(component, module).items():
        hooks.append(attn.register_forward_pre_hook(lambda *_, name=name: current.append(name)))
        hooks.append(attn.register_forward_hook(lambda *_: _forget(current)))
    try:
        with _Intercept(current, call) if hooks else nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _forget(current: list[str]) -> None:
    current.pop()


class _Intercept(TorchFunctionMode):
    def __init__(self, current: list[str], call: AttentionCall) -> None:
        super().__init__()
        self._current, self._call = current, call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and self._current:
            q, k, v = (
                kwargs.get(n, a) for n, a in zip(("query", "key", "value"), (*args, None, None, None), strict=False)
            )
            if any(kwargs.get(name) for name in ("is_causal", "scale")) or kwargs.get("attn_mask") is not None:
                raise ValueError(
                    f"{self._current[-1]}: got attention with {sorted(kwargs)}; expected neither mask nor scale"
                )
            result = self._call(self._current[-1], q, k, v)
            if result is not None:
                return result
        return func(*args, **kwargs)
