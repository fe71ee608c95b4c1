"""The seam: an Engine is bound to shapes once and then run many times at fixed addresses.

Orthogonal to what runs inside: TensorRT and CUDA graphs both want inputs and outputs that never move, a CPU engine does
not mind. `signature` says what can be bound; `bind` allocates and warms up; `run` enqueues on the current stream (a CPU
engine runs inline) and neither allocates nor waits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fluxserve.errors import ShapeError
from fluxserve.spec import NETWORK

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

FLOATING = "floating"
"""The dtype of a tensor that is in whatever precision the engine computes in."""


@dataclass(frozen=True)
class Dim:
    """A dimension that may vary: multiple · symbol + offset, where the symbol is a whole number from `least` to `most`.

    A causal VAE of video needs the offset: n latent frames are 4 · n - 3 frames, because the first stands alone.
    """

    symbol: str
    least: int
    most: int
    multiple: int = 1
    offset: int = 0

    def __str__(self) -> str:
        product = self.symbol if self.multiple == 1 else f"{self.multiple}*{self.symbol}"
        return f"{product}{self.offset:+d}" if self.offset else product

    def size(self, value: int) -> int:
        """Return the dimension at a value of the symbol."""
        return self.multiple * value + self.offset

    def value(self, size: int) -> int | None:
        """Return the symbol's value at a size of the dimension; None if it is no whole number or out of range."""
        value, rest = divmod(size - self.offset, self.multiple)
        return value if rest == 0 and self.least <= value <= self.most else None


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an engine: dtype as torch spells it ("int64", "float32", or FLOATING), fixed and varying dims."""

    name: str
    dtype: str
    dims: tuple[int | Dim, ...]

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Signature:
    """What an engine takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def resolve(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Check the shapes of all inputs and derive those of the outputs.

        Raises:
            ShapeError: an input is missing, unknown, of another rank, out of range, or contradicts another.
        """
        names = {t.name for t in self.inputs}
        if set(shapes) != names:
            raise ShapeError(f"inputs: got {sorted(shapes)}; expected {sorted(names)}")
        values: dict[str, int] = {}
        for tensor in self.inputs:
            _match(tensor, shapes[tensor.name], values)
        return {t.name: _shape(t, values) for t in (*self.inputs, *self.outputs)}

    def at(self, values: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The shapes of all inputs and outputs at given values of the symbols; nothing is checked."""
        return {t.name: _shape(t, values) for t in (*self.inputs, *self.outputs)}

    def most(self, symbol: str) -> int:
        """The largest value of a symbol."""
        return min(d.most for t in self.inputs for d in t.dims if isinstance(d, Dim) and d.symbol == symbol)

    def narrowed(self, ranges: Mapping[str, tuple[int, int]]) -> "Signature":
        """The same tensors, each symbol only from the least to the most given for it; others stay as they are."""

        def narrow(dim: int | Dim) -> int | Dim:
            if isinstance(dim, int) or dim.symbol not in ranges:
                return dim
            least, most = ranges[dim.symbol]
            return replace(dim, least=least, most=most)

        def all_of(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(replace(t, dims=tuple(narrow(d) for d in t.dims)) for t in tensors)

        return Signature(all_of(self.inputs), all_of(self.outputs))


def _match(tensor: TensorSpec, shape: tuple[int, ...], values: dict[str, int]) -> None:
    """Read the symbols' values off a shape into `values`, refusing what does not fit."""
    if len(shape) != len(tensor.dims):
        raise ShapeError(f"{tensor}: got {shape}; expected {len(tensor.dims)} dimensions")
    for size, dim in zip(shape, tensor.dims, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise ShapeError(f"{tensor}: got {shape}; expected {dim} where it has {size}")
            continue
        value = dim.value(size)
        if value is None:
            raise ShapeError(f"{tensor}: got {shape}; expected {dim.symbol} from {dim.least} to {dim.most}")
        if values.setdefault(dim.symbol, value) != value:
            raise ShapeError(f"{tensor}: got {shape}; {dim.symbol} is {values[dim.symbol]} in another input")


def _shape(tensor: TensorSpec, values: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else d.size(values[d.symbol]) for d in tensor.dims)


class Bound(Protocol):
    """An engine at given shapes."""

    inputs: Mapping[str, "Tensor"]
    """Fixed addresses: write into them before `run`."""
    outputs: Mapping[str, "Tensor"]
    """Fixed addresses: valid after `run`, until the next."""

    def run(self) -> None:
        """Enqueue one pass on the current stream."""


@runtime_checkable
class Denoiser(Protocol):
    """A bound transformer, run for the steps of a loop."""

    def begin(self, timesteps: "Tensor") -> None:
        """Compute ahead what depends on timesteps [steps] and conditioning, but not on latents.

        All inputs but the latents and the timestep must be written.
        """

    def run_step(self, step: int) -> None:
        """Enqueue one pass at timesteps[step]."""


class _OneByOne:
    """A Denoiser of a bound transformer that reads each timestep from its input."""

    def __init__(self, bound: Bound) -> None:
        self._bound = bound

    def begin(self, timesteps: "Tensor") -> None:
        self._timesteps = timesteps

    def run_step(self, step: int) -> None:
        timestep = self._bound.inputs["timestep"]
        timestep.copy_(self._timesteps[step].expand_as(timestep))
        self._bound.run()


def denoiser(bound: Bound) -> Denoiser:
    """Return a bound transformer as a Denoiser."""
    return bound if isinstance(bound, Denoiser) else _OneByOne(bound)


@runtime_checkable
class Saturating(Protocol):
    """An engine with static scales, which counts the values that they could not hold."""

    def saturated(self) -> Mapping[str, tuple[int, int]]:
        """Since the engine was opened: block → saturated values of q, k and v, and of the MLP's hidden layer.

        A sample of the rows is counted. Blocks without any are left out. Waits for the device.
        """


class Engine(Protocol):
    """One component of a model, ready to be bound."""

    signature: Signature

    def bind(self, shapes: Shapes) -> Bound:
        """Allocate for these input shapes and warm up. Raises ShapeError."""

    def close(self) -> None:
        """Free the weights. Bounds of this engine must not be run afterwards."""


_NO_TEXT = (NETWORK, "vae_encoder", "vae_decoder")


@dataclass(frozen=True)
class Components:
    """The engines of one model, opened together on one device, by the names of ModelSpec.components."""

    by_name: Mapping[str, Engine]

    @property
    def text(self) -> Mapping[str, Engine]:
        """The text encoders."""
        return {name: engine for name, engine in self.by_name.items() if name not in _NO_TEXT}

    @property
    def network(self) -> Engine:
        """What the loop runs."""
        return self.by_name[NETWORK]

    @property
    def vae_encoder(self) -> Engine:
        return self.by_name["vae_encoder"]

    @property
    def vae_decoder(self) -> Engine:
        return self.by_name["vae_decoder"]

    def replacing(self, **engines: Engine) -> "Components":
        """Return the same engines but for those that are given, by name."""
        return Components({**self.by_name, **engines})

    def close(self) -> None:
        for engine in self.by_name.values():
            engine.close()
