"""ONNX → the same graph with FP8 Q/DQ, by the arithmetic that fp8.py spells out.

Every quantised linear's input passes one QuantizeLinear/DequantizeLinear pair, shared by all linears that read it; its
weight is stored as FLOAT8E4M3FN behind a DequantizeLinear. Scales are in the graph's compute dtype and nothing stands
between DQ and the product: that is what TensorRT fuses into one FP8 kernel. Weights are quantised when they are
written, one after the other.

Attention comes in two dialects. Spelled out (opset 22): q·d^-¼ and k·d^-¼ already stand before the first product, and
the softmax gets a pair of its own. As one operator (opset 23): the factors are put before Q/DQ and the operator's own
scale becomes 1; that its softmax is quantised too can't be said in ONNX, and the TensorRT builder says it (build.py).
"""

from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from fluxserve.errors import ExportError
from fluxserve.folders.artifact import Ranges
from fluxserve_export.fp8 import E4M3_MAX, SOFTMAX_AMAX, amax_of, root_scale, scale_of, with_root
from fluxserve_export.trace import MODULE

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass
class Report:
    """What was quantised: names of linears and of attention modules."""

    linears: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)


def quantise(model: ir.Model, ranges: Ranges) -> Report:
    """Put FP8 into a traced component, in place.

    Raises:
        ExportError: a linear or an attention that has ranges is not in the graph, or not of the expected form.
    """
    surgery = _Surgery(model.graph)
    report = Report()
    for node in list(model.graph):
        name = node.metadata_props.get(MODULE, "")
        if node.op_type in ("MatMul", "Gemm") and name in ranges.linears and _constant(node.inputs[1]):
            surgery.activation(node, 0, ranges.linears[name], name)
            surgery.weight(node, name)
            report.linears.append(name)
        elif node.op_type == "Attention" and name in ranges.attention:
            _operator(surgery, node, ranges.attention[name], name)
            report.attention.append(name)
        elif node.op_type == "Softmax" and name in ranges.attention:
            _spelled_out(surgery, node, ranges.attention[name], name)
            report.attention.append(name)
    _refuse_gaps(report, ranges)
    return report


def load(file: Path) -> ir.Model:
    """A model whose tensors stay in their file."""
    return ir.load(file)


def _refuse_gaps(report: Report, ranges: Ranges) -> None:
    for kind, done, wanted in (
        ("linears", report.linears, ranges.linears),
        ("attention", report.attention, ranges.attention),
    ):
        missing = sorted(set(wanted) - set(done))
        if missing:
            raise ExportError(
                f"quantize: {kind}: {', '.join(missing[:5])} ({len(missing)} in all) not found in the graph"
            )


def _constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _spelled_out(surgery: "_Surgery", softmax: ir.Node, amax: tuple[float, float, float], name: str) -> None:
    """MatMul → Softmax → MatMul."""
    scores = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    uses = softmax.outputs[0].uses()
    if scores is None or scores.op_type != "MatMul" or len(uses) != 1 or uses[0].node.op_type != "MatMul":
        raise ExportError(f"quantize: {name}: expected MatMul, Softmax, MatMul around {softmax.name}")
    weighted = uses[0].node
    q, k, v = with_root(amax, _head_dim(scores.inputs[0], name))
    for node, index, largest, tag in (
        (scores, 0, q, "q"),
        (scores, 1, k, "k"),
        (weighted, 0, SOFTMAX_AMAX, "softmax"),
        (weighted, 1, v, "v"),
    ):
        surgery.activation(node, index, largest, f"{name}.{tag}")


def _operator(surgery: "_Surgery", node: ir.Node, amax: tuple[float, float, float], name: str) -> None:
    """Attention, its scale moved before Q/DQ."""
    if "scale" in node.attributes:
        raise ExportError(f"quantize: {name}: expected an Attention with the default scale")
    head_dim = _head_dim(node.inputs[0], name)
    for index, tag in ((0, "q"), (1, "k")):
        surgery.scale(node, index, root_scale(head_dim), f"{name}.{tag}")
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    for index, (tag, largest) in enumerate(zip("qkv", with_root(amax, head_dim), strict=True)):
        surgery.activation(node, index, largest, f"{name}.{tag}")


def _head_dim(query: ir.Value | None, name: str) -> int:
    """Return the last dimension of attention's queries. Raises ExportError."""
    size = query.shape[-1] if query is not None and query.shape is not None else None
    if not isinstance(size, int):
        raise ExportError(f"quantize: {name}: got queries of head_dim {size}; expected a number")
    return size


class _Surgery:
    """Inserts nodes and constants into a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._pairs: dict[tuple[str | None, float], ir.Value] = {}
        zero = ir.Tensor(np.zeros((), dtype=ml_dtypes.float8_e4m3fn), name="fp8.zero_point")
        self._zero = self._register(zero)

    def activation(self, node: ir.Node, index: int, amax: float, tag: str) -> None:
        """Put Q/DQ before an input; who reads the same value with the same amax shares the pair."""
        value = _float_input(node, index)
        key = (value.name, amax)
        if key not in self._pairs:
            scale = self._scalar(f"{tag}.scale", scale_of(amax), value.dtype)
            quantised = self._insert(
                node, "QuantizeLinear", [value, scale, self._zero], f"{tag}.q", value, {"saturate": 1}
            )
            quantised.dtype = ir.DataType.FLOAT8E4M3FN
            inputs = [quantised, scale, self._zero]
            self._pairs[key] = self._insert(node, "DequantizeLinear", inputs, f"{tag}.dq", value)
        node.replace_input_with(index, self._pairs[key])

    def scale(self, node: ir.Node, index: int, factor: float, tag: str) -> None:
        """Multiply an input by a number."""
        value = _float_input(node, index)
        by = self._scalar(f"{tag}.factor", factor, value.dtype)
        node.replace_input_with(index, self._insert(node, "Mul", [value, by], f"{tag}.scaled", value))

    def weight(self, node: ir.Node, tag: str) -> None:
        """Store a weight as FP8 behind a DQ."""
        value = _float_input(node, 1)
        original = value.const_value
        assert original is not None and value.dtype is not None
        number = _scale(original, value.dtype)
        number.name = f"{tag}.weight.scale"
        scale = self._register(number)
        stored = ir.LazyTensor(
            lambda: _quantised(original, number), ir.DataType.FLOAT8E4M3FN, original.shape, name=f"{tag}.weight.fp8"
        )
        inputs = [self._register(stored), scale, self._zero]
        node.replace_input_with(1, self._insert(node, "DequantizeLinear", inputs, f"{tag}.weight.dq", value))
        if not value.uses() and value.name in self._graph.initializers:
            del self._graph.initializers[value.name]

    def _insert(
        self,
        before: ir.Node,
        op: str,
        inputs: list[ir.Value],
        name: str,
        like: ir.Value,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=name)
        node.metadata_props[MODULE] = before.metadata_props.get(MODULE, "")
        output = node.outputs[0]
        output.name, output.dtype, output.shape = f"{name}.out", like.dtype, like.shape
        self._graph.insert_before(before, node)
        return output

    def _scalar(self, name: str, number: float, dtype: ir.DataType | None) -> ir.Value:
        assert dtype is not None
        return self._register(ir.Tensor(np.asarray(number, dtype=np.float32).astype(dtype.numpy()), name=name))

    def _register(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _float_input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None or value.dtype not in _FLOATS:
        raise ExportError(f"quantize: {node.name}: input {index} is {value.dtype if value else None}; expected a float")
    return value


def _scale(weight: ir.TensorProtocol, dtype: ir.DataType) -> ir.Tensor:
    """Return the weight's scale rounded to the compute dtype: what DQ multiplies by."""
    scale = np.asarray(scale_of(amax_of(_torch(weight))), dtype=np.float32)
    return ir.Tensor(scale.astype(dtype.numpy()))


def _quantised(weight: ir.TensorProtocol, scale: ir.Tensor) -> ir.Tensor:
    stored = (
        (_torch(weight).float() / float(scale.numpy().astype(np.float32)))
        .clamp_(-E4M3_MAX, E4M3_MAX)
        .to(torch.float8_e4m3fn)
    )
    return ir.Tensor(stored.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn))


def _torch(weight: ir.TensorProtocol) -> torch.Tensor:
    """The same memory as a torch tensor, whose casts use every core."""
    array = weight.numpy()
    if weight.dtype == ir.DataType.BFLOAT16:  # NumPy has no such type of its own
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
