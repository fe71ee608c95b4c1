"""flops: its counts against sums by hand, and the claim that can't be."""

import pytest

from benchmarks import floor, flops
from fluxserve.families.flux.models import FLUX1_DEV, FLUX2_KLEIN_9B

SIZE = (512, 512)


@pytest.fixture(scope="module")
def dev() -> dict[str, float]:
    return flops.counted(FLUX1_DEV, SIZE, 0)


def test_the_transformer_by_the_floors_sum(dev: dict[str, float]) -> None:
    tokens = FLUX1_DEV.image_tokens(*SIZE) + FLUX1_DEV.text.sequence.tokens
    assert dev["transformer"] == pytest.approx(floor.flops(FLUX1_DEV.transformer, tokens) / 1e12, rel=0.02)


@pytest.mark.parametrize("references", [0, 1])
def test_a_klein_by_hand(references: int) -> None:
    """Of every block and token 4 products of D², and SwiGLU's of 6 and 3 with M = 3·D; references are tokens."""
    spec, shape = FLUX2_KLEIN_9B, FLUX2_KLEIN_9B.transformer
    blocks, d = shape.num_layers + shape.num_single_layers, shape.hidden_size
    tokens = spec.image_tokens(*SIZE) * (1 + references) + spec.text.sequence.tokens
    expected = blocks * (2 * tokens * 13 * d * d + 4 * tokens * tokens * d)
    assert flops.counted(spec, SIZE, references)["transformer"] == pytest.approx(expected / 1e12, rel=0.02)


def test_every_component_counts(dev: dict[str, float]) -> None:
    assert set(dev) == set(FLUX1_DEV.components)
    assert all(tflop > 0 for tflop in dev.values())
    parts = dev["clip"] + dev["t5"] + 3 * dev["transformer"] + dev["vae_decoder"]
    assert flops.whole(FLUX1_DEV, dev, 3) == pytest.approx(parts)


def test_a_claim_that_cannot_be() -> None:
    """klein-9B in 0.9 s on an A100 in BF16: 107% of its peak, were nothing computed but the loop."""
    claim = next(c for c in flops.PUBLISHED["claims"] if c["gpu"] == "A100")
    judged = flops.judged(claim, flops.counted(FLUX2_KLEIN_9B, (1024, 1024), 0))
    assert 1.07 < judged["loop"] < 1.08 < judged["all"]
    assert "can't be" in flops.claims_table([judged])


@pytest.mark.parametrize("claim", [("flux.3", "1"), ("flux.1-dev", "soon"), ("flux.1-dev", "0"), ("flux.1-dev", "nan")])
def test_a_claim_that_is_none(monkeypatch: pytest.MonkeyPatch, claim: tuple[str, str]) -> None:
    monkeypatch.setattr("sys.argv", ["flops", "--claim", *claim])
    with pytest.raises(SystemExit):
        flops.main()
