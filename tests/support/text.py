"""Text encoders beside one another: one run of an engine, and what FP8 costs when nothing but FP8 is done."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fluxserve.engine import Engine
from fluxserve.kernels.fp8 import quantise_rows


def run(engine: Engine, inputs: Mapping[str, Tensor]) -> Tensor:
    """The engine's only output, float32 on the CPU."""
    bound = engine.bind({name: tuple(value.shape) for name, value in inputs.items()})
    for name, value in inputs.items():
        bound.inputs[name].copy_(value)
    bound.run()
    (output,) = bound.outputs.values()
    return output.float().cpu()


@contextmanager
def quantised(module: nn.Module) -> Iterator[None]:
    """Every product of E4M3 numbers, with a scale for each row on both sides; float32 around them."""

    def rounded(x: Tensor) -> Tensor:
        data, scale = quantise_rows(x.reshape(-1, x.shape[-1]))
        return (data.float() * scale[:, None]).reshape(x.shape)

    def take(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(given[0]),)

    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    for linear in linears:
        linear.weight.copy_(rounded(linear.weight))
    hooks = [linear.register_forward_pre_hook(take) for linear in linears]
    yield
    for hook in hooks:
        hook.remove()
