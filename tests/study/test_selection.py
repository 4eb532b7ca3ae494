"""Directions are chosen by rule: the strongest of each kind, each with a contrast that differs only in its match."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError
from dt_lens.study.selection import SIMILAR, best_matches, choose_directions
from dt_lens.svd.weight_svd import WeightSVD


@pytest.fixture(scope="module")
def svd() -> WeightSVD:
    torch.manual_seed(0)
    cfg = HookedDecisionTransformerConfig(4, 2, d_model=32, n_layers=2, n_heads=2, d_mlp=48, n_ctx=4, max_ep_len=20)
    return WeightSVD(HookedDecisionTransformer(cfg).eval())


def test_each_direction_has_its_one_best_match_and_untrained_heads_have_none(svd: WeightSVD) -> None:
    table = svd.scan(["*.W_out"], embeddings="*")
    best = best_matches(table)
    assert not best.duplicated(["matrix", "side", "sv"]).any()
    assert not set(best["embedding"]) & {"state_out", "reward_out"}
    trained = table[~table["embedding"].isin(["state_out", "reward_out"])]
    assert best["z"].sum() == pytest.approx(trained.groupby(["matrix", "side", "sv"])["z"].max().sum())


def test_the_strongest_of_each_kind_and_its_poorest_peer(svd: WeightSVD) -> None:
    table = svd.scan(["*.W_in", "*.W_out", "*.OV.*"], embeddings="*")
    chosen = choose_directions(table, svd, 3)
    assert chosen.attrs["without_contrast"] == []
    first = chosen[6:]
    assert set(first["role"]) == {"first"} and (first["sv"] == 0).all()
    chosen = chosen[:6]
    assert list(chosen["role"]) == ["strong", "weak"] * 3
    assert sorted(svd[name].matrix.kind for name in chosen["matrix"][::2]) == ["OV", "W_in", "W_out"]
    best = best_matches(table)
    for strong, weak in zip(chosen.iloc[::2].to_dict("records"), chosen.iloc[1::2].to_dict("records"), strict=True):
        kind = [name for name in set(best["matrix"]) if svd[name].matrix.kind == svd[strong["matrix"]].matrix.kind]
        assert strong["z"] == best[best["matrix"].isin(kind)]["z"].max()
        assert (strong["matrix"], strong["side"]) == (weak["matrix"], weak["side"])
        assert weak["embedding"] == strong["embedding"] and weak["p_value"] > 0.5
        here = table[(table["matrix"] == weak["matrix"]) & (table["side"] == weak["side"])]
        poor = here[(here["embedding"] == strong["embedding"]) & (here["p_value"] > 0.5)]["sv"]
        peers = best[(best["matrix"] == weak["matrix"]) & (best["side"] == weak["side"]) & best["sv"].isin(poor)]
        similar = peers[
            (peers["sigma"] / strong["sigma"]).between(1 / SIMILAR, SIMILAR) & (peers["sv"] != strong["sv"])
        ]
        assert weak["sv"] == similar.sort_values("z")["sv"].iloc[0]


def test_a_matrix_without_a_poor_match_has_no_contrast(svd: WeightSVD) -> None:
    table = svd.scan(["*.W_in", "*.W_out"], embeddings="*")
    strongest = choose_directions(table, svd, 1).iloc[0]["matrix"]
    good = table.assign(p_value=table["p_value"].where(table["matrix"] != strongest, 0.4))
    good.attrs = table.attrs
    chosen = choose_directions(good, svd, 1)
    assert chosen.attrs["without_contrast"] == [strongest] and "weak" not in set(chosen["role"])


def test_too_few_directions_are_refused(svd: WeightSVD) -> None:
    table = svd.scan(["blocks.0.mlp.W_in"], embeddings="action_out").head(0)
    with pytest.raises(DtLensError, match="too few"):
        choose_directions(pd.DataFrame(table), svd, 1)
