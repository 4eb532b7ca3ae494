"""What a sweep will do: directions, values, arms and blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from dt_lens.behaviour.sweep.arms import parse_value, resolve_sv
from dt_lens.behaviour.sweep.plan import block_size_of, merge_arms, split_units
from dt_lens.behaviour.sweep.settings import SweepSettings
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.edits.singular import load_edit
from dt_lens.errors import DtLensError

Make = Callable[..., Any]


def test_a_threshold_may_be_numpys(make_sweep: Make) -> None:
    """JSON, in which the file keeps it, has no number of NumPy's."""
    assert json.dumps(make_sweep(failure=np.float32(5)).plan.options["task"]["failure"]) == "5.0"
    with pytest.raises(DtLensError, match="failure is nan"):
        make_sweep(failure=float("nan"))
    with pytest.raises(DtLensError, match="keeps failure as a word or a number; give a function to table"):
        make_sweep(failure=lambda frame: frame["return"] < 5)


@pytest.mark.parametrize(
    ("sv", "chosen"),
    [
        (0, [0]),
        (-1, [9]),
        ("0,1", [0, 1]),
        ("3 , 1", [1, 3]),
        ("0-2,1-3", [0, 1, 2, 3]),
        ("-3--1", [7, 8, 9]),
        ("8--1", [8, 9]),
        ("all", list(range(10))),
        ([4, "0-1", -1], [0, 1, 4, 9]),
        (range(3), [0, 1, 2]),
    ],
)
def test_directions_as_text(sv: Any, chosen: list[int]) -> None:
    assert resolve_sv(sv, 10, "M") == chosen


@pytest.mark.parametrize(
    ("sv", "sentence"),
    [
        ("10", "out of range: M has 10"),
        ("-11", "out of range"),
        ("first", "holds 'first'"),
        ("5-3", "empty"),
        ([], "no"),
    ],
)
def test_directions_that_do_not_exist(sv: Any, sentence: str) -> None:
    with pytest.raises(DtLensError, match=sentence):
        resolve_sv(sv, 10, "M")


@pytest.mark.parametrize("value", ["nothing", "scale:", "scale:inf", None, float("nan")])
def test_values_that_are_not_valid(value: Any) -> None:
    with pytest.raises(DtLensError, match="value is"):
        parse_value(value)


@pytest.mark.parametrize("episodes", [1, 7, 12, 16, 17, 33, 100, 1000])
def test_blocks_have_nearly_equal_size(episodes: int) -> None:
    size = block_size_of(episodes, None)
    assert 1 <= size <= 16
    assert size * -(-episodes // size) - episodes < -(-episodes // size) * 2 or episodes < 16


def test_arms_and_blocks(make_sweep: Make, agent: Any) -> None:
    plan = make_sweep(matrices=["*.0.attn.OV.1", "*.1.mlp.W_out"], sv="0,-1", edits="constant,random", controls=2).plan
    assert [arm.number for arm in plan.arms] == list(range(len(plan.arms)))
    kinds = [arm.kind for arm in plan.arms]
    assert kinds == ["baseline"] + ["edit", "control", "control"] * (2 * 2 * 2 + 2 * 2)
    assert [arm.side for arm in plan.arms[1:13:3]] == ["read", "read", "write", "write"]
    assert [arm.control for arm in plan.arms[1:4]] == [None, 3, 4]
    assert {arm.of for arm in plan.arms[2:4]} == {1}
    for arm in plan.arms[1:]:
        edit = load_edit(agent, json.loads(json.dumps(arm.record)))
        assert edit.to_dict() == arm.record
        assert edit.matrix.name == arm.matrix
    assert merge_arms(plan.arms, (), plan.catalogue) == list(plan.arms)
    assert list(split_units(range(3, 10), 3)) == [(3, 3), (6, 3), (9, 1)]


def test_an_edit_that_only_scales_sigma_is_measured_on_one_side(make_sweep: Make) -> None:
    def edits(**options: Any) -> list[tuple[str | None, str | None]]:
        arms = make_sweep(matrices="*.0.attn.OV.1", edits="zero,flip,scale:2,constant", controls=0, **options).plan.arms
        return [(arm.value, arm.side) for arm in arms if arm.kind == "edit"]

    both = [("constant", "read"), ("constant", "write")]
    assert edits() == [("zero", "read"), ("flip", "read"), ("2", "read"), *both]
    assert len(edits(sides=["read", "write"])) == 8  # where both sides are named


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"matrices": "*.W_up"}, "No matrix of the model matches"),
        ({"sides": "left"}, "The model has no side 'left'"),
        ({"sides": "query"}, "has none of the sides query"),
        ({"sv": 99}, "out of range: blocks.0.mlp.W_in has 15"),
        ({"episodes": 0}, "episodes is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"block_size": 0}, "block_size is 0"),
        ({"controls": -1}, "controls is -1"),
        ({"edits": []}, "edits is empty"),
        ({"environment": "Hopper-v5"}, "this model reads 3"),
        ({"environment": ".foo:bar"}, "'.foo' of the environment '.foo:bar' cannot be imported: .*relative"),
        ({"environment_kwargs": {"g": np.float32(9)}}, "environment_kwargs holds g=.*; a sweep's file takes"),
        ({"environment_kwargs": {"g": float("nan")}}, "environment_kwargs holds g=nan"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be a whole number of at least 0 and at most"),
        ({"seed": 2**63 - 5}, "below 2..63, so give a smaller one"),
        ({"seed": 2**63 - 8, "halving": 4}, "below 2..63"),
        ({"seed": 2**63 - 7, "controls": 9}, "below 2..63"),
        ({"sv": 1.5}, "sv holds '1.5'"),
        ({"sv": None}, "sv holds 'None'"),
        ({"edits": [None]}, "value is None"),
        ({"value": " , ", "edits": None}, "value is empty"),
        ({"value": "zero", "edits": "flip"}, "give the values once, as value"),
        ({"side": "read", "sides": "read"}, "side was given twice"),
        ({"sides": 5}, "has no side 5"),
        ({"matrices": 3}, r"matrices is \[3\]; it must be names"),
        ({"matrices": []}, r"matrices is \[\]; it must be names"),
    ],
)
def test_bad_options_are_one_sentence(make_sweep: Make, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DtLensError, match=sentence) as caught:
        make_sweep(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"max_steps": np.int64(9), "block_size": np.int64(3)}, {"max_steps": 9, "block_size": 3}),
        ({"sv": np.int64(1), "seed": np.int64(5)}, {"sv": 1, "seed": 5}),
        ({"sv": np.arange(2), "episodes": np.int32(4)}, {"sv": "0,1", "episodes": 4}),
        ({"edits": np.float32(0.5)}, {"edits": 0.5}),
        ({"edits": np.int64(2)}, {"edits": "scale:2"}),
    ],
)
def test_numpys_numbers_are_numbers(make_sweep: Make, given: dict[str, Any], plain: dict[str, Any]) -> None:
    one, other = make_sweep(**given).plan, make_sweep(**plain).plan
    assert (json.dumps(one.options), one.arms, one.block_size) == (
        json.dumps(other.options),
        other.arms,
        other.block_size,
    )


def test_settings_and_keywords_are_one_thing(agent: Any, tmp_path: Any) -> None:
    settings = SweepSettings(matrices="*.W_in", sv="0,1", edits="zero,flip", controls=2, units=4)
    by_keyword = Sweep(
        agent, tmp_path, matrices="*.W_in", sv="0,1", edits="zero,flip", controls=2, episodes=4, max_steps=9
    )
    assert Sweep(agent, tmp_path, settings, max_steps=9).plan == by_keyword.plan
    changed = Sweep(agent, tmp_path, settings, sv=1, episodes=5)
    assert changed.plan == Sweep(agent, tmp_path, SweepSettings(**{**vars(settings), "sv": 1, "units": 5})).plan
    assert settings.sv == "0,1" and changed.settings.controls == 2
    with pytest.raises(FrozenInstanceError):
        settings.sv = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="matrixes"):
        Sweep(agent, tmp_path, matrixes="*.W_in")
