"""Whatever is edited, and however the edits come and go, the model is afterwards what it was, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.edits.edit import Edit
from dt_lens.edits.singular import load_edit
from dt_lens.lens.matrices import find_matrix
from dt_lens.lens.weights import weight_bytes

Make = Callable[..., Any]
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIDES = {
    "mlp.W_in": ("read", "neuron"),
    "mlp.W_out": ("neuron", "write"),
    "attn.W_Q": ("read", "head"),
    "attn.W_K": ("read", "head"),
    "attn.W_V": ("read", "head"),
    "attn.W_O": ("head", "write"),
    "attn.OV": ("read", "write"),
    "attn.QK": ("query", "key"),
}


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(SIDES)))
    heads = [0, 1] if kind in ("attn.OV", "attn.QK") else [None, 0, 1] if kind.startswith("attn") else [None]
    return {
        "matrix": f"blocks.{draw(st.integers(0, 1))}.{kind}",
        "head": draw(st.sampled_from(heads)),
        "side": draw(st.sampled_from(SIDES[kind])),
        "sv": draw(st.one_of(st.integers(0, 7), st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))),
        "value": draw(
            st.one_of(
                st.sampled_from(["constant", "zero", "flip", "random"]),
                st.floats(-3, 3).filter(lambda x: abs(x - 1) > 0.1),
                st.integers(0, 99).map(lambda seed: ("vector", seed)),
            )
        ),
        "seed": draw(st.integers(0, 99)),
        "fold_layernorm": draw(st.booleans()),
        "control": draw(st.sampled_from([None, 3])),
    }


def made(model: Any, request: dict[str, Any]) -> Edit:
    options = {name: value for name, value in request.items() if name != "control"}
    name = options["matrix"] if options["head"] is None else f"{options['matrix']}.{options['head']}"
    if isinstance(options["value"], tuple):
        matrix = find_matrix(model, name)
        size = matrix.dense(model).shape[0 if matrix.side(options["side"]) == "left" else 1]
        generator = torch.Generator().manual_seed(options["value"][1])
        options["value"] = torch.randn(size, generator=generator)
    edit = SingularEdit(model, **options)
    return edit if request["control"] is None else edit.control(request["control"])


def bits(model: Any) -> dict[str, bytes]:
    return {name: weight_bytes(weight) for name, weight in model.weights.items()}


class Stop(Exception):
    pass


@SETTINGS
@given(
    data=st.data(),
    wanted=st.lists(requests(), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 3),
    normalization=st.sampled_from(["pre", "post", "none"]),
    fails=st.booleans(),
    inference=st.booleans(),
)
def test_nested_edits_leave_the_model_as_it_was(
    make_dt: Make,
    data: st.DataObject,
    wanted: list[dict[str, Any]],
    dtype: torch.dtype,
    seed: int,
    normalization: str,
    fails: bool,
    inference: bool,
) -> None:
    model = make_dt(seed, dtype=dtype, normalization=normalization)
    before, active = bits(model), []
    with torch.inference_mode(inference):
        for request in wanted:
            edit = made(model, request)
            held = bits(model)
            try:
                edit.apply()
            except DtLensError as error:
                # Two edits of one direction, or one too faint for this precision: refused, and nothing has happened.
                assert any(part in str(error) for part in ("already being edited", "changes no bit", "moves no act"))
                assert bits(model) == held
            else:
                assert bits(model) != held
                active.append(edit)
    assert model.active_edits == active
    order = data.draw(st.permutations(active))
    for i, edit in enumerate(order):
        if fails and i == len(order) - 1:
            with pytest.raises(Stop):
                try:
                    raise Stop
                finally:
                    edit.__exit__(Stop, Stop(), None)
        else:
            edit.undo()
        assert not edit.active
    assert bits(model) == before
    assert not model.active_edits


@SETTINGS
@given(request=requests(), dtype=st.sampled_from(DTYPES[:3]), seed=st.integers(0, 3))
def test_energy_and_delta_are_what_happens_to_the_raw_matrix(
    make_dt: Make, request: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    model = make_dt(seed, dtype=dtype)
    edit = made(model, request)
    left, right = edit.delta
    assert edit.energy == pytest.approx(float((left @ right).norm()), rel=1e-9)
    matrix = edit.matrix
    before, live = matrix.dense(model, fold_layernorm=False), bits(model)
    eps, others = float(torch.finfo(dtype).eps), 1.0
    for factor in matrix.factors if len(matrix.factors) == 2 else ():
        others = max(others, float(factor.view(model.weights).double().norm()))
    written = max(float(w.double().norm()) for w in model.weights.values()) + float(edit._placed.left.norm()) * float(
        edit._placed.right.norm()
    )
    edit.apply()
    moved = matrix.dense(model, fold_layernorm=False) - before
    edit.undo()
    assert bits(model) == live
    assert float((moved - left @ right).norm()) <= eps * others * written


@SETTINGS
@given(request=requests(), seed=st.integers(0, 3))
def test_a_record_makes_the_same_edit(make_dt: Make, request: dict[str, Any], seed: int) -> None:
    model = make_dt(seed)
    edit = made(model, request)
    again = load_edit(model, edit.to_dict())
    edit.apply()
    first = bits(model)
    edit.undo()
    again.apply()
    assert bits(model) == first
    again.undo()


@SETTINGS
@given(request=requests(), seed=st.integers(0, 3))
def test_a_control_has_the_edits_spectrum(make_dt: Make, request: dict[str, Any], seed: int) -> None:
    model = make_dt(seed, dtype=torch.float64)
    edit = made(model, {**request, "control": None})
    spectra = [torch.linalg.svdvals(left @ right) for left, right in (edit.delta, edit.control(seed).delta)]
    torch.testing.assert_close(*spectra, rtol=0, atol=1e-9 * edit.energy)


@SETTINGS
@given(request=requests(), seed=st.integers(0, 3), scale=st.floats(-2, 2))
def test_scaling_a_direction_scales_its_sigma_and_leaves_the_others(
    make_dt: Make, request: dict[str, Any], seed: int, scale: float
) -> None:
    model = make_dt(seed, dtype=torch.float64)
    edit = made(model, {**request, "value": scale, "control": None})
    assert isinstance(edit, SingularEdit)
    svd = WeightSVD(model, fold_layernorm=request["fold_layernorm"])
    sigma = svd[edit.matrix.name].sigma.clone()
    expected = sigma.clone()
    expected[edit.sv] *= abs(scale)
    if abs(scale - 1) < 1e-6:
        return
    with edit:
        found = svd[edit.matrix.name].sigma
    expected = expected.sort(descending=True).values
    found = torch.cat([found, torch.zeros(len(expected) - len(found)).double()])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
