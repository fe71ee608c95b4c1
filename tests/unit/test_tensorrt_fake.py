"""The fake TensorRT has nothing that the real one lacks, and our code names nothing that some version lacks unasked."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxserve.engines import tensorrt, tensorrt_library
from tests.support import fake_tensorrt as fake
from tests.support import fake_tensorrt_builder

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / name for name in ("fluxserve/engines/tensorrt.py", "fluxserve/engines/tensorrt_library.py",
                                    "export/src/fluxserve_export/build.py")]  # fmt: skip
FAKES = [*fake.classes(vars(fake)), *fake.classes(vars(fake_tensorrt_builder))]

RECEIVERS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "graph.network": "INetworkDefinition",
    "parser": "OnnxParser",
    "e": "ParserError",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
    "attention": "IAttention",
    "runtime": "Runtime",
    "plan": "ICudaEngine",
    "self._plan": "ICudaEngine",
    "self._config": "IRuntimeConfig",
    "self._cache": "IRuntimeCache",
    "context": "IExecutionContext",
    "mode": "TensorIOMode",
}
"""Expressions of our code and the class of the library that they stand for."""

NOT_THE_LIBRARY = {("self._cache", "save")}
OF_A_SUBCLASS = {"op": "IElementWiseLayer", "weights": "IConstantLayer", "attention": "IAttentionInputLayer"}
"""Members that a layer has once it was cast."""

BEHIND_IS_RTX = {
    "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
    "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.set_runtime_cache", "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy", "IExecutionContext.is_stream_capturable",
    "IRuntimeCache.deserialize", "IRuntimeCache.serialize", "ComputeCapability", "CudaGraphStrategy.DISABLED",
    "DynamicShapesKernelSpecializationStrategy.EAGER", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy",
}  # fmt: skip
BEHIND_HAS = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION", "IAttention.get_input", "IAttention.set_input", "IAttention.name",
    "IAttention.decomposable", "IAttention.normalization_quantize_scale", "IAttention.normalization_quantize_to_type",
    "IAttentionInputLayer", "IAttentionInputLayer.attention",
}  # fmt: skip


def named_by_our_code() -> Iterator[str]:
    """Class.member, or a class alone, for everything of the library that a source names."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            receiver = ast.unparse(node.value)
            if receiver in RECEIVERS and (receiver, node.attr) not in NOT_THE_LIBRARY:
                # in the engine `config` is a runtime's
                owner = RECEIVERS[receiver]
                if receiver == "config" and source.name == "tensorrt.py":
                    owner = "IRuntimeConfig"
                yield f"{OF_A_SUBCLASS.get(node.attr, owner) if owner == 'ILayer' else owner}.{node.attr}"
            elif receiver in ("module", "library.module", "self.module", "self.library.module", "graph.library.module"):
                yield node.attr
            elif isinstance(node.value, ast.Attribute) and ast.unparse(node.value.value).endswith("module"):
                yield f"{node.value.attr}.{node.attr}"


def layer_types_named() -> set[str]:
    """The parser's layers are told apart by the names of their types."""
    tree = ast.parse(SOURCES[2].read_text(encoding="utf-8"))
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {c for c in constants if isinstance(c, str) and re.fullmatch("[A-Z][A-Z_0-9]{2,}", c)}


def in_api(key: str, name: str) -> bool:
    owner, _, member = name.partition(".")
    return owner in fake.API[key] and (not member or member in fake.API[key][owner])


NAMED = sorted({name for name in named_by_our_code() if "__" not in name})


def test_the_walk_finds_what_our_code_names() -> None:
    assert len(NAMED) > 60
    assert {
        "IExecutionContext.execute_async_v3", "ICudaEngine.device_memory_size_v2", "TensorIOMode.INPUT",
        "DataType.FP8", "IAttention.decomposable", "IRuntimeCache.serialize", "IConstantLayer.weights",
    } <= set(NAMED)  # fmt: skip


@pytest.mark.parametrize("key", fake.VERSIONS)
def test_our_code_names_only_what_every_version_has(key: str) -> None:
    missing = {name for name in NAMED if not in_api(key, name) and name not in BEHIND_HAS}
    assert missing - (set() if key == fake.RTX else BEHIND_IS_RTX) == set()


def test_layers_are_told_apart_by_names_that_are_real() -> None:
    named = layer_types_named() - {"INPUT", "FP8", "BuilderFlag", "REQUIRE_USER_ALLOCATION"}
    assert {"ATTENTION_INPUT", "DEQUANTIZE", "MATRIX_MULTIPLY"} <= named
    for key in fake.VERSIONS:
        absent = {"ATTENTION_INPUT"} if key.startswith("tensorrt-10.13") else set()
        assert named - set(fake.API[key]["LayerType"]) == absent
        assert {"FP8", *tensorrt._TORCH_NAMES} <= set(fake.API[key]["DataType"])


def test_what_is_behind_a_question_is_needed_there() -> None:
    """An exception for a name that nobody uses, or that every version has, would hide the next one."""
    for name in BEHIND_IS_RTX | BEHIND_HAS:
        assert name in NAMED, name
        assert not all(in_api(key, name) for key in fake.VERSIONS), name
        assert in_api(fake.RTX, name), name


@pytest.mark.parametrize("cls", FAKES, ids=lambda cls: cls.__name__)
def test_the_fake_invents_nothing(cls: type) -> None:
    holders = [key for key in fake.VERSIONS if cls.__name__ in fake.API[key]]
    assert holders
    for member in fake.public(cls):
        assert any(in_api(key, f"{cls.__name__}.{member}") for key in holders), member


@pytest.mark.parametrize("key", fake.VERSIONS)
def test_a_version_has_what_it_has(key: str) -> None:
    module = fake.make(key)
    for cls in FAKES:
        assert hasattr(module, cls.__name__) == (cls.__name__ in fake.API[key])
        for member in fake.public(cls) if hasattr(module, cls.__name__) else ():
            assert hasattr(getattr(module, cls.__name__), member) == in_api(key, f"{cls.__name__}.{member}")
    config = module.IBuilderConfig(None)
    with pytest.raises(AttributeError, match="max_aux_stream"):
        config.max_aux_stream = 0
    with pytest.raises(AttributeError):
        _ = module.BuilderFlag.NO_SUCH_FLAG


def test_the_installed_library_has_what_the_list_says(caplog: pytest.LogCaptureFixture) -> None:
    trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    assert trt.__version__.startswith(fake.RTX.partition("-")[2])
    for owner, members in fake.API[fake.RTX].items():
        assert set(members) <= set(dir(getattr(trt, owner))), owner
    library = tensorrt_library.load("tensorrt-rtx")
    assert (library.release, str(library)) == ("1.7", f"tensorrt-rtx {trt.__version__}")
    assert library.has("BuilderFlag", "REQUIRE_USER_ALLOCATION") and not library.has("BuilderFlag", "FP8_")
