"""Scales in quantised ONNX graphs: those of q and k take the factor that stands before their product."""

import onnx_ir as ir
import pytest
from fluxserve_export.quantize import quantise
from fluxserve_export.trace import MODULE

from fluxserve.errors import ExportError
from fluxserve.folders.artifact import Ranges

NAME, HEAD_DIM = "transformer_blocks.0.attn", 128
AMAX = (7.0, 11.0, 3.0)


def model_of(operator: bool, head_dim: int | str = HEAD_DIM) -> ir.Model:
    """Return attention as one operator (opset 23), or spelled out behind the factor (opset 22)."""
    sizes = {"q": (9, head_dim), "k": (9, head_dim) if operator else (head_dim, 9), "v": (9, head_dim)}
    q, k, v = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, 2, *size)))
        for name, size in sizes.items()
    )
    if operator:
        nodes = [ir.node("Attention", [q, k, v])]
    else:
        nodes = [ir.node("MatMul", [q, k])]
        nodes.append(ir.node("Softmax", nodes[0].outputs))
        nodes.append(ir.node("MatMul", [*nodes[1].outputs, v]))
    for index, node in enumerate(nodes):
        node.metadata_props[MODULE] = NAME
        node.outputs[0].name, node.outputs[0].dtype = f"out{index}", ir.DataType.FLOAT
    graph = ir.Graph([q, k, v], nodes[-1].outputs, nodes=nodes, opset_imports={"": 23 if operator else 22}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("operator", [True, False], ids=["one operator", "spelled out"])
def test_scales_of_attention(operator: bool) -> None:
    model = model_of(operator)
    assert quantise(model, Ranges({}, {NAME: AMAX}, {})).attention == [NAME]
    root = HEAD_DIM**-0.25
    q, k, v = AMAX
    expected = {"q": q * root / 448, "k": k * root / 448, "v": v / 448}
    if operator:
        expected |= {"q.factor": root, "k.factor": root}
    else:
        expected["softmax"] = 1 / 448
    constants = {
        name.removeprefix(f"{NAME}.").removesuffix(".scale"): float(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if name.startswith(NAME) and value.const_value is not None
    }
    assert constants == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("operator", [True, False], ids=["one operator", "spelled out"])
def test_queries_of_unknown_size_are_refused(operator: bool) -> None:
    with pytest.raises(ExportError, match=f"quantize: {NAME}: got queries of head_dim d; expected a number"):
        quantise(model_of(operator, "d"), Ranges({}, {NAME: AMAX}, {}))


def test_an_operator_with_a_scale_of_its_own_is_refused() -> None:
    model = model_of(operator=True)
    next(iter(model.graph)).attributes["scale"] = ir.AttrFloat32("scale", 0.5)
    with pytest.raises(ExportError, match="expected an Attention with the default scale"):
        quantise(model, Ranges({}, {NAME: AMAX}, {}))
