"""Why ONNX Runtime is what `make demo` serves: it is faster on a CPU. Both in one process, in turn."""

import statistics

import pytest

from benchmarks.engines import Contender
from tests.support.exports import Exports

pytestmark = pytest.mark.xdist_group("export")


def test_onnxruntime_is_faster_than_torch_eager_on_a_cpu(export: Exports) -> None:
    """2.2 times as fast, measured (benchmarks/results/engines-cpu-*.json); a busy machine may take some of it."""
    eager = Contender({"checkpoint": ""}, "cpu")
    exported = Contender({"artifact": str(export("onnxruntime", "fp32").path)}, "cpu")
    for seed in range(9):
        eager.draw(seed)
        exported.draw(seed)
    ratio = statistics.median(e["total"] / o["total"] for e, o in zip(eager.times[2:], exported.times[2:], strict=True))
    assert ratio > 1.2
