"""Rank statistics of factors: the same numbers as SciPy's, with ties, strata and factors that apply to a part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from dt_lens import DtLensError
from dt_lens.statistics.rank_effects import RankEffects, epsilon_squared, ranks, two_sided_auc

LEVELS = np.arange(60) % 4
HALF = np.arange(60) % 5 == 0


@pytest.fixture(params=[9, 1], ids=["distinct", "ties"])
def values(request: pytest.FixtureRequest) -> Any:
    return np.random.default_rng(3).standard_normal((7, 60)).round(request.param)


def kruskal(x: Any, levels: Any) -> float:
    return float(stats.kruskal(*[x[levels == level] for level in np.unique(levels)]).statistic) / (len(x) - 1)


def auc(x: Any, y: Any) -> float:
    area = stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
    return float(max(area, 1 - area))


def test_effects_are_those_of_scipy(values: Any) -> None:
    part = [None if i < 20 else level for i, level in enumerate(LEVELS.tolist())]
    uneven = np.minimum(np.arange(60) // 3 % 7, 3)
    effects = RankEffects({"four": LEVELS.tolist(), "half": HALF.tolist(), "part": part, "uneven": uneven.tolist()})
    assert effects.measures == ("epsilon_squared", "auc", "epsilon_squared", "epsilon_squared")
    for x, found in zip(values, effects(values), strict=True):
        wanted = [kruskal(x, LEVELS), auc(x[HALF], x[~HALF]), kruskal(x[20:], LEVELS[20:]), kruskal(x, uneven)]
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
        np.testing.assert_allclose([epsilon_squared(x, LEVELS), two_sided_auc(x, HALF)], wanted[:2], rtol=1e-9)
    np.testing.assert_allclose(ranks(values), stats.rankdata(values, axis=1), rtol=0)


def test_in_strata_only_the_order_within_each_counts(values: Any) -> None:
    strata = np.arange(60) // 15
    effects = RankEffects({"four": LEVELS.tolist(), "half": HALF.tolist()}, [strata.tolist()])
    found = effects(values)
    # Whatever moves whole strata changes nothing, and without strata everything.
    moved = values + 100 * strata
    np.testing.assert_allclose(effects(moved), found, atol=1e-12)
    assert (np.abs(RankEffects({"four": LEVELS.tolist()})(moved) - found[:, :1]) > 1e-3).all()
    for x, (four, half) in zip(values, found, strict=True):
        u = np.concatenate([(stats.rankdata(x[strata == s]) - 8) / 16 for s in range(4)])
        sums = np.array([u[level == LEVELS].sum() for level in range(4)])
        assert four == pytest.approx((sums**2 / 15).sum() / (u**2).sum(), rel=1e-9)
        # Strata of one size with as many of each level: the mean of their areas.
        areas = [stats.mannwhitneyu(x[(strata == s) & HALF], x[(strata == s) & ~HALF]).statistic / 36 for s in range(4)]
        assert half == pytest.approx(0.5 + abs(np.mean(areas) - 0.5), rel=1e-9)
    # A perfect order is an area of 1 in unequal strata too; a stratum of one level says nothing.
    level, where = [0, 1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2]
    uneven = RankEffects({"f": level}, [where])
    assert uneven([[1, 2, 3, 1, 2, -9, -9], [9, 8, 7, 1, 0, 5, 5]]).ravel().tolist() == pytest.approx([1.0, 1.0])
    # One stratum for and one against: 1/4 and -1/6, of at most 1/2 and 1/3 over a half.
    assert uneven([[1, 2, 3, 9, 8, 0, 0]])[0, 0] == pytest.approx(0.5 + (1 / 4 - 1 / 6) / (1 / 2 + 1 / 3))


def test_many_rows_at_once_are_what_each_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 60))
    effects = RankEffects({"four": LEVELS.tolist(), "half": HALF.tolist()})
    whole = effects(rows)
    monkeypatch.setattr("dt_lens.statistics.rank_effects.HELD", 180)
    np.testing.assert_array_equal(effects(rows), whole)


@pytest.mark.parametrize(
    ("factors", "strata", "said"),
    [
        ({}, [], "no factor"),
        ({"f": [1, 1, None]}, [], "two levels"),
        ({"f": [1, 2, 3]}, [["a", "b", "c"]], "in any stratum"),
        ({"f": [1, 2], "g": [1, 2, 1]}, [], "'g' has 3 levels"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(factors: Any, strata: Any, said: str) -> None:
    with pytest.raises(DtLensError, match=said):
        RankEffects(factors, strata)


def test_values_of_another_shape_are_refused() -> None:
    effects = RankEffects({"f": [1, 2, 1]})
    for values in ([[1.0, 2.0]], [1.0, 2.0, 3.0], [[1.0, np.nan, 2.0]]):
        with pytest.raises(DtLensError, match="rows of 3"):
            effects(values)
    with pytest.raises(DtLensError, match="epsilon_squared for more"):
        two_sided_auc([1, 2, 3], "abc")
