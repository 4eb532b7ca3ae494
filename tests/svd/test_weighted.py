"""Directions weighted by real inputs: the output's principal axes, the same in tables and in edits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dt_lens
from dt_lens import Activations, DtLensError, SingularEdit, WeightSVD, collect_activations
from dt_lens.edits.singular import load_edit
from dt_lens.lens.activations import Moments
from dt_lens.lens.matrices import catalogue, find_matrix

Make = Callable[..., Any]
W_IN = "blocks.0.mlp.W_in"
KINDS = ["pre", "post", "gpt2", "llama"]


def make_model(kind: str, make_dt: Make, make_lm: Make) -> Any:
    if kind in ("pre", "post"):
        return make_dt(dtype=torch.float64, normalization=kind)
    return dt_lens.wrap(make_lm(kind).double(), check=False)


def collected(model: Any, batches: int = 6) -> Activations:
    return collect_activations(model, batches=[model.probe(seed) for seed in range(batches)])


def planted(acts: Activations, name: str, covariance: Tensor, mean: Tensor | None = None) -> Activations:
    """The same activations, but for one matrix's inputs."""
    mean = torch.zeros(len(covariance)).double() if mean is None else mean
    moments = Moments(10**6, mean, covariance + torch.outer(mean, mean))
    return replace(acts, points={**acts.points, acts.reads[name]: moments})


@pytest.mark.parametrize("kind", KINDS)
def test_sigma_is_the_spread_of_the_output_and_the_terms_add_up(kind: str, make_dt: Make, make_lm: Make) -> None:
    model = make_model(kind, make_dt, make_lm)
    acts = collected(model)
    for fold in (True, False):
        svd = WeightSVD(model, fold_layernorm=fold, activations=acts)
        for name, matrix in catalogue(model).items():
            d, M = svd[name], matrix.dense(model, fold)
            C = acts.inputs[name].covariance
            raw = matrix.raw(model)[0]
            for factor in (matrix.folded(model) if fold else matrix.raw(model))[1:]:
                raw = raw @ factor
            k = len(d.sigma)
            torch.testing.assert_close(d.right @ d.right.T, torch.eye(k).double(), rtol=0, atol=1e-9)
            outputs = d.right @ raw.T @ C @ raw @ d.right.T
            torch.testing.assert_close(
                outputs, torch.diag(d.sigma.square()), rtol=0, atol=1e-9 * float(d.sigma[0]) ** 2
            )
            assert d.gain is not None
            torch.testing.assert_close(M @ d.right.T, d.left.T * d.gain, rtol=0, atol=1e-9)
            torch.testing.assert_close(d.left.norm(dim=1), torch.ones(k).double())
            # Nothing that moves is left out.
            left_over = raw - raw @ d.right.T @ d.right
            assert float(((left_over.T @ C) * left_over.T).sum()) < 1e-12 * float(d.sigma.square().sum())
            assert list(d.sigma) == sorted(d.sigma, reverse=True)
            facing = d.left if matrix.left in ("read", "query") else d.right
            assert bool((facing.gather(1, facing.abs().argmax(1, keepdim=True)) > 0).all())
            assert "weighted by the activations" in repr(d)


def test_folding_changes_neither_axes_nor_sigmas(make_dt: Make) -> None:
    model = make_dt(dtype=torch.float64)
    acts = collected(model)
    folded, raw = (WeightSVD(model, fold_layernorm=fold, activations=acts) for fold in (True, False))
    for name, matrix in catalogue(model).items():
        if matrix.kind == "QK":  # its keys' LayerNorm is on the output side
            continue
        a, b = folded[name], raw[name]
        torch.testing.assert_close(a.sigma, b.sigma)
        torch.testing.assert_close((a.right * b.right).sum(1).abs(), torch.ones(len(a.sigma)).double())
        if matrix.foldable:
            assert not torch.allclose(a.left.abs(), b.left.abs(), atol=1e-3)
            assert float(a.left.mean(1).abs().max()) < 1e-12


def test_planted_inputs_decide_what_is_first(make_dt: Make) -> None:
    """Large weights that inputs hardly move are last, small ones that they move are first."""
    model = make_dt(dtype=torch.float64)
    d, n = 16, 24
    generator = torch.Generator().manual_seed(3)
    U = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0][:, :d]
    weights, moves = torch.logspace(1, -1, d).double(), torch.logspace(-3, 0.5, d).double()
    model.weights[W_IN].copy_((U * weights) @ V.T)
    acts = planted(collected(model), W_IN, (U * moves.square()) @ U.T, mean=100 * U[:, 0])
    plain = WeightSVD(model, fold_layernorm=False)[W_IN]
    weighted = WeightSVD(model, fold_layernorm=False, activations=acts)[W_IN]
    expected, order = (weights * moves).sort(descending=True)
    assert order.tolist() == list(range(d))[::-1]
    torch.testing.assert_close(weighted.sigma, expected)
    for i in range(d):
        assert abs(float(plain.right[i] @ V[:, i])) == pytest.approx(1)
        assert abs(float(weighted.right[i] @ V[:, d - 1 - i])) == pytest.approx(1)
        assert abs(float(weighted.left[i] @ U[:, d - 1 - i])) == pytest.approx(1)
    torch.testing.assert_close(weighted.gain, weights.flip(0))


def test_what_is_read_need_not_be_orthogonal(make_dt: Make) -> None:
    """Correlated inputs: the axes of the output are orthogonal, and what is read for them is found by regression."""
    model = make_dt(dtype=torch.float64)
    acts = collected(model)
    d = WeightSVD(model, activations=acts)[W_IN]
    inner = d.left @ d.left.T
    assert float((inner - torch.eye(len(inner)).double()).abs().max()) > 0.1
    # M v is the one combination whose output is v's: x M v = (x M) v, whatever x.
    M, x = find_matrix(model, W_IN).dense(model), torch.randn(5, 16, dtype=torch.float64)
    assert d.gain is not None
    torch.testing.assert_close((x @ d.left.T) * d.gain, x @ M @ d.right.T)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("name", "side"),
    [(W_IN, "read"), (W_IN, "neuron"), ("blocks.1.mlp.W_out", "write"), ("blocks.0.attn.W_V.1", "head"),
     ("blocks.1.attn.OV.0", "read"), ("blocks.1.attn.OV.0", "write"), ("blocks.0.attn.QK.1", "query"),
     ("blocks.0.attn.QK.1", "key")],
)  # fmt: skip
def test_an_edit_counts_as_the_table_does_and_removes_the_term(make_dt: Make, name: str, side: Any, fold: bool) -> None:
    model = make_dt(dtype=torch.float64)
    acts = collected(model)
    d = WeightSVD(model, fold_layernorm=fold, activations=acts)[name]
    matrix = find_matrix(model, name)
    M, v = matrix.dense(model, fold).clone(), d.right
    for sv in (0, 3, [1, 2], -1):
        edit = SingularEdit(model, name, sv, side=side, value="zero", fold_layernorm=fold, activations=acts)
        some = v[edit.sv]
        assert edit.sigma == pytest.approx(d.sigma[edit.sv].tolist())
        assert len(edit.delta[0].T) == len(edit.sv)
        with edit:
            torch.testing.assert_close(matrix.dense(model, fold), M - M @ some.T @ some, rtol=0, atol=1e-10)
            assert WeightSVD(model, fold_layernorm=fold, activations=replace(acts, made_of={}))[name].sigma[0] > 0
        # The output's variance along the axis is gone, and with it as much as sigma says.
        before = matrix.dense(model, fold_layernorm=False).clone()
        with edit:
            after = matrix.dense(model, fold_layernorm=False).clone()
        C = acts.inputs[name].covariance
        if matrix.kind != "QK" or not fold:
            left = some @ after.T @ C @ after @ some.T
            assert float(left.abs().max()) < 1e-9 * float((some @ before.T @ C @ before @ some.T).diagonal().min())
            moved = after - before
            spread = float((moved.T @ C @ moved).diagonal().sum()) ** 0.5
            assert spread == pytest.approx(float(d.sigma[edit.sv].norm()), rel=1e-6)
        control = edit.control(1, acts)
        assert control.energy == pytest.approx(edit.energy)
        assert control.output_energy(acts) == pytest.approx(edit.output_energy(acts), rel=1e-6)
    for value, side_of in (("flip", None), (0.5, None), ("random", "left"), ("random", "right")):
        edit = SingularEdit(model, name, 1, side=side, value=value, fold_layernorm=fold, activations=acts)  # type: ignore[arg-type]
        with edit:
            edited = matrix.dense(model, fold).clone()
        if side_of is None:
            factor = -1.0 if value == "flip" else 0.5
            expected = M + (factor - 1) * torch.outer(M @ v[1], v[1])
            torch.testing.assert_close(edited, expected, rtol=0, atol=1e-10)
        else:
            moved = edited - M
            assert torch.linalg.matrix_rank(moved, atol=1e-9) == 1


def test_inputs_of_few_dimensions_have_few_directions(make_dt: Make) -> None:
    model = make_dt(dtype=torch.float64)
    acts = collected(model)
    for rank in (3, 1):
        x = torch.randn(rank, 16, dtype=torch.float64)
        few = planted(acts, W_IN, x.T @ x)
        d = WeightSVD(model, activations=few)[W_IN]
        assert len(d.sigma) == rank
        # Folded they would be a LayerNorm's outputs, which lie in a hyperplane that these do not keep to.
        with SingularEdit(model, W_IN, slice(None), value="zero", activations=few, fold_layernorm=False):
            M = find_matrix(model, W_IN).dense(model, fold_layernorm=False)
            assert float((M.T @ x.T @ x @ M).abs().max()) < 1e-9
    nothing = planted(acts, W_IN, torch.zeros(16, 16).double())
    assert len(WeightSVD(model, activations=nothing)[W_IN].sigma) == 0
    with pytest.raises(DtLensError, match="has no singular direction to edit"):
        SingularEdit(model, W_IN, activations=nothing)


def test_what_rounding_leaves_of_an_output_that_never_moves_is_not_a_direction(make_dt: Make) -> None:
    """Behind a LayerNorm inputs lie in a hyperplane, up to the precision of the activations."""
    model = make_dt(d_mlp=16)
    acts = collected(model, 40)
    M = find_matrix(model, W_IN).dense(model, fold_layernorm=False)
    least = float(torch.linalg.eigvalsh(M.T @ acts.inputs[W_IN].covariance @ M)[0].clamp_min(0).sqrt())
    d = WeightSVD(model, activations=acts)[W_IN]
    assert len(d.sigma) == 15
    assert least < 1e-5 * float(d.sigma[-1])


def test_tables_carry_the_weighting(make_dt: Make, tmp_path: Path) -> None:
    model = make_dt()
    acts = collected(model)
    svd = WeightSVD(model, activations=acts, resume=tmp_path)
    table = svd.scan("*.W_in", "haar")
    assert table.attrs["weighted_by"] == acts.digest
    assert "weighted_by" not in WeightSVD(model).scan("*.W_in").attrs
    mine = table[table["matrix"] == W_IN].groupby("sv")["sigma"].first()
    assert mine.to_numpy() == pytest.approx(svd[W_IN].sigma[mine.index].numpy())
    again = WeightSVD(model, activations=acts, resume=tmp_path)[W_IN]
    assert again.activations == acts.digest
    assert again.gain is not None
    assert torch.equal(again.left, svd[W_IN].left)
    # What is cached for one weighting is not used for another.
    plain = WeightSVD(model, resume=tmp_path)[W_IN]
    assert (plain.activations, plain.gain) == ("", None)
    assert torch.equal(plain.strength, plain.sigma)
    best = svd.strongest("*.W_in")
    assert bool(best["p_value"].between(0, 1).all())
    assert svd.scan("*.W_in", "shuffled", draws=2).attrs["draws"] == 2
    with pytest.raises(DtLensError, match="must be a result of collect_activations"):
        WeightSVD(model, activations=torch.eye(16))  # type: ignore[arg-type]


def test_blocks_of_what_is_read_are_measured_by_their_span(make_dt: Make) -> None:
    model = make_dt(dtype=torch.float64)
    d = WeightSVD(model, activations=collected(model))[W_IN]
    joined = replace(d, blocks=((0, 3), *((i, i + 1) for i in range(3, len(d.sigma)))))
    rows = joined.spanning("read")
    torch.testing.assert_close(rows[:3] @ rows[:3].T, torch.eye(3).double())
    assert torch.equal(rows[3:], d.left[3:])
    assert torch.linalg.matrix_rank(torch.cat([rows[:3], d.left[:3]]), tol=1e-9) == 3
    assert torch.equal(joined.spanning("neuron"), d.right)


def test_records_and_what_does_not_fit(make_dt: Make) -> None:
    model = make_dt()
    acts, other = collected(model), collected(model, 2)
    edit = SingularEdit(model, W_IN, [0, 2], value="zero", activations=acts)
    for change in (edit, edit.control(3), edit.control(3, acts)):
        record = json.loads(json.dumps(change.to_dict()))
        again = load_edit(model, record, acts)
        assert torch.equal(again.delta[0], change.delta[0])
        assert (again.to_dict(), repr(again)) == (record, repr(change))
        for wrong, message in ((None, "none were given"), (other, f"these are {other.digest}")):
            with pytest.raises(DtLensError, match=message):
                load_edit(model, record, wrong)
    plain, weighted = WeightSVD(model)[W_IN], WeightSVD(model, activations=acts)[W_IN]
    given = SingularEdit(model, W_IN, [0, 2], value="zero", activations=acts, decomposition=weighted)
    torch.testing.assert_close(given.delta, edit.delta)
    with pytest.raises(DtLensError, match="is plain, and the edit was given the activations"):
        SingularEdit(model, W_IN, activations=acts, decomposition=plain)
    with pytest.raises(DtLensError, match="and the edit was given none"):
        SingularEdit(model, W_IN, decomposition=weighted)
    with pytest.raises(DtLensError, match="of another model, whose"):
        SingularEdit(model, W_IN, activations=collected(make_dt(1)))
    # Directions of another weighting are others; those of the same one may be edited once.
    with edit:
        with SingularEdit(model, W_IN, 0, value="zero"):
            pass
        with pytest.raises(DtLensError, match="Direction 2 of blocks"):
            SingularEdit(model, W_IN, 2, value="flip", activations=acts).apply()
