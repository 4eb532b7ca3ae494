"""The smallest of several p-values, compared with the draws' own smallest."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dt_lens import DtLensError
from dt_lens.statistics.nulls.smallest_p import SmallestP


@pytest.mark.parametrize("statistics", [1, 3])
def test_it_is_the_rank_of_the_row_among_the_draws_and_itself(statistics: int) -> None:
    """The definition, computed again for each row with the row in the draws' midst."""
    rng = np.random.default_rng(statistics)
    drawn, rows = rng.standard_normal((60, statistics)), 1.5 * rng.standard_normal((150, statistics))
    found = SmallestP.of(drawn).test(rows)
    for row, p, each in zip(rows, found.p_value, found.each, strict=True):
        together = np.vstack([drawn, row])
        ps = (together[None] >= together[:, None]).sum(1) / 61
        np.testing.assert_allclose(each, ps[-1])
        assert p == pytest.approx((ps.min(1) <= ps[-1].min() + 1e-12).mean())
    if statistics == 1:
        np.testing.assert_allclose(found.p_value, found.each[:, 0])


@pytest.mark.parametrize("levels", [2, 4, 9])
def test_ties_count_as_the_definition_says(levels: int) -> None:
    """Of small whole numbers, by brute force: how many of the draws and the row have as small a smallest rank."""
    rng = np.random.default_rng(levels)
    for B, statistics in ((1, 1), (3, 2), (12, 3), (40, 4)):
        drawn, rows = rng.integers(0, levels, (B, statistics)), rng.integers(-1, levels + 1, (30, statistics))
        found = SmallestP.of(drawn).test(rows)
        for row, p, each in zip(rows, found.p_value, found.each, strict=True):
            together = np.vstack([drawn, row])
            ranks = (together[None] >= together[:, None]).sum(1)
            assert (each * (B + 1)).tolist() == pytest.approx(ranks[-1].tolist())
            assert p * (B + 1) == pytest.approx((ranks.min(1) <= ranks[-1].min()).sum()), (drawn, row)


def test_p_values_of_dependent_statistics_are_uniform() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        x = rng.standard_normal((100, 4))
        x[:, 1] = x[:, 0] + 0.1 * x[:, 1]  # nearly the same, and one of another scale
        x[:, 3] *= 50
        found.append(float(SmallestP.of(x[1:]).test(x[:1]).p_value[0]))
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_bad_draws_are_refused() -> None:
    for drawn in ([], [1.0, 2.0], [[np.nan]]):
        with pytest.raises(DtLensError, match="draws, statistics"):
            SmallestP.of(drawn)
    with pytest.raises(DtLensError, match=r"\[rows, 2\]"):
        SmallestP.of([[1, 2]]).test([[1.0]])
