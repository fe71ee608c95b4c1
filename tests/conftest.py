"""Before any test imports torch: its waiting threads sleep, because tests share the machine with one another."""

import pytest

from fluxserve import settings
from tests.support import exports

settings.let_threads_sleep()


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> exports.Exports:
    """`export(engine, precision, *arguments)`: the tiny model, exported at most once."""
    return exports.make(tmp_path_factory)


@pytest.fixture(scope="session")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> "exports.OnnxOf":
    """`onnx(flux)`: the components of random weights, traced to ONNX and opened with ONNX Runtime, once."""
    return exports.OnnxOf(tmp_path_factory.mktemp("onnx"))
