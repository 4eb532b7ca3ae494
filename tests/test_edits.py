"""What an edit does to the matrix, against float64 references; its energy, its control, its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.edits import load_edit
from dt_lens.matrices import Snapshot, find_matrix

Make = Callable[..., Any]
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


def test_scan_and_edit_count_alike(make_dt: Make) -> None:
    model = make_dt(dtype=torch.float64)
    svd = WeightSVD(model)
    before = svd["blocks.0.attn.OV.0"]
    for sv in (0, 3, 7):
        with SingularEdit(model, "blocks.0.attn.OV.0", sv, side="write", value=100.0):
            after = svd["blocks.0.attn.OV.0"]
            assert float(after.sigma[0]) == pytest.approx(100 * float(before.sigma[sv]))
            assert abs(float(after.left[0] @ before.left[sv])) == pytest.approx(1)


def test_inside_another_edit_directions_count_as_without(make_dt: Make) -> None:
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
def test_without_layernorms_the_constant_edit_is_no_removal(make_dt: Make, name: str) -> None:
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
    assert "Directions 1 to 2 cannot be told apart" in SingularEdit(model, "blocks.0.mlp.W_out", 1, value="zero").note
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
    assert f"by {lost:.0%} of its size" in faint.note


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
    # The same place: the same weight changes, within the same head, and nothing else.
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


def test_records_go_there_and_back(make_dt: Make) -> None:
    model = make_dt()
    vector = torch.randn(16)
    edits = [
        SingularEdit(model, "blocks.0.mlp.W_in", 3),
        SingularEdit(model, "blocks.0.attn.OV.1", [2, 0], side="write", value="random", seed=9),
        SingularEdit(model, "blocks.0.attn.W_Q", slice(2), head=1, value=-0.25, fold_layernorm=False),
        SingularEdit(model, "blocks.1.mlp.W_out", 1, value=vector),
        SingularEdit(model, "blocks.1.mlp.W_out", 1, side="neuron", value=np.arange(24)),
    ]
    for edit in [*edits, *(edit.control(11) for edit in edits)]:
        record = json.loads(json.dumps(edit.to_dict()))
        for again in (SingularEdit.from_dict(model, record), load_edit(model, edit.to_dict())):
            assert type(again) is type(edit)
            for mine, theirs in zip(edit.delta, again.delta, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
            assert again.to_dict() == edit.to_dict()
            assert repr(again) == repr(edit)
    # On another model it is the same question, not the same change.
    elsewhere = SingularEdit.from_dict(make_dt(1), edits[0].to_dict())
    assert elsewhere.to_dict() == edits[0].to_dict()
    assert elsewhere.energy != pytest.approx(edits[0].energy)


@pytest.mark.parametrize(
    "record",
    [
        {}, [], None, {"kind": "singular"}, {"kind": "singular", "matrix": "blocks.0.mlp.W_in", "sv": [0]},
        {"kind": "control", "seed": 0, "of": {}}, {"kind": "control", "seed": 0, "of": None}, {"kind": "patch"},
    ],
)  # fmt: skip
def test_what_is_no_record(make_dt: Make, record: Any) -> None:
    with pytest.raises(DtLensError, match=r"no record of an edit|Unknown kind of edit"):
        load_edit(make_dt(), record)


W_IN = "blocks.0.mlp.W_in"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": "blocks.0.mlp.W_inn"}, "Did you mean 'blocks.0.mlp.W_in'"),
        ({"matrix": "blocks.0.attn.OV", "head": 5, "side": "read"}, "no head 5"),
        ({"matrix": "blocks.0.attn.OV.0"}, "say side='read' or side='write'"),
        ({"matrix": "blocks.0.attn.QK.0", "side": "read"}, "'query' and 'key'"),
        ({"side": "write"}, "no side 'write'; it has 'read' and 'neuron'"),
        ({"sv": 15}, r"sv=15 is out of range: blocks.0.mlp.W_in has 15 directions, 0 to 14"),
        ({"sv": -16}, "sv=-16 is out of range"),
        ({"sv": [0, 40]}, "sv=40 is out of range"),
        ({"sv": [1, 1]}, "names a direction twice"),
        ({"sv": [1, -14]}, "names a direction twice"),
        ({"sv": []}, "chooses no direction"),
        ({"sv": slice(20, 30)}, "chooses no direction"),
        ({"sv": "0"}, "must be an index, a list of indices or a slice"),
        ({"sv": 0.5}, "must be an index"),
        ({"sv": [0, 1.0]}, "must be an index"),
        ({"sv": True}, "must be an index"),
        ({"sv": None}, "must be an index"),
        ({"sv": [[0], [1, 2]]}, "must be an index"),
        ({"sv": np.zeros((2, 2), int)}, "must be an index"),
        ({"sv": slice("a", None)}, "must be an index"),
        ({"sv": slice(None, None, 0)}, "must be an index"),
        ({"matrix": None}, "named by text, such as 'blocks.0.mlp.W_in', not None"),
        ({"matrix": 5}, "named by text"),
        ({"matrix": [W_IN]}, "named by text"),
        ({"decomposition": "x"}, "decomposition is a str; it must be what WeightSVD gives"),
        ({"activations": "x"}, "activations is a str; it must be what collect_activations gives"),
        ({"value": "random", "seed": 2**70}, "seed is 1180591620717411303424; it must be a whole number of at least"),
        ({"value": ("action_out", 0, 10**400)}, "it must be a number of degrees"),
        ({"value": "constan"}, "Did you mean 'constant'"),
        ({"value": "nonsense"}, "must be one of constant, zero, flip, random, a number, or a vector of 16 numbers"),
        ({"value": float("nan")}, "NaN"),
        ({"value": float("inf")}, "infinite"),
        ({"value": [0.0] * 15}, r"shape \[15\].*a vector of 16 real numbers"),
        ({"value": torch.zeros(1, 16)}, r"shape \[1, 16\]"),
        ({"value": [float("nan")] + [0.0] * 15}, "NaN"),
        ({"value": None}, "NoneType"),
        ({"value": True}, "bool"),
        ({"value": 1j}, "complex"),
        ({"value": {"a": 1}}, r"value is .*with an embedding it must be .*replace"),
        ({"value": "random", "seed": 0.5}, "seed is 0.5"),
    ],
)
def test_what_is_no_edit(make_dt: Make, arguments: dict[str, Any], message: str) -> None:
    model = make_dt()
    with pytest.raises(DtLensError, match=message):
        SingularEdit(model, **{"matrix": W_IN, **arguments})


def test_more_of_what_is_no_edit(make_dt: Make) -> None:
    model = make_dt()
    with pytest.raises(DtLensError, match="takes a wrapped model, not a Linear"):
        SingularEdit(torch.nn.Linear(2, 2), W_IN)  # type: ignore[arg-type]
    with pytest.raises(DtLensError, match="seed is 'a'"):
        SingularEdit(model, W_IN).control("a")  # type: ignore[arg-type]
    for wrong in (None, "x"):
        with pytest.raises(DtLensError, match="it must be what collect_activations gives"):
            SingularEdit(model, W_IN).output_energy(wrong)  # type: ignore[arg-type]
    with pytest.raises(DtLensError, match="activations is a str"):
        SingularEdit(model, W_IN).control(0, "x")  # type: ignore[arg-type]
    model.weights[W_IN].zero_()
    with pytest.raises(DtLensError, match=r"blocks.0.mlp.W_in is zero"):
        SingularEdit(model, W_IN)
    model.weights["blocks.1.mlp.W_in"][0, 0] = float("nan")
    with pytest.raises(DtLensError, match=r"blocks.1.mlp.W_in: A matrix holds NaN"):
        SingularEdit(model, "blocks.1.mlp.W_in")


def test_a_layernorm_scale_of_zero(make_dt: Make) -> None:
    model = make_dt()
    model.weights["blocks.0.ln2.w"][3] = 0.0
    model.weights["blocks.0.ln1.w"][3] = 0.0
    for name, side in ((W_IN, "read"), (W_IN, "neuron"), ("blocks.0.attn.OV.0", "read")):
        with pytest.raises(DtLensError, match=r"scale 0 at coordinate 3.*use fold_layernorm=False"):
            SingularEdit(model, name, side=side)  # type: ignore[arg-type]
        with SingularEdit(model, name, side=side, fold_layernorm=False):  # type: ignore[arg-type]
            pass
    # What an OV circuit writes is edited in W_O, which no LayerNorm stands before.
    with SingularEdit(model, "blocks.0.attn.OV.0", side="write"):
        pass


def test_a_decomposition_handed_over_is_that_of_the_matrix(make_dt: Make) -> None:
    model = make_dt()
    svd, raw = WeightSVD(model), WeightSVD(model, fold_layernorm=False)
    given = SingularEdit(model, W_IN, 2, decomposition=svd[W_IN])
    torch.testing.assert_close(given.delta, SingularEdit(model, W_IN, 2).delta)
    for wrong in (svd["blocks.1.mlp.W_in"], raw[W_IN]):
        with pytest.raises(DtLensError, match="the edit is of blocks"):
            SingularEdit(model, W_IN, 2, decomposition=wrong)
    with pytest.raises(DtLensError, match="that of other weights"):
        SingularEdit(model, W_IN, 2, decomposition=WeightSVD(make_dt(1))[W_IN])
    qk = svd["blocks.0.attn.QK.1"]
    assert SingularEdit(model, "blocks.0.attn.QK.1", side="key", decomposition=qk).sv == [0]


def test_a_decomposition_fits_as_well_as_it_was_computed(make_dt: Make) -> None:
    """Of a large matrix in low precision directions are known to six digits: still its own, and no other's."""
    model = make_dt()
    found = WeightSVD(model)[W_IN]

    def moved(by: float) -> Any:
        return replace(found, right=found.right + by * torch.eye(*found.right.shape))

    rough = replace(moved(1e-6), error=4e-6)
    given = SingularEdit(model, W_IN, [0, 2], value="zero", decomposition=rough)
    for mine, own in zip(given.delta, SingularEdit(model, W_IN, [0, 2], value="zero").delta, strict=True):
        torch.testing.assert_close(mine, own, rtol=0, atol=1e-5)
    with pytest.raises(DtLensError, match="that of other weights"):
        SingularEdit(model, W_IN, 0, decomposition=moved(1e-6))
    model.weights[W_IN][3, 5] += 1e-3
    with pytest.raises(DtLensError, match="that of other weights"):
        SingularEdit(model, W_IN, 0, decomposition=rough)


def test_overlapping_edits_are_refused(make_dt: Make) -> None:
    model = make_dt()
    with SingularEdit(model, W_IN, [0, 1]):
        with pytest.raises(DtLensError, match=r"Direction 1 of blocks.0.mlp.W_in is being edited already"):
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
    import dt_lens.edits

    original = dt_lens.edits.decompose_matrix

    def counted(*args: Any) -> Any:
        made.append(args[1].name)
        return original(*args)

    monkeypatch.setattr(dt_lens.edits, "decompose_matrix", counted)
    for sv in range(5):
        with SingularEdit(model, W_IN, sv) as edit, edit.control():
            pass
    assert made == [W_IN]
    model.weights[W_IN].mul_(2)
    SingularEdit(model, W_IN, 0)
    assert len(made) == 2


def test_edits_need_weights_and_structure_only_to_be_made(make_dt: Make) -> None:
    """Snapshot and model give the same matrices: an edit does not depend on how the weights are asked for."""
    model = make_dt()
    snapshot = Snapshot.of(model)
    for name in ("blocks.0.attn.OV.1", W_IN):
        torch.testing.assert_close(dense(snapshot, name, True), dense(model, name, True), rtol=0, atol=0)
