"""A component as an ONNX graph whose weights are never all in memory.

torch.export needs a module's structure, not its values. The large components are *hollow*: built from their
configuration with parameters of the right shape and dtype over a single number (stride 0). The traced graph's
initialisers are then tensors that read the checkpoint's safetensors when they are written, one after the other, so that
an export of 12 B parameters holds the largest tensor and no more. The graph is optimised by onnxscript as torch.onnx
does it, except that transposed weights stay lazy instead of being copied.

What is traced is the wrapper that torch_eager calls, so that the reference and the export can't differ.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from onnxscript import optimizer
from safetensors import safe_open
from torch import Tensor, nn

from fluxserve.engine import FLOATING, Dim, TensorSpec
from fluxserve.engines.finite import extremes, refuse_infinite
from fluxserve.engines.torch_eager import hollow_module, load_module
from fluxserve.errors import ExportError
from fluxserve.families import registry
from fluxserve.folders.artifact import Extent
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.folders.weights import Stored, Weights
from fluxserve_export.options import example

_LARGE = 2**16
"""Elements from which a tensor is a weight that must stay lazy, and not a constant that may be folded."""

MODULE = "fluxserve.module"
"""The key of a node's metadata that names its module, as in the checkpoint."""

_WRAPPED = "module."
"""What the wrapper puts before every name."""

_LOADED = ("clip",)  # 123 M parameters; published files name them as an older transformers did, which its loader knows

Progress = Callable[[int, int], None]
"""(done, of how many)."""


def trace(
    checkpoint: Checkpoint, component: str, shapes: Mapping[str, Extent], dtype: torch.dtype, opset: int
) -> ir.Model:
    """Trace one component.

    Args:
        shapes: symbol → least, typical, most; equal ends make a dimension fixed.
        dtype: what it computes in, and the dtype of FLOATING tensors.
        opset: of ONNX; from 23 on attention is one operator.

    Returns:
        a model whose large initialisers are lazy; `save` writes it.
    """
    signature = registry.of(checkpoint.spec).signatures(checkpoint.spec)[component]
    with _weights_of(checkpoint, component, dtype) as (module, weights):
        wrapper = registry.architectures(checkpoint.spec)[component].wrapper(module).eval().requires_grad_(False)
        at = signature.at(example(shapes))
        program = torch.onnx.export(
            wrapper,
            (),
            kwargs={t.name: _zeros(t, at[t.name], dtype) for t in signature.inputs},
            input_names=[t.name for t in signature.inputs],
            output_names=[t.name for t in signature.outputs],
            dynamic_shapes={t.name: _dynamic(t, shapes) for t in signature.inputs},
            opset_version=opset,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model: ir.Model = program.model
        for name, value in model.graph.initializers.items():
            if name in weights:
                value.const_value = weights[name]
            elif _is_hollow(value.const_value):
                raise ExportError(f"onnx: {component}: {name} is of no parameter; it would be written as zeros")
    _optimise(model)
    _lay_out(model)
    _name_modules(model)
    model.producer_name, model.producer_version = "fluxserve", None
    return model


def save(model: ir.Model, file: Path, progress: Progress = lambda *_: None) -> None:
    """Write the graph, and beside it (file.data) its tensors, streamed."""

    def tell(_: object, info: Any) -> None:
        progress(info.index + 1, info.total)

    ir.save(model, file, external_data=f"{file.name}.data", callback=tell)


# --- hollow modules ---------------------------------------------------------------------------------------------------


@contextmanager
def _weights_of(
    checkpoint: Checkpoint, component: str, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, Mapping[str, ir.TensorProtocol]]]:
    """The module to trace, and lazy tensors for those of its parameters that have no values."""
    if component in _LOADED:
        yield load_module(checkpoint, component, "cpu", dtype), {}
        return
    architecture = registry.architectures(checkpoint.spec)[component]
    module = _hollow(checkpoint, component, dtype)
    yield module, dict(_lazy_parameters(module, checkpoint.weights(architecture.folder)))


def _hollow(checkpoint: Checkpoint, component: str, dtype: torch.dtype) -> nn.Module:
    """The module with parameters of one number each, spread over their shape."""
    module = hollow_module(checkpoint, component)
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for owner_name, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            high = dtype == torch.float16 and kept & {*owner_name.split("."), name}  # as from_pretrained does
            number = torch.zeros((), dtype=torch.float32 if high else dtype)
            setattr(owner, name, nn.Parameter(number.expand(parameter.shape), requires_grad=False))
    return module


def _lazy_parameters(module: nn.Module, weights: Weights) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Initialiser name (the wrapper's: `module.` before it) → a tensor that reads the checkpoint when it is asked."""
    seen: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if (stored := weights.find(name)) is None:
            raise ExportError(f"{weights.folder}: no tensor {name}; it has {len(weights.tensors)} others")
        if stored.name not in seen:  # looked at now: ONNX's passes read some, and hide an error of ours in theirs
            with safe_open(stored.file, "pt") as tensors:
                seen[stored.name] = extremes(tensors.get_tensor(stored.name).to(parameter.dtype))
        yield f"{_WRAPPED}{name}", _lazy(f"{_WRAPPED}{name}", stored, parameter)
    refuse_infinite(weights.folder, seen)


def _lazy(name: str, stored: Stored, parameter: Tensor) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        with safe_open(stored.file, "pt") as tensors:
            value: Tensor = tensors.get_tensor(stored.name)
        if value.shape != parameter.shape:
            got, expected = tuple(value.shape), tuple(parameter.shape)
            raise ExportError(f"{stored.file}: {stored.name} is {got}; expected {expected}")
        return tensor_adapters.TorchTensor(value.to(parameter.dtype), name)

    dtype = tensor_adapters.from_torch_dtype(parameter.dtype)
    return ir.LazyTensor(read, dtype, ir.Shape(parameter.shape), name=name)


def _is_hollow(tensor: ir.TensorProtocol | None) -> bool:
    """Whether one number stands for many."""
    raw = getattr(tensor, "raw", None)
    return isinstance(raw, Tensor) and raw.untyped_storage().nbytes() < raw.nbytes


def _zeros(tensor: TensorSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype if tensor.dtype == FLOATING else getattr(torch, tensor.dtype))


def _dynamic(tensor: TensorSpec, shapes: Mapping[str, Extent]) -> dict[int, Any]:
    """torch.export's description of the dimensions that vary."""
    varying: dict[int, Any] = {}
    for axis, dim in enumerate(tensor.dims):
        if isinstance(dim, Dim) and shapes[dim.symbol][0] != shapes[dim.symbol][2]:
            least, _, most = shapes[dim.symbol]
            symbol = torch.export.Dim(dim.symbol, min=least, max=most)
            product = symbol if dim.multiple == 1 else dim.multiple * symbol
            varying[axis] = product + dim.offset if dim.offset else product
    return varying


# --- the graph --------------------------------------------------------------------------------------------------------


def _optimise(model: ir.Model) -> None:
    """What torch.onnx does with optimize=True, without touching large weights.

    And without its fusion of RMSNorm (opset 23), which loses a cast around T5's in float16 (onnxscript 0.7.2).
    """

    def fold(node: ir.Node) -> bool | None:
        large = any(v is not None and v.const_value is not None and v.const_value.size >= _LARGE for v in node.inputs)
        return False if large else None

    optimizer.optimize_ir(model, should_fold=fold)


def _lay_out(model: ir.Model) -> None:
    """Replace Transpose(weight) by the weight stored transposed, still lazy."""
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or list(node.attributes["perm"].as_ints()) != [1, 0]:
            continue
        stored = _transposed(weight.const_value)
        value = ir.Value(name=stored.name, type=weight.type, shape=stored.shape, const_value=stored)
        graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]


def _name_modules(model: ir.Model) -> None:
    """Keep of the tracer's notes only the module that a node belongs to (MODULE).

    The rest has paths of the machine that exported: it is nobody's business, and changes the file's hash.
    """
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        modules = [s for s in scopes if s.startswith(_WRAPPED)]
        node.metadata_props.clear()
        if modules:
            node.metadata_props[MODULE] = modules[-1].removeprefix(_WRAPPED)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _transposed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    name = f"{tensor.name}.T"
    rows, columns = tensor.shape

    def read() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().T.copy(), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(read, tensor.dtype, ir.Shape([columns, rows]), name=name)
