"""What an edit is made from (a record, arguments, a given decomposition), and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dt_lens import DtLensError, SingularEdit, WeightSVD
from dt_lens.edits.singular import load_edit

Make = Callable[..., Any]
W_IN = "blocks.0.mlp.W_in"


def test_records_make_the_round_trip(make_dt: Make) -> None:
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
def test_a_malformed_record_is_refused(make_dt: Make, record: Any) -> None:
    refused = r"^Not an edit record: .*; records come from to_dict\(\)\.$|^Unknown kind of edit 'patch'; known are"
    with pytest.raises(DtLensError, match=refused):
        load_edit(make_dt(), record)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": "blocks.0.mlp.W_inn"}, "Did you mean 'blocks.0.mlp.W_in'"),
        ({"matrix": "blocks.0.attn.OV", "head": 5, "side": "read"}, "no head 5"),
        ({"matrix": "blocks.0.attn.OV.0"}, "pass side='read' or side='write'"),
        ({"matrix": "blocks.0.attn.QK.0", "side": "read"}, "'query' and 'key'"),
        ({"side": "write"}, "no side 'write'; it has 'read' and 'neuron'"),
        ({"sv": 15}, r"sv=15 is out of range: blocks.0.mlp.W_in has 15 directions, 0 to 14"),
        ({"sv": -16}, "sv=-16 is out of range"),
        ({"sv": [0, 40]}, "sv=40 is out of range"),
        ({"sv": [1, 1]}, "names a direction twice"),
        ({"sv": [1, -14]}, "names a direction twice"),
        ({"sv": []}, "chooses no direction"),
        ({"sv": slice(20, 30)}, "chooses no direction"),
        ({"sv": "first"}, "it must be an index, a range such as 0-9"),
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
        ({"activations": "x"}, "activations is a str; it must be a result of collect_activations"),
        ({"value": "random", "seed": 2**70}, "seed is 1180591620717411303424; it must be a whole number of at least"),
        ({"value": ("action_out", 0, 10**400)}, "it must be a number of degrees"),
        ({"value": "constan"}, "Did you mean 'constant'"),
        ({"value": "nonsense"}, "must be one of constant, zero, flip, random, a number that sigma is multiplied by"),
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
def test_wrong_arguments_are_refused(make_dt: Make, arguments: dict[str, Any], message: str) -> None:
    model = make_dt()
    with pytest.raises(DtLensError, match=message):
        SingularEdit(model, **{"matrix": W_IN, **arguments})


def test_wrong_models_activations_and_weights_are_refused(make_dt: Make) -> None:
    model = make_dt()
    with pytest.raises(DtLensError, match="takes a wrapped model, not a Linear"):
        SingularEdit(torch.nn.Linear(2, 2), W_IN)  # type: ignore[arg-type]
    with pytest.raises(DtLensError, match="seed is 'a'"):
        SingularEdit(model, W_IN).control("a")  # type: ignore[arg-type]
    for wrong in (None, "x"):
        with pytest.raises(DtLensError, match="it must be a result of collect_activations"):
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
    # What an OV circuit writes is edited in W_O, which has no LayerNorm in front.
    with SingularEdit(model, "blocks.0.attn.OV.0", side="write"):
        pass


def test_a_given_decomposition_must_be_of_the_matrix(make_dt: Make) -> None:
    model = make_dt()
    svd, raw = WeightSVD(model), WeightSVD(model, fold_layernorm=False)
    given = SingularEdit(model, W_IN, 2, decomposition=svd[W_IN])
    torch.testing.assert_close(given.delta, SingularEdit(model, W_IN, 2).delta)
    for wrong in (svd["blocks.1.mlp.W_in"], raw[W_IN]):
        with pytest.raises(DtLensError, match="the edit is of blocks"):
            SingularEdit(model, W_IN, 2, decomposition=wrong)
    with pytest.raises(DtLensError, match="is of other weights"):
        SingularEdit(model, W_IN, 2, decomposition=WeightSVD(make_dt(1))[W_IN])
    qk = svd["blocks.0.attn.QK.1"]
    assert SingularEdit(model, "blocks.0.attn.QK.1", side="key", decomposition=qk).sv == [0]


def test_a_decomposition_must_fit_as_well_as_it_was_computed(make_dt: Make) -> None:
    """The directions of a large matrix in low precision are known to six digits; they are accepted as its own."""
    model = make_dt()
    found = WeightSVD(model)[W_IN]

    def moved(by: float) -> Any:
        return replace(found, right=found.right + by * torch.eye(*found.right.shape))

    rough = replace(moved(1e-6), error=4e-6)
    given = SingularEdit(model, W_IN, [0, 2], value="zero", decomposition=rough)
    for mine, own in zip(given.delta, SingularEdit(model, W_IN, [0, 2], value="zero").delta, strict=True):
        torch.testing.assert_close(mine, own, rtol=0, atol=1e-5)
    with pytest.raises(DtLensError, match="is of other weights"):
        SingularEdit(model, W_IN, 0, decomposition=moved(1e-6))
    model.weights[W_IN][3, 5] += 1e-3
    with pytest.raises(DtLensError, match="is of other weights"):
        SingularEdit(model, W_IN, 0, decomposition=rough)
