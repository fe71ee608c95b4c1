"""The alternative that benchmarks measure does the same: its endings, over products that are in memory."""

import pytest
import torch

from benchmarks import library
from fluxserve.kernels import linear as kernels
from fluxserve.kernels.fp8 import E4M3
from tests.kernels.judge import DEVICE, poisoned, random, relative
from tests.kernels.test_linear import HEAD, heads_of, operands


@pytest.mark.parametrize("ending", ["gelu", "add", "heads"])
def test_endings(ending: str) -> None:
    rows, columns, split = 70, 3 * HEAD, 32
    x, x_scale, w = operands(rows, columns, 128, E4M3)
    if DEVICE == "cuda":
        y = library.products(x, x_scale, w, split)
    else:
        y = torch.empty(rows, columns)
        kernels.plain_linear(x, x_scale, kernels.Linear(w.weight, None, None), split, y)
    gate, heads = random(2, columns, seed=6), heads_of(rows, 2)
    before = random(rows, columns, seed=7)
    got = before.clone() if ending == "add" else poisoned(rows, columns, dtype=torch.float32)
    expected = before.clone()
    library.end(ending, y, w, split, got, gate, heads, 20.0)
    if ending == "gelu":
        kernels.plain_linear_gelu(x, x_scale, w, split, 20.0, expected)
    elif ending == "add":
        kernels.plain_linear_add(x, x_scale, w, split, gate, expected)
    else:
        kernels.plain_linear_heads(x, x_scale, w, split, heads, expected)
    assert relative(got, expected) < (2**-8 if DEVICE == "cuda" else 1e-5)
