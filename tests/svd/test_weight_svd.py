"""Scans: planted directions are found on their side and under their label, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from dt_lens import DtLensError, Embedding, SingularEdit, WeightSVD
from dt_lens.lens.matrices import find_matrix
from dt_lens.statistics.multiplicity import q_values

Make = Callable[..., Any]
COLUMNS = ["matrix", "layer", "head", "side", "sv", "block", "sigma", "embedding", "label", "cosine"]
COLUMNS += ["z", "p_value", "q_value"]
# No LayerNorm anywhere: raw directions and raw embeddings lie in the same space.
BARE = {"normalization": "none", "embed_ln": False, "final_ln": False}


def plant(model: Any, name: str, left: torch.Tensor, right: torch.Tensor, size: float = 50.0) -> None:
    """Make ``size left right^T`` stand out in a catalogued matrix, by writing into its (last) factor."""
    matrix = find_matrix(model, name)
    weights, pair = model.weights, size * torch.outer(left / left.norm(), right / right.norm()).double()
    if len(matrix.factors) == 1:
        (factor,) = matrix.factors
        change = pair
    else:
        factor = matrix.factors[1]
        change = torch.linalg.pinv(matrix.raw(model)[0]) @ pair
    weights[factor.weight].add_(factor.scatter(change, weights).to(weights[factor.weight].dtype))


def row(table: pd.DataFrame, embedding: str, sv: int = 0) -> pd.Series:
    found = table[(table["embedding"] == embedding) & (table["sv"] == sv)]
    assert len(found) == 1
    return found.iloc[0]


@pytest.mark.parametrize("norms", [{}, BARE, {"normalization": "post"}])
def test_a_planted_read_direction_is_found(make_dt: Make, norms: dict[str, Any]) -> None:
    model = make_dt(d_model=32, **norms)
    state = model.embeddings["state_in"]
    # Behind a LayerNorm the raw weight that reads along e is e / w: the folded matrix then reads along e.
    target = state.effective[2].double()
    if norms == {}:
        target = (target - target.mean()) / model.weights["blocks.1.ln2.w"].double()
    plant(model, "blocks.1.mlp.W_in", target, torch.randn(24).double())
    found = row(WeightSVD(model).scan("blocks.1.mlp.W_in"), "state_in")
    assert (found["label"], found["side"], found["layer"]) == ("state 2", "read", 1)
    assert abs(found["cosine"]) > 0.99
    assert found["p_value"] < 1e-9
    assert found["q_value"] < 1e-6
    assert found["z"] > 5
    # The neuron side is another space; no other direction or embedding shares the match.
    others = WeightSVD(model).scan("blocks.1.mlp.W_in")
    assert (others[others.index != found.name]["p_value"] > 1e-6).all()


@pytest.mark.parametrize("norms", [{}, BARE])
def test_a_planted_write_direction_is_found(make_dt: Make, norms: dict[str, Any]) -> None:
    """The trap: reading rows of the wrong factor, a planted direction of cosine 1 was read as 0.05."""
    model = make_dt(d_model=32, d_mlp=48, **norms)
    target = model.embeddings["action_out"].effective[1].double()
    plant(model, "blocks.0.mlp.W_out", torch.randn(48).double(), target)
    svd = WeightSVD(model)
    found = row(svd.scan("blocks.0.mlp.W_out"), "action_out")
    assert (found["label"], found["side"]) == ("action 1", "write")
    assert abs(found["cosine"]) > 0.99
    assert found["p_value"] < 1e-9
    # Coordinates of the factor are not directions: a transposed reading of the same matrix misses it.
    M = find_matrix(model, "blocks.0.mlp.W_out").dense(model).numpy()
    misread = np.linalg.svd(M, full_matrices=False)[2].T[0]
    assert abs(misread @ (target / target.norm()).numpy()) < 0.9


@pytest.mark.parametrize("head", [0, 1])
def test_planted_circuits_are_found_on_both_sides(make_dt: Make, head: int) -> None:
    model = make_dt(d_model=32, **BARE)
    state, action = (model.embeddings[name].directions.double() for name in ("state_in", "action_out"))
    # OV reads a state and writes an action; what a circuit can read is its head's W_V's columns' span.
    V = model.weights["blocks.0.attn.W_V"]
    V[head, :, 0] = (30 * state[1] / state[1].norm()).float()
    plant(model, f"blocks.0.attn.OV.{head}", V[head, :, 0].double(), action[2], 500)
    Q, K = model.weights["blocks.1.attn.W_Q"], model.weights["blocks.1.attn.W_K"]
    reward = model.embeddings["reward_in"].directions[0]
    Q[head, :, 0], K[head, :, 0] = 30 * state[3] / state[3].norm(), 30 * reward / reward.norm()
    table = WeightSVD(model).scan(["*.OV.*", "*.QK.*"])

    def hits(matrix: str, side: str, embedding: str) -> tuple[str, float]:
        rows = table[(table["matrix"] == matrix) & (table["side"] == side)]
        found = row(rows, embedding)
        return found["label"], abs(found["cosine"])

    for (label, cosine), wanted in (
        (hits(f"blocks.0.attn.OV.{head}", "read", "state_in"), "state 1"),
        (hits(f"blocks.0.attn.OV.{head}", "write", "action_out"), "action 2"),
        (hits(f"blocks.1.attn.QK.{head}", "query", "state_in"), "state 3"),
        (hits(f"blocks.1.attn.QK.{head}", "key", "reward_in"), "return-to-go"),
    ):
        assert label == wanted
        assert cosine > 0.95
    assert hits(f"blocks.1.attn.QK.{head}", "key", "state_in")[1] < 0.9
    assert hits(f"blocks.0.attn.OV.{1 - head}", "read", "state_in")[1] < 0.9


@pytest.mark.parametrize("letter", ["Q", "K", "V", "O"])
def test_planted_attention_weights_are_found_merged_and_by_head(make_dt: Make, letter: str) -> None:
    model = make_dt(d_model=32, **BARE)
    name, inside = f"blocks.0.attn.W_{letter}", torch.cat([torch.zeros(16), torch.randn(16)]).double()
    embedding = "action_out" if letter == "O" else "state_in"
    target = model.embeddings[embedding].directions[1].double()
    plant(model, name, *((inside, target) if letter == "O" else (target, inside)))
    svd = WeightSVD(model)
    assert abs(row(svd.scan(name), embedding)["cosine"]) > 0.99
    by_head = svd.scan([f"{name}.0", f"{name}.1"], embeddings=embedding)
    cosines = [abs(row(by_head[by_head["head"] == head], embedding)["cosine"]) for head in (0, 1)]
    assert cosines[1] > 0.99 > cosines[0]  # the planted vector lies in head 1 alone
    assert abs(float(svd[f"{name}.1"].head[0] @ inside[16:] / inside.norm())) > 0.99


def test_columns_and_rows(make_dt: Make) -> None:
    model = make_dt()
    svd = WeightSVD(model)
    table = svd.scan(seed=3)
    assert list(table.columns) == COLUMNS
    pairs = table.drop_duplicates(["matrix", "side", "embedding"])
    compared = set(zip(pairs["side"], pairs["embedding"], strict=True))
    reading = {"state_in", "action_in", "reward_in", "timestep_in"}
    assert compared == {(s, e) for s in ("read", "query", "key") for e in reading} | {
        ("write", e) for e in ("action_out", "state_out", "reward_out")
    }
    W_in = table[table["matrix"] == "blocks.0.mlp.W_in"]
    assert len(W_in) == 15 * 4
    assert W_in["sv"].tolist() == [*range(15)] * 4
    assert (table["block"] == 1).all()
    np.testing.assert_allclose(W_in["sigma"][:15], svd["blocks.0.mlp.W_in"].sigma)
    assert table["head"].dtype == "Int64"
    assert table[table["matrix"] == "blocks.0.attn.QK.1"]["head"].eq(1).all()
    assert W_in["head"].isna().all()
    assert "anywhere" in table.attrs["assumes"]
    assert {name: value for name, value in table.attrs.items() if name != "assumes"} == {
        "fold_layernorm": True, "null": "haar", "seed": 3, "untrained": ["state_out", "reward_out"],
    }  # fmt: skip
    np.testing.assert_allclose(table["q_value"], q_values(table["p_value"]))
    pd.testing.assert_frame_equal(table, WeightSVD(model).scan(seed=3))
    # The best label, and its cosine with its sign, are those of the whole table of cosines.
    for _, found in W_in.sample(8, random_state=0).iterrows():
        cosines = svd.cosines(found["matrix"], found["embedding"]).iloc[found["sv"]]
        assert found["label"] == cosines.abs().idxmax()
        assert found["cosine"] == pytest.approx(cosines[found["label"]])


def test_embeddings_by_name_are_compared_with_every_side(make_dt: Make) -> None:
    model = make_dt()
    for table in (
        WeightSVD(model).scan("blocks.0.*", embeddings=["action_*"]),
        WeightSVD(model, embeddings="action_*").scan("blocks.0.*"),
    ):
        compared = set(zip(table["side"], table["embedding"], strict=True))
        assert compared == {(s, e) for s in ("read", "write", "query", "key") for e in ("action_in", "action_out")}
    for wrong in ({"embeddings": "actions"}, {"embeddings": ["state_in", "nope"]}):
        with pytest.raises(DtLensError, match="There is no embedding"):
            WeightSVD(model, **wrong)
        with pytest.raises(DtLensError, match="There is no embedding"):
            WeightSVD(model).scan(**wrong)


def test_ones_own_directions_join_the_scan_in_one_line(make_dt: Make) -> None:
    model = make_dt(**BARE)
    svd = WeightSVD(model)
    read = svd["blocks.0.mlp.W_in"].read
    model.embeddings["mine"] = Embedding(torch.stack([-read[3], read[5] + read[6]]), ["three", "between"])
    table = svd.scan("blocks.0.mlp.W_in", embeddings="mine")
    assert row(table, "mine", 3)["label"] == "three"
    assert row(table, "mine", 3)["cosine"] == pytest.approx(-1)
    assert row(table, "mine", 5)["cosine"] == pytest.approx(0.5**0.5)
    assert row(table, "mine", 9)["z"] < 0


def test_registries_of_other_models_are_refused(make_dt: Make) -> None:
    model, other, small = make_dt(0), make_dt(1), make_dt(d_model=8)
    assert len(WeightSVD(model, embeddings=model.embeddings).scan("*.W_in"))
    for foreign in (other, small):
        with pytest.raises(DtLensError, match="belong to another model"):
            WeightSVD(model, embeddings=foreign.embeddings)


def test_wrong_arguments_are_refused(make_dt: Make) -> None:
    model = make_dt()
    svd = WeightSVD(model)
    with pytest.raises(DtLensError, match=r"takes a wrapped model, not a Linear; call dt_lens\.wrap"):
        WeightSVD(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    for rank in (0, -1, 2.5):
        with pytest.raises(DtLensError, match="at least 1"):
            WeightSVD(model, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(DtLensError, match="Unknown null 'gauss'"):
        svd.scan(null="gauss")
    with pytest.raises(DtLensError, match=r"Did you mean 'blocks.0.mlp.W_in'"):
        svd["blocks.0.mlp.W_on"]
    with pytest.raises(DtLensError, match=r"QK.0 has two sides"):
        svd.cosines("blocks.0.attn.QK.0", "state_in")
    with pytest.raises(DtLensError, match=r"neuron side of blocks.0.mlp.W_in is not in the residual stream"):
        svd.top("blocks.0.mlp.W_in", "state_in", side="neuron")
    model.weights["predict.action.W"][0, 0] = float("nan")
    with pytest.raises(DtLensError, match="'action_out' holds NaN"):
        svd.scan("*.W_out")


def test_decompositions_follow_the_weights(make_dt: Make) -> None:
    model = make_dt()
    svd = WeightSVD(model)
    name = "blocks.0.mlp.W_in"
    before = svd[name]
    assert svd[name] is before
    model.weights[name][[0, 1]] = model.weights[name][[1, 0]]  # as many numbers, the same sum, the same norm
    assert not torch.allclose(svd[name].left, before.left)
    model.weights[name][[0, 1]] = model.weights[name][[1, 0]]
    with SingularEdit(model, name, value=3.0):
        assert float(svd[name].sigma[0]) == pytest.approx(3 * float(before.sigma[0]), rel=1e-6)
    torch.testing.assert_close(svd[name].left, before.left)
    # Embeddings are live too.
    action = svd.scan("*.W_out", embeddings="action_out")
    model.weights["predict.action.W"][:, 0].neg_()
    again = svd.scan("*.W_out", embeddings="action_out")
    np.testing.assert_allclose(again["cosine"].abs(), action["cosine"].abs(), atol=1e-12)
    turned = action["label"] == "action 0"
    np.testing.assert_allclose(again["cosine"][turned], -action["cosine"][turned], atol=1e-12)


@pytest.mark.parametrize("norms", [{}, BARE])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_takes_the_first_directions(make_dt: Make, rank: int, norms: dict[str, Any]) -> None:
    model = make_dt(**norms)
    whole, cut = WeightSVD(model)["blocks.0.attn.OV.1"], WeightSVD(model, rank=rank)["blocks.0.attn.OV.1"]
    torch.testing.assert_close(cut.left, whole.left[:rank])
    torch.testing.assert_close(cut.sigma, whole.sigma[:rank])
    assert set(WeightSVD(model, rank=rank).scan()["sv"]) == set(range(rank))


def test_raw_and_folded(make_dt: Make) -> None:
    model = make_dt()
    folded, raw = WeightSVD(model), WeightSVD(model, fold_layernorm=False)
    assert folded["blocks.0.mlp.W_in"].folded
    assert not raw["blocks.0.mlp.W_in"].folded
    assert raw.scan("*.W_in").attrs["fold_layernorm"] is False
    # Raw directions are compared with raw embeddings: the columns of the head itself.
    read = raw["blocks.0.mlp.W_out"].write[0]
    head = model.weights["predict.action.W"].double()
    expected = (read @ head / head.norm(dim=0)).numpy()
    np.testing.assert_allclose(raw.cosines("blocks.0.mlp.W_out", "action_out").iloc[0], expected, atol=1e-12)
    assert np.abs(folded.cosines("blocks.0.mlp.W_out", "action_out").iloc[0] - expected).max() > 1e-3
    # Behind a LayerNorm labels are measured by what it leaves of them.
    effective = model.embeddings["state_in"].effective
    left = effective - effective.mean(1, keepdim=True)
    assert float((left.norm(dim=1) / effective.norm(dim=1)).min()) < 1 - 1e-4
    expected = (folded["blocks.0.mlp.W_in"].read[2] @ left.T / left.norm(dim=1)).numpy()
    np.testing.assert_allclose(folded.cosines("blocks.0.mlp.W_in", "state_in").iloc[2], expected, atol=1e-12)


def test_top_shows_both_poles(make_dt: Make) -> None:
    model = make_dt()
    svd = WeightSVD(model)
    table = svd.top("blocks.0.mlp.W_in", "state_in", k=2, n=2)
    pd.testing.assert_frame_equal(table, svd.top("blocks.0.mlp.W_in", "state_in", 2, None, labels=2))  # its old name
    beside = svd.tokens("blocks.0.mlp.W_in", "state_in", k=2, n=2).rows  # the same words mean the same
    assert beside["label"].tolist() == table["label"].tolist() and beside["sv"].tolist() == table["sv"].tolist()
    assert list(table.columns) == ["sv", "block", "sigma", "pole", "rank", "label", "cosine", "trained"]
    assert table["trained"].all() and not svd.top("blocks.0.mlp.W_out", "state_out", k=2)["trained"].any()
    table = table[table["sv"] == 1]
    cosines = svd.cosines("blocks.0.mlp.W_in", "state_in").iloc[1].sort_values(ascending=False)
    up, down = cosines[cosines >= 0][:2], cosines[cosines < 0][::-1][:2]
    assert table["label"].tolist() == [*up.index, *down.index]
    assert table["cosine"].tolist() == [*up, *down]
    # Every label is at the pole of its sign, and at one only.
    three = svd.top("blocks.0.mlp.W_out", "action_out", k=16, n=9)
    assert (three.groupby("sv")["label"].nunique() == 3).all() and len(three) == 16 * 3
    assert (three["pole"] == np.where(three["cosine"] >= 0, "+", "-")).all()
    assert three.groupby("sv")["pole"].nunique().min() == 1
    reward = svd.top("blocks.0.mlp.W_in", "reward_in", k=5)
    assert (reward["pole"] == np.where(reward["cosine"] >= 0, "+", "-")).all()
    assert len(reward) == 5
    # Circuits are compared on the side that suits the embedding.
    ov = svd["blocks.0.attn.OV.0"]
    for embedding, side in (("action_out", ov.right), ("state_in", ov.left)):
        by_default = svd.cosines("blocks.0.attn.OV.0", embedding)
        assert len(by_default) == len(side)
    assert len(svd.top("blocks.0.mlp.W_in", "state_in", k=0)) == 0
    assert len(svd.cosines("blocks.0.attn.QK.0", "state_in", side="key", k=3)) == 3


def test_a_block_is_scanned_as_a_span(make_dt: Make) -> None:
    """Two equal sigmas: any rotation of their directions is as good, and the scan must not depend on which came."""
    model = make_dt(d_model=32, d_mlp=40, dtype=torch.bfloat16, **BARE)
    name = "blocks.0.mlp.W_in"
    state = model.embeddings["state_in"].directions[1].double()
    u = torch.linalg.qr(torch.cat([state[:, None], torch.randn(32, 31, dtype=torch.float64)], 1))[0]
    v = torch.linalg.qr(torch.randn(40, 32, dtype=torch.float64))[0]
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    u[:, :2] = u[:, :2] @ turn  # the label lies within the span, along neither direction
    sigma = torch.logspace(1, -1, 32, dtype=torch.float64)
    sigma[1] = sigma[0]
    model.weights[name].copy_((u * sigma) @ v.T)
    svd = WeightSVD(model)
    assert svd[name].blocks[0] == (0, 2)
    table = svd.scan(name)
    found = row(table, "state_in")
    assert (found["sv"], found["block"], found["label"]) == (0, 2, "state 1")
    assert found["cosine"] == pytest.approx(1, abs=1e-3)
    assert 1 not in table["sv"].tolist()
    assert found["p_value"] < 1e-6
    assert svd.top(name, "state_in", k=2)["block"].tolist()[0] == 2


def test_span_matches_are_calibrated(make_dt: Make) -> None:
    """Random spans against random labels: p is uniform and z standard, as for single directions."""
    p, z = [], []
    for seed in range(40):
        model = make_dt(seed=seed, d_model=24, d_mlp=40, state_dim=8, **BARE)
        v = torch.linalg.qr(torch.randn(40, 24, dtype=torch.float64))[0]
        sigma = torch.tensor([3.0] * 3 + [2.0] * 5 + [1.0] * 16, dtype=torch.float64)
        u = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]
        model.weights["blocks.0.mlp.W_in"].copy_(u * sigma @ v.T)
        # The weights' own rounding is what makes equal sigmas one block.
        table = WeightSVD(model).scan("blocks.0.mlp.W_in", embeddings="state_in", seed=seed)
        assert table["block"].tolist() == [3, 5, 16]
        p += table["p_value"].tolist()
        z += table["z"].tolist()
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert abs(np.mean(z)) < 0.25
    assert np.std(z) == pytest.approx(1, abs=0.15)


def test_zero_weights_and_zero_labels(make_dt: Make) -> None:
    model = make_dt()
    model.weights["blocks.0.mlp.W_out"].zero_()
    model.weights["predict.state.W"].zero_()
    # ln_final makes a constant of this but for its last bits, and its centring leaves nothing else.
    model.weights["predict.return_to_go.W"].copy_(0.7 / model.weights["ln_final.w"][:, None])
    model.weights["predict.action.W"][:, 1].zero_()
    model.weights["embed.return_to_go.W"].fill_(0.7)  # a constant, which embed_ln's centring takes away
    svd = WeightSVD(model)
    table = svd.scan()
    assert "blocks.0.mlp.W_out" not in set(table["matrix"])
    assert "blocks.1.mlp.W_out" in set(table["matrix"])
    for name in ("reward_out", "reward_in", "state_out"):
        nothing = table[table["embedding"] == name]
        assert len(nothing)
        assert (nothing["cosine"] == 0).all()
        assert (nothing["p_value"] == 1).all()
        assert (nothing["z"] == 0).all()
    actions = table[table["embedding"] == "action_out"]
    assert set(actions["label"]) == {"action 0", "action 2"}
    assert np.isfinite(table[["cosine", "z", "p_value", "q_value"]].to_numpy(dtype=float)).all()
    only = svd.scan("blocks.0.mlp.W_out")
    assert (len(only), list(only.columns)) == (0, COLUMNS)
    assert len(svd.strongest("blocks.0.mlp.W_out")) == 0


def test_the_strongest_match_of_a_whole_matrix(make_dt: Make) -> None:
    model = make_dt(d_model=32)
    target = model.embeddings["action_out"].effective[1].double()
    plant(model, "blocks.0.mlp.W_out", torch.randn(24).double(), target)
    svd = WeightSVD(model)
    table = svd.strongest(samples=300)
    assert " ".join(table.columns) == "matrix side embedding sv label cosine null_median p_value q_value"
    found = table[(table["matrix"] == "blocks.0.mlp.W_out") & (table["embedding"] == "action_out")].iloc[0]
    assert (found["sv"], found["label"]) == (0, "action 1")
    # Beyond what a count of 300 draws can say.
    one = svd.scan("blocks.0.mlp.W_out", embeddings="action_out").iloc[0]
    assert one["sv"] == 0
    assert found["p_value"] == pytest.approx(24 * one["p_value"], rel=1e-9, abs=0)  # about 4e-54
    assert found["p_value"] < 1e-6
    assert found["q_value"] < 1e-4
    assert 0.3 < found["null_median"] < 0.8
    # The best of a whole matrix is the best of its rows.
    scan = svd.scan("blocks.0.mlp.W_out", embeddings="action_out")
    assert abs(found["cosine"]) == pytest.approx(scan["cosine"].abs().max())
    pd.testing.assert_frame_equal(table, svd.strongest(samples=300))
    # Nothing was planted anywhere else.
    assert (table.drop(found.name)["q_value"] > 0.001).all()
