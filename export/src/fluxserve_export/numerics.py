"""An ONNX file through ONNX Runtime, to see how far it is from the module that it was traced from.

ONNX Runtime's CPU provider has no bfloat16. A bfloat16 graph is *widened* for the comparison: every bfloat16 tensor,
scale and cast becomes float32, with the values that the file holds. That checks the operators, weights and scales of
the very file that an engine is built from, and not its rounding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner
from torch import Tensor

from fluxserve.engine import Signature
from fluxserve.engines.onnxruntime import open_session

Arrays = Mapping[str, npt.NDArray[Any]]
Tensors = Mapping[str, Tensor]


def run_onnx(file: Path, signature: Signature, cases: Sequence[Tensors]) -> list[dict[str, Tensor]]:
    """An ONNX file on ONNX Runtime's CPU provider, through polygraphy, which checks names, shapes and dtypes.

    Returns:
        for each case the outputs by name, float32.
    """
    results = []
    with OnnxrtRunner(lambda: open_session(str(file))) as runner:
        known = runner.get_input_metadata()
        for case in cases:
            feed = {n: case[n].numpy().astype(known[n].dtype) for n in known}
            outputs = runner.infer(feed, check_inputs=True)
            results.append({t.name: _tensor(outputs[t.name]) for t in signature.outputs})
    return results


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array).astype(np.float32))


_CGROUP = Path("/sys/fs/cgroup")


def memory_needed(file: Path) -> int:
    """Bytes that ONNX Runtime takes for a file's weights in float32, about: its own copy and the packed one."""
    tensors = (value.const_value for value in ir.load(file).graph.initializers.values())
    return sum(3 * 4 * tensor.size for tensor in tensors if tensor is not None)


def memory_free() -> int:
    """Bytes that this machine can give without swapping, or this container within its limit."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return machine
    return min(machine, int(most) - int(used.read_text()))


def widened(source: Path, target: Path) -> None:
    """Write a copy of a model in which float32 stands for bfloat16."""
    model = ir.load(source)
    for tensor_owner in list(model.graph.initializers.values()):
        tensor = tensor_owner.const_value
        if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
            tensor_owner.const_value = _wide(tensor)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "output_dtype", "dtype") and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif name == "value" and attribute.value.dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _wide(attribute.value))
    values = [v for node in model.graph.all_nodes() for v in node.outputs]
    for value in (*values, *model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    ir.save(model, target, external_data=f"{target.name}.data")


def _wide(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(tensor.shape), name=tensor.name)
