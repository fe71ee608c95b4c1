"""Before any test imports torch: its waiting threads sleep, because tests share the machine with one another. And a
GPU's memory is taken as a server takes it, or what shows only there would show in no test.

Without a GPU, kernels run in Triton's interpreter: indexing and arithmetic are the same, conversions are not. It
multiplies bfloat16 as if it were whole numbers, and rounding up to the next power of two loses the carry (127.9 to E4M3
gives 64): so it is given float32, or E4M3 operands, and float32 results. Rounding is what a run on a GPU shows.
"""

import os
import signal
from typing import TYPE_CHECKING

import pytest

from fluxserve import settings
from tests.support import exports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.fused import FusedOf

settings.as_served()
signal.signal(signal.SIGINT, signal.default_int_handler)  # `make test &` in a script ignores it, and Ctrl-C is tested

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported


@pytest.fixture(autouse=torch.cuda.is_available())
def _give_memory_back() -> "Iterator[None]":
    """Tests share a GPU with one another: what PyTorch's pool kept of one test's is no other process's memory."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> exports.Exports:
    """`export(engine, precision, *arguments)`: the tiny model, exported at most once."""
    return exports.make(tmp_path_factory)


@pytest.fixture(scope="session")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> "exports.OnnxOf":
    """`onnx(flux)`: the components of random weights, traced to ONNX and opened with ONNX Runtime, once."""
    return exports.OnnxOf(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> "FusedOf":
    """`fused(flux)`: random weights in the fused engine, every kernel replaced by its plain reference."""
    from tests.support.fused import FusedOf

    return FusedOf(tmp_path_factory.mktemp("fused"))
