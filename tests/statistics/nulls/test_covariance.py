"""The covariance null against brute force, textbook cases, and an independent integral."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dt_lens import DtLensError
from dt_lens.statistics.nulls.covariance import CovarianceMaximum
from dt_lens.statistics.nulls.haar import HaarMaximum, LabelBlocks, cap_probability

Array = NDArray[Any]


def rotation(d: int, seed: int = 0) -> Array:
    return np.asarray(np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0])


def uneven(d: int, power: float, seed: int = 0) -> Array:
    """A covariance whose eigenvalues fall like a power, turned at random."""
    Q = rotation(d, seed)
    return np.asarray(Q * np.arange(1, d + 1.0) ** -power @ Q.T)


def labels_of(n: int, S: Array, seed: int = 1) -> Array:
    """Unit labels that lie where the covariance has its variance."""
    E = np.random.default_rng(seed).standard_normal((n, len(S))) @ np.linalg.cholesky(S).T
    return np.asarray(E / np.linalg.norm(E, axis=1, keepdims=True))


def drawn(E: Array, S: Array, samples: int, span: int = 1, centred: bool = False) -> Array:
    rng, root = np.random.default_rng(77), np.linalg.cholesky(S)
    best = []
    for _ in range(0, samples, 10_000):
        x = np.einsum("de,nes->nds", root, rng.standard_normal((10_000, len(S), span)), optimize=True)
        if centred:
            x -= x.mean(1, keepdims=True)
        x = np.linalg.qr(x)[0] if span > 1 else x / np.linalg.norm(x, axis=1, keepdims=True)
        best.append(np.sqrt(sum(np.square(x[:, :, j] @ E.T) for j in range(span)).max(1)))
    return np.sort(np.concatenate(best))


@pytest.mark.parametrize("d", [2, 3, 8, 32, 128])
def test_a_round_gaussian_gives_the_beta_distribution(d: int) -> None:
    t = np.array([0.003, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    null = CovarianceMaximum.of(rotation(d)[:1], 7.3 * np.eye(d), samples=2000)
    np.testing.assert_allclose(null.p_value(t), cap_probability(t, d), rtol=2e-4)
    assert null.dimension == d
    haar = HaarMaximum.of(rotation(d)[:1])
    assert null.mean == pytest.approx(haar.mean, abs=0.1 * haar.std)
    assert null.std == pytest.approx(haar.std, rel=0.08)


@pytest.mark.parametrize(("d", "power"), [(3, 1.0), (16, 2.0), (48, 1.0)])
def test_one_label_against_draws(d: int, power: float) -> None:
    S = uneven(d, power)
    for label in (labels_of(1, S), rotation(d, 9)[:1]):
        best = drawn(label, S, 200_000)
        null = CovarianceMaximum.of(label, S, samples=2000)
        for level in (0.9, 0.5, 0.1, 0.01, 1e-3):
            t = float(np.quantile(best, 1 - level))
            low, high = stats.binomtest(int((best >= t).sum()), len(best)).proportion_ci(0.9999)
            assert low <= float(null.p_value(t)) <= high, (d, level)


@pytest.mark.parametrize(("along", "d"), [(3.0, 5), (0.2, 20), (40.0, 90)])
def test_far_in_the_tail_against_the_f_distribution(along: float, d: int) -> None:
    """One variance along the label and another across: cos^2 is a monotone function of an F-distributed ratio."""
    null = CovarianceMaximum.of(np.eye(d)[:1], np.diag([along, *[2.0] * (d - 1)]), samples=2000)
    t = np.array([0.1, 0.5, 0.8, 0.95, 0.99])
    wanted = stats.f.sf(t**2 / (1 - t**2) * 2.0 * (d - 1) / along, 1, d - 1)
    np.testing.assert_allclose(null.p_value(t), wanted, rtol=1e-3)
    assert wanted[-1] < 2e-2
    assert d < 20 or wanted[-1] < 1e-16


@pytest.mark.parametrize("n", [2, 12, 400])
def test_many_labels_are_never_underrated_and_hardly_overrated(n: int) -> None:
    S = uneven(40, 1.0)
    E = labels_of(n, S)
    best = drawn(E, S, 200_000)
    null = CovarianceMaximum.of(E, S, seed=3)
    for level, slack in ((0.9, 0.05), (0.5, 0.05), (0.1, 0.1), (0.01, 0.25), (1e-3, 0.8), (1e-4, 3.0)):
        t = float(np.quantile(best, 1 - level))
        low, high = stats.binomtest(int((best >= t).sum()), len(best)).proportion_ci(0.999)
        p, noise = float(null.p_value(t)), 4 / np.sqrt(20_000 * level)
        assert low * (1 - noise) <= p <= high * (1 + slack + noise), level
    assert abs(float(null.z(best).mean())) < 0.05
    assert float(null.z(best).std()) == pytest.approx(1, rel=0.03)
    t = np.linspace(0, 1, 300)
    p = null.p_value(t)
    assert (np.diff(p) <= 1e-12).all()
    assert p[0] == 1.0
    # Deep in the tail it is the union of the single labels.
    single = sum(CovarianceMaximum.of(E[i : i + 1], S, samples=2000).p_value([0.9, 0.97]) for i in range(min(n, 12)))
    if n <= 12:
        np.testing.assert_allclose(null.p_value([0.9, 0.97]), single, rtol=1e-3)


def test_an_even_null_would_reject_what_the_stream_is_made_of() -> None:
    S = uneven(64, 1.5)
    label = labels_of(1, S)
    t = float(np.quantile(drawn(label, S, 20_000), 0.5))
    assert float(CovarianceMaximum.of(label, S).p_value(t)) == pytest.approx(0.5, abs=0.02)
    assert float(HaarMaximum.of(label).p_value(t)) < 0.05


def test_behind_a_centring_and_without_a_scale() -> None:
    S = uneven(24, 1.0)
    E = labels_of(5, S) - labels_of(5, S).mean(1, keepdims=True)
    E /= np.linalg.norm(E, axis=1, keepdims=True)
    best = drawn(E, S, 100_000, centred=True)
    null = CovarianceMaximum.of(E, S, centred=True)
    assert null.dimension == 23
    for level in (0.5, 0.1, 0.01):
        assert float(null.p_value(np.quantile(best, 1 - level))) == pytest.approx(level, rel=0.25)
    t = np.linspace(0.01, 0.99, 40)
    np.testing.assert_allclose(CovarianceMaximum.of(E, 1e6 * S, True).p_value(t), null.p_value(t), rtol=1e-6)


@pytest.mark.parametrize("span", [2, 5])
def test_spans_are_drawn(span: int) -> None:
    S = uneven(20, 1.0)
    E = labels_of(6, S)
    best = drawn(E, S, 50_000, span)
    null = CovarianceMaximum.of(E, S, span=span, samples=4000)
    for level in (0.9, 0.5, 0.1, 0.02):
        assert float(null.p_value(np.quantile(best, 1 - level))) == pytest.approx(level, rel=0.3)
    assert float(null.p_value(1.0)) == 1 / 4001  # and says no more than its draws


def test_what_the_gaussian_does_not_reach() -> None:
    flat = np.diag([1.0, 0.5, 0.25, 0.0])
    outside = np.array([[0.0, 0.0, 0.6, 0.8]])
    null = CovarianceMaximum.of(outside, flat, samples=2000)
    assert null.dimension == 3
    assert float(null.p_value(0.59)) > 0
    assert float(null.p_value(0.61)) < 1e-8
    nothing = CovarianceMaximum.of(np.zeros((2, 4)), flat)
    np.testing.assert_array_equal(nothing.p_value([0.0, 0.9]), 1.0)
    np.testing.assert_array_equal(nothing.z([0.5]), 0.0)


def test_labels_in_blocks_and_kept_in_a_file() -> None:
    S = uneven(16, 1.0)
    E = labels_of(90, S)

    def blocks() -> Iterator[Array]:
        yield from (E[:50].astype(np.float32), E[50:].astype(np.float32))

    streamed = CovarianceMaximum.of(LabelBlocks(90, 16, False, lambda i: E[i], blocks), S, seed=2)
    whole = CovarianceMaximum.of(E, S, seed=2)
    t = np.linspace(0.02, 0.98, 30)
    np.testing.assert_allclose(streamed.p_value(t), whole.p_value(t), rtol=2e-3)
    kept = CovarianceMaximum.from_tensors(whole.tensors())
    np.testing.assert_array_equal(kept.p_value(t), whole.p_value(t))
    assert (kept.mean, kept.std, kept.span) == (whole.mean, whole.std, 1)
    np.testing.assert_array_equal(CovarianceMaximum.of(E, S, seed=2).p_value(t), whole.p_value(t))
    assert not np.array_equal(CovarianceMaximum.of(E, S, seed=4).p_value(t), whole.p_value(t))


@pytest.mark.parametrize(
    ("covariance", "sentence"),
    [
        (np.eye(5), "does not fit"),
        (np.full((4, 4), np.nan), "finite"),
        (np.arange(16.0).reshape(4, 4), "symmetric"),
        (-np.eye(4), "positive semidefinite"),
        (np.zeros((4, 4)), "not zero"),
    ],
)
def test_bad_covariances(covariance: Array, sentence: str) -> None:
    with pytest.raises(DtLensError, match=sentence):
        CovarianceMaximum.of(np.eye(4), covariance)
