"""Laws of the rank effects and of the smallest p: what a test of clusters must not depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dt_lens.statistics.nulls.smallest_p import SmallestP
from dt_lens.statistics.rank_effects import RankEffects

N = 12
values = hnp.arrays(np.float64, (2, N), elements=st.integers(-40, 40).map(lambda x: x / 8))
levels = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=N, max_size=N).filter(
    lambda x: len(set(x) - {None}) > 1
)
strata = st.lists(st.sampled_from([0, 1]), min_size=N, max_size=N)


def effects(x: Any, of: Any, within: Any = None) -> Any:
    """With ``None`` where the strata leave nothing to compare."""
    kept = [
        len({level for level, s in zip(of, within or [0] * N, strict=True) if s == one and level is not None}) > 1
        for one in set(within or [0])
    ]
    return RankEffects({"f": of}, [] if within is None else [within])(x) if any(kept) else None


@settings(max_examples=40, deadline=None)
@given(values, levels, st.none() | strata)
def test_what_effects_do_not_depend_on(x: Any, of: list[Any], within: Any) -> None:
    found = effects(x, of, within)
    if found is None:
        return
    assert ((found >= -1e-12) & (found <= 1 + 1e-12)).all()
    for same in (-x, x**3 + 5, np.exp(x)):  # the sign of the direction, and monotone maps
        np.testing.assert_allclose(effects(same, of, within), found, atol=1e-9)
    renamed = [None if level is None else {"a": 9, "b": 3, "c": 7}[level] for level in of]
    np.testing.assert_allclose(effects(x, renamed, within), found, atol=1e-12)
    order = np.random.default_rng(0).permutation(N)
    moved = None if within is None else [within[i] for i in order]
    np.testing.assert_allclose(effects(x[:, order], [of[i] for i in order], moved), found, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float64, (30, 3), elements=st.floats(-3, 3)),
    hnp.arrays(np.float64, (4, 3), elements=st.floats(-3, 3)),
)
def test_p_values_know_ranks_only_and_lie_between_one_and_all_factors(drawn: Any, rows: Any) -> None:
    drawn = drawn + np.random.default_rng(0).standard_normal(drawn.shape) * 1e-3  # no ties
    found = SmallestP.of(drawn).test(rows)
    least = found.each.min(1)
    assert (found.p_value >= least - 1e-12).all() and (found.p_value <= np.minimum(1, 3 * least) + 1e-12).all()
    scaled = SmallestP.of(np.exp(drawn) * [1, 9, 100]).test(np.exp(rows) * [1, 9, 100])
    np.testing.assert_allclose(scaled.each, found.each, atol=2 / 31)  # ties are told by differences
    more = SmallestP.of(drawn).test(rows + np.array([0.5, 0, 0]))
    assert (more.each <= found.each + 1e-12).all()
