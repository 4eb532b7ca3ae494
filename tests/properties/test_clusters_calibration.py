"""Models that keep trained embeddings and have noise for blocks: at most five tables of a hundred hold a cluster.

Every table is whole: a model, its decompositions, its effects, Benjamini and Hochberg over its rows. Tables with the
same seed share their random directions, which depend on the labels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

import dt_lens
from dt_lens import Embedding, EmbeddingRegistry, clusters
from dt_lens.lens.matrices import Structure
from dt_lens.statistics.multiplicity import q_values
from dt_lens.svd import clustering
from dt_lens.svd.drawn_models import Drawn
from dt_lens.zoo.models import bundled

Array = NDArray[Any]
GROUP = 25  # tables that share their random directions
SHARED: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def shared_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw the random directions of a seed once."""
    drawn = clustering.haar_draws

    def shared(labels: Array, span: int, centred: bool, effects: Any, seed: int) -> Callable[[int], Array]:
        draw = drawn(labels, span, centred, effects, seed)

        def once(count: int) -> Array:
            key = (labels.shape, effects.names, span, seed, count)
            if key not in SHARED:
                SHARED[key] = draw(count)
            return np.asarray(SHARED[key])

        return once

    SHARED.clear()
    monkeypatch.setattr(clustering, "haar_draws", shared)
    yield
    SHARED.clear()


def states(n: int, d: int) -> tuple[Array, dict[str, Array]]:
    """Embeddings of states that consist of four factors, and the factors: like states lie close to each other."""
    rng, number = np.random.default_rng(0), np.arange(n)
    factors = {"row": number * 5 // n, "column": number // 4 % 5, "passenger": number // 20 % 5, "goal": number % 4}
    parts = [rng.standard_normal((5, d))[levels] for levels in factors.values()]
    return sum(parts) + 0.7 * rng.standard_normal((n, d)), factors


def entangled(factors: dict[str, Array]) -> dict[str, Array]:
    """The same with factors that are nested in others, and correlated with them."""
    row, column = factors["row"], factors["column"]
    noisy = np.where(np.random.default_rng(1).random(len(row)) < 0.2, (row + 1) % 5, row)
    return {**factors, "place": 5 * row + column, "half": (row > 2).astype(int), "nearly_row": noisy}


def noise(labels: Array, matrices: list[Array]) -> Drawn:
    """A model with these ``W_in``, nothing before them, and the labels as its embedding."""
    n, d = len(matrices), labels.shape[1]
    registry = EmbeddingRegistry(d, "nothing")
    registry["state_in"] = Embedding(torch.from_numpy(labels), kind="state")
    weights = {f"blocks.{layer}.mlp.W_in": torch.from_numpy(matrix) for layer, matrix in enumerate(matrices)}
    return Drawn(weights, Structure(n, 1, d, (1.0,) * n, (None,) * n, (None,) * n), registry)


def table_of(factors: dict[str, Array]) -> pd.DataFrame:
    n = len(next(iter(factors.values())))
    return pd.DataFrame(factors, index=[f"state {i}" for i in range(n)])


def found_with_permuted_labels(table: pd.DataFrame, factors: dict[str, Array], n: int) -> bool:
    """Whether the same effects are a discovery if labels are permuted: Kruskal and Wallis's own p-values."""
    p = np.ones(len(table))
    for name, levels in factors.items():
        k = len(np.unique(levels))
        h = table[f"effect_{name}"].to_numpy() * (n - 1)
        if table.attrs["measures"][name] == "auc":
            n1 = int((levels == 1).sum())
            h = 12 * n1 * (n - n1) * (table[f"effect_{name}"].to_numpy() - 0.5) ** 2 / (n + 1)
        p = np.minimum(p, len(factors) * stats.chi2.sf(h, k - 1))
    return bool((q_values(np.minimum(p, 1.0)) <= 0.05).any())


def at_most(tables: int) -> int:
    """The number of tables with a discovery that is not exceeded, at a rate of 0.05, but once in a thousand times."""
    return int(stats.binom.ppf(0.999, tables, 0.05))


def count(tables: int, labels: Array, factors: dict[str, Array], rows: int, seed: int) -> tuple[int, int, list[float]]:
    """Of so many models with noise for blocks, in how many a cluster is found, by this test and by permuted labels."""
    rng, given, found, permuted, p = np.random.default_rng(seed), table_of(factors), 0, 0, []
    for number in range(tables):
        model = noise(labels, [rng.standard_normal((labels.shape[1], rows // 2)) for _ in range(2)])
        table = clusters(model, given, seed=number // GROUP, beside=False)
        assert len(table) == rows
        found += table.attrs["found"] > 0
        permuted += found_with_permuted_labels(table, factors, len(labels))
        p.append(float(table["p_value"].iloc[0]))
    return found, permuted, p


@pytest.mark.parametrize("mixed", [False, True], ids=["four factors", "nested and correlated"])
def test_few_tables_of_noise_hold_a_cluster(mixed: bool) -> None:
    labels, factors = states(100, 24)
    factors = entangled(factors) if mixed else factors
    found, permuted, p = count(60, labels, factors, 6, seed=int(mixed))
    assert found <= at_most(60), found
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert permuted > 40, permuted  # like labels are close: permuting them finds clusters in noise


def test_behind_a_layernorm_too() -> None:
    """What is read is centred and scaled, and is noise after that; the states pass a LayerNorm of their own."""
    labels, factors = states(60, 16)
    rng, given, found, p = np.random.default_rng(7), table_of(factors), 0, []
    w = torch.from_numpy(np.exp(0.5 * rng.standard_normal((2, 16))))
    registry = EmbeddingRegistry(16, "nothing")
    registry["state_in"] = Embedding(torch.from_numpy(labels) + 3, kind="state", layernorm=w[0])  # + 3: it is centred
    structure = Structure(1, 1, 16, (1.0,), (None,), ("blocks.0.ln2",))
    for number in range(25):
        W = torch.from_numpy(rng.standard_normal((16, 3)) + 4) / w[1][:, None]  # centring takes the 4 away
        table = clusters(
            Drawn({"blocks.0.mlp.W_in": W, "blocks.0.ln2.w": w[1]}, structure, registry),
            given,
            seed=number // GROUP,
            beside=False,
        )
        found += table.attrs["found"] > 0
        p.append(float(table["p_value"].iloc[0]))
    assert found <= at_most(25), found
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_strata_and_spectrum_are_calibrated_too() -> None:
    labels, factors = states(100, 24)
    rng, given, held, signs = np.random.default_rng(5), table_of(factors), 0, 0
    axes = np.linalg.svd(labels - labels.mean(0), full_matrices=False)
    S = axes[2].T @ np.diag(axes[1] ** 2) @ axes[2]
    for number in range(30):
        model = noise(labels, [rng.standard_normal((24, 5))])
        held += clusters(model, given, strata="row", seed=number // GROUP, beside=False).attrs["found"] > 0
        # Long on the axes of most variance, as trained directions are; only the signs are chance.
        lengths = rng.exponential(axes[1]) * rng.choice([-1.0, 1.0], (3, 24)) @ axes[2]
        lone = noise(labels, [np.outer(x, rng.standard_normal(3)) for x in lengths])
        signs += clusters(lone, given, null="spectrum", activations=S, seed=number, beside=False).attrs["found"] > 0
    assert held <= at_most(30), held
    assert signs <= at_most(30), signs


@pytest.mark.acceptance(minutes=1)
@pytest.mark.parametrize("mixed", [False, True], ids=["four factors", "nested and correlated"])
def test_few_of_500_models_with_trained_embeddings_hold_a_cluster(mixed: bool) -> None:
    """The states of ``taxi``, as its first block reads them."""
    if "taxi" not in bundled():
        pytest.skip("taxi is not bundled")
    model = dt_lens.load("taxi", check=False)
    e = model.embeddings["state_in"].effective.detach().double().numpy()
    factors = {name: pd.factorize(np.array(levels))[0] for name, levels in model.facts.factors["state_in"].items()}
    found, permuted, p = count(500, e, entangled(factors) if mixed else factors, 24, seed=int(mixed))
    print(f"{found} of 500 tables with a discovery (at most {at_most(500)}); with permuted labels {permuted}")
    assert found <= at_most(500), found
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert permuted > 450, permuted
