"""The overlap of random subspaces against brute force, and whole spans in a scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dt_lens import DtLensError, WeightSVD
from dt_lens.statistics.nulls.haar import cap_probability
from dt_lens.statistics.nulls.subspaces import SubspaceOverlap
from dt_lens.study.power import planted_model
from dt_lens.svd.subspaces import COLUMNS

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


def test_a_planted_plane_that_no_single_direction_shows(make_dt: Make) -> None:
    """Three directions in the span of the labels, each halfway between them: the span is theirs, no vector is."""
    model = make_dt(seed=2, d_model=48, d_mlp=64, state_dim=8, n_layers=1, normalization="none", embed_ln=False)
    E = torch.linalg.qr(model.embeddings["state_in"].directions.detach().double().T)[0].T
    mixed = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]) @ E
    rng = torch.Generator().manual_seed(1)
    rest = torch.linalg.qr(torch.cat([mixed[:4], torch.randn(44, 48, generator=rng, dtype=torch.float64)]).T)[0].T
    v = torch.linalg.qr(torch.randn(64, 48, generator=rng, dtype=torch.float64))[0]
    sigma = torch.linspace(3, 1, 48, dtype=torch.float64)
    model.weights["blocks.0.mlp.W_in"].copy_(rest.T * sigma @ v.T)
    svd = WeightSVD(model)
    table = svd.subspaces("*.W_in", "state_in", k=[1, 4, 8])
    assert list(table.columns) == COLUMNS
    assert table["k"].tolist() == [1, 4, 8]
    assert (table["labels"] == 8).all()
    assert (table["dimension"] == 48).all()
    four = table[table["k"] == 4].iloc[0]
    assert four["overlap"] == pytest.approx(1, abs=1e-4)
    assert four["largest"] == pytest.approx(1, abs=1e-4)
    assert four["haar_overlap"] == pytest.approx(8 / 48)
    assert 0.3 < four["haar_largest"] < 0.9
    assert four["q_value"] < 1e-6
    assert svd.scan("*.W_in", embeddings="state_in")["cosine"].abs().max() < 0.95
    # Other embeddings are not involved.
    others = svd.subspaces("*.W_in", ["action_in", "reward_in"], k=4)
    assert (others["p_value"] > 1e-4).all()
    assert table.attrs["null"] == "haar"


def test_spans_behind_a_layernorm_and_blocks(make_dt: Make) -> None:
    model = make_dt(seed=1, d_model=16, d_mlp=24)
    table = WeightSVD(model).subspaces(k=(1, 3, 40))
    reading = table[table["side"] != "write"]
    assert (reading["dimension"] == 15).all()
    # What is written reaches the heads through ln_final, which removes constants; raw labels ignore ln_final.
    assert (table[table["side"] == "write"]["dimension"] == 15).all()
    raw = WeightSVD(model, fold_layernorm=False).subspaces("*.W_out", k=3)
    assert (raw["dimension"] == 16).all()
    assert (table[(table["embedding"] == "timestep_in")]["labels"] == 15).all()  # thirty steps fill the space
    full = table[table["labels"] >= table["dimension"]]
    np.testing.assert_allclose(full["p_value"], 1.0)
    np.testing.assert_allclose(full["overlap"], 1.0, atol=1e-9)
    assert table["k"].max() <= 16
    for name in ("overlap", "largest", "p_value", "q_value"):
        assert table[name].between(0, 1 + 1e-9).all(), name
    # Equal sigmas are in a span together.
    W = torch.eye(16, 24, dtype=torch.float64)
    W[0, 0] = 3.0
    model.weights["blocks.0.mlp.W_in"].copy_(W)
    raw = WeightSVD(model, fold_layernorm=False).subspaces("blocks.0.mlp.W_in", "action_in", k=[1, 2, 5, 14])
    assert set(raw["k"]) <= {1, 16}
    with pytest.raises(DtLensError, match="at least 1"):
        WeightSVD(model).subspaces(k=[0])


def test_spans_are_calibrated() -> None:
    """Random matrices and random labels: p is uniform, approximated or not."""
    p = []
    for seed in range(60):
        model = planted_model(0.0, d_model=20, labels=4, layers=1, seed=seed)
        model.weights["blocks.0.mlp.W_in"].copy_(
            torch.from_numpy(np.random.default_rng(seed).standard_normal((20, 20)))
        )
        p += WeightSVD(model).subspaces(k=5)["p_value"].tolist()
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_writes_that_avoid_constants_are_not_discoveries(make_dt: Make) -> None:
    """Twenty state labels behind ln_final fill the space without constants, so every span lies in it."""
    model = make_dt(seed=3, d_model=16, d_mlp=24, state_dim=20, n_layers=1)
    W = model.weights["blocks.0.mlp.W_out"]
    W -= W.mean(1, keepdim=True)
    table = WeightSVD(model).subspaces("*.W_out", "state_out", k=[2, 8])
    assert (table["labels"] == 15).all()
    np.testing.assert_allclose(table["p_value"], 1.0)
