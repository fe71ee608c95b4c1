"""diffusers' and transformers' modules as they are: the reference that every other engine is judged against.

Not fast, and not meant to be: no graph, no fused kernel, one library call per operation.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from fluxserve.engine import FLOATING, Components, Shapes, Signature, TensorSpec
from fluxserve.engines.finite import extremes, refuse_infinite
from fluxserve.engines.open import dtype_on
from fluxserve.errors import CheckpointError
from fluxserve.families import registry
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.folders.weights import Weights
from fluxserve.spec import ModelSpec

Tensors = Mapping[str, Tensor]


class TorchEngine:
    """A component's module, called with the signature's names."""

    def __init__(self, signature: Signature, module: nn.Module) -> None:
        self.signature = signature
        self._module: nn.Module | None = module

    def bind(self, shapes: Shapes) -> "TorchBound":
        assert self._module is not None, "bind after close"
        weight = next(self._module.parameters())
        sizes = self.signature.resolve(shapes)

        def allocate(tensors: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
            return {t.name: torch.zeros(sizes[t.name], dtype=_dtype(t, weight), device=weight.device) for t in tensors}

        return TorchBound(allocate(self.signature.inputs), allocate(self.signature.outputs), self._module)

    def close(self) -> None:
        self._module = None


class TorchBound:
    """Eager PyTorch at fixed addresses: results are copied to where they are expected."""

    def __init__(self, inputs: Tensors, outputs: Tensors, module: nn.Module) -> None:
        self.inputs, self.outputs, self._module = inputs, outputs, module

    @torch.inference_mode()
    def run(self) -> None:
        results = self._module(**self.inputs)
        for output, result in zip(self.outputs.values(), _tuple(results), strict=True):
            output.copy_(result)


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def _dtype(tensor: TensorSpec, weight: Tensor) -> torch.dtype:
    if tensor.dtype == FLOATING:
        return weight.dtype
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype


def load_module(checkpoint: Checkpoint, component: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The module behind one component, without its wrapper. Raises CheckpointError."""
    architecture = registry.architectures(checkpoint.spec)[component]
    folder = checkpoint.component(architecture.folder)
    for library in (diffusers_logging, transformers_logging):  # a server's log is no place for their progress bars
        library.disable_progress_bar()
    weights = checkpoint.weights(architecture.folder)
    with _libraries_errors(folder):
        module, report = architecture.module.from_pretrained(  # type: ignore[attr-defined]
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            variant=weights.set.variant or None,
            local_files_only=True,
            output_loading_info=True,
            **architecture.configuration,
        )
        _refuse_gaps(weights, report)
        loaded: nn.Module = module.eval().requires_grad_(False).to(device)
        named = (*loaded.named_parameters(), *loaded.named_buffers())
        refuse_infinite(folder, {name: extremes(t) for name, t in named if t.is_floating_point()})
    return loaded


def hollow_module(checkpoint: Checkpoint, component: str) -> nn.Module:
    """The same module on the meta device, without weights. Raises CheckpointError."""
    architecture = registry.architectures(checkpoint.spec)[component]
    cls: Any = architecture.module
    folder = checkpoint.component(architecture.folder)
    with _libraries_errors(folder), init_empty_weights(include_buffers=False):
        if hasattr(cls, "load_config"):  # diffusers
            module: nn.Module = cls.from_config(cls.load_config(str(folder)))
        else:
            module = cls(cls.config_class.from_pretrained(str(folder), **architecture.configuration))
    return module


@contextmanager
def _libraries_errors(folder: Path) -> Iterator[None]:
    """What diffusers and transformers raise about a folder, as a CheckpointError that names it."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def check_components(checkpoint: Checkpoint, _: str, __: str) -> None:
    """Build every module, without its weights; see engines.open. Raises CheckpointError."""
    for component in checkpoint.spec.components:
        hollow_module(checkpoint, component)


def open_components(checkpoint: Checkpoint, device: str, dtype: str) -> Components:
    """Load every component; see engines.open.open_components."""
    loaded = getattr(torch, dtype_on(device, dtype))
    names = (name for name in checkpoint.spec.components if name != "vae_encoder")  # whose module is the decoder's
    modules = {name: load_module(checkpoint, name, device, loaded) for name in names}
    return from_modules(checkpoint.spec, {**modules, "vae_encoder": modules["vae_decoder"]})


def _refuse_gaps(weights: Weights, report: Mapping[str, Iterable[object]]) -> None:
    """Refuse what the loader left out: it draws missing tensors at random, drops the ones that it can't place, and
    goes on."""
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(key) for key in report.get(problem, ()))
        if problem == "unexpected_keys":
            names = [name for name in names if (stored := weights.find(name)) and stored.name == name]
        if names:
            few, problem = ", ".join(names[:5]), problem.replace("_", " ")
            raise CheckpointError(f"{weights.folder}: {problem}: {few} ({len(names)} in all)")


def from_modules(spec: ModelSpec, modules: Mapping[str, nn.Module]) -> Components:
    """Wrap modules that are loaded already, by the component's name, all on one device and of one dtype."""
    signatures = registry.of(spec).signatures(spec)
    return Components(
        {
            name: TorchEngine(signatures[name], architecture.wrapper(modules[name]))
            for name, architecture in registry.architectures(spec).items()
        }
    )
