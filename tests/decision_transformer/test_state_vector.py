"""Observations of any space become the numbers that Gymnasium's own flattening gives, in one order and named."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import gymnasium as gym
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


@pytest.mark.parametrize(
    ("environment", "start", "moves"),
    [
        ("CliffWalking-v1", 24, {"up": 12, "right": 25, "down": 36, "left": 24}),  # 12 columns
        ("FrozenLake-v1", 9, {"up": 5, "right": 10, "down": 13, "left": 8}),  # 4 columns
        (
            "Taxi",
            244,
            {"north": 144, "east": 264, "south": 344, "west": 224},
        ),  # ((row * 5 + column) * 5 + ...) * 4 + ...
    ],
)
def test_actions_of_grids_are_named_after_where_they_lead(environment: str, start: int, moves: dict[str, int]) -> None:
    name = next(name for name in gym.registry if name.startswith(environment))  # Taxi's version differs
    kwargs = {"is_slippery": False} if environment == "FrozenLake-v1" else {}
    _, names = environment_labels(name, kwargs)
    assert names is not None
    table: Any = gym.make(name, **kwargs).unwrapped
    assert {move: table.P[start][names.index(move)][0][1] for move in moves} == moves


def test_an_image_with_its_channels_last_is_turned_for_an_encoder() -> None:
    space = spaces.Dict({"image": spaces.Box(0, 255, (7, 5, 3), np.uint8), "direction": spaces.Discrete(4)})
    value = space.sample()
    seen = StateVector.of(space, ["direction"], image=(3, 7, 5)).flat(value)
    np.testing.assert_array_equal(seen.reshape(3, 7, 5), value["image"].transpose(2, 0, 1))
    for ignores, image in ((["direction"], None), (["direction"], (7, 5, 3)), ([], (3, 7, 5))):
        seen = StateVector.of(space, ignores, image=image).flat(value)
        np.testing.assert_array_equal(seen[-105:], value["image"].ravel())


def test_labels_of_blackjack_and_of_minigrid() -> None:
    state, action = environment_labels("Blackjack-v1")
    assert action == ("stick", "hit")
    assert state is not None and len(state) == 32 + 11 + 2
    assert (state[14], state[32 + 3], state[-1]) == ("your sum 14", "dealer's card 3", "usable ace 1")
    pytest.importorskip("minigrid")
    only = [{"name": "minigrid.wrappers.ImgObsWrapper"}]
    state, _ = environment_labels("MiniGrid-Empty-5x5-v0", {"wrappers": only})
    assert state is not None and state[:2] == ("object at cell (0, 0)", "colour at cell (0, 0)")
    state, _ = environment_labels("MiniGrid-Empty-5x5-v0", {"wrappers": [{"name": "minigrid.wrappers.FlatObsWrapper"}]})
    assert state is None
    state, _ = environment_labels("MiniGrid-Empty-5x5-v0", {}, ("mission",))
    assert state is not None and len(state) == 4 + 7 * 7 * 3
    assert state[:5] == ("facing right", "facing down", "facing left", "facing up", "object at cell (0, 0)")
