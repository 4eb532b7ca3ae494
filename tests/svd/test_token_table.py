"""Token tables: the same numbers as the cosines, the right labels at either end, and filters that filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dt_lens import DtLensError, Embedding, WeightSVD
from dt_lens.svd import side_labels
from dt_lens.svd.label_filters import ascii_only, whole_words
from dt_lens.svd.token_table import poles

Make = Callable[..., Any]


def with_vocabulary(model: Any, n: int = 300, seed: int = 0, **options: Any) -> Any:
    """Two embeddings with many labels, as a language model has."""
    generator = torch.Generator().manual_seed(seed)
    labels = [f" w{chr(97 + i % 26)}{chr(97 + i // 26)}" if i % 3 else f"é{i}" for i in range(n)]
    for name, side in (("token_in", "in"), ("token_out", "out")):
        directions = torch.randn(n, model.cfg.d_model, generator=generator)
        layernorm = torch.rand(model.cfg.d_model, generator=generator) if side == "out" else None
        model.embeddings[name] = Embedding(directions, labels, "token", side, layernorm=layernorm, **options)  # type: ignore[arg-type]
    return model


@pytest.fixture(params=[2**23, 100], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_labels, "BLOCK", request.param)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("options", [{}, {"normalization": "none"}])
def test_it_is_the_table_of_cosines_sorted(blocks: None, make_dt: Make, fold: bool, options: dict[str, str]) -> None:
    model = with_vocabulary(make_dt(**options))
    svd = WeightSVD(model, fold_layernorm=fold)
    for matrix, embedding, side in (
        ("blocks.0.mlp.W_in", "token_in", None),
        ("blocks.1.mlp.W_out", "token_out", None),
        ("blocks.1.mlp.W_out", "token_in", None),
        ("blocks.0.attn.OV.1", "token_out", "write"),
        ("blocks.0.attn.QK.1", "token_in", "key"),
    ):
        table = svd.tokens(matrix, embedding, k=3, n=7, side=side).to_frame()  # type: ignore[arg-type]
        cosines = svd.cosines(matrix, embedding, side)  # type: ignore[arg-type]
        assert len(table) == 3 * 14
        for sv in range(3):
            wanted = cosines.iloc[sv].sort_values(ascending=False, kind="stable")
            found = table[table["sv"] == sv]
            plus, minus = found[found["pole"] == "+"], found[found["pole"] == "-"]
            assert list(plus["label"]) == list(wanted.index[:7])
            assert list(minus["label"]) == list(wanted.index[::-1][:7])
            np.testing.assert_allclose(plus["cosine"], wanted[:7], atol=1e-12)
            np.testing.assert_allclose(minus["cosine"], wanted[::-1][:7], atol=1e-12)
            assert (plus["rank"].to_numpy() == np.arange(7)).all()
            assert set(found["sigma"]) == {float(svd[matrix].sigma[sv])}
        labels = model.embeddings[embedding].labels
        assert [labels[i] for i in table["index"]] == list(table["label"])


def test_circuits_are_compared_on_both_sides_and_name_their_head(make_dt: Make) -> None:
    svd = WeightSVD(with_vocabulary(make_dt()))
    table = svd.tokens("blocks.*.attn.OV.*", ["token_in", "token_out"], k=2, n=3).to_frame()
    compared = table[["matrix", "layer", "head", "side", "embedding"]].drop_duplicates()
    assert len(compared) == 2 * 2 * 2  # layers, heads, sides
    assert {(s, e) for s, e in zip(compared["side"], compared["embedding"], strict=True)} == {
        ("read", "token_in"),
        ("write", "token_out"),
    }
    assert table[table["matrix"] == "blocks.1.attn.OV.1"][["layer", "head"]].drop_duplicates().to_numpy().tolist() == [
        [1, 1]
    ]
    # A side given by name is compared with every embedding; QK has two, and both are shown.
    one = svd.tokens("blocks.0.attn.OV.0", ["token_in", "token_out"], side="read").to_frame()
    assert set(one["embedding"]) == {"token_in", "token_out"} and set(one["side"]) == {"read"}
    assert set(svd.tokens("blocks.0.attn.QK.0", "token_in").to_frame()["side"]) == {"query", "key"}
    natural = svd.tokens("blocks.0.mlp.W_out").to_frame()
    assert set(natural["embedding"]) == {"action_out", "state_out", "reward_out", "token_out"}


def test_filters(blocks: None, make_dt: Make) -> None:
    svd = WeightSVD(with_vocabulary(make_dt()))
    everything = svd.cosines("blocks.0.mlp.W_in", "token_in")
    table = svd.tokens("blocks.0.mlp.W_in", "token_in", k=1, n=5, where=[ascii_only, whole_words])
    wanted = everything.iloc[0][[label for label in everything.columns if label.startswith(" w")]]
    assert list(table.rows["label"][:5]) == list(wanted.sort_values(ascending=False).index[:5])
    assert table.shown["token_in"] == (200, 300)
    # By default the sets that have such labels; none at all is an error.
    assert set(svd.tokens("blocks.0.mlp.W_in", where=lambda text: "é" in text).rows["embedding"]) == {"token_in"}
    with pytest.raises(DtLensError, match="No label of token_in passes"):
        svd.tokens("blocks.0.mlp.W_in", "token_in", where=lambda text: False)


@pytest.mark.parametrize("left", [1, 2, 5, 13, 14, 15])
def test_few_labels_are_each_shown_once(make_dt: Make, left: int) -> None:
    svd = WeightSVD(with_vocabulary(make_dt()))
    kept = {svd.registry["token_in"].labels[i] for i in range(left)}
    table = svd.tokens("blocks.0.mlp.W_in", "token_in", k=16, n=7, where=kept.__contains__).to_frame()
    for _, found in table.groupby("sv"):
        assert found["label"].is_unique and len(found) >= min(left, 7)
        plus, minus = (found[found["pole"] == pole]["cosine"] for pole in "+-")
        assert plus.is_monotonic_decreasing and minus.is_monotonic_increasing
        assert (plus >= 0).all() and (minus < 0).all()
        assert len(found) == left or len(plus) == 7 or len(minus) == 7  # left out only where a pole is full


@pytest.mark.parametrize(("values", "ends"), [([3, 2, 1, -1], (2, 1)), ([3, 2, 1, 0.5], (2, 0)), ([-1.0], (0, 1))])
def test_poles(values: list[float], ends: tuple[int, int]) -> None:
    plus, minus = poles(torch.tensor(values, dtype=torch.float64), 2)
    assert (plus.stop - plus.start, minus.stop - minus.start) == ends


def test_one_direction_in_disguise_is_found_among_many(make_dt: Make) -> None:
    """Labels closer together than single precision can tell: double precision decides."""
    model = make_dt(dtype=torch.float64, normalization="none", embed_ln=False, final_ln=False)
    svd = WeightSVD(model)
    direction = svd["blocks.0.mlp.W_in"].read[0]
    steps = torch.linspace(0, 1e-5, 20, dtype=torch.float64).flip(0)
    model.embeddings["near"] = Embedding(direction + steps[:, None] * svd["blocks.0.mlp.W_in"].read[1], kind="near")
    table = svd.tokens("blocks.0.mlp.W_in", "near", k=1, n=3).to_frame()
    assert list(table["index"][:3]) == [19, 18, 17]


def test_wide_frame_has_embeddings_side_by_side(make_dt: Make) -> None:
    table = WeightSVD(with_vocabulary(make_dt())).tokens("blocks.0.mlp.W_in", ["token_*"], k=2, n=3)
    wide = table.to_frame(wide=True)
    assert wide.shape == (2 * 2 * 3, 4)
    assert wide.columns.tolist() == [(e, v) for e in ("token_in", "token_out") for v in ("label", "cosine")]
    row = table.rows[(table.rows["embedding"] == "token_out") & (table.rows["sv"] == 1)].iloc[4]
    found = wide.xs(("blocks.0.mlp.W_in", 1, row["pole"], row["rank"]), level=("matrix", "sv", "pole", "rank"))
    assert found.iloc[0][("token_out", "label")] == row["label"]
    assert repr(table).startswith("blocks.0.mlp.W_in, read side\n  sv 0")


def test_blocks_of_directions_are_shown(make_dt: Make) -> None:
    model = make_dt(normalization="none")
    W = model.weights["blocks.0.mlp.W_in"]
    with torch.no_grad():
        u, s, v = torch.linalg.svd(W.double(), full_matrices=False)
        s[1] = s[2]
        W.copy_((u * s) @ v)
    table = WeightSVD(model).tokens("blocks.0.mlp.W_in", "state_in", k=4, n=2)
    assert table.rows.drop_duplicates("sv")["block"].tolist() == [1, 2, 2, 1]
    assert "one of 2" in table._repr_html_()


def test_large_matrices_are_decomposed_only_so_far(make_dt: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from dt_lens.svd import token_table as token_tables

    svd = WeightSVD(make_dt())
    whole = svd.tokens("blocks.0.mlp.W_in", k=3).to_frame()
    monkeypatch.setattr(token_tables, "LARGE", 1)
    pd.testing.assert_frame_equal(WeightSVD(svd.model).tokens("blocks.0.mlp.W_in", k=3).to_frame(), whole)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"k": 0}, "k is 0"),
        ({"n": 1.5}, "n is 1.5"),
        ({"embeddings": "token_inn"}, "There is no embedding"),
        ({"side": "write"}, "no side"),
        ({"side": "neuron"}, "not in the residual stream"),
        ({"where": 3}, "filter"),
    ],
)
def test_mistakes_are_one_sentence(make_dt: Make, options: dict[str, Any], needed: str) -> None:
    with pytest.raises(DtLensError, match=needed):
        WeightSVD(make_dt()).tokens("blocks.0.mlp.W_in", **options)


def test_html_is_escaped_and_knows_no_theme(make_dt: Make, tmp_path: Any) -> None:
    model = make_dt()
    labels = ["<script>alert(1)</script>", ' "quoted"', "\n", "é", "a & b"]
    model.embeddings["wild"] = Embedding(torch.randn(5, 16), labels, kind="token")
    table = WeightSVD(model).tokens(["blocks.0.attn.QK.1"], "wild", k=2, n=9)
    page = table._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "␣&quot;quoted&quot;" in page and "<bdi>\\n</bdi>" in page
    assert "layer 0, head 1 · query side" in page and "σ " in page
    assert "color:" not in page.replace("color: inherit", "")  # the page's own ink
    assert page.count("rgba(213,94,0") + page.count("rgba(0,114,178") == len(table)
    assert "data" not in table.save(tmp_path / "t.csv").read_text().splitlines()[0]
    saved = table.save(tmp_path / "t.html").read_text()
    assert page.split("</style>")[1].split("</table>")[0] in saved
    with pytest.raises(DtLensError, match="csv"):
        table.save(tmp_path / "t.pdf")
    many = WeightSVD(model).tokens("*", "wild", k=1)
    assert "more are in the table" in many._repr_html_() and "more are in" not in many.to_html()


def test_untrained_heads_are_marked_and_grey(make_dt: Make) -> None:
    table = WeightSVD(make_dt()).tokens("blocks.0.mlp.W_out", ["action_out", "state_out"], k=2, n=2)
    marks = table.rows.groupby("embedding")["trained"].agg(["min", "max"])
    assert marks.to_dict("index") == {
        "action_out": {"min": True, "max": True},
        "state_out": {"min": False, "max": False},
    }
    assert "state_out (untrained)" in repr(table) and "action_out (untrained)" not in repr(table)
    page = table._repr_html_()
    assert page.count("untrained head") == 1
    assert page.count("rgba(128,128,128,") - page.count("rgba(128,128,128,0.35)") == (~table.rows["trained"]).sum()
