"""The facts of a training run, whoever wrote them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.errors import DtLensError


def test_arrays_become_plain_numbers(tmp_path: Path) -> None:
    facts = RunFacts(
        20,
        state_mean=np.arange(3, dtype=np.float32),  # type: ignore[arg-type]
        state_std=torch.ones(3),  # type: ignore[arg-type]
        target_returns=[3600, 1800],  # type: ignore[arg-type]
        action_labels=["hip"],  # type: ignore[arg-type]
    )
    assert facts.state_mean == (0.0, 1.0, 2.0) and facts.state_std == (1.0,) * 3
    assert facts.target_returns == (3600.0, 1800.0) and facts.action_labels == ("hip",)
    facts.save(tmp_path)
    assert RunFacts.load(tmp_path) == facts and RunFacts.load(tmp_path / "elsewhere") is None
    assert json.loads((tmp_path / "dt_lens.json").read_text())["context"] == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 0}, "context is 0; it must be a positive number of steps"),
        ({"context": "20"}, "context is '20'"),
        ({"context": True}, "context is True"),
        ({"environment": 3}, "environment is 3; it must be a Gymnasium id"),
        ({"environment_kwargs": ["x"]}, "environment_kwargs is"),
        ({"environment_kwargs": {3: "x"}}, "environment_kwargs is"),
        ({"about": "a dataset"}, "about is 'a dataset'"),
        ({"return_scale": 0}, "return_scale is 0; it must be a positive number"),
        ({"return_scale": "x"}, "return_scale is 'x'"),
        ({"return_scale": float("inf")}, "return_scale is inf"),
        ({"state_mean": [0.0]}, "give only one of state_mean and state_std"),
        ({"state_mean": [0.0], "state_std": [1.0, 1.0]}, "state_mean has 1 entries and state_std 2"),
        ({"state_mean": [0.0], "state_std": [0.0]}, r"state_std is 0\.0; it must be positive in every entry"),
        ({"state_mean": ["a"], "state_std": [1.0]}, "state_mean is .* it must be a list of finite numbers"),
        ({"state_mean": [float("nan")], "state_std": [1.0]}, "state_mean is"),
        ({"state_mean": [[0.0]], "state_std": [1.0]}, "state_mean is"),
        ({"state_mean": 0.0, "state_std": 1.0}, r"state_mean is 0\.0"),
        ({"target_returns": 3600}, "target_returns is 3600; it must be a list of finite numbers"),
        ({"state_labels": "xyz"}, "state_labels is 'xyz'; it must be a list of strings"),
        ({"action_labels": [1]}, "action_labels is"),
        ({"trained_heads": ["actions"]}, r"names 'actions'; the heads are action, .* mean 'action'\?"),
        ({"contxt": 3}, r"unknown field 'contxt'.* mean 'context'\?"),
        ({"context": None}, "context is None"),
        # JSON's whole numbers have no bound.
        ({"context": 10**400}, "context is 1000"),
        ({"failure": 10**400}, "failure is 1000.*a return to fall below"),
        ({"return_scale": 10**400}, "return_scale is 1000.*a positive number"),
        ({"target_returns": [10**400]}, "target_returns is .*a list of finite numbers"),
        ({"state_mean": [10**400], "state_std": [1.0]}, "state_mean is .*a list of finite numbers"),
        ({"factors": []}, r"factors is \[\]; it must be by embedding and factor the level of each label"),
        ({"factors": {}}, r"factors is \{\}; it must be by embedding"),
        ({"factors": {"state_in": [0, 1]}}, r"factors of state_in is \[0, 1\]; it must be a list of levels for each"),
        ({"factors": {"state_in": {}}}, r"factors of state_in is \{\}"),
        ({"factors": {"state_in": {"row": "0011"}}}, "factor 'row' of state_in is '0011'; .* texts, whole numbers, or"),
        ({"factors": {"state_in": {"row": [0, 1.5]}}}, r"factor 'row' of state_in is \[0, 1\.5\]"),
        ({"factors": {"state_in": {"row": [0, True]}}}, r"factor 'row' of state_in is \[0, True\]"),
        ({"factors": {"state_in": {"row": [None, None]}}}, "factor 'row' of state_in .* level for at least one label"),
        ({"factors": {"state_in": {"row": []}}}, "factor 'row' of state_in is .* level for at least one label"),
        (
            {"factors": {"state_in": {"row": [0, 1], "column": [0]}}},
            r"factors of state_in is \{'row': 2, 'column': 1\}; it must be lists of one length",
        ),
    ],
)
def test_wrong_facts_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DtLensError, match=message) as caught:
        RunFacts.from_dict({"context": 20, **values})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("values", [[], 3, None, "text"])
def test_facts_must_be_an_object(values: Any) -> None:
    with pytest.raises(DtLensError, match=r"the run facts holds an? \w+; expected an object"):
        RunFacts.from_dict(values)


def test_the_context_must_be_given() -> None:
    with pytest.raises(DtLensError, match="lacks the field 'context'"):
        RunFacts.from_dict({"environment": "Hopper-v5"})
    assert RunFacts.from_dict(asdict(RunFacts(3))) == RunFacts(3)


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match="cannot be written as JSON"):
        RunFacts(3, about={"scores": np.zeros(3)}).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


FACTORS: Any = {"state_in": {"row": [0, 0, 1], "colour": ["red", None, "blue"]}, "action_in": {"turn": np.arange(2)}}


def test_factors_travel_in_the_file(tmp_path: Path) -> None:
    facts = RunFacts(3, factors=FACTORS)
    assert facts.factors == {
        "state_in": {"row": (0, 0, 1), "colour": ("red", None, "blue")},
        "action_in": {"turn": (0, 1)},
    }
    facts.save(tmp_path)
    assert RunFacts.load(tmp_path) == facts
    assert json.loads((tmp_path / "dt_lens.json").read_text())["factors"]["state_in"]["colour"] == ["red", None, "blue"]
    assert "factors" not in RunFacts(3).to_dict() and RunFacts.from_dict(RunFacts(3).to_dict()).factors is None


def test_factors_must_have_a_level_for_every_label() -> None:
    RunFacts(3, factors=FACTORS).require_fit(3, 2)
    with pytest.raises(DtLensError, match="factor 'turn' of action_in has 2 levels; give one for each of its 3 labels"):
        RunFacts(3, factors=FACTORS).require_fit(3, 3)
    with pytest.raises(DtLensError, match="factor 'row' of state_in has 3 levels; give one for each of its 4 labels"):
        RunFacts(3, factors=FACTORS).require_fit(4, 2)
