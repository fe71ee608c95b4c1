"""Triton's tensors ↔ NumPy arrays and Python values, by the names and dtypes of the contract."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from fluxserve.contract import ANY, ModelContract
from fluxserve.serving import shared_memory

_NUMPY: dict[str, type] = {
    "BYTES": np.object_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "UINT8": np.uint8,
}


def read(request: Any, contract: ModelContract) -> dict[str, npt.NDArray[Any]]:
    """The inputs that came, as arrays; optional ones that did not come are absent."""
    arrays = {}
    for tensor in contract.inputs:
        given = pb_utils.get_input_tensor_by_name(request, tensor.name)
        if given is not None:
            arrays[tensor.name] = given.as_numpy()
    return arrays


def read_scalars(request: Any, contract: ModelContract) -> dict[str, Any]:
    """The same for a model whose inputs are of one element: bytes, int or float; a list where one may have more."""
    several = {tensor.name for tensor in contract.inputs if tensor.dims == (ANY,)}
    arrays = read(request, contract)
    return {name: list(array) if name in several else _scalar(array) for name, array in arrays.items()}


def _scalar(array: npt.NDArray[Any]) -> Any:
    """A float32 becomes the number that was typed: 0.6, and not the 0.60000002 that would run one step more."""
    value = array.reshape(-1)[0]
    return float(str(value)) if array.dtype == np.float32 else value


def response(contract: ModelContract, values: Mapping[str, Any]) -> Any:
    """An InferenceResponse of all outputs, to be sent at once.

    Args:
        values: arrays or what np.asarray takes (lists of bytes for BYTES).

    Raises:
        NoRoom: shared memory can't take it.
    """
    tensors, size = [], 0
    for tensor in contract.outputs:
        array: npt.NDArray[Any] = np.ascontiguousarray(np.asarray(values[tensor.name], dtype=_NUMPY[tensor.dtype]))
        size += sum(len(element) for element in array.flat) if tensor.dtype == "BYTES" else array.nbytes
        tensors.append(pb_utils.Tensor(tensor.name, array))
    shared_memory.check(size)
    return pb_utils.InferenceResponse(output_tensors=tensors)


def send(sender: Any, response: Any) -> None:
    """Answer a request through its response sender; once, and finally.

    Where shared memory is scarce, tensors go in two messages. A response that could not be written can't be followed by
    another, not even by an error; but an end without one gives the client Triton's error in place of no answer at all.
    """
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    if response.has_error() or not shared_memory.is_scarce():
        sender.send(response, flags=final)
        return
    try:
        sender.send(response)
    finally:
        sender.send(flags=final)
