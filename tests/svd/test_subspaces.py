"""Whole spans of matrices and embeddings in a scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dt_lens import DtLensError, WeightSVD
from dt_lens.study.power import planted_model
from dt_lens.svd.subspaces import COLUMNS

Make = Callable[..., Any]


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
