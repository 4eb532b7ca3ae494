"""Comparing two models: planted changes are measured exactly, and what did not change is not reported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dt_lens
from dt_lens import DtLensError, Embedding, SingularEdit
from dt_lens.lens.forward_mode import one_thread
from dt_lens.lens.matrices import MatrixFactors, find_matrix
from dt_lens.svd.decomposition import decompose_matrix
from dt_lens.svd.two_models import comparison, matrix_change
from dt_lens.svd.two_models.label_changes import label_changes

Make = Callable[..., Any]
BARE = {"normalization": "none", "embed_ln": False, "final_ln": False}
SIZES = ["relative_change", "change_stable_rank", "change_effective_rank", "change_leading_share"]
SHIFTS = ["spectrum_change", "spectrum_change_max", "spectral_norm_change"]
ANGLES = ["left_angle", "left_angle_max", "right_angle", "right_angle_max"]


def plant(model: Any, name: str, left: torch.Tensor, right: torch.Tensor, relative: float) -> None:
    """Add a rank-one change of this size, relative to the matrix, to one that is a weight."""
    (factor,) = find_matrix(model, name).factors
    weight = model.weights[factor.weight]
    size = relative * float(factor.view(model.weights).double().norm())
    change = size * torch.outer(left / left.norm(), right / right.norm())
    weight.add_(factor.scatter(change.to(weight.dtype), model.weights))


def row(comparison: Any, name: str) -> pd.Series:
    return comparison.table.set_index("matrix").loc[name]


@pytest.mark.parametrize("fold", [True, False])
def test_numbers_are_those_of_the_dense_matrices(make_dt: Make, fold: bool) -> None:
    a, b = make_dt(0), make_dt(1)
    found = dt_lens.compare(a, b, k=3, fold_layernorm=fold)
    assert len(found.table) == len(dt_lens.WeightSVD(a).scan()["matrix"].unique()) == 20
    for record in found.table.to_dict("records"):
        matrix = find_matrix(a, record["matrix"])
        A, B = (matrix.dense(m, fold).detach().numpy() for m in (a, b))
        (ua, sa, va), (ub, sb, vb) = (np.linalg.svd(M, full_matrices=False) for M in (A, B))
        s = np.linalg.svd(B - A, compute_uv=False)
        s = s[s > 1e-12]
        share = s / s.sum()
        close = pytest.approx
        assert record["relative_change"] == close(np.linalg.norm(B - A) / np.linalg.norm(A))
        assert record["change_stable_rank"] == close((s**2).sum() / s[0] ** 2)
        assert record["change_effective_rank"] == close(np.exp(-(share * np.log(share)).sum()))
        assert record["change_leading_share"] == close(s[0] ** 2 / (s**2).sum())
        assert record["spectrum_change"] == close(np.linalg.norm(sb - sa) / np.linalg.norm(sa))
        assert record["spectrum_change_max"] == close(np.abs(sb - sa).max() / sa[0])
        assert record["spectral_norm_change"] == close(sb[0] / sa[0] - 1)
        for side, one, two in (("left", ua[:, :3], ub[:, :3]), ("right", va[:3].T, vb[:3].T)):
            cosines = np.linalg.svd(one.T @ two, compute_uv=False).clip(0, 1)
            assert record[f"{side}_overlap"] == close((cosines**2).mean())
            assert record[f"{side}_angle_max"] == close(np.degrees(np.arccos(cosines.min())))
            assert record[f"{side}_angle"] == close(np.degrees(np.arccos(cosines)).mean())
            centred = fold and matrix.norm(side) is not None  # type: ignore[arg-type]
            assert record[f"{side}_haar_overlap"] == 3 / (one.shape[0] - centred)
        assert (record["left_side"], record["right_side"]) == (matrix.left, matrix.right)


def test_a_model_and_itself(make_dt: Make) -> None:
    model = make_dt()
    for other in (model, copy.deepcopy(model)):
        found = dt_lens.compare(model, other)
        assert (found.table[[*SIZES, *SHIFTS, *ANGLES]] == 0).all(axis=None)
        assert (found.table[["left_overlap", "right_overlap"]] == 1).all(axis=None)
        directions = found.directions("blocks.0.mlp.W_in")
        assert directions["matched"].all() and (directions["sv_a"] == directions["sv_b"]).all()
        assert (directions["sign"] == 1).all() and directions["overlap"].min() > 1 - 1e-9
        assert found.labels("blocks.0.mlp.W_in", "state_in")["change"].abs().max() < 1e-12
        assert found.labels("blocks.0.mlp.W_in", "state_in", by="change").empty
        assert len(found.change("blocks.0.attn.OV.0").sigma) == 0
        assert "same" not in repr(found) and "0 of 20 matrices changed" in repr(found)


@pytest.mark.parametrize("relative", [1e-3, 0.5])
def test_a_planted_change_is_measured_and_named(make_dt: Make, relative: float) -> None:
    a = make_dt(dtype=torch.float64, d_model=32, **BARE)
    b = copy.deepcopy(a)
    label = a.embeddings["action_out"].directions[1]
    plant(b, "blocks.1.mlp.W_out", torch.randn(24, dtype=torch.float64), label.double(), relative)
    found = dt_lens.compare(a, b)
    planted = row(found, "blocks.1.mlp.W_out")
    assert planted["relative_change"] == pytest.approx(relative, rel=1e-9)
    for column in SIZES[1:]:
        assert planted[column] == pytest.approx(1.0, abs=1e-6), column
    others = found.table[found.table["matrix"] != "blocks.1.mlp.W_out"]
    assert (others[[*SIZES, *SHIFTS, *ANGLES]] == 0).all(axis=None)
    named = found.labels("blocks.1.mlp.W_out", "action_out", by="change").iloc[0]
    assert (named["label"], named["sv"]) == ("action 1", 0)
    assert abs(named["a"]) == pytest.approx(1.0, abs=1e-9) and named["label_cosine"] == pytest.approx(1.0)
    assert found.most_changed(1)["matrix"].item() == "blocks.1.mlp.W_out"
    if relative == 0.5:  # large enough to lead
        moved = found.labels("blocks.1.mlp.W_out", "action_out", k=1)
        assert moved.iloc[0]["label"] == "action 1"
        assert moved.iloc[0]["b"] > 0.5 > moved.iloc[0]["a"]
        assert moved["change"].abs().is_monotonic_decreasing


def test_a_tiny_change_of_a_circuit_keeps_its_digits(make_dt: Make) -> None:
    """``B - A`` of the products, computed from the factors' differences: nothing cancels."""
    a = make_dt(dtype=torch.float64, **BARE)
    b = copy.deepcopy(a)
    direction = torch.randn(2, 8, 16, dtype=torch.float64) * 1e-12
    b.weights["blocks.0.attn.W_O"].add_(direction)
    found = row(dt_lens.compare(a, b), "blocks.0.attn.OV.1")
    stored = b.weights["blocks.0.attn.W_O"][1] - a.weights["blocks.0.attn.W_O"][1]
    W_V = a.weights["blocks.0.attn.W_V"][1]
    exact = float((W_V @ stored).norm() / (W_V @ a.weights["blocks.0.attn.W_O"][1]).norm())
    assert found["relative_change"] == pytest.approx(exact, rel=1e-6)
    assert found["change_effective_rank"] > 3


@pytest.mark.parametrize("name", ["blocks.0.mlp.W_in", "blocks.1.mlp.W_out"])
def test_directions_that_rounding_makes_are_left_out(make_dt: Make, name: str) -> None:
    a = make_dt()
    b = copy.deepcopy(a)
    left, right = find_matrix(a, name).dense(a).shape
    plant(b, name, torch.randn(left), torch.randn(right), 0.01)
    assert len(dt_lens.compare(a, b).change(name).sigma) == 1
    plant(b, name, torch.randn(left), torch.randn(right), 0.0001)
    assert len(dt_lens.compare(a, b).change(name).sigma) == 2


def test_another_basis_inside_a_head_does_not_change_its_circuits(make_dt: Make) -> None:
    a = make_dt(dtype=torch.float64)
    b = copy.deepcopy(a)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    b.weights["blocks.0.attn.W_V"][0] = a.weights["blocks.0.attn.W_V"][0] @ turn
    b.weights["blocks.0.attn.W_O"][0] = turn.T @ a.weights["blocks.0.attn.W_O"][0]
    found = dt_lens.compare(a, b)
    assert row(found, "blocks.0.attn.W_V")["relative_change"] > 0.1
    assert row(found, "blocks.0.attn.OV.0")["relative_change"] < 1e-13
    assert row(found, "blocks.0.attn.OV.0")["left_angle_max"] < 1e-6


def test_large_matrices_give_the_same_numbers(make_dt: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The routes for large matrices: leading directions only, spectra through the Gram matrix."""
    a, b = make_dt(0), make_dt(1)
    whole = dt_lens.compare(a, b, k=2).table
    monkeypatch.setattr(matrix_change, "LARGE", 8)
    monkeypatch.setattr(matrix_change, "GRAM", 4)
    monkeypatch.setattr(matrix_change, "SPARE", 2)
    cut = dt_lens.compare(a, b, k=2)
    pd.testing.assert_frame_equal(cut.table, whole, rtol=1e-6)
    assert len(cut.directions("blocks.0.mlp.W_in", rank=3)) >= 3


def test_rows_do_not_depend_on_what_is_measured_beside_them(make_dt: Make) -> None:
    a, b = make_dt(0), make_dt(1)
    threads = torch.get_num_threads()
    tables = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            tables.append(dt_lens.compare(a, b, k=2).table)
    finally:
        torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.parametrize("changed", ["W_V", "W_O"])
def test_a_circuit_of_which_one_factor_changed(make_dt: Make, changed: str) -> None:
    a = make_dt(dtype=torch.float64, d_model=32, **BARE)
    b = copy.deepcopy(a)
    b.weights[f"blocks.0.attn.{changed}"].mul_(1 + 1e-3 * torch.randn(b.weights[f"blocks.0.attn.{changed}"].shape))
    found = dt_lens.compare(a, b)
    for name in ("blocks.0.attn.OV.0", "blocks.0.attn.OV.1"):
        A, B = (find_matrix(m, name).dense(m) for m in (a, b))
        exact = torch.linalg.svdvals(B - A)[: len(found.spectra[name][2])]
        np.testing.assert_allclose(found.spectra[name][2], exact.numpy(), rtol=1e-9, atol=1e-12 * float(exact[0]))
        assert len(exact) == a.weights["blocks.0.attn.W_V"].shape[-1]


def test_directions_that_swapped_places_are_found(make_dt: Make) -> None:
    """Other sigmas for the same directions: matched by what they are, not by where they stand."""
    a = make_dt(dtype=torch.float64, **BARE)
    b = copy.deepcopy(a)
    weight = b.weights["blocks.0.mlp.W_in"]
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    s[0], s[3] = float(s[3]) * 0.99, float(s[0])
    v[5] = -v[5]  # does the opposite
    weight.copy_((u * s) @ v)
    found = dt_lens.compare(a, b).directions("blocks.0.mlp.W_in")
    matched = found.set_index("sv_a")["sv_b"]
    assert matched[0] == 3 and matched[3] == 0 and matched[1] == 1
    assert found["matched"].all() and found["overlap"].min() > 0.999
    assert found.set_index("sv_a")["sign"].tolist() == [1] * 5 + [-1] + [1] * 10
    assert found.set_index("sv_a").loc[0, "sigma_change"] == pytest.approx(float(s[0] / s[3]) - 1)
    assert found[["read_angle", "neuron_angle"]].max(axis=None) < 1e-4


def test_unmatched_directions_are_listed(make_dt: Make) -> None:
    found = dt_lens.compare(make_dt(0, d_model=32), make_dt(5, d_model=32)).directions("blocks.0.attn.OV.0", least=0.7)
    lost = found[~found["matched"]]
    assert len(lost) and lost["overlap"].isna().all()
    assert (lost["sv_a"].isna() != lost["sv_b"].isna()).all()
    assert found["sv_a"].notna().sum() == found["sv_b"].notna().sum() == 16
    assert found[found["matched"]]["overlap"].min() >= 0.7 if found["matched"].any() else True


def test_labels_by_direction_have_the_sign_of_their_partner(make_dt: Make) -> None:
    a = make_dt(dtype=torch.float64, **BARE)
    b = copy.deepcopy(a)
    plant(b, "blocks.0.mlp.W_in", torch.randn(16).double(), torch.randn(24).double(), 0.05)
    found = dt_lens.compare(a, b, k=4)
    table = found.labels("blocks.0.mlp.W_in", "state_in", by="directions", n=None)
    assert len(table) == 4 * 5
    svds = [dt_lens.WeightSVD(m) for m in (a, b)]
    cosines = [svd.cosines("blocks.0.mlp.W_in", "state_in") for svd in svds]
    for record in table.to_dict("records"):
        assert record["a"] == pytest.approx(cosines[0].loc[record["sv_a"], record["label"]])
        assert abs(record["b"]) == pytest.approx(abs(cosines[1].loc[record["sv_b"], record["label"]]))
        assert abs(record["change"]) < 0.5 and record["change"] == pytest.approx(record["b"] - record["a"])
    assert table["change"].abs().is_monotonic_decreasing


def test_a_direction_written_the_other_way_round_moved_no_label(make_dt: Make) -> None:
    """The sign of a direction is a convention, which a small change can turn over."""
    model = make_dt()
    found = decompose_matrix(MatrixFactors.of(model, find_matrix(model, "blocks.0.mlp.W_in")))
    turned = replace(found, left=-found.left, right=-found.right)
    options: dict[str, Any] = {"k": 3, "n": None, "folded": True, "owner": "own"}
    for by in ("directions", "subspace"):
        moved = label_changes((model, model), (found, turned), "state_in", None, by=by, **options)
        assert moved["change"].abs().max() < 1e-12 and moved["a"].abs().max() > 0.1


def test_each_model_has_its_own_labels_by_default(make_dt: Make) -> None:
    a = make_dt(dtype=torch.float64, **BARE)
    b = copy.deepcopy(a)
    b.weights["embed.state.W"].copy_(torch.randn(5, 16, dtype=torch.float64))
    found = dt_lens.compare(a, b, "*.W_in")
    own = found.labels("blocks.0.mlp.W_in", "state_in", k=3)
    assert own["change"].abs().max() > 0.01 and own["label_cosine"].abs().max() < 0.95
    assert own.attrs["embeddings"] == "each model's own"
    same = found.labels("blocks.0.mlp.W_in", "state_in", k=3, embeddings="a")
    assert same["change"].abs().max() < 1e-12 and same["label_cosine"].min() == pytest.approx(1)
    assert same.attrs["embeddings"] == "the first model's for both"


def test_labels_are_paired_by_name_where_the_sets_differ(make_dt: Make) -> None:
    a = make_dt(dtype=torch.float64, **BARE)
    b = copy.deepcopy(a)
    rows = torch.randn(4, 16, dtype=torch.float64)
    a.embeddings["mine"] = Embedding(rows, ["w", "x", "y", "z"])
    for labels, order in ((["z", "x", "q"], [3, 1, 0]), (["w", "x", "y", "z", "new"], [0, 1, 2, 3, 0])):
        b.embeddings["mine"] = Embedding(rows[order], labels)
        moved = dt_lens.compare(a, b, "*.W_in").labels("blocks.0.mlp.W_in", "mine", n=None)
        assert set(moved["label"]) == set(labels) & {"w", "x", "y", "z"}
        assert moved["change"].abs().max() < 1e-12 and moved["label_cosine"].min() == pytest.approx(1)
    b.embeddings["mine"] = Embedding(rows, ["1", "2", "3", "4"])
    with pytest.raises(DtLensError, match="no label of mine in common"):
        dt_lens.compare(a, b, "*.W_in").labels("blocks.0.mlp.W_in", "mine")


def test_weights_alone_are_enough(make_dt: Make) -> None:
    a, b = make_dt(0), make_dt(1)
    bare = [SimpleNamespace(weights=m.weights, structure=m.structure) for m in (a, b)]
    found = dt_lens.compare(*bare)
    pd.testing.assert_frame_equal(found.table, dt_lens.compare(a, b).table)
    assert len(found.directions("blocks.0.mlp.W_in"))
    assert found._repr_html_()


def test_other_precisions_are_noted(make_dt: Make) -> None:
    a = make_dt()
    found = dt_lens.compare(a, copy.deepcopy(a).to(torch.bfloat16), "*.W_in", names=("full", "half"))
    assert "full is stored as float32 and half as bfloat16" in found.notes[0] and "2e-03" in found.notes[0]
    assert found.table["relative_change"].between(0.001, 0.004).all()


def test_progress_is_reported(make_dt: Make) -> None:
    reports: list[tuple[str, float]] = []
    dt_lens.compare(make_dt(), make_dt(1), "*.W_in", progress=lambda *state: reports.append(state))
    assert reports == [("comparing blocks.0.mlp.W_in", 0.0), ("comparing blocks.1.mlp.W_in", 0.5)]


def test_what_changed_since_is_noticed(make_dt: Make) -> None:
    a, b = make_dt(0), make_dt(1)
    found = dt_lens.compare(a, b, ["*.W_in"])
    with SingularEdit(b, "blocks.0.mlp.W_in", 0), pytest.raises(DtLensError, match="have changed since"):
        found.directions("blocks.0.mlp.W_in")
    assert len(found.directions("blocks.0.mlp.W_in"))
    with pytest.raises(DtLensError, match="was not compared"):
        found.labels("blocks.0.mlp.W_out", "action_out")


@pytest.mark.parametrize(
    ("other", "options", "needed"),
    [
        ({"d_mlp": 20}, {}, r"blocks.0.mlp.W_in is \[16, 24\] in the first model and \[16, 20\]"),
        ({"n_heads": 4}, {"matrices": "*.W_Q"}, r"blocks.0.attn.W_Q is \[2, 16, 8\] .* \[4, 16, 4\]"),
        ({"n_layers": 1}, {}, "second model has no matrix 'blocks.1"),
        ({"n_layers": 3}, {}, "first model has no matrix 'blocks.2"),
        ({"normalization": "none"}, {}, "fold_layernorm=False"),
        ({}, {"k": 0}, "k is 0"),
        ({}, {"matrices": "*.W_inn"}, "W_in"),
        ({}, {"matrices": []}, "matrices is empty"),
    ],
)
def test_mistakes_are_one_sentence(make_dt: Make, other: dict[str, Any], options: dict[str, Any], needed: str) -> None:
    with pytest.raises(DtLensError, match=needed) as caught:
        dt_lens.compare(make_dt(), make_dt(1, **other), **options)
    assert str(caught.value).count(". ") == 0 or "Did you mean" in str(caught.value)


def test_other_mistakes(make_dt: Make) -> None:
    a, b = make_dt(0), make_dt(1)
    with pytest.raises(DtLensError, match="compare takes a wrapped model, not a Linear"):
        dt_lens.compare(a, torch.nn.Linear(2, 2))
    evaluation = SimpleNamespace(outcomes=[1.0], compare=None)
    with pytest.raises(DtLensError, match=r"two evaluations are compared by edited\.compare\(unedited\)"):
        dt_lens.compare(evaluation, evaluation)
    b.weights["blocks.1.attn.W_O"][0, 0, 0] = float("nan")
    with pytest.raises(DtLensError, match=r"blocks.1.attn.W_O holds NaN"):
        dt_lens.compare(a, b)
    found = dt_lens.compare(a, b, "*.W_in")
    for options, needed in (
        ({"by": "x"}, "by is 'x'"),
        ({"side": "neuron"}, "residual stream"),
        ({"side": "x"}, "no side"),
    ):
        with pytest.raises(DtLensError, match=needed):
            found.labels("blocks.0.mlp.W_in", "state_in", **options)
    with pytest.raises(DtLensError, match="what is 'x'; it must be 'change', 'spectra' or 'angles'"):
        found.plot("x")


def test_a_norm_that_changed_shows_only_in_what_is_folded(make_dt: Make) -> None:
    a = make_dt()
    b = copy.deepcopy(a)
    b.weights["blocks.0.ln2.w"].mul_(torch.linspace(0.5, 1.5, 16))
    assert row(dt_lens.compare(a, b), "blocks.0.mlp.W_in")["relative_change"] > 0.1
    raw = dt_lens.compare(a, b, fold_layernorm=False).table
    assert (raw["relative_change"] == 0).all()


def test_matrices_that_did_not_change_are_not_decomposed(make_dt: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    a = make_dt()
    b = copy.deepcopy(a)
    b.weights["blocks.1.attn.W_V"][1].mul_(1.5)
    measured = []
    real = comparison.measure
    monkeypatch.setattr(comparison, "measure", lambda one, *rest: measured.append(one.matrix.name) or real(one, *rest))
    found = dt_lens.compare(a, b)
    assert measured == list(found.spectra) == ["blocks.1.attn.W_V", "blocks.1.attn.OV.1"]
    assert found.table["relative_change"].gt(0).sum() == 2
    # The same row as from the decompositions.
    matrix = find_matrix(a, "blocks.0.mlp.W_in")
    one, two = (MatrixFactors.of(model, matrix) for model in (a, b))
    for k in (1, 10):
        assert matrix_change.unchanged(one, k) == pytest.approx(real(one, two, k).row)
    # A zero of another sign is another bit, and no change.
    b = copy.deepcopy(a)
    a.weights["blocks.0.mlp.W_in"][0, 0], b.weights["blocks.0.mlp.W_in"][0, 0] = 0.0, -0.0
    assert dt_lens.compare(a, b).table["relative_change"].eq(0).all()
    for model in (a, b):
        model.weights["blocks.0.mlp.W_in"][0, 0] = float("nan")
    with pytest.raises(DtLensError, match=r"blocks.0.mlp.W_in holds NaN"):
        dt_lens.compare(a, b)


def test_finished_rows_are_kept_by_the_weights_of_both(
    make_dt: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make_dt(0), make_dt(1)
    straight = dt_lens.compare(a, b, k=3)
    measured = []
    real = comparison.measure
    monkeypatch.setattr(comparison, "measure", lambda one, *rest: measured.append(one.matrix.name) or real(one, *rest))

    def stop(what: str, share: float) -> None:
        if len(measured) == 7:
            raise KeyboardInterrupt

    # With more threads circuits are measured ahead of the row that is told of.
    with pytest.raises(KeyboardInterrupt), one_thread():
        dt_lens.compare(a, b, k=3, progress=stop, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 7
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-3])  # damaged: computed again
    found = dt_lens.compare(a, b, k=3, resume=tmp_path)
    assert len(measured) == 21
    pd.testing.assert_frame_equal(found.table, straight.table)
    for name, spectra in straight.spectra.items():
        for one, two in zip(spectra, found.spectra[name], strict=True):
            np.testing.assert_array_equal(one, two)
    dt_lens.compare(a, b, k=3, resume=tmp_path)
    assert len(measured) == 21
    dt_lens.compare(a, b, k=2, matrices="*.W_in", resume=tmp_path)  # another question
    dt_lens.compare(b, a, k=3, matrices="*.W_in", resume=tmp_path)
    dt_lens.compare(a, b, k=3, matrices="*.W_in", fold_layernorm=False, resume=tmp_path)
    assert len(measured) == 27
    b.weights["blocks.1.mlp.W_in"][0, 0] += 1
    changed = dt_lens.compare(a, b, k=3, matrices="*.W_in", resume=tmp_path)
    assert measured[27:] == ["blocks.1.mlp.W_in"]
    name = "blocks.1.mlp.W_in"
    assert row(changed, name)["relative_change"] != row(straight, name)["relative_change"]
