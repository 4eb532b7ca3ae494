"""Singular vectors replaced by an embedding's direction, or turned towards one: the right direction, pole and angle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import DtLensError, Embedding, SingularEdit, WeightSVD
from dt_lens.edits.singular import load_edit
from dt_lens.lens.matrices import find_matrix

Make = Callable[..., Any]
PLACES = [
    ("blocks.0.mlp.W_in", "read"),
    ("blocks.1.mlp.W_out", "write"),
    ("blocks.0.attn.W_K.1", "read"),
    ("blocks.1.attn.W_O", "write"),
    ("blocks.0.attn.OV.1", "read"),
    ("blocks.0.attn.OV.1", "write"),
    ("blocks.1.attn.QK.0", "query"),
    ("blocks.1.attn.QK.0", "key"),
]
EMBEDDINGS = ["state_in", "action_out"]


def became(model: Any, edit: SingularEdit, fold: bool) -> Tensor:
    """What each edited vector became, read off the matrix while the edit is in force; ``[k, d]``."""
    d = WeightSVD(model, fold_layernorm=fold)[edit.matrix.name]
    where, rows = edit.matrix.side(edit.side), edit.sv
    left, right, sigma = d.left[rows].clone(), d.right[rows].clone(), d.sigma[rows].clone()
    with edit:
        M = edit.matrix.dense(model, fold)
        found = right @ M.T if where == "left" else left @ M
    return found / sigma[:, None]


def compared(model: Any, name: str, row: int, fold: bool, centred: bool) -> Tensor:
    """The unit direction that a scan compares with, computed independently."""
    embedding = model.embeddings[name]
    e = (embedding.effective if fold else embedding.directions)[row].double()
    e = e - e.mean() if centred else e
    return e / e.norm()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize(("name", "side"), PLACES)
def test_the_vector_becomes_the_direction_that_a_scan_compares_with(
    make_dt: Make, name: str, side: Any, embedding: str, fold: bool
) -> None:
    model = make_dt(dtype=torch.float64)
    label = model.embeddings[embedding].labels[1]
    matrix = find_matrix(model, name)
    centred = fold and matrix.centred(matrix.side(side))
    unit = compared(model, embedding, 1, fold, centred)
    d = WeightSVD(model, fold_layernorm=fold)[name]
    old = d.side(side)[[0, 2]].clone()
    edit = SingularEdit(model, name, [0, 2], side=side, value=(embedding, label), fold_layernorm=fold)
    assert edit.value == {"replace": [embedding, label]}
    new = became(model, edit, fold)
    for was, now in zip(old, new, strict=True):
        pole = 1.0 if float(was @ unit) >= 0 else -1.0
        torch.testing.assert_close(now, pole * unit, rtol=0, atol=1e-9)
    # The same cosine as in the table: what is now read is exactly the label.
    expected = WeightSVD(model, fold_layernorm=fold).cosines(name, embedding, side)[label].to_numpy()[[0, 2]]
    assert (old @ unit).tolist() == pytest.approx(expected.tolist(), abs=1e-9)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("angle", [0.5, 30, 90, 200.0, -45])
@pytest.mark.parametrize(("name", "side"), PLACES)
def test_turning_keeps_the_length_the_plane_and_the_angle(
    make_dt: Make, name: str, side: Any, angle: float, fold: bool
) -> None:
    model = make_dt(dtype=torch.float64)
    label = model.embeddings["action_out"].labels[0]
    matrix = find_matrix(model, name)
    unit = compared(model, "action_out", 0, fold, fold and matrix.centred(matrix.side(side)))
    old = WeightSVD(model, fold_layernorm=fold)[name].side(side)[[1, 3]].clone()
    edit = SingularEdit(
        model, name, [1, 3], side=side, value={"towards": ["action_out", label], "angle": angle}, fold_layernorm=fold
    )
    for was, now in zip(old, became(model, edit, fold), strict=True):
        pole = unit if float(was @ unit) >= 0 else -unit
        between = math.acos(float(was @ pole))
        assert float(now.norm()) == pytest.approx(1)
        assert float(was @ now) == pytest.approx(math.cos(math.radians(angle)))
        assert float(now @ pole) == pytest.approx(math.cos(between - math.radians(angle)))  # and in their plane:
        basis = torch.linalg.qr(torch.stack([was, pole], 1))[0]
        torch.testing.assert_close(basis @ basis.T @ now, now, rtol=0, atol=1e-9)


def test_turning_by_the_whole_angle_is_replacing(make_dt: Make) -> None:
    model = make_dt(dtype=torch.float64)
    name = "blocks.0.mlp.W_in"
    cosine = float(WeightSVD(model).cosines(name, "state_in")[model.embeddings["state_in"].labels[2]][0])
    between = math.degrees(math.acos(abs(cosine)))
    turned = SingularEdit(model, name, value=("state_in", 2, between))
    replaced = SingularEdit(model, name, value=("state_in", 2))
    torch.testing.assert_close(turned.delta[0] @ turned.delta[1], replaced.delta[0] @ replaced.delta[1])


def test_a_planted_direction(make_dt: Make) -> None:
    """A user's embedding: what is written becomes what was planted, whatever else the matrix does."""
    model = make_dt(normalization="none", final_ln=False, dtype=torch.float64)
    planted = torch.nn.functional.one_hot(torch.tensor([3, 9]), 16).double()
    model.embeddings["mine"] = Embedding(-4 * planted, ["left", "right"])
    for label, coordinate in (("left", 3), ("right", 9)):
        edit = SingularEdit(model, "blocks.0.mlp.W_out", 0, value={"replace": ["mine", label]})
        new = became(model, edit, fold=True)[0]
        assert float(new[coordinate].abs()) == pytest.approx(1)
        assert float(new.square().sum()) == pytest.approx(1)


def test_records_of_embeddings(make_dt: Make) -> None:
    model = make_dt()
    labels = model.embeddings["action_out"].labels
    edits = [
        SingularEdit(model, "blocks.0.mlp.W_in", [0, -1], value=("action_out", labels[2])),
        SingularEdit(model, "blocks.0.mlp.W_in", 0, value=["action_out", 1, 15]),
        SingularEdit(model, "blocks.1.mlp.W_out", 0, value={"towards": ("state_in", -1), "angle": -7.5}),
        SingularEdit(model, "blocks.1.mlp.W_out", 0, value=("state_in", 0), fold_layernorm=False),
    ]
    for edit in [*edits, *(edit.control(2) for edit in edits)]:
        record = json.loads(json.dumps(edit.to_dict()))
        again = load_edit(model, record)
        torch.testing.assert_close(again.delta, edit.delta)
        assert (again.to_dict(), repr(again)) == (record, repr(edit))
    assert edits[1].value == {"towards": ["action_out", labels[1]], "angle": 15.0}
    assert edits[2].value == {"towards": ["state_in", model.embeddings["state_in"].labels[-1]], "angle": -7.5}
    # Without a LayerNorm to fold, raw and effective directions still differ, and the record says which were meant.
    folded = SingularEdit(model, "blocks.1.mlp.W_out", 0, value=("state_in", 0))
    assert not torch.allclose(folded.delta[1], edits[3].delta[1], atol=1e-4)
    assert (folded.to_dict()["fold_layernorm"], edits[3].to_dict()["fold_layernorm"]) == (True, False)


def test_a_label_that_two_rows_share_is_recorded_by_its_row(make_dt: Make) -> None:
    model = make_dt()
    model.embeddings.relabel("action_out", ["a", "b", "b"])
    first, second = (SingularEdit(model, "blocks.0.mlp.W_out", value=("action_out", row)) for row in (1, 2))
    assert first.value == {"replace": ["action_out", "b"]}
    assert second.value == {"replace": ["action_out", 2]}
    torch.testing.assert_close(load_edit(model, second.to_dict()).delta, second.delta)
    # NumPy's numbers are accepted too.
    again = SingularEdit(model, "blocks.0.mlp.W_out", value=("action_out", np.int64(2), np.float32(30)))
    assert json.loads(json.dumps(again.value)) == {"towards": ["action_out", 2], "angle": 30.0}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokens_of_a_language_model(kind: str, make_lm: Make) -> None:
    lens = dt_lens.wrap(make_lm(kind).double(), check=False)
    for name, side in (("blocks.0.mlp.W_in", "read"), ("blocks.1.attn.OV.3", "write")):
        matrix = find_matrix(lens, name)
        unit = compared(lens, "token_out", 5, True, matrix.centred(matrix.side(side)))  # type: ignore[arg-type]
        edit = SingularEdit(lens, name, 0, side=side, value=("token_out", "token 5"))  # type: ignore[arg-type]
        assert abs(float(became(lens, edit, True)[0] @ unit)) == pytest.approx(1)


@pytest.mark.parametrize("value", ["zero", "flip", "constant", 0.0, 2.5, ("action_out", 0), ("action_out", 0, 20)])
@pytest.mark.parametrize("sv", [-1, [-1, -2], slice(-3, None), [0, -1]])
def test_every_value_at_the_smallest_sigmas_too(make_dt: Make, value: Any, sv: Any) -> None:
    model = make_dt(dtype=torch.float64)
    for name, side in PLACES:
        k = len(WeightSVD(model)[name].sigma)
        edit = SingularEdit(model, name, sv, side=side, value=value)  # type: ignore[arg-type]
        wanted = list(range(k))[sv] if isinstance(sv, slice) else [i % k for i in ([sv] if isinstance(sv, int) else sv)]
        assert edit.sv == wanted
        before = {n: w.clone() for n, w in model.weights.items()}
        with edit:
            moved = [n for n, w in model.weights.items() if not torch.equal(w, before[n])]
        assert len(moved) == 1
        assert all(torch.equal(w, before[n]) for n, w in model.weights.items())


def test_a_partial_decomposition_does_not_hold_the_last_directions(make_dt: Make) -> None:
    model = make_dt()
    name = "blocks.0.mlp.W_in"
    part, whole = WeightSVD(model, 4)[name], WeightSVD(model)[name]
    assert SingularEdit(model, name, 3, value="zero", decomposition=part).sv == [3]
    assert SingularEdit(model, name, -1, value="zero", decomposition=whole).sv == [14]
    for sv in (-1, slice(None)):
        with pytest.raises(DtLensError, match="holds only the first 4 directions"):
            SingularEdit(model, name, sv, value="zero", decomposition=part)


W_IN = "blocks.0.mlp.W_in"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (("action_ot", "a"), "no embedding 'action_ot'.*Did you mean 'action_out'"),
        (("action_out", "sideways"), "has no label 'sideways'"),
        (("action_out", 3), "has 3 directions, 0 to 2, and no 3"),
        (("action_out", None), "A label of action_out is text, or the number of its row, not None"),
        (("action_out", True), "A label of action_out is text"),
        (("action_out",), "names"),
        (("action_out", 0, "x"), "The angle is 'x'; it must be a number of degrees"),
        (("action_out", 0, float("nan")), "The angle is nan"),
        (("action_out", 0, 10, 10), r"give \(embedding, label\)"),
        ({"replace": "action_out"}, "names 'action_out'; with an embedding it must be"),
        ({"replace": [3, 0]}, "named by text, such as 'action_out', not 3"),
        ({"towards": ["action_out", 0]}, "with an embedding it must be"),
        ({"towards": ["action_out", 0], "angle": None}, "The angle is None"),
        ({"replace": ["action_out", 0], "angle": 3}, "with an embedding it must be"),
        ({}, "with an embedding it must be"),
    ],
)
def test_malformed_directions_of_embeddings_are_refused(make_dt: Make, value: Any, message: str) -> None:
    with pytest.raises(DtLensError, match=message):
        SingularEdit(make_dt(), W_IN, value=value)


def test_directions_that_no_edit_can_take(make_dt: Make) -> None:
    model = make_dt()
    with pytest.raises(DtLensError, match="does not face the residual stream"):
        SingularEdit(model, W_IN, side="neuron", value=("action_out", 0))
    model.embeddings["flat"] = Embedding(torch.ones(1, 16), ["all"])
    with pytest.raises(DtLensError, match="'all' of flat is zero as seen from this side"):
        SingularEdit(model, W_IN, value=("flat", "all"))
    model.embeddings["same"] = Embedding(WeightSVD(model)[W_IN].read[:1].clone(), ["v"])  # type: ignore[index]
    with pytest.raises(DtLensError, match="already lies along 'v' of same"):
        SingularEdit(model, W_IN, value=("same", "v", 10))
    with pytest.raises(DtLensError, match="changes no bit"):
        SingularEdit(model, W_IN, value=("same", "v")).apply()
