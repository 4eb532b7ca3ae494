"""On models without structure each null makes a discovery in at most five scans of a hundred.

Every scan is whole: a model, its decompositions, its matches, Benjamini and Hochberg over its table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from dt_lens import Embedding, EmbeddingRegistry, WeightSVD
from dt_lens.lens.matrices import Structure
from dt_lens.progress import silent
from dt_lens.statistics.nulls.haar import HaarMaximum
from dt_lens.statistics.nulls.spectrum import BandMaximum, SpectrumMaximum
from dt_lens.svd.drawn_models import Drawn
from dt_lens.svd.scan import null_source

SCANS = 500
MANY = pytest.param(SCANS, marks=pytest.mark.acceptance)
GROUP = 25  # scans with the same labels share one null, whose own error (800 draws) the bounds below leave out
Array = NDArray[Any]


def model_of(matrices: list[Array], labels: Array) -> Drawn:
    """A ``W_in [d, n]`` in each block, nothing before it, and an embedding ``known``."""
    d, n = matrices[0].shape[0], len(matrices)
    weights = {f"blocks.{layer}.mlp.W_in": torch.from_numpy(matrix) for layer, matrix in enumerate(matrices)}
    registry = EmbeddingRegistry(d, "nothing")
    registry["known"] = Embedding(torch.from_numpy(labels))
    return Drawn(weights, Structure(n, 1, d, (1.0,) * n, (None,) * n, (None,) * n), registry)


def lone_directions(directions: Array, rng: np.random.Generator) -> list[Array]:
    """Matrices of rank one, so that no direction depends on another."""
    return [np.outer(x, rng.standard_normal(4)) for x in directions]


def discovered(table: Any) -> bool:
    return bool((table["q_value"] < 0.05).any())


def interval(scans: int = SCANS) -> tuple[int, int]:
    """Where the number of scans with a discovery lies, at a rate of 0.05, but once in a thousand times."""
    low, high = stats.binom.interval(0.999, scans, 0.05)
    return int(low), int(high)


@pytest.mark.parametrize("scans", [200, MANY])
def test_haar_on_directions_that_point_anywhere(scans: int) -> None:
    """Five rows that do not depend on each other: Benjamini and Hochberg's rate is alpha itself, on both sides."""
    rng, found, p_values = np.random.default_rng(0), 0, []
    for group in range(scans // GROUP):
        d, n = int(rng.integers(4, 24)), int(rng.integers(1, 4))
        labels, nulls = rng.standard_normal((n, d)), dict[Any, Any]()
        for _ in range(GROUP):
            svd = WeightSVD(model_of(lone_directions(rng.standard_normal((5, d)), rng), labels))
            svd._nulls = nulls
            table = svd.scan(embeddings="known", draws=800, seed=group)
            assert len(table) == 5
            found += discovered(table)
            p_values.append(table["p_value"].to_numpy())
        assert len(nulls) == 1
    low, high = interval(scans)
    assert low <= found <= high, found
    assert stats.kstest(np.concatenate(p_values), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("scans", [200, MANY])
def test_haar_on_whole_random_matrices(scans: int) -> None:
    """All directions of a matrix at once, which are orthogonal to each other: never more than alpha."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(scans // GROUP):
        d, k = int(rng.integers(4, 20)), int(rng.integers(2, 16))
        labels, nulls = rng.standard_normal((1, d)), dict[Any, Any]()
        for _ in range(GROUP):
            svd = WeightSVD(model_of([rng.standard_normal((d, k)) for _ in range(2)], labels))
            svd._nulls = nulls
            found += discovered(svd.scan(embeddings="known"))
    low, high = interval(scans)
    assert low / 2 <= found <= high, found


@pytest.mark.parametrize("n", [1, pytest.param(6, marks=pytest.mark.acceptance)])
@pytest.mark.parametrize("scans", [200, MANY])
def test_covariance_on_directions_drawn_with_it_and_haar_on_the_same(scans: int, n: int) -> None:
    """Why there is a covariance null: on directions that lie where the stream does, an even null rejects too much."""
    rng, d = np.random.default_rng(n), 12
    root = np.linalg.qr(rng.standard_normal((d, d)))[0] * np.arange(1, d + 1.0) ** -0.75
    S, labels = root @ root.T, rng.standard_normal((n, d)) @ root.T
    found, even, p_values = 0, 0, []
    shared: WeightSVD | None = None
    for _ in range(scans):
        svd = WeightSVD(model_of(lone_directions(rng.standard_normal((5, d)) @ root.T, rng), labels))
        if shared is not None:  # the nulls depend on the labels alone
            svd._nulls = shared._nulls
        source = null_source(svd, "covariance", [], 0, S, None, silent) if shared is None else source
        shared = svd
        table = svd.scan(null="haar", embeddings="known")
        even += discovered(table)
        matches = zip(svd.pairings(), table["cosine"], strict=True)
        p = np.array([float(source.null(pairing, 1).p_value(cosine)) for pairing, cosine in matches])
        found += bool((stats.false_discovery_control(p) < 0.05).any())
        p_values.append(p)
    # The very numbers that a scan gives.
    np.testing.assert_allclose(svd.scan(null="covariance", activations=S)["p_value"], p, rtol=1e-9)
    low, high = interval(scans)
    assert found <= high, found
    assert found >= (low if n == 1 else low / 2), found
    assert even > 2 * high, even
    if n == 1:
        assert stats.kstest(np.concatenate(p_values), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("null", [SpectrumMaximum, pytest.param(BandMaximum, marks=pytest.mark.acceptance)])
def test_spectrum_on_frames_that_are_turned_at_random(null: type[SpectrumMaximum]) -> None:
    """Lengths on the axes as lopsided as they like: whether a direction points to a label is chance all the same."""
    rng, d, found, even, p_values = np.random.default_rng(5), 12, 0, 0, []
    axes = np.linalg.qr(rng.standard_normal((d, d)))[0]
    values = np.repeat([64.0, 8.0, 1.0], [1, 4, 7])
    root = axes * values**0.5
    labels = rng.standard_normal((2, d)) @ root.T
    haar = HaarMaximum.of(labels, samples=800)
    unit = labels / np.linalg.norm(labels, axis=1, keepdims=True)
    for scan in range(200):
        x = rng.standard_normal((5, d)) * np.exp(rng.standard_normal((5, d))) * values**0.5
        if null is BandMaximum:  # in each band any direction, and any length
            x = rng.standard_normal((5, d)) * np.repeat(np.exp(rng.standard_normal((5, 3))), [1, 4, 7], 1) * values**0.5
        V = x / np.linalg.norm(x, axis=1, keepdims=True) @ axes.T
        best = np.abs(V @ unit.T).max(1)
        p = null(V, labels, root @ root.T, seed=scan, samples=300).p_value(best)
        found += bool((stats.false_discovery_control(p) < 0.05).any())
        even += bool((stats.false_discovery_control(haar.p_value(best)) < 0.05).any())
        p_values.append(p)
    low, high = interval(200)
    assert low <= found <= high, found
    assert even > high, even
    assert stats.kstest(np.concatenate(p_values), "uniform").pvalue > 1e-3


@pytest.mark.acceptance
def test_untrained_on_models_that_are(make_dt: Callable[..., Any]) -> None:
    """A decision transformer as initialised, against pools of others; five pools, as a pool is a draw itself."""
    found, shape = 0, {"n_layers": 1, "n_heads": 1, "d_model": 8, "d_mlp": 8, "state_dim": 3, "act_dim": 2}
    matrices, embeddings = ["*.W_in", "*.W_out"], ["state_in", "action_out"]
    for part in range(5):
        first = WeightSVD(make_dt(10_000 + part, size=0.0, **shape))
        pools = first.pools("untrained", matrices, embeddings, seed=part, draws=150)
        for seed in range(SCANS // 5):
            model = make_dt(part * SCANS + seed, size=0.0, **shape)
            found += discovered(WeightSVD(model).scan(matrices, pools, embeddings=embeddings))
    _, high = interval()
    # A pool's own luck adds to the binomial's.
    assert 5 <= found <= high + 5, found


@pytest.mark.acceptance
def test_shuffled_on_weights_in_no_order() -> None:
    """Entries with heavy tails, in no order: the model is one of its own shuffles, and the p-values are exact."""
    rng, found = np.random.default_rng(3), 0
    for scan in range(SCANS):
        labels = np.eye(6)[:2]  # axes are what heavy-tailed entries lie along
        model = model_of([rng.standard_t(2, (6, 4))], labels)
        table = WeightSVD(model).scan(null="shuffled", embeddings="known", draws=20, seed=scan)
        assert table.attrs["smallest_p"] == 1 / 81
        found += discovered(table)
    low, high = interval()
    assert low / 3 <= found <= high, found
