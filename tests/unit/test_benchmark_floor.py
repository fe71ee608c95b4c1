"""What the floor counts: the operations that PERFORMANCE's numbers are of."""

import pytest

from benchmarks import timing
from benchmarks.floor import flops, products
from fluxserve.spec import FLUX1_DEV


def test_a_step_of_flux1() -> None:
    """74.4 TFLOP: 57 blocks over 4096 image and 512 text tokens."""
    assert flops(FLUX1_DEV.transformer, 4096 + 512) / 1e12 == pytest.approx(74.4, abs=0.05)


def test_products_are_the_weights_of_the_blocks() -> None:
    """Text has its own again in the double blocks; modulation and embedders are the rest of 11.9 B."""
    spec = FLUX1_DEV.transformer
    shared = sum(p.count * p.columns * p.inner for p in products(spec))
    text = spec.num_layers * 12 * spec.hidden_size**2
    steering = (spec.num_layers * 12 + spec.num_single_layers * 3 + 2) * spec.hidden_size**2
    assert (shared + text + steering) / 1e9 == pytest.approx(11.9, abs=0.05)


def test_summary() -> None:
    found = timing.summary([3.0, 1.0, 2.0, 100.0])
    assert found == {"median": 2.5, "p90": 100.0, "p99": 100.0, "least": 1.0, "most": 100.0, "n": 4}
