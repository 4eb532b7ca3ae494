"""What an edit does to the matrix, against float64 references; its energy, its control, its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.edits import singular
from dt_lens.lens.matrices import Snapshot, find_matrix

Make = Callable[..., Any]
W_IN = "blocks.0.mlp.W_in"
PLACES = [
    ("blocks.0.mlp.W_in", "read"),
    ("blocks.0.mlp.W_in", "neuron"),
    ("blocks.1.mlp.W_out", "write"),
    ("blocks.1.mlp.W_out", "neuron"),
    ("blocks.0.attn.W_Q", "read"),
    ("blocks.0.attn.W_K.1", "read"),
    ("blocks.0.attn.W_V", "head"),
    ("blocks.1.attn.W_O", "write"),
    ("blocks.1.attn.W_O.0", "head"),
    ("blocks.0.attn.OV.1", "read"),
    ("blocks.0.attn.OV.1", "write"),
    ("blocks.1.attn.QK.0", "query"),
    ("blocks.1.attn.QK.0", "key"),
]
VALUES: dict[str, Any] = {
    "constant": lambda old: torch.full_like(old, 1 / len(old)),
    "zero": torch.zeros_like,
    "flip": torch.neg,
    "scale": lambda old: 1.7 * old,
    "vector": lambda old: torch.arange(len(old), dtype=old.dtype) / 10,
    "random": None,
}


def dense(model: Any, name: str, fold: bool) -> Tensor:
    return find_matrix(model, name).dense(model, fold).clone()


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**model.probe()).action_preds


def wanted(kind: str, d: int) -> Any:
    return {"scale": 1.7, "vector": [i / 10 for i in range(d)]}.get(kind, kind)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("name", "side"), PLACES)
def test_the_matrix_becomes_the_sum_with_the_vector_replaced(
    make_dt: Make, name: str, side: str, value: str, fold: bool
) -> None:
    model = make_dt(dtype=torch.float64)
    d = WeightSVD(model, fold_layernorm=fold)[name]
    raw = dense(model, name, fold=False)
    sv = 2
    where = d.matrix.side(side)
    left, right = d.left.clone(), d.right.clone()
    vectors = left if where == "left" else right
    old = vectors[sv].clone()
    edit = SingularEdit(
        model, name, sv, side=side, value=wanted(value, len(old)), seed=4, fold_layernorm=fold  # type: ignore[arg-type]
    )  # fmt: skip
    with edit:
        edited, edited_raw = dense(model, name, fold), dense(model, name, fold=False)
    centred = fold and d.matrix.norm(where) is not None
    if value == "random":
        moved = (left.T * d.sigma) @ right - edited
        (new,) = (edited @ right[sv] / d.sigma[sv],) if where == "left" else (left[sv] @ edited / d.sigma[sv],)
        assert float(new.norm()) == pytest.approx(1)
        assert abs(float(new @ old)) < 0.9
        assert torch.linalg.matrix_rank(moved) == 1
        assert (abs(float(new.mean())) < 1e-12) == centred
    else:
        new = VALUES[value](old)
        new = new - new.mean() if centred else new  # a folded matrix reads no constant
    vectors[sv] = new
    torch.testing.assert_close(edited, (left.T * d.sigma) @ right, rtol=0, atol=1e-9)
    # delta is the change of the raw matrix, energy its Frobenius norm.
    torch.testing.assert_close(edited_raw - raw, edit.delta[0] @ edit.delta[1], rtol=0, atol=1e-9)
    assert edit.energy == pytest.approx(float((edited_raw - raw).norm()), rel=1e-9)
    assert edit.effective_energy == pytest.approx(
        float((edited if fold else dense_folded(model, name, edit)).sub(dense(model, name, fold=True)).norm()), rel=1e-6
    )
    assert edit.sigma == [pytest.approx(float(d.sigma[sv]))]
    torch.testing.assert_close(dense(model, name, fold=False), raw, rtol=0, atol=0)


def dense_folded(model: Any, name: str, edit: SingularEdit) -> Tensor:
    with edit:
        return dense(model, name, fold=True)


@pytest.mark.parametrize("sv", [[0, 2], slice(3), slice(None, None, 2), [-1], np.int64(1), -2])
def test_several_directions_at_once(make_dt: Make, sv: Any) -> None:
    model = make_dt(dtype=torch.float64)
    d = WeightSVD(model)["blocks.0.mlp.W_in"]
    k = len(d.sigma)
    chosen = [int(i) for i in np.atleast_1d(np.arange(k)[sv])]
    edit = SingularEdit(model, "blocks.0.mlp.W_in", sv, value="zero")
    assert edit.sv == chosen
    kept = [i for i in range(k) if i not in chosen]
    with edit:
        left = (d.left[kept].T * d.sigma[kept]) @ d.right[kept]
        torch.testing.assert_close(dense(model, "blocks.0.mlp.W_in", fold=True), left, rtol=0, atol=1e-10)
    assert edit.effective_energy == pytest.approx(float(d.sigma[chosen].norm()))


def test_scan_and_edit_number_directions_alike(make_dt: Make) -> None:
    model = make_dt(dtype=torch.float64)
    svd = WeightSVD(model)
    before = svd["blocks.0.attn.OV.0"]
    for sv in (0, 3, 7):
        with SingularEdit(model, "blocks.0.attn.OV.0", sv, side="write", value=100.0):
            after = svd["blocks.0.attn.OV.0"]
            assert float(after.sigma[0]) == pytest.approx(100 * float(before.sigma[sv]))
            assert abs(float(after.left[0] @ before.left[sv])) == pytest.approx(1)


def test_directions_are_the_same_inside_another_edit(make_dt: Make) -> None:
    model = make_dt(dtype=torch.float64)
    name = "blocks.0.mlp.W_in"
    alone = SingularEdit(model, name, 1, value="flip")
    with SingularEdit(model, name, 0, value="zero"), SingularEdit(model, name, 1, value="flip") as inner:
        torch.testing.assert_close(inner.delta[0] @ inner.delta[1], alone.delta[0] @ alone.delta[1])
        assert inner.sigma == alone.sigma
        control = inner.control(3)
    torch.testing.assert_close(control.delta[0], alone.control(3).delta[0])


def test_the_constant_edit_behind_a_layernorm_is_a_removal(make_dt: Make) -> None:
    model = make_dt()
    for name, side in (("blocks.0.mlp.W_in", "read"), ("blocks.1.attn.OV.1", "read"), ("blocks.0.attn.QK.0", "key")):
        edits = [SingularEdit(model, name, side=side, value=value) for value in ("constant", "zero")]  # type: ignore[arg-type]
        seen = []
        for edit in edits:
            with edit:
                seen.append(outputs(model))
        torch.testing.assert_close(*seen, rtol=0, atol=1e-6)
        assert (seen[0] - outputs(model)).abs().max() > 1e-5
        assert "is a removal" in edits[0].note
        assert edits[1].note == ""
    assert "nearly a removal" in SingularEdit(model, "blocks.0.mlp.W_in", fold_layernorm=False).note


@pytest.mark.parametrize(
    "name", ["blocks.0.mlp.W_out", "blocks.1.mlp.W_out", "blocks.0.attn.W_O", "blocks.1.attn.OV.0"]
)
@pytest.mark.parametrize(
    ("options", "unseen"),
    [({}, True), ({"normalization": "post", "final_ln": False}, True), ({"final_ln": False}, False),
     ({"normalization": "none", "final_ln": False}, False)],
)  # fmt: skip
def test_a_constant_that_is_written_is_seen_only_without_layernorms(
    make_dt: Make, name: str, options: dict[str, Any], unseen: bool
) -> None:
    model = make_dt(**options)
    before, seen, edits = outputs(model), [], []
    for value in ("constant", "zero"):
        edits.append(SingularEdit(model, name, side="write", value=value))  # type: ignore[arg-type]
        with edits[-1]:
            seen.append(outputs(model))
    difference = float((seen[0] - seen[1]).abs().max())
    assert (difference < 1e-5) == unseen
    assert ("acts as a removal here too" in edits[0].note) == unseen
    assert edits[0].energy != edits[1].energy
    assert float((seen[1] - before).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out"])
def test_without_layernorms_the_constant_edit_is_not_a_removal(make_dt: Make, name: str) -> None:
    model = make_dt(normalization="none")
    seen = []
    for value in ("constant", "zero"):
        with SingularEdit(model, name, value=value) as edit:  # type: ignore[arg-type]
            seen.append(outputs(model))
        assert edit.note == ""
    assert (seen[0] - seen[1]).abs().max() > 1e-5


def test_a_part_of_a_block_is_noted(make_dt: Make) -> None:
    model = make_dt()
    model.weights["blocks.0.mlp.W_out"].zero_()[:4, :4] = torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0]))
    assert (
        "Directions 1 to 2 cannot be distinguished" in SingularEdit(model, "blocks.0.mlp.W_out", 1, value="zero").note
    )
    assert SingularEdit(model, "blocks.0.mlp.W_out", [1, 2], value="zero").note == ""
    assert SingularEdit(model, "blocks.0.mlp.W_out", 3, value="zero").note == ""


def test_what_rounding_alters_is_noted(make_dt: Make) -> None:
    model = make_dt(dtype=torch.bfloat16)
    name = "blocks.0.mlp.W_in"
    assert "Rounding" not in SingularEdit(model, name, 0, value="flip").note
    faint = SingularEdit(model, name, 0, value=1.005)
    assert "Rounding to the weights' precision alters the change by" in faint.note
    before = model.weights[name].double()
    with faint:
        made = model.weights[name].double() - before
    wanted_change = faint.delta[0] @ faint.delta[1]
    lost = float((made - wanted_change).norm() / wanted_change.norm())
    assert f"by {100 * lost:.0f} % of its size, in the weights and in passes through the model; an agent" in faint.note


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "side"), PLACES)
def test_energy_is_what_is_measured(make_dt: Make, name: str, side: str, dtype: torch.dtype) -> None:
    model = make_dt(dtype=dtype)
    edit = SingularEdit(model, name, [0, 1], side=side, value="flip")  # type: ignore[arg-type]
    for change in (edit, edit.control(0)):
        before = dense(model, name, fold=False)
        with change:
            moved = dense(model, name, fold=False) - before
        eps = float(torch.finfo(dtype).eps)
        rounding = eps * float(before.norm() + change.energy)
        assert float(moved.norm()) == pytest.approx(change.energy, abs=3 * rounding)
        torch.testing.assert_close(moved, change.delta[0] @ change.delta[1], rtol=0, atol=10 * rounding)


@pytest.mark.parametrize(("name", "side"), PLACES)
def test_a_control_is_of_the_same_energy_and_rank_at_the_same_place(make_dt: Make, name: str, side: str) -> None:
    model = make_dt(dtype=torch.float64)
    edit = SingularEdit(model, name, [0, 2], side=side, value="constant")  # type: ignore[arg-type]
    control = edit.control(5)
    assert control.energy == pytest.approx(edit.energy, rel=1e-9)
    spectra = [torch.linalg.svdvals(left @ right)[:3] for left, right in (edit.delta, control.delta)]
    torch.testing.assert_close(*spectra, rtol=0, atol=1e-9 * edit.energy)
    cosine = float((edit.delta[0] @ edit.delta[1]).flatten() @ (control.delta[0] @ control.delta[1]).flatten())
    assert abs(cosine) < 0.8 * edit.energy**2
    # The same place: the same weight changes, in the same head, and nothing else does.
    before = {n: w.clone() for n, w in model.weights.items()}
    touched = []
    for change in (edit, control):
        with change:
            touched.append({n: (w != before[n]) for n, w in model.weights.items() if not torch.equal(w, before[n])})
    assert list(touched[0]) == list(touched[1])
    (weight,) = touched[0]
    if before[weight].ndim == 3:
        assert torch.equal(*(t[weight].flatten(1).any(1) for t in touched))
    # A function of edit and seed.
    again = SingularEdit(model, name, [0, 2], side=side, value="constant").control(5)  # type: ignore[arg-type]
    assert torch.equal(again.delta[0], control.delta[0])
    assert not torch.allclose(edit.control(6).delta[0], control.delta[0])
    assert control.control(6).delta[0].equal(edit.control(6).delta[0])
    first, second = (SingularEdit(model, name, sv, side=side).control(5) for sv in (0, 1))  # type: ignore[arg-type]
    assert not torch.allclose(first.delta[0] / first.energy, second.delta[0] / second.energy)


def test_overlapping_edits_are_refused(make_dt: Make) -> None:
    model = make_dt()
    with SingularEdit(model, W_IN, [0, 1]):
        with pytest.raises(DtLensError, match=r"Direction 1 of blocks.0.mlp.W_in is already being edited"):
            SingularEdit(model, W_IN, [1, 2], value="flip").apply()
        with SingularEdit(model, W_IN, 2), SingularEdit(model, "blocks.1.mlp.W_in", 0):
            pass
        with SingularEdit(model, W_IN, [1, 2], value="flip").control():
            pass
        with SingularEdit(model, W_IN, 1, fold_layernorm=False):  # another direction, of the raw matrix
            pass
    with SingularEdit(model, "blocks.0.attn.OV.0", 0, side="read"):
        with pytest.raises(DtLensError, match="Direction 0"):
            SingularEdit(model, "blocks.0.attn.OV.0", 0, side="write").apply()
        # Two sides of two directions are two factors' changes, and their product adds nothing.
        before = dense(model, "blocks.0.attn.OV.0", fold=False)
        with SingularEdit(model, "blocks.0.attn.OV.0", 1, side="write") as other:
            moved = dense(model, "blocks.0.attn.OV.0", fold=False) - before
        torch.testing.assert_close(moved, other.delta[0] @ other.delta[1], rtol=0, atol=1e-5)


def test_a_study_of_one_matrix_decomposes_it_once(make_dt: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = make_dt(), []
    original = singular.decompose_matrix

    def counted(factors: Any, rank: Any) -> Any:
        made.append(factors.matrix.name)
        return original(factors, rank)

    monkeypatch.setattr(singular, "decompose_matrix", counted)
    for sv in range(5):
        with SingularEdit(model, W_IN, sv) as edit, edit.control():
            pass
    assert made == [W_IN]
    model.weights[W_IN].mul_(2)
    SingularEdit(model, W_IN, 0)
    assert len(made) == 2


def test_a_snapshot_has_the_models_matrices(make_dt: Make) -> None:
    """A snapshot gives the same matrices as the model."""
    model = make_dt()
    snapshot = Snapshot.of(model)
    for name in ("blocks.0.attn.OV.1", W_IN):
        torch.testing.assert_close(dense(snapshot, name, True), dense(model, name, True), rtol=0, atol=0)
