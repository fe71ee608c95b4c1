"""Building engines: TensorRT-RTX for real, on a CPU, for GPUs that are not here; every version's API by the fake."""

import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes", reason="the extra 'export' is not installed")
onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")

from fluxserve_export import build as building  # noqa: E402
from fluxserve_export.build import BuildReport, build  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from fluxserve.engines import tensorrt, tensorrt_library  # noqa: E402
from fluxserve.engines.tensorrt_library import Library  # noqa: E402
from fluxserve.errors import ExportError, LibraryRefused  # noqa: E402
from tests.support import fake_tensorrt as fake  # noqa: E402

HEADS, HEAD_DIM = 2, 128
CHANNELS = HEADS * HEAD_DIM
SHAPES = {"x": ((1, 32, CHANNELS), (1, 64, CHANNELS), (2, 256, CHANNELS))}
SHORT = {"x": ((1, 16, CHANNELS), (1, 64, CHANNELS), (2, 256, CHANNELS))}
_NUMPY = {
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.INT64: np.int64,
}


class _Block:
    """x bf16 [rows, tokens, C] → three FP8 linears → attention → y; written node by node, as the export would."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.constant("zero", 0, TensorProto.FLOAT8E4M3FN)

    def constant(self, name: str, value: Any, dtype: int = TensorProto.BFLOAT16) -> str:
        array = np.asarray(value, dtype=np.float32).astype(_NUMPY[dtype])
        self.weights.append(
            TensorProto(name=name, data_type=dtype, dims=array.shape, raw_data=np.ascontiguousarray(array).tobytes())
        )
        return name

    def node(self, operator: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def quantised(self, tensor: str, name: str) -> str:
        scale = self.constant(f"{name}.scale", 0.01)
        self.node("QuantizeLinear", f"{name}.q", tensor, scale, "zero")
        return self.node("DequantizeLinear", f"{name}.dq", f"{name}.q", scale, "zero")

    def linear(self, x: str, name: str) -> str:
        values = np.random.default_rng(0).standard_normal((CHANNELS, CHANNELS))
        weight = self.constant(f"{name}.weight", values, TensorProto.FLOAT8E4M3FN)
        dequantised = self.node("DequantizeLinear", f"{name}.wdq", weight, self.constant(f"{name}.ws", 0.02), "zero")
        return self.node("MatMul", f"{name}.matmul", x, dequantised)


def write_block(file: Path, fp8: bool = True, between: str = "", scale: float = 1.0, unknown: str = "") -> Path:
    """An attention block; `between`: an operation after q's DequantizeLinear; `unknown`: an operator in front."""
    block = _Block()
    x = block.node(unknown, "odd", "x") if unknown else "x"
    x = block.quantised(x, "x")
    heads = block.constant("heads", [0, 0, HEADS, HEAD_DIM], TensorProto.INT64)
    inputs = []
    for name in ("q", "k", "v"):
        split = block.node("Reshape", f"{name}.split", block.linear(x, name), heads)
        tensor = block.node("Transpose", f"{name}.t", split, perm=[0, 2, 1, 3])
        tensor = block.quantised(tensor, name) if fp8 else tensor
        if between and name == "q":
            tensor = block.node(between, "between", tensor, block.constant("one", 1.0))
        inputs.append(tensor)
    attended = block.node("Attention", "attention", *inputs, scale=scale)
    merged = block.node("Transpose", "merged", attended, perm=[0, 2, 1, 3])
    block.node("Reshape", "y", merged, block.constant("flat", [0, 0, CHANNELS], TensorProto.INT64))
    dims = ["rows", "tokens", CHANNELS]
    ends = [[helper.make_tensor_value_info(name, TensorProto.BFLOAT16, dims)] for name in ("x", "y")]
    graph = helper.make_graph(block.nodes, "block", *ends, block.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    if not unknown:
        onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    return file


@pytest.fixture(params=["real", *fake.VERSIONS])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """TensorRT-RTX itself, where it is installed, and every version of the fake; the GPU that is here is an sm89."""
    if request.param == "real":
        return real_library()
    flavour = "tensorrt-rtx" if request.param == fake.RTX else "tensorrt"
    monkeypatch.setitem(sys.modules, flavour.replace("-", "_"), fake.make(request.param))
    monkeypatch.setattr(building, "Cuda", lambda device: SimpleNamespace(architecture="sm89"))
    return tensorrt_library.load(flavour)


def real_library() -> Library:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    return tensorrt_library.load("tensorrt-rtx")


def has_attention(library: Library) -> bool:
    return library.has("IAttention")


def build_block(library: Library, tmp_path: Path, *, architecture: str = "sm89", **changes: Any) -> BuildReport:
    block = {key: changes.pop(key) for key in ("fp8", "between", "scale", "unknown") if key in changes}
    changes = {"shapes": SHAPES, "fp8_attentions": 1, **changes}
    file = write_block(tmp_path / "block.onnx", **block)
    return build(library, file, target=tmp_path / "block.engine", architecture=architecture, **changes)


def test_fp8_attention_becomes_one_kernel(library: Library, tmp_path: Path) -> None:
    if not has_attention(library):
        with pytest.raises(ExportError, match=r"has no FP8 attention; expected 10\.16 or newer"):
            build_block(library, tmp_path)
        return
    seen: list[tuple[str, int, int]] = []
    report = build_block(library, tmp_path, progress=lambda *step: seen.append(step))
    assert (report.attentions, report.fp8_attentions, report.matmuls, report.fp8_matmuls) == (1, 1, 3, 3)
    assert report.bytes == (tmp_path / "block.engine").stat().st_size and report.layers > 20
    assert ("Building engine", 0, seen[0][2]) == seen[0] and all(0 <= done <= steps for _, done, steps in seen)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["block.engine", "block.onnx"]


def test_attention_that_is_not_quantised(library: Library, tmp_path: Path) -> None:
    report = build_block(library, tmp_path, fp8=False, fp8_attentions=0, scale=0.5)
    assert (report.attentions, report.fp8_attentions) == (int(has_attention(library)), 0)
    assert report.fp8_matmuls == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"between": "Add"}, r"0 attentions have .* expected 1. Not among them: attention \(from ELEMENTWISE, DEQUANT"),
        ({"scale": 0.25}, r"0 attentions .* attention \(from ELEMENTWISE, ELEMENTWISE, DEQUANTIZE\)"),
        ({"fp8": False}, r"0 attentions .* attention \(from SHUFFLE, SHUFFLE, SHUFFLE\)"),
        ({"fp8_attentions": 2}, r"1 attentions .* expected 2. Not among them: none"),
        ({"fp8_attentions": 0}, r"1 attentions .* expected 0"),
        (
            {"shapes": SHORT},
            r"can't build it \(it has FP8 attention, which must fuse.* supported by a dedicated kernel",
        ),
    ],
)
def test_a_fusion_that_can_not_be_fails_the_build(
    library: Library, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if not has_attention(library):
        pytest.skip("this version has no attention")
    with pytest.raises(ExportError, match=message):
        build_block(library, tmp_path, **changes)
    assert not (tmp_path / "block.engine").exists()


def test_what_the_builder_alone_would_let_pass(tmp_path: Path) -> None:
    """Left alone, the parser's network builds: decomposable=False proves nothing unless the softmax is quantised."""
    library, file = real_library(), write_block(tmp_path / "block.onnx")
    builder = library.builder()
    network = library.strongly_typed_network(builder)
    parser = library.module.OnnxParser(network, library.logger)
    config = building._config(library, builder, "sm89")
    assert parser.parse_from_file(str(file))
    building._add_profile(library, builder, network, config, SHAPES)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": {}}, r"shapes: got \[\]; expected x \(-1, -1, 256\) among them"),
        ({"shapes": {"x": ((1, 64, 256), (1, 32, 256), (2, 512, 256))}}, "shapes: tensorrt.* MIN<=OPT<=MAX"),
        (
            {"unknown": "NoSuchOperator", "fp8_attentions": 0},
            r"block.onnx: .* node 'odd' \(NoSuchOperator\): .*Plugin not",
        ),
        ({"architecture": "sm90"}, "architecture: got sm90; tensorrt.* builds for .*sm89"),
    ],
)
def test_refusals(library: Library, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        build_block(library, tmp_path, **{"fp8": False, "fp8_attentions": 0, **changes})


def test_fp8_for_a_gpu_without_it(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"sm86.*fp8_e4m3"):
        build_block(real_library(), tmp_path, architecture="sm86")


def test_both_consumer_architectures(tmp_path: Path) -> None:
    library = real_library()
    engines = {}
    for architecture in ("sm89", "sm120"):
        build_block(library, tmp_path, architecture=architecture)
        engines[architecture] = (tmp_path / "block.engine").read_bytes()
    assert engines["sm89"] != engines["sm120"]


def test_an_error_of_the_progress_ends_the_build(library: Library, tmp_path: Path) -> None:
    def progress(phase: str, step: int, steps: int) -> None:
        if step == 1:
            raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        build_block(library, tmp_path, fp8=False, fp8_attentions=0, progress=progress)
    assert not (tmp_path / "block.engine").exists()


def test_an_interrupt_ends_the_build(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = threading.Event()
    make = building._monitor

    def watched(*given: Any) -> Any:
        monitor = make(*given)
        cancel = monitor.cancel
        monitor.cancel = lambda: (cancel(), cancelled.set())
        return monitor

    def progress(phase: str, step: int, steps: int) -> None:
        if not cancelled.is_set():  # on the build's thread; the other one is interrupted meanwhile
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert cancelled.wait(20)

    monkeypatch.setattr(building, "_monitor", watched)

    with pytest.raises(KeyboardInterrupt):
        build_block(library, tmp_path, fp8=False, fp8_attentions=0, progress=progress)
    assert "cancel" in caplog.text.lower()  # the library says so
    assert not (tmp_path / "block.engine").exists()


@pytest.mark.parametrize("key", fake.VERSIONS)
def test_how_a_build_is_set_up(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake.make(key)
    flavour = "tensorrt-rtx" if key == fake.RTX else "tensorrt"
    monkeypatch.setitem(sys.modules, flavour.replace("-", "_"), module)
    monkeypatch.setattr(building, "Cuda", lambda device: SimpleNamespace(architecture="sm89"))
    build_block(tensorrt_library.load(flavour), tmp_path, fp8=False, fp8_attentions=0)
    ((_, config, flags),) = module.trace.named("build")
    assert flags == 1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert config.max_aux_streams == 0 and config.profiling_verbosity.name == "DETAILED"
    assert {flag.name for flag in config._flags} == ({"REQUIRE_USER_ALLOCATION"} if key == fake.RTX else set())
    if key == fake.RTX:
        assert config._capability == module.ComputeCapability.SM89


def test_the_fakes_parser_makes_the_layers_of_the_real_one(tmp_path: Path) -> None:
    module = fake.make(fake.RTX)
    made = Library(module, "tensorrt-rtx", "", tensorrt_library._logger(module))
    for fp8 in (True, False):
        file = write_block(tmp_path / "block.onnx", fp8=fp8)
        types = []
        for library in (real_library(), made):
            network = library.strongly_typed_network(library.builder())
            assert library.module.OnnxParser(network, library.logger).parse_from_file(str(file))
            layers = [network.get_layer(index).type.name for index in range(network.num_layers)]
            types.append([name for name in layers if name != "CONSTANT"])
        assert types[0] == types[1]


@pytest.mark.skipif(tensorrt.torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_runtime_without_a_gpu_has_the_librarys_words(tmp_path: Path) -> None:
    library = real_library()
    build_block(library, tmp_path)
    engine, truncated = tmp_path / "block.engine", tmp_path / "truncated.engine"
    truncated.write_bytes(engine.read_bytes()[:5000])
    for file, words in ((engine, "cudaError"), (truncated, "Serialization assertion plan.header.size == blobSize")):
        with pytest.raises(LibraryRefused, match=f"{file.name}: tensorrt-rtx .* can't load it: .*{words}"):
            tensorrt.deserialise(library, library.runtime(), file)
