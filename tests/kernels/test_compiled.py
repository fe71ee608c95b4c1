"""What the compiler makes of every kernel for Hopper: it must fit, use the tensor cores, and keep to its registers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

SHARED_MEMORY = 227 * 1024
"""Bytes a block may have on compute capability 9.0."""


KNOWN = ("3.6.", "3.9.")
"""Each Triton allots registers anew; with these nothing is spilled."""


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.hopper"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_they_fit(kernels: dict[str, dict[str, Any]]) -> None:
    assert {name: k for name, k in kernels.items() if k["shared"] > SHARED_MEMORY} == {}


@pytest.mark.skipif(not triton.__version__.startswith(KNOWN), reason=f"tiles were chosen with Triton {KNOWN}")
def test_they_do_not_spill(kernels: dict[str, dict[str, Any]]) -> None:
    assert {name: k for name, k in kernels.items() if k["spilled"]} == {}


def test_products_use_the_tensor_cores(kernels: dict[str, dict[str, Any]]) -> None:
    products = {name: k for name, k in kernels.items() if name.startswith("linear")}
    assert len(products) == 32
    assert all(k["tensor_cores"] for k in products.values())
