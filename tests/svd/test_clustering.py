"""The test of clusters: every effect computed again by SciPy, plants that are found, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import dt_lens
from dt_lens import DtLensError, clusters
from dt_lens.statistics.multiplicity import q_values
from dt_lens.svd.clustering import COLUMNS
from dt_lens.svd.null_sources import side_covariance

Make = Callable[..., Any]
N, D = 60, 48
ROW, SEAT = np.arange(N) // 12, np.arange(N) % 3
FACTORS = {"row": ROW.tolist(), "seat": SEAT.tolist(), "odd": (np.arange(N) % 12 == 0).astype(int).tolist()}
QUICK: dict[str, Any] = {"draws": 199, "beside": False}


def centred(x: Any) -> Any:
    return x - x.mean(-1, keepdims=True)


@pytest.fixture(scope="module")
def agent(make_dt: Make) -> Any:
    """60 states that consist of rows and seats; block 0 reads the row from W_in, block 1 writes the seat with W_out."""
    model = make_dt(7, state_dim=N, act_dim=6, d_model=D, d_mlp=48, n_layers=2, n_heads=2)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for name in ("state_in", "state_out"):
            one, other = np.linalg.qr(rng.standard_normal((D, 2)))[0].T
            parts = np.outer(ROW - 2, one) + 1.5 * np.outer(SEAT - 1, other)
            model.embeddings[name].directions.copy_(torch.from_numpy(parts + 0.6 * rng.standard_normal((N, D))))
        for norm in (model.weights["blocks.0.ln2.w"], model.weights["embed_ln.w"], model.weights["ln_final.w"]):
            norm.copy_(torch.exp(torch.from_numpy(0.4 * rng.standard_normal(D))))
        W, w = model.weights["blocks.0.mlp.W_in"], model.weights["blocks.0.ln2.w"].double()
        reads = torch.from_numpy(between(rows_of(model, "state_in"), ROW))
        W += 40 * torch.outer(reads / w, torch.nn.functional.normalize(torch.randn(48, dtype=torch.float64), dim=0))
        W = model.weights["blocks.1.mlp.W_out"]
        writes = torch.from_numpy(between(rows_of(model, "state_out"), SEAT))
        W += 40 * torch.outer(torch.nn.functional.normalize(torch.randn(48, dtype=torch.float64), dim=0), writes)
    model.facts = replace(model.facts, factors=dict.fromkeys(("state_in", "state_out"), FACTORS))
    return model


def rows_of(model: Any, name: str) -> Any:
    """Effective directions of a side's labels as unit rows, by the textbook."""
    e, norm = model.embeddings[name].directions.double().numpy(), "embed_ln" if name.endswith("_in") else "ln_final"
    w = model.weights[f"{norm}.w"].double().numpy()
    rows = centred(w * centred(e)) if name.endswith("_in") else centred(w * e)  # what reads is behind a LayerNorm too
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def between(rows: Any, levels: Any) -> Any:
    """The direction that separates the levels' means best."""
    means = np.stack([rows[levels == level].mean(0) for level in np.unique(levels)])
    return np.linalg.svd(means - means.mean(0))[2][0]


def effects(values: Any) -> list[float]:
    """By SciPy: two Kruskal-Wallis and one area."""
    found = [
        float(stats.kruskal(*[values[f == level] for level in np.unique(f)]).statistic) / (N - 1) for f in (ROW, SEAT)
    ]
    odd = np.array(FACTORS["odd"]) == 1
    area = stats.mannwhitneyu(values[odd], values[~odd]).statistic / (odd.sum() * (~odd).sum())
    return [*found, float(max(area, 1 - area))]


def test_every_effect_is_scipys_and_what_was_planted_is_found(agent: Any) -> None:
    table = clusters(agent, matrices=["blocks.0.mlp.W_in", "blocks.1.mlp.W_out"], beside=False)
    names = list(FACTORS)
    assert list(table.columns) == [*COLUMNS, *(f"{part}_{name}" for name in names for part in ("effect", "p"))]
    assert set(zip(table["matrix"], table["side"], table["embedding"], strict=True)) == {
        ("blocks.0.mlp.W_in", "read", "state_in"),
        ("blocks.1.mlp.W_out", "write", "state_out"),
    }
    W = agent.weights["blocks.0.mlp.W_in"].detach().double().numpy()
    w = agent.weights["blocks.0.ln2.w"].detach().double().numpy()
    folded = w[:, None] * W
    reads = np.linalg.svd(folded - folded.mean(0))[0].T
    writes = np.linalg.svd(agent.weights["blocks.1.mlp.W_out"].detach().double().numpy())[2]
    for row in table.itertuples():
        u, rows = (reads[row.sv], "state_in") if row.side == "read" else (writes[row.sv], "state_out")
        wanted = effects(rows_of(agent, rows) @ u)
        assert [row.effect_row, row.effect_seat, row.effect_odd] == pytest.approx(wanted, rel=1e-6), row
    assert table.attrs["measures"] == {"row": "epsilon_squared", "seat": "epsilon_squared", "odd": "auc"}
    first = table[table["sv"] == 0].set_index("side")
    assert first["factor"].to_dict() == {"read": "row", "write": "seat"}
    assert (first["q_value"] < 0.05).all()
    np.testing.assert_allclose(table["q_value"], q_values(table["p_value"]))
    least = table[[f"p_{name}" for name in names]]
    assert (table["p_value"] >= least.min(axis=1)).all() and (table["p_value"] <= 3 * least.min(axis=1) + 1e-9).all()
    for row in table.itertuples():
        assert getattr(row, f"p_{row.factor}") == least.loc[row.Index].min()
        assert getattr(row, f"effect_{row.factor}") == row.effect
    about = table.attrs
    assert about["draws"] + 1 >= 20 * len(table) and about["smallest_p"] == 1 / (1 + about["draws"])
    assert (about["null"], about["seed"], about["found"]) == ("haar", 0, int((table["q_value"] <= 0.05).sum()))


def test_spectrum_keeps_lengths_on_the_axes(agent: Any) -> None:
    S = np.cov(rows_of(agent, "state_in").T)
    few: dict[str, Any] = {"matrices": "blocks.0.mlp.W_in", "sv": "0-5", "beside": False}
    table = clusters(agent, null="spectrum", activations=S, **few)
    plain = clusters(agent, **few)
    pd.testing.assert_series_equal(table["effect_row"], plain["effect_row"])
    assert table["factor"][0] == "row" and table["q_value"][0] < 0.05
    assert not table["p_value"].equals(plain["p_value"])
    assert table.attrs["draws"] == 21 * 6 * 3 - 1 and table.attrs["lone_p"] == 1 / (21 * 6)
    # A covariance whose only axis is the direction itself: no sign changes how far labels are sorted.
    v = dt_lens.WeightSVD(agent)["blocks.0.mlp.W_in"].side("read")[0].numpy()
    alone = clusters(agent, null="spectrum", activations=np.outer(v, v), **{**few, "sv": 0})
    assert alone["p_value"][0] == 1.0
    with pytest.raises(DtLensError, match="needs activations"):
        clusters(agent, null="spectrum")
    with pytest.raises(DtLensError, match="leave them out"):
        clusters(agent, activations=S)


def test_the_same_seed_gives_the_same_table_and_another_seed_other_draws(agent: Any) -> None:
    few: dict[str, Any] = {"matrices": "*.0.mlp.W_in", "sv": "0-7", **QUICK}
    first = clusters(agent, seed=3, **few)
    pd.testing.assert_frame_equal(first, clusters(agent, seed=3, **few))
    assert not first["p_value"].equals(clusters(agent, seed=4, **few)["p_value"])


def test_strata_and_single_levels(agent: Any) -> None:
    few: dict[str, Any] = {"matrices": "blocks.0.mlp.W_in", "sv": "0,2-3", **QUICK}
    held = clusters(agent, strata="row", **few)
    assert held["sv"].tolist() == [0, 2, 3]
    assert list(held.filter(like="effect_")) == ["effect_seat", "effect_odd"]
    assert held.attrs["strata"] == ["row"]
    v = dt_lens.WeightSVD(agent)["blocks.0.mlp.W_in"].side("read")[2].numpy()
    x = rows_of(agent, "state_in") @ v
    u = np.concatenate([(stats.rankdata(x[r == ROW]) - 6.5) / 13 for r in range(5)])
    assert held["effect_seat"][1] == pytest.approx(
        sum(u[s == SEAT].sum() ** 2 / 20 for s in range(3)) / (u**2).sum(), rel=1e-6
    )
    asked = clusters(agent, only=["row=4", "seat"], **few)
    assert asked.attrs["measures"] == {"row=4": "auc", "seat": "epsilon_squared"}
    area = stats.mannwhitneyu(x[ROW == 4], x[ROW != 4]).statistic / (12 * 48)
    assert asked["effect_row=4"][1] == pytest.approx(max(area, 1 - area), rel=1e-6)


def test_a_block_is_the_best_of_directions_in_its_span(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dt_lens.svd import cluster_draws
    from dt_lens.svd.decompositions import Decompositions

    whole = Decompositions._decomposition
    monkeypatch.setattr(
        Decompositions,
        "_decomposition",
        lambda self, *given: replace(whole(self, *given), blocks=((0, 3), (3, 4))),
    )
    table = clusters(agent, matrices="blocks.0.mlp.W_in", draws=49, beside=False)
    assert table["sv"].tolist() == [0, 3]
    frame = dt_lens.WeightSVD(agent)["blocks.0.mlp.W_in"].side("read")[:3].numpy()
    inside = cluster_draws._inside(3)
    assert inside.shape == (200, 3)
    best = np.max([effects(rows_of(agent, "state_in") @ (x @ frame)) for x in inside], axis=0)
    assert table.loc[0, ["effect_row", "effect_seat", "effect_odd"]].tolist() == pytest.approx(best.tolist(), rel=1e-6)
    assert table["p_row"][0] == 1 / 50 and table["factor"][0] == "row"


def test_beside_it_an_untrained_model(agent: Any) -> None:
    table = clusters(agent, matrices="blocks.0.mlp.W_in", sv="0-3", draws=99)
    assert table.attrs["untrained_model"] == {"null": "haar", "rows": 4, "found": 0}


def test_a_table_of_ones_own(agent: Any, tmp_path: Path) -> None:
    labels = list(agent.embeddings["state_in"].labels)
    given = pd.DataFrame({"line": ROW, "seat": SEAT}, index=labels)
    few: dict[str, Any] = {"matrices": "blocks.0.mlp.W_in", "sv": "0-3", **QUICK}
    own = clusters(agent, only=["row", "seat"], **few)
    found = clusters(agent, given.sample(frac=1, random_state=0), embeddings=None, **few)
    assert found.attrs["factors"] == {"state_in": ["line", "seat"], "state_out": ["line", "seat"]}
    np.testing.assert_array_equal(found["effect_line"], own["effect_row"])
    np.testing.assert_array_equal(found["p_value"], own["p_value"])
    given.rename_axis("label").reset_index().to_csv(tmp_path / "factors.csv", index=False)
    read = clusters(agent, tmp_path / "factors.csv", **few)
    np.testing.assert_array_equal(read["p_value"], own["p_value"])
    # A level that is missing is a label that the factor does not apply to.
    part = given.assign(line=given["line"].where(given["seat"] != 2))
    v = dt_lens.WeightSVD(agent)["blocks.0.mlp.W_in"].side("read")[0].numpy()
    x, kept = rows_of(agent, "state_in") @ v, SEAT != 2
    wanted = stats.kruskal(*[x[kept & (r == ROW)] for r in range(5)]).statistic / (kept.sum() - 1)
    assert clusters(agent, part, **few)["effect_line"][0] == pytest.approx(wanted, rel=1e-6)
    # Said for one embedding, it is compared with every side.
    both = clusters(agent, given, embeddings="state_in", matrices="blocks.0.attn.OV.0", sv=0, **QUICK)
    assert both["side"].tolist() == ["read", "write"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"null": "permuted"}, "knows haar and spectrum"),
        ({"only": "rows"}, "no factor 'rows'; there are row, seat, odd. Did you mean 'row'"),
        ({"only": "row=9"}, "no level '9'; it has 0, 1, 2, 3, 4"),
        ({"strata": ["row", "seat", "odd"]}, "No factor is left"),
        ({"only": "row", "strata": "row"}, "No factor is left"),
        ({"embeddings": "action_in"}, "give factors="),
        ({"matrices": "*.W_inn"}, "W_in"),
        ({"sv": "0-99"}, "out of range"),
        ({"sv": slice(0, 0)}, r"sv is slice\(0, 0, None\), which is none of the directions"),
        ({"alpha": 2}, "alpha"),
        ({"draws": 0}, "draws"),
        ({"factors": 3}, "DataFrame"),
    ],
)
def test_what_is_wrong_is_one_sentence(agent: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DtLensError, match=said):
        clusters(agent, **options)


def test_no_rows_are_an_error(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "facts", replace(agent.facts, factors={"state_in": FACTORS}))
    with pytest.raises(DtLensError, match="No side of these matrices is compared with state_in by default; give emb"):
        clusters(agent, matrices="*.W_out", **QUICK)


def test_strata_leave_an_embedding_out(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the writing sides has no row, so its labels are not ranked within rows."""
    factors = {"state_in": FACTORS, "state_out": {"seat": FACTORS["seat"]}}
    monkeypatch.setattr(agent, "facts", replace(agent.facts, factors=factors))
    table = clusters(agent, strata="row", matrices="blocks.?.mlp.*", sv=0, **QUICK)
    assert set(table["embedding"]) == {"state_in"} and table.attrs["strata"] == ["row"]
    assert list(table.attrs["factors"]) == ["state_in"]
    assert "have no factor 'row'" in table.attrs["left_out"]["state_out: seat"]


def test_covariance_of_a_side_is_that_of_scans(agent: Any) -> None:
    """An array is used unchanged, so that what the two tests call spectrum is the same."""
    S = np.eye(D)
    assert side_covariance(None, "read", S) is S  # type: ignore[arg-type]
