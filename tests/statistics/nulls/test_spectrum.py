"""The spectrum-matched nulls against every sign pattern, brute force, and the Haar null."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import ortho_group

from dt_lens import DtLensError
from dt_lens.statistics.nulls.haar import LabelBlocks, cap_probability
from dt_lens.statistics.nulls.spectrum import BandMaximum, SpectrumMaximum

Array = NDArray[Any]


def uneven(d: int, seed: int = 0) -> tuple[Array, Array]:
    """Eigenvalues that fall like 1 / i^2, and the axes in columns."""
    return np.arange(1, d + 1.0) ** -2, ortho_group.rvs(d, random_state=seed)


def unit(rows: Array) -> Array:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def test_every_pattern_of_signs() -> None:
    """With 14 axes there are 16,384 patterns, and p is a count of them, to the very last one."""
    d, rng = 14, np.random.default_rng(1)
    values, axes = uneven(d)
    v, E = unit(rng.standard_normal((1, d)))[0], unit(rng.standard_normal((3, d)))
    signs = np.array(list(product((-1.0, 1.0), repeat=d)))
    best = np.sort(np.abs(signs * (v @ axes) @ axes.T @ E.T).max(1))
    for place, slack in ((4000, 0.1), (12_000, 0.3), (15_800, 0.12), (16_300, 0.12), (16_380, 0.12), (-1, 0.12)):
        t = best[place]
        null = SpectrumMaximum(v[None], E, axes * values @ axes.T, samples=20_000)
        exact = float((best >= t - 1e-12).mean())
        assert float(null.p_value([t])[0]) == pytest.approx(exact, rel=slack), exact
    assert exact == 2 / 2**d
    assert float(null.z([best.mean()])[0]) == pytest.approx(0, abs=0.15)
    assert float(null.std[0]) == pytest.approx(best.std(), rel=0.15)


def test_one_band_is_a_random_rotation() -> None:
    d = 30
    null = BandMaximum(np.eye(d)[:3], np.eye(d)[3:4], 2.5 * np.eye(d))
    t = np.array([0.5, 0.8, 0.95])
    np.testing.assert_allclose(null.p_value(t), cap_probability(t, d), rtol=0.15)
    assert cap_probability(0.95, d) < 1e-14


def test_bands_are_rotated_inside() -> None:
    values, axes = np.array([9.0, 2, 2, 1, 1, 0.9, 0.1, 0.1, 0.05, 0.04]), ortho_group.rvs(10, random_state=2)
    rng = np.random.default_rng(3)
    v, E = unit(rng.standard_normal((2, 10))), unit(rng.standard_normal((4, 10)))
    null = BandMaximum(v, E, axes * values @ axes.T)
    for i in range(2):
        turned = np.empty((60_000, 10))
        for band in (slice(0, 1), slice(1, 6), slice(6, 10)):
            x = rng.standard_normal((60_000, band.stop - band.start))
            turned[:, band] = unit(x) * np.linalg.norm((v[i] @ axes)[band])
        best = np.abs(turned @ axes.T @ E.T).max(1)
        for level, slack in ((0.5, 0.15), (0.05, 0.15), (0.003, 0.25)):
            t = np.quantile(best, 1 - level)
            assert float(null.p_value([t, t])[i]) == pytest.approx(level, rel=slack)


def test_a_span_is_turned_as_a_whole() -> None:
    d, rng = 8, np.random.default_rng(4)
    values, axes = uneven(d)
    frame, E = ortho_group.rvs(d, random_state=5)[:3], unit(rng.standard_normal((2, d)))
    signs = np.array(list(product((-1.0, 1.0), repeat=d)))
    inside = np.einsum("ka,sa,na->skn", frame @ axes, signs, E @ axes)
    best = np.sort(np.sqrt(np.square(inside).sum(1)).max(1))
    null = SpectrumMaximum(frame[None], E, axes * values @ axes.T)
    for level in (0.7, 0.3, 0.05):
        t = np.quantile(best, 1 - level)
        assert float(null.p_value([t])[0]) == pytest.approx(float((best >= t).mean()), abs=0.03)
    assert float(null.p_value([1.0])[0]) == 1 / 2001
    whole = BandMaximum(ortho_group.rvs(d, random_state=6)[None], E, axes * values @ axes.T, samples=20)
    assert float(whole.p_value([1.0])[0]) == 1.0  # the whole space matches everything, however it is turned


def test_labels_in_blocks_and_no_labels() -> None:
    d, rng = 12, np.random.default_rng(7)
    values, axes = uneven(d)
    S, V, E = axes * values @ axes.T, unit(rng.standard_normal((2, d))), unit(rng.standard_normal((30, d)))

    def blocks() -> Iterator[Array]:
        yield from (E[:20].astype(np.float32), E[20:].astype(np.float32))

    t = np.array([0.8, 0.7])
    whole = SpectrumMaximum(V, E, S, seed=1)
    streamed = SpectrumMaximum(V, LabelBlocks(30, d, False, lambda i: E[i], blocks), S, seed=1)
    np.testing.assert_allclose(streamed.p_value(t), whole.p_value(t), rtol=0.2)
    np.testing.assert_array_equal(whole.p_value(t), SpectrumMaximum(V, E, S, seed=1).p_value(t))
    nothing = SpectrumMaximum(V, np.zeros((2, d)), S)
    np.testing.assert_array_equal(nothing.p_value(t), 1.0)
    np.testing.assert_array_equal(nothing.z(t), 0.0)


def test_what_does_not_fit() -> None:
    with pytest.raises(DtLensError, match="expected finite unit rows of 4 numbers"):
        SpectrumMaximum(np.eye(5), np.eye(4), np.eye(4))
    with pytest.raises(DtLensError, match="does not fit"):
        SpectrumMaximum(np.eye(4), np.eye(4), np.eye(5))
    with pytest.raises(DtLensError, match="one best match for each of its 4 directions"):
        SpectrumMaximum(np.eye(4), np.eye(4), np.eye(4)).p_value(0.5)
