"""The overlap of random subspaces against brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dt_lens import DtLensError
from dt_lens.statistics.nulls.haar import cap_probability
from dt_lens.statistics.nulls.subspaces import SubspaceOverlap

Make = Callable[..., Any]


def brute_force(k: int, m: int, d: int, samples: int) -> tuple[Any, Any]:
    """Sums of squares and largest cosines, from whole random frames and singular values."""
    rng = np.random.default_rng(5)
    total, largest = np.empty(samples), np.empty(samples)
    for i in range(samples):
        frame = np.linalg.qr(rng.standard_normal((d, k)))[0]
        cosines = np.linalg.svd(frame[:m], compute_uv=False)
        total[i], largest[i] = np.square(cosines).sum(), cosines.max()
    return total, largest


@pytest.mark.parametrize(("k", "m", "d"), [(1, 4, 9), (3, 2, 10), (5, 7, 30), (6, 7, 10), (9, 3, 10), (20, 20, 24)])
def test_draws_are_those_of_random_frames(k: int, m: int, d: int) -> None:
    null = SubspaceOverlap(k, m, d)
    total, largest = brute_force(k, m, d, 3000)
    drawn = null.draws(3000, seed=1)
    assert stats.ks_2samp(total, drawn[0]).pvalue > 1e-3
    if k + m <= d:
        assert stats.ks_2samp(largest, drawn[1]).pvalue > 1e-3
    else:
        np.testing.assert_array_equal(drawn[1], 1.0)  # subspaces that fill the space share a line
    assert total.mean() == pytest.approx(null.mean, abs=5 * null.std / 3000**0.5)
    assert total.std() == pytest.approx(null.std, rel=0.07)
    assert abs(float(null.z(total).mean())) < 0.1


@pytest.mark.parametrize(("m", "d"), [(1, 12), (5, 12), (11, 12)])
def test_a_line_is_exact(m: int, d: int) -> None:
    cosine = np.linspace(0.05, 0.95, 9)
    for null in (SubspaceOverlap(1, m, d), SubspaceOverlap(m, 1, d)):
        assert null.exact
        np.testing.assert_allclose(null.p_value(cosine**2), cap_probability(cosine, d, m), rtol=1e-9)
    # And so is a hyperplane: the overlap that it lacks is the overlap of its normal.
    plane = SubspaceOverlap(d - 1, m, d)
    assert plane.exact or m in (1, d)
    np.testing.assert_allclose(plane.p_value(m - 1 + cosine**2), 1 - cap_probability((1 - cosine**2) ** 0.5, d, m))


@pytest.mark.parametrize(("k", "m", "d"), [(2, 2, 12), (3, 5, 32), (8, 11, 127), (32, 11, 128), (16, 100, 128)])
def test_the_matched_beta_against_exact_draws(k: int, m: int, d: int) -> None:
    """Within a tenth down to one in a hundred, and within a factor of two at one in a thousand."""
    null = SubspaceOverlap(k, m, d)
    samples = 60_000 if min(k, m) < 12 else 20_000
    total = null.draws(samples, seed=2)[0]
    for level, slack in ((0.5, 0.05), (0.1, 0.05), (0.01, 0.4), (1e-3, 1.0)):
        p = float(null.p_value(np.quantile(total, 1 - level)))
        noise = 4 / np.sqrt(level * samples)
        assert level * (1 - min(slack, 0.12) - noise) <= p <= level * (1 + slack + noise), level


@pytest.mark.parametrize(("k", "m", "d"), [(2, 2, 4), (3, 3, 6), (3, 5, 9), (4, 4, 8), (2, 46, 48), (2, 3, 5)])
def test_subspaces_that_nearly_fill_the_space_are_not_discoveries(k: int, m: int, d: int) -> None:
    """What is drawn under the null has a p-value of alpha or less in a share alpha of cases."""
    null = SubspaceOverlap(k, m, d)
    assert null.exact
    p = null.p_value(null.draws(200_000, seed=3)[0])
    # A thousandth of 9,999 draws is 10 of them, give or take 3.
    for level, slack in ((0.5, 0.05), (0.1, 0.12), (0.01, 0.3), (1e-3, 0.7)):
        assert (p <= level).mean() <= level * (1 + slack), level
    overlap = np.linspace(max(0, k + m - d), min(k, m), 400)
    assert (np.diff(null.p_value(overlap)) <= 0).all()
    assert null.p_value(overlap[0]) == 1


@pytest.mark.parametrize(("m", "d"), [(2, 5), (3, 7), (4, 9)])
def test_far_in_the_tail_the_chance_is_that_of_a_ball(m: int, d: int) -> None:
    """Of m + 1 and m dimensions in 2 m + 1 the density is flat: near the maximum the bound is the chance itself."""
    null = SubspaceOverlap(m + 1, m, d)
    total = null.draws(400_000, seed=4)[0]
    # A hundredth of all draws are nearer than this, and so 1e-9 of them nearer than a part of it, by volume.
    near, exponent = float(np.quantile(m - total, 0.01)), m * (d - m - 1) / 2
    found = float(null.p_value(m - near * (1e-9 / 0.01) ** (1 / exponent)))
    assert found == pytest.approx(100 * 1e-9, rel=0.1)  # a hundredth of every level goes to the bound
    assert float(null.p_value(m)) == 0


def test_nothing_to_vary() -> None:
    for null in (SubspaceOverlap(4, 9, 9), SubspaceOverlap(9, 4, 9), SubspaceOverlap(0, 3, 9)):
        assert float(null.p_value(null.mean)) == 1.0
        assert float(null.z(null.mean)) == 0.0
        np.testing.assert_allclose(null.draws(3)[0], null.mean)
    with pytest.raises(DtLensError, match="do not fit"):
        SubspaceOverlap(4, 2, 3)
    assert SubspaceOverlap(3, 3, 20).largest_cosine(seed=1) == SubspaceOverlap(3, 3, 20).largest_cosine(seed=1)
