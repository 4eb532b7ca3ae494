"""Controls: random, at the same place, within reach, and with activations of the edit's output energy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dt_lens
from dt_lens import Activations, DtLensError, SingularEdit, collect_activations
from dt_lens.edits.control import Control, _tilted_frame
from dt_lens.edits.singular import load_edit
from dt_lens.lens.activations import Moments
from dt_lens.lens.matrices import find_matrix

Make = Callable[..., Any]
PLACES = [
    ("blocks.0.mlp.W_in", "read"),
    ("blocks.0.mlp.W_in", "neuron"),
    ("blocks.1.mlp.W_out", "write"),
    ("blocks.0.attn.W_K.1", "read"),
    ("blocks.0.attn.W_V", "head"),
    ("blocks.1.attn.W_O.0", "head"),
    ("blocks.0.attn.OV.1", "read"),
    ("blocks.0.attn.OV.1", "write"),
    ("blocks.1.attn.QK.0", "query"),
    ("blocks.1.attn.QK.0", "key"),
]
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def collected(model: Any, batches: int = 4) -> Activations:
    return collect_activations(model, batches=[model.probe(seed) for seed in range(batches)])


def test_a_control_of_a_control_is_one_of_the_edit(make_dt: Make) -> None:
    edit = SingularEdit(make_dt(), "blocks.0.mlp.W_in")
    control = Control(edit.control(0), 1)
    assert control.of is edit and control.to_dict() == edit.control(1).to_dict()


def skewed(acts: Activations, seed: int = 0, rank: int | None = None) -> Activations:
    """The same places, with inputs whose second moments differ a lot from direction to direction."""
    generator = torch.Generator().manual_seed(seed)
    points = {}
    for name, moments in acts.points.items():
        d = len(moments.mean)
        Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
        spread = torch.logspace(0, -6, d, dtype=torch.float64)
        if rank is not None:
            spread[rank:] = 0
        points[name] = Moments(99, torch.zeros(d).double(), (Q * spread) @ Q.T)
    return replace(acts, points=points)


@pytest.mark.parametrize("value", ["zero", "flip", "random", 0.5])
@pytest.mark.parametrize(("name", "side"), PLACES)
def test_norm_rank_and_output_energy_are_the_edits(make_dt: Make, name: str, side: Any, value: Any) -> None:
    model = make_dt(dtype=torch.float64)
    for acts in (collected(model), skewed(collected(model))):
        for sv in (0, -1, [0, 2, 3]):
            edit = SingularEdit(model, name, sv, side=side, value=value)
            control = edit.control(5, acts)
            assert control.note == ""
            assert control.energy == pytest.approx(edit.energy, rel=1e-9)
            assert control.output_energy(acts) == pytest.approx(edit.output_energy(acts), rel=1e-7)
            # What a matched control is for: an unmatched one has another output energy.
            plain = edit.control(5).output_energy(acts)
            assert abs(plain / edit.output_energy(acts) - 1) > 1e-4
            cosine = float((edit.delta[0] @ edit.delta[1]).flatten() @ (control.delta[0] @ control.delta[1]).flatten())
            assert abs(cosine) < 0.99 * edit.energy**2
            again = SingularEdit(model, name, sv, side=side, value=value).control(5, acts)
            assert torch.equal(again.delta[0], control.delta[0])
            assert torch.equal(control.control(5, acts).delta[0], control.delta[0])
            assert not torch.allclose(edit.control(6, acts).delta[1], control.delta[1])


def test_output_energy_is_what_the_forward_pass_shows(make_dt: Make) -> None:
    """At the hook behind the matrix, edited minus unedited, nothing before it having changed."""
    model = make_dt(dtype=torch.float64)
    batches = [model.probe(seed) for seed in range(3)]
    acts = collect_activations(model, batches=batches)

    def seen(hook: str) -> Tensor:
        rows = []
        for batch in batches:
            with torch.no_grad():
                x = model.run_with_cache(**batch)[1][hook]
            rows.append(x[batch["attention_mask"].bool().repeat_interleave(3, 1)])
        return torch.cat(rows).flatten(1)

    for name, side, hook in (
        ("blocks.1.mlp.W_in", "read", "blocks.1.mlp.hook_pre"),
        ("blocks.1.mlp.W_in", "neuron", "blocks.1.mlp.hook_pre"),
        ("blocks.0.mlp.W_out", "write", "blocks.0.hook_mlp_out"),
        ("blocks.1.attn.W_O", "write", "blocks.1.hook_attn_out"),
        ("blocks.0.attn.W_V.1", "read", "blocks.0.attn.hook_v"),
        ("blocks.1.attn.OV.1", "write", "blocks.1.hook_attn_out"),
        ("blocks.1.attn.OV.0", "read", "blocks.1.hook_attn_out"),
    ):
        edit = SingularEdit(model, name, [0, 1], side=side, value="flip")  # type: ignore[arg-type]
        for change in (edit, edit.control(2), edit.control(2, acts)):
            before = seen(hook)
            with change:
                moved = seen(hook) - before
            shown = float(moved.square().sum(1).mean().sqrt())
            assert change.output_energy(acts) == pytest.approx(shown, rel=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_models_have_matched_controls(kind: str, make_lm: Make) -> None:
    lens = dt_lens.wrap(make_lm(kind), check=False)
    acts = collected(lens)
    for name, side in (("mlp.W_in", "read"), ("attn.OV.3", "write"), ("attn.OV.1", "read"), ("attn.QK.2", "key")):
        edit = SingularEdit(lens, f"blocks.1.{name}", [0, 1], side=side, value="zero")  # type: ignore[arg-type]
        control = edit.control(1, acts)
        assert control.energy == pytest.approx(edit.energy, rel=1e-6)
        assert control.output_energy(acts) == pytest.approx(edit.output_energy(acts), rel=1e-6)
        with control:
            pass


@SETTINGS
@given(
    place=st.sampled_from(PLACES),
    sv=st.lists(st.integers(-7, 7), min_size=1, max_size=4, unique_by=lambda i: i % 7),
    value=st.one_of(st.sampled_from(["constant", "zero", "flip", "random"]), st.floats(-3, 3)),
    seed=st.integers(0, 3),
    draw=st.integers(0, 99),
    rank=st.one_of(st.none(), st.integers(2, 16)),
)
def test_law_norm_and_output_energy_are_matched(
    make_dt: Make, place: tuple[str, Any], sv: list[int], value: Any, seed: int, draw: int, rank: int | None
) -> None:
    model = make_dt(seed, dtype=torch.float64)
    try:
        edit = SingularEdit(model, place[0], sv, side=place[1], value=value)
    except DtLensError as error:
        assert "names a direction twice" in str(error)
        return
    acts = collected(model) if rank is None else skewed(collected(model), draw, rank)
    control = edit.control(draw, acts)
    assert control.energy == pytest.approx(edit.energy, rel=1e-6, abs=1e-12)
    assert control.output_energy(acts) == pytest.approx(edit.output_energy(acts), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("condition", [1.0001, 10, 1e6, 1e10])
def test_every_possible_output_energy_is_reached(r: int, condition: float) -> None:
    """From the least that a frame can have to the most, at steep and at nearly flat spectra."""
    d, generator = 40, torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.logspace(0, -float(torch.tensor(condition).log10()), d, dtype=torch.float64)
    moments = Moments(1, torch.zeros(d).double(), (Q * eigenvalues) @ Q.T)
    spectrum = torch.linspace(2, 1, r).double()
    most = float(spectrum.square() @ eigenvalues[:r])
    least = float(spectrum.square() @ eigenvalues.flip(0)[:r])
    for share in (1e-3, 0.1, 0.5, 0.9, 0.999):
        target = (least ** (1 - share) * most**share) ** 0.5
        drawn = torch.randn(d, r, generator=generator, dtype=torch.float64)
        frame = _tilted_frame(moments.second, drawn, spectrum, target)
        torch.testing.assert_close(frame.T @ frame, torch.eye(r).double(), rtol=0, atol=1e-12)
        reached = moments.energy((frame * spectrum, torch.eye(r).double()))
        assert reached == pytest.approx(target, rel=1e-7), (share, condition)


def test_without_a_tilt_the_draw_is_haar_and_with_one_it_leans(make_dt: Make) -> None:
    """At the output energy of an average Haar draw and above it, equal eigenvalues share alike."""
    d = 6
    eigenvalues = torch.tensor([4.0, 1, 1, 1, 1, 1]).double()
    moments = Moments(1, torch.zeros(d).double(), torch.diag(eigenvalues))
    generator = torch.Generator().manual_seed(0)
    n = 250
    for target, shares in ((1.5, 1 / 6), (3.0, 2 / 3)):
        gaussian = [torch.randn(d, 1, generator=generator, dtype=torch.float64) for _ in range(n)]
        drawn = torch.stack(
            [_tilted_frame(moments.second, x, torch.ones(1).double(), target**0.5)[:, 0] for x in gaussian]
        )
        squares = drawn.square().mean(0)
        # a^T C a = 1 + 3 a_0^2 is held exactly; the others share the rest alike, and either sign is as likely.
        assert float(squares[0]) == pytest.approx(shares, rel=1e-6)
        assert float((squares[1:] - (1 - shares) / 5).abs().max()) < 4.5 * (2 / n) ** 0.5 / 5
        assert float(drawn.mean(0).abs().max()) < 4.5 * n**-0.5


def test_an_output_energy_out_of_reach_is_matched_as_nearly_as_possible(
    make_dt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_dt(dtype=torch.float64)
    acts = collected(model)
    edit = SingularEdit(model, "blocks.0.mlp.W_in", value="flip")
    most = float(torch.linalg.eigvalsh(acts.inputs["blocks.0.mlp.W_in"].second)[-1]) ** 0.5 * edit.energy
    # No rank-one edit has more output energy than the largest eigenvalue gives, so such a request is made up.
    energy = Moments.energy
    monkeypatch.setattr(
        Moments, "energy", lambda self, change: 2 * most if change is edit.delta else energy(self, change)
    )
    control = edit.control(0, acts)
    assert "the nearest has" in control.note
    assert energy(acts.inputs["blocks.0.mlp.W_in"], control.delta) == pytest.approx(most, rel=1e-3)


def test_records_name_the_activations(make_dt: Make) -> None:
    model = make_dt()
    acts, other = collected(model), collected(model, 2)
    control = SingularEdit(model, "blocks.0.mlp.W_in", 2, value="zero").control(7, acts)
    record = json.loads(json.dumps(control.to_dict()))
    assert record["match"] == "output"
    assert record["activations"] == acts.digest
    again = load_edit(model, record, acts)
    assert torch.equal(again.delta[0], control.delta[0])
    assert (again.to_dict(), repr(again)) == (record, repr(control))
    for wrong, message in ((None, "none were given"), (other, f"these are {other.digest}")):
        with pytest.raises(DtLensError, match=message):
            load_edit(model, record, wrong)
    # A record without matched output energy needs no activations.
    plain = control.of.control(7)
    assert set(plain.to_dict()) == {"kind", "seed", "of"}
    assert torch.equal(load_edit(model, plain.to_dict(), acts).delta[0], plain.delta[0])


def test_another_models_activations_are_refused(make_dt: Make) -> None:
    model = make_dt()
    acts = collected(make_dt(1))
    edit = SingularEdit(model, "blocks.0.mlp.W_in", value="zero")
    for ask in (lambda: edit.output_energy(acts), lambda: edit.control(0, acts)):
        with pytest.raises(DtLensError, match=r"of another model, whose blocks\.0\.mlp\.W_in differs"):
            ask()
    mine = collected(model)
    with SingularEdit(model, "blocks.0.mlp.W_in", 3, value="flip"):
        # Edits in force make no difference.
        assert edit.output_energy(mine) == pytest.approx(edit.output_energy(collected(model)))
    few = collect_activations(model, batches=[model.probe()], matrices="*.W_out")
    with pytest.raises(DtLensError, match=r"do not cover what blocks.0.mlp.W_in reads"):
        edit.output_energy(few)
    small = replace(collected(make_dt(d_model=8)), made_of={})
    with pytest.raises(DtLensError, match="have 8 entries and the matrix reads 16"):
        edit.output_energy(small)


def test_a_matched_control_stays_within_what_the_edit_can_reach(make_dt: Make) -> None:
    model = make_dt(dtype=torch.float64)
    acts = skewed(collected(model))
    for name, side in (("blocks.0.attn.OV.1", "write"), ("blocks.1.attn.QK.0", "key"), ("blocks.0.attn.OV.1", "read")):
        edit = SingularEdit(model, name, [0, 1], side=side, value="zero")  # type: ignore[arg-type]
        control = edit.control(3, acts)
        before = find_matrix(model, name).dense(model, fold_layernorm=False)
        assert control._weight == edit._weight
        with control:
            after = find_matrix(model, name).dense(model, fold_layernorm=False)
        torch.testing.assert_close(after - before, control.delta[0] @ control.delta[1], rtol=0, atol=1e-10)


def conditioned(model: Any, weight: str, condition: float) -> None:
    """Every head's part of ``weight`` with singular values from 1 down to ``1 / condition``."""
    with torch.no_grad():
        for part in model.weights[weight]:
            U, s, Vt = torch.linalg.svd(part.double(), full_matrices=False)
            part.copy_(U * torch.logspace(0, -float(torch.tensor(condition).log10()), len(s)) @ Vt)


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize(
    ("circuit", "side", "stays"),
    [("OV", "read", "W_O"), ("OV", "write", "W_V"), ("QK", "query", "W_K"), ("QK", "key", "W_Q")],
)
def test_a_circuits_control_changes_the_weight_by_as_much_as_an_edit_does(
    make_dt: Make, circuit: str, side: Any, stays: str, matched: bool
) -> None:
    """Where the unedited factor passes on some directions a thousand times less than others."""
    model = make_dt(dtype=torch.float64)
    conditioned(model, f"blocks.1.attn.{stays}", 1e3)
    acts = collected(model)
    edits = [SingularEdit(model, f"blocks.1.attn.{circuit}.0", sv, side=side, value="zero") for sv in range(3)]

    def size(change: Any) -> float:
        return float((change._placed.left @ change._placed.right).norm()) / change.energy

    # Directions that the factor hardly passes on would need hundreds of times as much.
    most = max(size(edit) for edit in edits)
    sizes = [size(edit.control(seed, acts if matched else None)) for edit in edits[:2] for seed in range(20)]
    assert sorted(sizes)[len(sizes) // 2] < 6 * most
    assert max(sizes) < 100 * most


def test_output_energy_on_the_key_side_includes_the_queries_bias(make_dt: Make) -> None:
    """A change of W_K acts on whole queries, b_Q included: the scores move by that much."""
    model = make_dt(dtype=torch.float64)
    acts = collected(model)
    x = torch.cat([_normalized(model, seed) for seed in range(4)])
    q = x @ model.weights["blocks.1.attn.W_Q"][0] + model.weights["blocks.1.attn.b_Q"][0]
    edit = SingularEdit(model, "blocks.1.attn.QK.0", [0, 2], side="key", value="flip")
    for change in (edit, edit.control(1), edit.control(1, acts)):
        before = model.weights["blocks.1.attn.W_K"][0].clone()
        with change:
            moved = q @ (model.weights["blocks.1.attn.W_K"][0] - before).T
        assert change.output_energy(acts) == pytest.approx(float(moved.square().sum(1).mean().sqrt()), rel=1e-9)


def _normalized(model: Any, seed: int) -> Tensor:
    """What the second block's attention reads for a probe batch, one row for each real token."""
    batch = model.probe(seed)
    with torch.no_grad():
        x = model.run_with_cache(**batch)[1]["blocks.1.ln1.hook_normalized"]
    norm = "blocks.1.ln1"
    rows = x * model.weights[f"{norm}.w"] + model.weights[f"{norm}.b"]
    return rows[batch["attention_mask"].bool().repeat_interleave(3, 1)]


def test_a_control_has_the_edits_remarks(make_dt: Make, make_lm: Make) -> None:
    """That heads share the changed weight, and that the weights' precision cannot hold the change."""
    lens = dt_lens.wrap(make_lm("llama"), check=False)
    edit = SingularEdit(lens, "blocks.0.attn.OV.1", side="read", value="zero")
    assert "Heads 0 to 1 share W_V" in edit.control(0).note
    model = make_dt()
    conditioned(model, "blocks.0.attn.W_O", 1e4)
    model = model.to(torch.bfloat16)
    edit = SingularEdit(model, "blocks.0.attn.OV.0", -1, side="read", value="zero")
    assert "Rounding to the weights' precision alters the change by" in edit.note
    for seed in range(5):
        control = edit.control(seed)
        before = find_matrix(model, "blocks.0.attn.OV.0").dense(model, fold_layernorm=False)
        with control:
            made = find_matrix(model, "blocks.0.attn.OV.0").dense(model, fold_layernorm=False) - before
        lost = float((made - control.delta[0] @ control.delta[1]).norm()) / control.energy
        assert ("Rounding" in control.note) == (lost > 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("side", "stays"), [("read", "W_O"), ("write", "W_V")])
def test_controls_stay_in_the_image_of_the_unedited_factor(make_dt: Make, side: Any, stays: str, dtype: Any) -> None:
    """Also where its other singular values are zero, or only rounding of what was zero."""
    model = make_dt(dtype=torch.float64)
    with torch.no_grad():
        weight = model.weights[f"blocks.0.attn.{stays}"][0]
        U, s, Vt = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(U[:, :4] * s[:4] @ Vt[:4])
    model = model.to(dtype)
    for sv in (0, [0, 1, 2]):
        edit = SingularEdit(model, "blocks.0.attn.OV.0", sv, side=side, value="flip")
        for seed in range(5):
            control = edit.control(seed)
            assert control.energy == pytest.approx(edit.energy, rel=1e-6)
            assert float((control._placed.left @ control._placed.right).norm()) < 100 * edit.energy
            assert control.note == ""


@pytest.mark.parametrize(("name", "side"), [("blocks.0.mlp.W_in", "read"), ("blocks.0.attn.OV.1", "write")])
def test_controls_are_haar(make_dt: Make, name: str, side: str) -> None:
    """All directions and both signs are equally likely: first and second moments of the sphere."""
    model = make_dt(dtype=torch.float64)
    edit = SingularEdit(model, name, side=side, value="flip")  # type: ignore[arg-type]
    n = 1500
    lefts, rights, pairs = [], [], []
    # In a circuit the fixed side is the unedited factor's image of Haar-random directions.
    back = torch.eye(16).double() if "OV" not in name else torch.linalg.pinv(find_matrix(model, name).raw(model)[0])
    for seed in range(n):
        left, right = edit.control(seed).delta
        u, v = back @ left[:, 0], right[0] / right.norm()
        u = u / u.norm()
        lefts.append(u)
        rights.append(v)
        pairs.append(u[0] * v[0])
    for drawn in (torch.stack(lefts), torch.stack(rights)):
        d = drawn.shape[1]
        torch.testing.assert_close(drawn.norm(dim=1), torch.ones(n).double())
        assert float(drawn.mean(0).abs().max()) < 4.5 / (n * d) ** 0.5
        second = drawn.square().mean(0)
        assert float((second - 1 / d).abs().max()) < 4.5 * (2 / n) ** 0.5 / d
    size = (len(lefts[0]) * len(rights[0])) ** -0.5
    assert abs(float(torch.stack(pairs).mean())) < 4.5 * size / n**0.5


def test_a_control_of_nothing(make_dt: Make) -> None:
    control = SingularEdit(make_dt(), "blocks.0.mlp.W_in", value=1.0).control()
    assert isinstance(control, Control)
    assert control.energy == 0
    with pytest.raises(DtLensError, match="changes no bit"):
        control.apply()
