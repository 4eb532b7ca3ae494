"""The nulls against brute force: random directions and subspaces drawn one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dt_lens import DtLensError
from dt_lens.statistics.nulls.haar import HaarMaximum, cap_probability, frame_maximum

Array = NDArray[np.float64]


def unit(E: Array) -> Array:
    return np.asarray(E / np.linalg.norm(E, axis=1, keepdims=True))


def gaussian(n: int, d: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, d))


LABELS: dict[str, Callable[[], Array]] = {
    "one": lambda: gaussian(1, 24),
    "a close pair": lambda: np.array([[1.0, 0, 0, 0, 0, 0], [0.9, 0.19**0.5, 0, 0, 0, 0]]),
    "orthogonal": lambda: np.eye(24)[:6],
    "all axes": lambda: np.eye(16),
    "random": lambda: gaussian(11, 24),
    "strongly correlated": lambda: gaussian(1, 24, 5) + 0.15 * gaussian(20, 24),
    "a curve": lambda: np.cos(np.outer(np.linspace(0.1, 1, 200), range(1, 13))),
    "duplicated": lambda: np.repeat(gaussian(4, 20), 5, axis=0),
    "opposite": lambda: np.concatenate([gaussian(4, 20), -gaussian(4, 20)]),
    "more labels than dimensions": lambda: gaussian(300, 12),
    "of different lengths": lambda: gaussian(8, 24) * np.logspace(-6, 6, 8)[:, None],
}


def brute_force(E: Array, samples: int, span: int = 1, centred: bool = False, seed: int = 99) -> Array:
    """The best match of random subspaces with the labels, drawn without any cleverness; sorted."""
    rng = np.random.default_rng(seed)
    best = []
    for start in range(0, samples, 20_000):
        size = min(20_000, samples - start)
        frame = rng.standard_normal((size, E.shape[1], span))
        if centred:
            frame -= frame.mean(1, keepdims=True)
        frame = frame / np.linalg.norm(frame, axis=1, keepdims=True) if span == 1 else np.linalg.qr(frame)[0]
        best.append(np.sqrt(sum(np.square(frame[:, :, i] @ unit(E).T) for i in range(span)).max(1)))
    return np.sort(np.concatenate(best))


def assert_agrees(null: HaarMaximum, drawn: Array, levels: list[float], slack: float = 0.08) -> None:
    """At thresholds that brute force exceeds with the given frequencies, p is that frequency, up to both errors."""
    for level in levels:
        threshold = float(np.quantile(drawn, 1 - level))
        hits = int((drawn >= threshold).sum())
        low, high = stats.binomtest(hits, len(drawn)).proportion_ci(0.999)
        assert low * (1 - slack) <= float(null.p_value(threshold)) <= high * (1 + slack), level
    assert null.mean == pytest.approx(drawn.mean(), abs=0.05 * drawn.std())
    assert null.std == pytest.approx(drawn.std(), rel=0.04)
    assert float(null.z(drawn).mean()) == pytest.approx(0, abs=0.1)
    assert float(null.z(drawn).std()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("kind", LABELS)
def test_the_best_match_of_one_direction(kind: str) -> None:
    E = LABELS[kind]()
    assert_agrees(HaarMaximum.of(E), brute_force(E, 200_000), [0.9, 0.5, 0.1, 0.01, 1e-3])


@pytest.mark.parametrize(("kind", "slack"), [("random", 0.05), ("a close pair", 0.02)])
def test_far_in_the_tail(kind: str, slack: float) -> None:
    E = LABELS[kind]()
    assert_agrees(HaarMaximum.of(E), brute_force(E, 1_500_000), [0.3, 0.1, 1e-2, 1e-3, 1e-4], slack)


@pytest.mark.parametrize("kind", ["random", "a curve"])
def test_behind_a_centring(kind: str) -> None:
    E = LABELS[kind]()
    E = E - E.mean(1, keepdims=True)
    drawn = brute_force(E, 100_000, centred=True)
    assert_agrees(HaarMaximum.of(E, E.shape[1] - 1), drawn, [0.9, 0.5, 0.1, 0.01])
    if kind == "a curve":  # one dimension of twelve more makes a difference that is seen
        with pytest.raises(AssertionError):
            assert_agrees(HaarMaximum.of(E), drawn, [0.9, 0.5, 0.1, 0.01])


@pytest.mark.parametrize(("kind", "span"), [("random", 3), ("strongly correlated", 2), ("a curve", 5), ("one", 4)])
def test_the_best_match_of_a_span(kind: str, span: int) -> None:
    E = LABELS[kind]()
    assert_agrees(HaarMaximum.of(E, span=span), brute_force(E, 60_000, span), [0.9, 0.5, 0.1, 0.01, 1e-3], slack=0.1)


def test_exact_cases() -> None:
    t = np.linspace(0.05, 0.95, 10)
    d = 30
    one = HaarMaximum.of(gaussian(1, d))
    # For one label the textbook's beta distribution, to the last digit: P(|cos| > t) = P(F(1, d-1) > ...).
    f = t**2 * (d - 1) / (1 - t**2)
    np.testing.assert_allclose(one.p_value(t), stats.f.sf(f, 1, d - 1), rtol=1e-10)
    np.testing.assert_allclose(HaarMaximum.of(gaussian(1, d), span=3).p_value(t), cap_probability(t, d, 3), rtol=1e-10)
    # Caps of orthogonal labels do not intersect beyond 45 degrees, where the union bound is an equality.
    far = np.array([0.75, 0.9, 0.99])
    np.testing.assert_allclose(HaarMaximum.of(np.eye(d)).p_value(far), d * cap_probability(far, d), rtol=1e-3)
    # Labels that coincide, or point away from each other, are one label.
    same = HaarMaximum.of(np.repeat(gaussian(1, d), 7, axis=0) * np.array([1, -1, 2, 3, -4, 1, 1])[:, None])
    np.testing.assert_allclose(same.p_value(t), one.p_value(t), rtol=0.02)
    assert one.mean == pytest.approx(same.mean, abs=0.03 * one.std)
    assert float(one.p_value(0.0)) == 1.0
    assert float(one.p_value(-0.3)) == float(one.p_value(0.3))
    np.testing.assert_allclose(HaarMaximum.of(np.eye(d)).p_value([0.0, 1.0]), [1.0, 0.0], atol=1e-9)


def test_p_is_uniform_under_the_null() -> None:
    """Matches of directions that are random, with labels that are: many label sets, one direction each."""
    rng = np.random.default_rng(4)
    p = []
    for seed in range(200):
        E = gaussian(int(rng.integers(2, 30)), 16, seed)
        g = rng.standard_normal(16)
        p.append(
            float(HaarMaximum.of(E, seed=seed, samples=1000).p_value(np.abs(unit(E) @ g).max() / np.linalg.norm(g)))
        )
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_p_falls_as_the_match_grows() -> None:
    for kind, make in LABELS.items():
        t = np.linspace(0, 1, 400)
        p = HaarMaximum.of(make()).p_value(t)
        assert (np.diff(p) <= 1e-3 * p[:-1]).all(), kind
        assert p[0] == pytest.approx(1.0)
        assert ((p >= 0) & (p <= 1)).all()


@pytest.mark.parametrize("kind", ["random", "more labels than dimensions", "strongly correlated"])
def test_a_rotation_of_the_labels_changes_nothing(kind: str) -> None:
    E = LABELS[kind]()
    Q = np.linalg.qr(gaussian(E.shape[1], E.shape[1], 3))[0]
    a, b = HaarMaximum.of(E), HaarMaximum.of(E @ Q)
    t = np.linspace(0, 1, 50)
    np.testing.assert_allclose(a.p_value(t), b.p_value(t), rtol=1e-9, atol=0)
    np.testing.assert_allclose(a.z(t), b.z(t), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(frame_maximum(E, 5, samples=50), frame_maximum(E @ Q, 5, samples=50), rtol=1e-6)


def test_seeds_repeat() -> None:
    E = LABELS["random"]()
    t = np.linspace(0.1, 0.9, 9)
    assert np.array_equal(HaarMaximum.of(E, seed=1).p_value(t), HaarMaximum.of(E, seed=1).p_value(t))
    assert not np.array_equal(HaarMaximum.of(E, seed=1).p_value(t), HaarMaximum.of(E, seed=2).p_value(t))
    assert np.array_equal(frame_maximum(E, 3, samples=9, seed=1), frame_maximum(E, 3, samples=9, seed=1))
    assert not np.array_equal(frame_maximum(E, 3, samples=9, seed=1), frame_maximum(E, 3, samples=9, seed=2))


def test_wide_streams_and_large_vocabularies() -> None:
    """Where all that matters happens within a hair's breadth of the mean."""
    E = gaussian(500, 768)
    drawn = brute_force(E, 3000)
    assert_agrees(HaarMaximum.of(E), drawn, [0.9, 0.5, 0.1], slack=0.1)


def test_zero_rows_and_nothing_to_match() -> None:
    E = gaussian(4, 8)
    t = np.linspace(0, 1, 9)
    padded = np.concatenate([E, np.zeros((3, 8))])
    np.testing.assert_array_equal(HaarMaximum.of(padded).p_value(t), HaarMaximum.of(E).p_value(t))
    nothing = HaarMaximum.of(np.zeros((3, 8)))
    assert (nothing.n_labels, nothing.mean, nothing.std) == (0, 0.0, 0.0)
    np.testing.assert_array_equal(nothing.p_value(t), 1.0)
    np.testing.assert_array_equal(nothing.z(t), 0.0)
    np.testing.assert_array_equal(frame_maximum(np.zeros((3, 8)), 2, samples=4), 0.0)
    whole = HaarMaximum.of(E, span=8)  # the whole space holds every label
    assert float(whole.p_value(1.0)) == 1.0
    assert float(whole.z(1.0)) == 0.0
    with pytest.raises(DtLensError, match="finite directions in rows"):
        HaarMaximum.of(np.full((2, 3), np.nan))
    for few in (4, 0, -1, 2.5):  # five labels of sixteen dimensions lie in no fewer than five
        with pytest.raises(DtLensError, match=r"do not lie in 4 dimensions|dimension is"):
            HaarMaximum.of(np.eye(5, 16), dimension=few)  # type: ignore[arg-type]
        with pytest.raises(DtLensError, match=r"do not lie in 4 dimensions|dimension is"):
            frame_maximum(np.eye(5, 16), 2, dimension=few)  # type: ignore[arg-type]
    assert HaarMaximum.of(np.eye(5, 16), dimension=5).dimension == 5
    for wrong in ({"samples": 0}, {"span": 0}, {"seed": -1}):
        with pytest.raises(DtLensError, match="must be a whole number"):
            HaarMaximum.of(np.eye(5, 16), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "d", "k", "centred"), [(1, 12, 5, False), (3, 12, 12, False), (30, 12, 5, True)])
def test_the_best_match_of_a_whole_frame(n: int, d: int, k: int, centred: bool) -> None:
    E = gaussian(n, d)
    if centred:
        E -= E.mean(1, keepdims=True)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(4000):
        G = rng.standard_normal((d, k))
        drawn.append(np.abs(unit(E) @ np.linalg.qr(G - G.mean(0) if centred else G)[0]).max())
    assert stats.ks_2samp(drawn, frame_maximum(E, k, d - centred, samples=4000)).pvalue > 1e-3


def test_one_label_against_a_complete_frame_has_its_largest_coordinate() -> None:
    found = frame_maximum(gaussian(1, 10), 10, samples=2000)
    assert found.min() >= 10**-0.5 - 1e-6
    assert np.array_equal(found, np.sort(found))


def test_the_match_that_was_thought_to_be_too_good() -> None:
    """0.24 was "more than one would expect" after a look at 40 directions of 9 matrices in 128 dimensions.

    The median best match of nine random frames with one label is larger.
    """
    best = np.stack([frame_maximum(gaussian(1, 128), 40, samples=2000, seed=s) for s in range(9)])
    rng = np.random.default_rng(0)
    median = np.median(np.max([rng.permutation(frame) for frame in best], axis=0))
    assert median == pytest.approx(0.27, abs=0.005)
    independent = 1 - (1 - float(cap_probability(0.24, 128))) ** 360
    assert independent > 0.85
    # A single direction would reach 0.24 less than once in a hundred times: the mistake was to ask that.
    assert float(HaarMaximum.of(gaussian(1, 128)).p_value(0.24)) < 0.01
