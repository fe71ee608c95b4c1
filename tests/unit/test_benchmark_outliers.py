"""benchmarks.outliers: what docs/quality.md says of E4M3's range, held here."""

import pytest

from benchmarks.outliers import attention_error, product_errors


@pytest.mark.parametrize("factor", [1, 100, 10_000])
def test_outliers_of_a_row_cost_the_others_no_digits(factor: float) -> None:
    """Up to about 2^14: E4M3 has 18 octaves, of which the last three lose a digit each."""
    errors = product_errors(factor)
    assert errors["small numbers"] < 0.04 and errors["whole"] < 0.04


def test_outliers_beyond_the_format_cost_the_others_theirs() -> None:
    assert product_errors(1e5)["small numbers"] > 0.1


def test_peaked_scores_cost_more_than_flat_ones() -> None:
    flat, peaked = attention_error(0.5, uneven=False), attention_error(4, uneven=True)
    assert 0.03 < flat < 0.045 < peaked < 0.12
