"""One rule for which embeddings are compared with which sides: in scans, cosines, token tables, and two models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import dt_lens
from dt_lens import DtLensError, WeightSVD
from dt_lens.lens.matrices import SideName, find_matrix
from dt_lens.svd.pairings import is_natural, natural_side

Make = Callable[..., Any]
MATRICES = ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "blocks.0.attn.OV.0", "blocks.0.attn.QK.0"]
READING: list[SideName] = ["read", "query", "key"]


@pytest.fixture(scope="module")
def model(make_dt: Make) -> Any:
    return make_dt()


def test_output_embeddings_go_with_writing_sides_and_all_others_with_reading_sides(model: Any) -> None:
    for name, embedding in model.embeddings.items():
        assert is_natural(embedding, "write") == name.endswith("_out")
        assert all(is_natural(embedding, side) == name.endswith("_in") for side in READING)


def test_every_table_follows_the_rule(model: Any) -> None:
    svd = WeightSVD(model)
    expected = {
        (name, side, embedding)
        for name in MATRICES
        for side in find_matrix(model, name).residual_sides
        for embedding in model.embeddings
        if embedding.endswith("_out") == (side == "write")
    }
    for table in (svd.scan(MATRICES), svd.tokens(MATRICES, k=1, n=1).rows):
        found = table[["matrix", "side", "embedding"]].drop_duplicates()
        assert set(found.itertuples(index=False, name=None)) == expected
    changes = dt_lens.compare(model, model, MATRICES)
    assert set(changes.embeddings_of_both("write")) == {name for name in model.embeddings if name.endswith("_out")}
    assert set(changes.embeddings_of_both("key")) == {name for name in model.embeddings if name.endswith("_in")}
    for name in ("state_in", "state_out"):
        moved = changes.labels("blocks.0.attn.OV.0", name)
        assert moved.attrs["side"] == ("read" if name == "state_in" else "write")


def test_the_side_for_an_embedding(model: Any) -> None:
    W_in, W_out, OV, QK = (find_matrix(model, name) for name in MATRICES)
    state_in, state_out = (model.embeddings[name] for name in ("state_in", "state_out"))
    assert [natural_side(matrix, state_in) for matrix in (W_in, W_out, OV)] == ["read", "write", "read"]
    assert [natural_side(matrix, state_out) for matrix in (W_in, W_out, OV)] == ["read", "write", "write"]
    assert natural_side(OV, state_in, "write") == "write" and natural_side(QK, state_in, "key") == "key"
    with pytest.raises(DtLensError, match="has two sides on the residual stream"):
        natural_side(QK, state_in)
    with pytest.raises(DtLensError, match=r"head side of .*W_Q is not in the residual stream.*; say read\.$"):
        natural_side(find_matrix(model, "blocks.0.attn.W_Q"), state_in, "head")
