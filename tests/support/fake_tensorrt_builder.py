"""The builder's half of fake_tensorrt: a parser of a few ONNX operations, and a build that refuses as the real one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.support.fake_tensorrt import _MAGIC, ILogger, _Fake

_ONNX_DTYPES = {1: "FLOAT", 7: "INT64", 10: "HALF", 16: "BF16", 17: "FP8"}  # the numbers of onnx.TensorProto
_LAYERS = {
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "MatMul": "MATRIX_MULTIPLY",
    "Reshape": "SHUFFLE",
    "Transpose": "SHUFFLE",
    "Add": "ELEMENTWISE",
}
_MIN_FUSED = 32
_PHASES = {"Building engine": 3, "Timing tactics": 2}


class ITensor(_Fake):
    def __init__(self, name: str, dtype: Any, shape: Sequence[int] = ()) -> None:
        self.name, self.dtype, self.shape = name, dtype, tuple(shape)


class ILayer(_Fake):
    def __init__(self, kind: Any, name: str, inputs: list[Any], outputs: list[Any], **details: Any) -> None:
        self.name, self._kind, self._inputs, self._outputs, self._details = name, kind, inputs, outputs, details

    @property
    def type(self) -> Any:
        return self._kind

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class IElementWiseLayer(ILayer):
    @property
    def op(self) -> Any:
        return self._details["op"]


class IConstantLayer(ILayer):
    @property
    def weights(self) -> Any:
        return self._details["weights"]


class IAttentionInputLayer(ILayer):
    @property
    def attention(self) -> Any:
        return self._details["attention"]


class IAttention(_Fake):
    decomposable = False
    normalization_quantize_scale: Any = None
    normalization_quantize_to_type: Any = None

    def __init__(self, name: str, inputs: list[Any]) -> None:
        self.name, self._inputs = name, inputs

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def set_input(self, index: int, tensor: Any) -> bool:
        self._inputs[index] = tensor
        return True


class Weights(_Fake):
    def __init__(self, values: Any) -> None:
        self._values = values


class INetworkDefinition(_Fake):
    def __init__(self, flags: int) -> None:
        self._flags, self._layers, self._network_inputs = flags, [], []

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_inputs(self) -> int:
        return len(self._network_inputs)

    def get_layer(self, index: int) -> Any:
        return self._layers[index]

    def get_input(self, index: int) -> Any:
        return self._network_inputs[index]

    def add_constant(self, shape: tuple[int, ...], weights: Weights) -> Any:
        assert weights._values.dtype == np.float32
        return self._add("CONSTANT", "constant", [], "FLOAT", weights=weights._values)

    def _add(self, kind: str, name: str, inputs: list[Any], dtype: str, output: str = "", **details: Any) -> Any:
        tensor = self.trt.ITensor(output or f"{kind} {len(self._layers)}", self.trt.DataType[dtype])
        layer = self.trt.ILayer(self.trt.LayerType[kind], name, inputs, [tensor], **details)
        self._layers.append(layer)
        return layer


class ParserError(_Fake):
    def __init__(self, node: str, operator: str, description: str) -> None:
        self._told = (node, operator, description)

    def node_name(self) -> str:
        return self._told[0]

    def node_operator(self) -> str:
        return self._told[1]

    def desc(self) -> str:
        return self._told[2]


class OnnxParser(_Fake):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        import onnx  # only who builds needs it

        graph, trt = onnx.load(path).graph, self.trt
        tensors = {}
        for value in graph.input:
            kind = value.type.tensor_type
            shape = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
            tensors[value.name] = trt.ITensor(value.name, trt.DataType[_dtype(kind.elem_type)], shape)
            self._network._network_inputs.append(tensors[value.name])
        for weight in graph.initializer:
            layer = self._network._add("CONSTANT", weight.name, [], _dtype(weight.data_type), weight.name)
            layer.get_output(0).shape = tuple(weight.dims)
            tensors[weight.name] = layer.get_output(0)
        for node in graph.node:
            if node.op_type not in (*_LAYERS, "Attention"):
                self._errors.append(trt.ParserError(node.name, node.op_type, "Plugin not found"))
                return False
            inputs = [tensors[name] for name in node.input]
            layer = self._attention(node, inputs) if node.op_type == "Attention" else self._plain(node, inputs)
            tensors[node.output[0]] = layer.get_output(0)
        return True

    def _plain(self, node: Any, inputs: list[Any]) -> Any:
        dtype = inputs[2].dtype.name if node.op_type == "QuantizeLinear" else "BF16"
        if node.op_type == "MatMul":  # the weight has a dimension less
            inputs[1] = self._network._add("SHUFFLE", "broadcast", [inputs[1]], "BF16").get_output(0)
        details = {"op": self.trt.ElementWiseOperation.SUM} if node.op_type == "Add" else {}
        return self._network._add(_LAYERS[node.op_type], node.name, inputs, dtype, node.output[0], **details)

    def _attention(self, node: Any, inputs: list[Any]) -> Any:
        """q and k times the root of the scale, which is cast to their type, whatever it is."""
        network, trt = self._network, self.trt
        if not hasattr(trt.LayerType, "ATTENTION_INPUT"):
            return network._add("SOFTMAX", node.name, inputs, "BF16", node.output[0])
        (scale,) = (a.f for a in node.attribute if a.name == "scale")
        for index in (0, 1):
            constant = network.add_constant((), trt.Weights(np.array([scale**0.5], dtype=np.float32)))
            cast = network._add("CAST", "cast", [constant.get_output(0)], "BF16")
            pair = [inputs[index], cast.get_output(0)]
            product = network._add("ELEMENTWISE", "scale", pair, "BF16", op=trt.ElementWiseOperation.PROD)
            inputs[index] = product.get_output(0)
        attention = trt.IAttention(node.name, inputs)
        entry = network._add("ATTENTION_INPUT", node.name, inputs, "BF16", attention=attention)
        return network._add("ATTENTION_OUTPUT", node.name, [entry.get_output(0)], "BF16", node.output[0])


def _dtype(elem_type: int) -> str:
    return _ONNX_DTYPES[elem_type]


class IOptimizationProfile(_Fake):
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, name: str, least: Any, typical: Any, most: Any) -> None:
        self._shapes[name] = (least, typical, most)


class IBuilderConfig(_Fake):
    max_aux_streams = -1
    num_compute_capabilities = 0
    profiling_verbosity: Any = None
    progress_monitor: Any = None

    def __init__(self, logger: ILogger) -> None:
        self._logger, self._flags, self._profile = logger, {self.trt.BuilderFlag.TF32}, None

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        self._capability = capability
        return index < self.num_compute_capabilities

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if any(
            not low <= opt <= high for dims in profile._shapes.values() for low, opt, high in zip(*dims, strict=True)
        ):
            self._logger.log(self.trt.Severity.ERROR, "profiles satisfy MIN<=OPT<=MAX")
            return -1
        self._profile = profile
        return 0


class IProgressMonitor(_Fake):
    """Overridden by who builds."""


class Builder(_Fake):
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> Any:
        return self.trt.INetworkDefinition(flags)

    def create_builder_config(self) -> Any:
        return self.trt.IBuilderConfig(self.logger)

    def create_optimization_profile(self) -> Any:
        return self.trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        """The plan has no tensors; what is tested of it is that it comes, or does not."""
        self.trt.trace("build", config, network._flags)
        for phase, steps in _PHASES.items():
            config.progress_monitor.phase_start(phase, None, steps)
            for step in range(steps):
                if not config.progress_monitor.step_complete(phase, step):
                    return self._refuse("Build canceled by user")
            config.progress_monitor.phase_finish(phase)
        if config._profile is None and any(-1 in tensor.shape for tensor in network._network_inputs):
            return self._refuse("Network has dynamic inputs, but no optimization profile has been defined")
        if any(not self._fuses(network, config, layer) for layer in network._layers):
            return self._refuse("Attention operation was not supported by a dedicated kernel")
        return _MAGIC + b"{}"

    def _fuses(self, network: Any, config: Any, layer: Any) -> bool:
        attention = layer._details.get("attention")
        if attention is None or attention.decomposable or attention.normalization_quantize_to_type is None:
            return True
        producers = {t.name: made.type.name for made in network._layers for t in made._outputs}
        quantised = all(producers[t.name] == "DEQUANTIZE" for t in attention._inputs)
        return quantised and min(dims[0][1] for dims in config._profile._shapes.values()) >= _MIN_FUSED

    def _refuse(self, why: str) -> None:
        self.logger.log(self.trt.Severity.ERROR, why)
