"""What the floor counts: the operations that PERFORMANCE's numbers are of."""

import pytest

from benchmarks import timing
from benchmarks.floor import flops, products
from fluxserve.families.flux.models import FLUX1_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from fluxserve.families.flux.parts import FluxSpec


def test_a_step_of_flux1() -> None:
    """74.4 TFLOP: 57 blocks over 4096 image and 512 text tokens."""
    assert flops(FLUX1_DEV.transformer, 4096 + 512) / 1e12 == pytest.approx(74.4, abs=0.05)


@pytest.mark.parametrize(
    ("spec", "references", "expected"),
    [(FLUX2_KLEIN_4B, 0, 34.79), (FLUX2_KLEIN_9B, 0, 75.45), (FLUX2_KLEIN_4B, 1, 76.67), (FLUX2_KLEIN_9B, 1, 161.22)],
)
def test_a_step_of_a_klein(spec: FluxSpec, references: int, expected: float) -> None:
    """13 D² of weights a row and block: SwiGLU's gate beside what it opens, and M = 3·D. References are rows too."""
    found = flops(spec.transformer, 4096 * (1 + references) + 512)
    d, blocks = spec.transformer.hidden_size, spec.transformer.num_layers + spec.transformer.num_single_layers
    rows = 4096 * (1 + references) + 512
    assert found == blocks * (2 * rows * 13 * d**2 + 4 * rows**2 * d)
    assert found / 1e12 == pytest.approx(expected, abs=0.01)


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
