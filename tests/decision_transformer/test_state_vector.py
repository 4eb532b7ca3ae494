"""Observations of any space become the numbers that Gymnasium's own flattening gives, in one order and named."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from dt_lens.decision_transformer.environment_labels import environment_labels
from dt_lens.decision_transformer.state_vector import StateVector, part_names
from dt_lens.errors import DtLensError

SPACES: list[spaces.Space[Any]] = [
    spaces.Discrete(5, start=2),
    spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [0, 5]]),
    spaces.MultiBinary([2, 3]),
    spaces.Box(0, 255, (3, 2, 2), np.uint8),
    spaces.Tuple((spaces.Discrete(4), spaces.Box(-1, 1, (2,)), spaces.Discrete(2))),
    spaces.Dict(
        {
            "b": spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2))),
            "a": spaces.Box(-1, 1, ()),
            "c": spaces.MultiDiscrete([3, 2]),
        }
    ),
]
LAMP = {"mission": spaces.Text(20), "lamp": spaces.Discrete(2), "at": spaces.Discrete(3)}


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_numbers_are_those_of_gymnasiums_flatten(space: spaces.Space[Any]) -> None:
    space.seed(3)
    vector = pickle.loads(pickle.dumps(StateVector.of(space)))  # as a worker gets it
    assert vector.size == spaces.flatdim(space) == len(vector.one_hot)
    for _ in range(5):
        value = space.sample()
        np.testing.assert_array_equal(vector.flat(value), np.asarray(spaces.flatten(space, value), np.float64).ravel())
    if vector.labels is not None:
        assert len(set(vector.labels)) == vector.size


def test_a_dict_has_one_order_however_it_was_written() -> None:
    written = spaces.Dict(OrderedDict(z=spaces.Discrete(2), a=spaces.Discrete(3)))  # which Gymnasium does not sort
    assert list(written) == ["z", "a"]
    vector = StateVector.of(written)
    assert vector.flat({"z": 1, "a": 0}).tolist() == [1, 0, 0, 0, 1]
    assert vector.labels == ("a = 0", "a = 1", "a = 2", "z = 0", "z = 1")


def test_a_text_is_ignored_or_one_hot_or_refused() -> None:
    space = spaces.Dict(LAMP)
    value = {"mission": "go", "lamp": 1, "at": 2}
    with pytest.raises(DtLensError, match=r"^Lamp gives a text, 'mission', which .* ignores=\['mission'\]"):
        StateVector.of(space, whose="Lamp")
    ignoring = StateVector.of(space, ["mission"])
    assert ignoring.flat(value).tolist() == [0, 0, 1, 0, 1] and ignoring.one_hot.all()
    reading = StateVector.of(space, ["lamp"], {"mission": ("stop", "go", "wait")}, "Lamp")
    assert reading.flat(value).tolist() == [0, 0, 1, 0, 1, 0]
    assert reading.labels == ("at = 0", "at = 1", "at = 2", "mission: stop", "mission: go", "mission: wait")
    with pytest.raises(DtLensError, match=r"^Lamp gave the text 'fly' as 'mission', which is none of the 3 "):
        reading.flat({**value, "mission": "fly"})
    nested = spaces.Dict({"goal": space})
    assert part_names(nested) == ["goal", "goal.at", "goal.lamp", "goal.mission"]
    assert StateVector.of(nested, ["goal.mission", "goal.at"]).flat({"goal": value}).tolist() == [0, 1]


def test_a_mixed_observation_says_what_is_not_normalised() -> None:
    vector = StateVector.of(spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(2)}))
    assert vector.one_hot.tolist() == [False, False, True, True]


def test_spaces_of_no_one_size_are_refused() -> None:
    with pytest.raises(DtLensError, match=r"^Bag's observations 'x' \(Sequence.* cannot be flattened"):
        StateVector.of(spaces.Dict({"x": spaces.Sequence(spaces.Discrete(2))}), whose="Bag")


def test_labels_of_blackjack_and_of_minigrid() -> None:
    state, _ = environment_labels("Blackjack-v1")
    assert state is not None and len(state) == 32 + 11 + 2
    assert (state[14], state[32 + 3], state[-1]) == ("your sum 14", "dealer's card 3", "usable ace 1")
    pytest.importorskip("minigrid")
    state, _ = environment_labels("MiniGrid-Empty-5x5-v0", {}, ("mission",))
    assert state is not None and len(state) == 4 + 7 * 7 * 3
    assert state[:5] == ("direction = 0", "direction = 1", "direction = 2", "direction = 3", "image (0, 0, 0)")
