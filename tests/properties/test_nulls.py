"""False discoveries on models without structure are no more frequent than promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dt_lens import WeightSVD
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.nulls.haar import HaarMaximum, cap_probability

SCANS = 60  # test_nulls_calibration counts more of them, on smaller models


def test_discoveries_under_a_true_null_come_out_at_the_promised_rate(make_dt: Callable[..., Any]) -> None:
    """Random weights as initialised, many whole scans: the share with any discovery at q < 0.05, and the p-values."""
    found, p_values = 0, []
    for seed in range(SCANS):
        model = make_dt(seed, size=0.0, n_layers=1, n_heads=1)
        table = WeightSVD(model).scan(embeddings=["state_in", "action_out"], seed=seed)
        found += bool((table["q_value"] < 0.05).any())
        p_values.append(table["p_value"].to_numpy())
    low, high = stats.binom.interval(0.999, SCANS, 0.05)
    assert found <= high, f"{found} of {SCANS} scans"
    # And not far fewer: dependence between rows costs some discoveries, not all.
    assert found >= low / 2
    first = np.array([p[0] for p in p_values])
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    pooled = np.concatenate(p_values)
    for level in (0.5, 0.1, 0.01):
        assert abs(float((pooled < level).mean()) / level - 1) < 0.3


@settings(max_examples=40, deadline=None)
@given(
    t=st.floats(0, 1),
    dimension=st.integers(2, 400),
    span=st.integers(1, 40),
)
def test_a_cap_is_a_probability_that_falls_with_the_cosine_and_grows_with_the_span(
    t: float, dimension: int, span: int
) -> None:
    p = float(cap_probability(t, dimension, span))
    assert 0 <= p <= 1
    assert p <= float(cap_probability(t, dimension, span + 1)) + 1e-12
    assert p <= float(cap_probability(t * 0.9, dimension, span)) + 1e-12
    # A span holds the part of a vector that its complement lacks.
    if span < dimension:
        other = float(cap_probability((1 - t**2) ** 0.5, dimension, dimension - span))
        np.testing.assert_allclose(p, 1 - other, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 12), d=st.integers(2, 20), span=st.integers(1, 4))
def test_the_null_of_a_maximum_lies_between_one_label_and_all_of_them(seed: int, n: int, d: int, span: int) -> None:
    E = np.random.default_rng(seed).standard_normal((n, d))
    t = np.linspace(0.01, 0.99, 20)
    p = HaarMaximum.of(E, span=span, samples=2000).p_value(t)
    cap = cap_probability(t, d, span)
    assert (p >= cap * 0.9).all()
    assert (p <= np.minimum(1, n * cap) * 1.1 + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_q_values_keep_the_order_and_are_no_smaller(p: list[float]) -> None:
    q = q_values(p)
    assert (q >= np.asarray(p) - 1e-15).all()
    assert (q <= 1).all()
    assert (np.diff(q[np.argsort(p, kind="stable")]) >= -1e-15).all()
