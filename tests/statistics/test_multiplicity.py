"""Corrections for many tests: Benjamini and Hochberg, Holm, and a bound beside random draws."""

from __future__ import annotations

import numpy as np
import pytest

from dt_lens.statistics.multiplicity import holm, q_values, tail_or_share


def test_q_values_are_benjamini_and_hochbergs() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(50), rng.random(10) * 1e-3])
    q = q_values(p)
    # Rejecting q <= a is the step-up procedure: the largest k with p_(k) <= k a / m.
    for a in (0.01, 0.05, 0.2):
        k = max([i + 1 for i, x in enumerate(np.sort(p)) if x <= (i + 1) * a / len(p)], default=0)
        assert int((q <= a).sum()) == k
    assert q_values([]).shape == (0,)


@pytest.mark.parametrize("draws", [60, 1000])
def test_a_bound_beside_draws_makes_no_p_too_small(draws: int) -> None:
    """For the smaller of the two, one in 1,000 is 1.37 in 1,000."""
    true = np.random.default_rng(0).random(400_000)
    beaten = np.random.default_rng(1).binomial(draws, true)
    share = (1 + beaten) / (1 + draws)
    for strict in (1.0, 3.0):  # an exact bound, and one that is three times too large
        p = tail_or_share(np.minimum(1, strict * true), share, draws)
        for alpha in (1 / (draws + 1), 0.01, 0.05, 0.1, 0.11, 0.2):
            assert (p <= alpha).mean() < 1.08 * alpha + 4 * np.sqrt(alpha / len(true))
        assert ((p > 0) & (p <= 1)).all()
    smaller = np.minimum(share, true)
    assert (smaller <= 1 / (draws + 1)).mean() > 1.3 / (draws + 1)


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
