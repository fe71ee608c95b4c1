"""Ways of choosing FP8 scales, as hooks over plain PyTorch: what `benchmarks.calibration` compares.

Beside export's own (one scale per tensor, from a range's maximum or a percentile): the clip with the least mean squared
error, SmoothQuant, weight scales per output channel, and each token's own scale as a bound that no fixed one can pass.
SmoothQuant is at its best here: every layer has factors of its own, where a graph that folds them into the operation
before must share one set between q, k and v, and multiply where there is nothing to fold them into.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from fluxserve_export import fp8
from fluxserve_export.calibrate import BIN_WIDTH, Histogram
from torch import Tensor, nn

LEAST = 1e-12
OPEN = "per token, as it comes"
Amax = Tensor | float


@dataclass(frozen=True)
class Method:
    """How scales are chosen. Attention has no weights: what concerns those leaves it as under `max`.

    activations: a method of Histogram.amax, "mse", or OPEN: each token's (pixel's) own, of the input at hand.
    alpha: SmoothQuant's, 0 for none. draw: of the luck; 0 for none.
    """

    name: str
    activations: str = "max"
    alpha: float = 0.0
    per_channel: bool = False
    draw: int = 0

    def luck(self, key: str) -> float:
        """What the scale of this name is multiplied by."""
        return 2.0 ** random.Random(f"{self.draw} {key}").random() if self.draw else 1.0  # noqa: S311

    def concerns(self, target: "Target") -> bool:
        """Whether it does anything to the target that `max` does not."""
        return target.layers or not (self.alpha or self.per_channel) or self.activations != "max"


MAX = Method("max")
CANDIDATES = (
    MAX,
    Method("percentile 99.9", "percentile-99.9"),
    Method("percentile 99.99", "percentile-99.99"),
    Method("percentile 99.999", "percentile-99.999"),
    Method("least MSE", "mse"),
    Method("SmoothQuant 0.5", alpha=0.5),
    Method("SmoothQuant 0.75", alpha=0.75),
    Method("weights per channel", per_channel=True),
)
BOUND = Method("per token + per channel", OPEN, per_channel=True)
LUCK = tuple(Method(f"max, luck {draw}", draw=draw) for draw in range(1, 9))


@dataclass(frozen=True)
class Target:
    """What is quantised: a component's layers, its attention, or both."""

    component: str
    layers: bool = True
    attention: bool = False
    inner: bool = False  # all layers but the first and the last


TARGETS = {
    "transformer linears": Target("transformer"),
    "transformer attention": Target("transformer", layers=False, attention=True),
    "transformer both": Target("transformer", attention=True),
    "t5": Target("t5"),
    "clip": Target("clip"),
    "vae decoder": Target("vae_decoder"),
    "vae encoder": Target("vae_encoder"),
}


def layers_of(component: str, module: nn.Module) -> dict[str, nn.Module]:
    """The linears that FP8 is for; of the VAE, which export leaves alone, every convolution of the half in question."""
    if component.startswith("vae"):
        part = getattr(module, component.removeprefix("vae_"))
        return {name: layer for name, layer in part.named_modules() if isinstance(layer, nn.Conv2d)}
    return dict(fp8.quantised_linears(component, module))


# --- what is measured on the calibration prompts ---------------------------------------------------------------------


@dataclass
class Seen:
    """Of one component: each layer's range and its input channels' largest values; the attention's ranges."""

    layers: dict[str, Histogram] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    attention: Mapping[str, tuple[Histogram, ...]] = field(default_factory=dict)

    def see(self, name: str, x: Tensor) -> None:
        x = x.detach()
        largest = x.abs().amax([d for d in range(x.dim()) if d != channel_dim(x)])
        self.channels[name] = torch.maximum(self.channels.get(name, largest), largest)
        self.layers.setdefault(name, Histogram()).see(x)


def channel_dim(x: Tensor) -> int:
    """Of a layer's input: pictures have their channels second, sequences last."""
    return 1 if x.dim() == 4 else x.dim() - 1


@contextmanager
def watched(component: str, module: nn.Module, seen: Seen) -> Iterator[None]:
    with ExitStack() as stack:
        for name, layer in layers_of(component, module).items():
            hook = layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.see(name, inputs[0]))
            stack.callback(hook.remove)
        yield


# --- methods ---------------------------------------------------------------------------------------------------------


def amax_by(method: str, seen: Histogram) -> float:
    return mse_amax(seen) if method == "mse" else seen.amax("max" if method == OPEN else method)


def mse_amax(seen: Histogram, points: int = 8, octaves: int = 6) -> float:
    """The clip, at most `octaves` below the maximum, with the least mean squared error over the histogram.

    Each bin stands for `points` values spread over it, since a bin is about as wide as a step of E4M3.
    """
    hit, begins = seen.bins()
    within = BIN_WIDTH * (torch.arange(points) + 0.5) / points
    largest = seen.amax("max")
    values, counts = (2.0 ** (begins[:, None] + within)).clamp(max=largest), hit[:, None].double()

    def error(amax: float) -> float:
        return float(((fp8.fake_quantise(values, amax) - values).double().square() * counts).sum())

    return min((largest * 2.0 ** (-k / 8) for k in range(octaves * 8)), key=error)


def migration(channels: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's s: inputs are divided by it, and the weight's columns multiplied. Channels never seen stay."""
    columns = weight.abs().transpose(0, 1).flatten(1).amax(1)
    factors = channels.clamp(min=1e-5) ** alpha / columns.clamp(min=1e-5) ** (1 - alpha)
    return torch.where(channels > 0, factors, torch.ones_like(factors))


@dataclass(frozen=True)
class Recipe:
    """Of one layer. amax: of its input, None for each token's own; smooth: what the input is divided by before."""

    weight: Tensor
    amax: float | None
    smooth: Tensor | None = None

    def input(self, x: Tensor) -> Tensor:
        channels = channel_dim(x)
        if self.smooth is not None:
            x = x / self.smooth.view([-1 if d == channels else 1 for d in range(x.dim())])
        return fp8.fake_quantise(x, own_amax(x, channels) if self.amax is None else self.amax)


def own_amax(x: Tensor, dim: int) -> Tensor:
    return x.abs().amax(dim, keepdim=True).clamp(min=LEAST)


def recipe(name: str, layer: nn.Module, seen: Seen, method: Method) -> Recipe:
    weight: Tensor = layer.weight.detach()
    amax, smooth = amax_by(method.activations, seen.layers[name]), None
    if method.alpha:
        smooth = migration(seen.channels[name], weight, method.alpha)
        amax = float((seen.channels[name] / smooth).max())
        weight = weight * smooth.view([-1 if d == 1 else 1 for d in range(weight.dim())])
    rows: Amax = fp8.amax_of(weight)
    if method.per_channel:
        rows = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True).clamp(min=LEAST)
    quantised = fp8.fake_quantise(weight, rows * method.luck(f"{name}.weight"))
    return Recipe(quantised, None if method.activations == OPEN else amax * method.luck(name), smooth)


@contextmanager
def quantised(target: Target, module: nn.Module, seen: Seen, method: Method) -> Iterator[None]:
    """Within, the target computes in FP8 with the method's scales."""
    layers = list(layers_of(target.component, module).items()) if target.layers else []
    with ExitStack() as stack:
        for name, layer in layers[1:-1] if target.inner else layers:
            made = recipe(name, layer, seen, method)
            stack.callback(setattr, layer, "weight", layer.weight)
            layer.weight = nn.Parameter(made.weight, requires_grad=False)
            hook = layer.register_forward_pre_hook(lambda _, x, made=made: (made.input(x[0]), *x[1:]))
            stack.callback(hook.remove)
        if target.attention:
            call = attention_by(seen, method)
            stack.enter_context(fp8.watched_attention(target.component, module, call))
        yield


def attention_by(seen: Seen, method: Method) -> fp8.AttentionCall:
    amax = {
        name: tuple(amax_by(method.activations, r) * method.luck(f"{name}.{i}") for i, r in enumerate(q_k_v))
        for name, q_k_v in seen.attention.items()
    }

    def call(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if method.activations != OPEN:
            return fp8.attention(q, k, v, amax[name])  # type: ignore[arg-type]
        own = tuple(own_amax(x, -1) for x in (q, k, v))
        return fp8.attention(q, k, v, own)  # type: ignore[arg-type]

    return call
