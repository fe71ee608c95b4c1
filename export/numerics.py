"""How far one set of numbers is from another, and an ONNX file from the module that it was traced from.

ONNX Runtime's CPU provider has no bfloat16. A bfloat16 graph is *widened* for the comparison: every bfloat16 tensor,
scale and cast becomes float32, with the values that the file holds. That checks the operators, weights and scales of
the very file that an engine is built from, and not its rounding.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner
from torch import Tensor, nn

from fluxserve.engines.base import FLOATING, Signature

Arrays = Mapping[str, npt.NDArray[Any]]
Tensors = Mapping[str, Tensor]

EQUAL_DB = 99.0


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64; infinite where a number is not finite."""
    a, b = got.double(), expected.double()
    error = float((a - b).norm() / b.norm().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def cosine(got: Tensor, expected: Tensor) -> float:
    a, b = got.double().flatten(), expected.double().flatten()
    return float(torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-30))


def psnr(got: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> float:
    """Of 8-bit images, in dB; at most EQUAL_DB, which equal ones get."""
    error = float(np.mean((got.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return min(10 * math.log10(255**2 / error), EQUAL_DB) if error else EQUAL_DB


def outputs_of(module: nn.Module, signature: Signature, inputs: Tensors) -> dict[str, Tensor]:
    """A wrapper of torch_eager called on tensors, FLOATING ones in the dtype and on the device of its weights."""
    weight = next(module.parameters())
    dtypes = {t.name: weight.dtype if t.dtype == FLOATING else getattr(torch, t.dtype) for t in signature.inputs}
    with torch.inference_mode():
        results = module(**{name: inputs[name].to(weight.device, dtype) for name, dtype in dtypes.items()})
    results = (results,) if isinstance(results, Tensor) else results
    return {t.name: r.float().cpu() for t, r in zip(signature.outputs, results, strict=True)}


def run_onnx(file: Path, signature: Signature, cases: Sequence[Tensors]) -> list[dict[str, Tensor]]:
    """An ONNX file on ONNX Runtime's CPU provider, through polygraphy, which checks names, shapes and dtypes.

    Returns:
        for each case the outputs by name, float32.
    """
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # see engines/onnxruntime.py
    options.log_severity_level = 3
    results = []
    with OnnxrtRunner(lambda: ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])) as runner:
        known = runner.get_input_metadata()
        for case in cases:
            feed = {n: case[n].numpy().astype(known[n].dtype) for n in known}
            outputs = runner.infer(feed, check_inputs=True)
            results.append({t.name: _tensor(outputs[t.name]) for t in signature.outputs})
    return results


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array).astype(np.float32))


def memory_needed(file: Path) -> int:
    """Bytes that ONNX Runtime takes for a file's weights in float32, about: its own copy and the packed one."""
    tensors = (value.const_value for value in ir.load(file).graph.initializers.values())
    return sum(3 * 4 * tensor.size for tensor in tensors if tensor is not None)


def memory_free() -> int:
    """Bytes that this machine can give without swapping."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


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
