"""What the states of discrete worlds consist of, checked with the environments' own codes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.toy_text.taxi import TaxiEnv

from dt_lens.decision_transformer.environment_factors import described_states, environment_factors
from dt_lens.decision_transformer.environment_labels import environment_labels
from dt_lens.decision_transformer.state_vector import StateVector

ONE_HOT: dict[str, Any] = {
    "wrappers": [
        {"name": "minigrid.wrappers.OneHotPartialObsWrapper", "kwargs": {}},
        {"name": "gymnasium.wrappers.FilterObservation", "kwargs": {"filter_keys": ["direction", "image"]}},
    ]
}


def test_taxis_states_are_rows_columns_passengers_and_destinations() -> None:
    factors, (labels, actions) = environment_factors("Taxi-v4"), environment_labels("Taxi-v4")
    assert factors is not None and labels is not None and set(map(len, factors.values())) == {500} == {len(set(labels))}
    bare: Any = gym.make("Taxi-v4").unwrapped
    waiting, wanted = ("R", "G", "Y", "B", "in taxi"), ("R", "G", "Y", "B")
    for state in range(500):
        row, column, passenger, destination = (
            factors[name][state] for name in ("row", "column", "passenger", "destination")
        )
        assert bare.encode(row, column, waiting.index(str(passenger)), wanted.index(str(destination))) == state
    assert labels[bare.encode(0, 1, 0, 1)] == "row 0, column 1, passenger R, destination G"
    # Where the taxi stands at the passenger's letter, it can pick him up.
    for state in np.flatnonzero([level == "B" for level in factors["passenger"]]):
        at = (factors["row"][state], factors["column"][state]) == (4, 3)
        assert (bare.P[state][4][0][2] == -1) == at
    assert actions == ("south", "north", "east", "west", "pickup", "dropoff")
    env = gym.make("Taxi-v4")
    env.reset(seed=0)
    bare = env.unwrapped
    for action, name, change in ((0, "row", 1), (1, "row", -1), (2, "column", 1), (3, "column", -1)):
        bare.s = bare.encode(2, 2, 0, 1)
        after = env.step(action)[0]
        assert factors[name][after] == 2 + change


@pytest.mark.parametrize(("name", "shape"), [("FrozenLake8x8-v1", (8, 8)), ("CliffWalking-v1", (4, 12))])
def test_the_cells_of_a_grid(name: str, shape: tuple[int, int]) -> None:
    factors, (labels, actions) = environment_factors(name), environment_labels(name)
    assert factors is not None and labels is not None and actions is not None
    env: Any = gym.make(name, **({"is_slippery": False} if name.startswith("Frozen") else {}))
    env.reset(seed=0)
    middle = int(np.ravel_multi_index((1, 4), shape))
    assert labels[middle] == "row 1, column 4" and len(labels) == shape[0] * shape[1]
    for action, step in {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}.items():
        env.unwrapped.s = middle
        after = env.step(actions.index(action))[0]
        assert (factors["row"][after], factors["column"][after]) == (1 + step[0], 4 + step[1])
    if name.startswith("Frozen"):
        holes = [state for state, tile in enumerate(factors["tile"]) if tile == "hole"]
        assert factors["tile"][0] == "start" and factors["tile"][63] == "goal" and len(holes) == 10
        assert all(env.unwrapped.P[hole][0][0][3] for hole in holes)


def test_a_minigrid_view_is_named_by_cells() -> None:
    pytest.importorskip("minigrid")
    from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT

    name = "minigrid:MiniGrid-DoorKey-8x8-v0"
    factors, (labels, actions) = environment_factors(name, ONE_HOT), environment_labels(name, ONE_HOT)
    assert factors is not None and labels is not None and len(labels) == 984 == len(set(labels))
    assert set(factors) == {"object", "colour", "state", "cell"}
    assert actions == ("left", "right", "forward", "pickup", "drop", "toggle", "done")
    from dt_lens.decision_transformer.environment_wrappers import specify

    spec, own = specify(gym.spec("MiniGrid-DoorKey-8x8-v0"), ONE_HOT)
    env: Any = gym.make(spec, **own)
    observation, _ = env.reset(seed=1)
    for _ in range(4):
        on = np.flatnonzero(StateVector.of(env.observation_space).flat(observation))
        raw = env.unwrapped.gen_obs()
        assert len(on) == 1 + 3 * 49
        assert labels[on[0]] == "facing " + ("right", "down", "left", "up")[raw["direction"]]
        seen = {
            (kind, factors["cell"][i]): factors[kind][i]
            for i in on[1:]
            for kind in ("object", "colour", "state")
            if factors[kind][i] is not None
        }
        for x, y in np.ndindex(7, 7):
            thing, colour, state = raw["image"][x, y]
            at = f"({x}, {y})"
            assert seen["object", at] == IDX_TO_OBJECT[thing] and seen["colour", at] == IDX_TO_COLOR[colour]
            assert seen["state", at] == ("open", "closed", "locked")[state]
        observation = env.step(0)[0]
    i = labels.index("goal at cell (3, 5)")
    assert [factors[kind][i] for kind in factors] == ["goal", None, None, "(3, 5)"]
    assert [factors[kind][0] for kind in factors] == [None] * 4
    plain, _ = environment_labels(name, {}, ["mission"])
    assert plain is not None and plain[4 + 3 * (7 * 3 + 5)] == "object at cell (3, 5)"
    assert environment_factors(name, {}, ["mission"]) is None
    pixels = {"wrappers": [{"name": "minigrid.wrappers.RGBImgPartialObsWrapper", "kwargs": {"tile_size": 1}}]}
    pixel_labels, _ = environment_labels(name, pixels, ["mission"])
    assert pixel_labels is not None and "cell" not in pixel_labels[10]


@pytest.mark.parametrize("name", ["Hopper-v5", "CartPole-v1", "NoSuch-v0", "Blackjack-v1"])
def test_other_states_have_no_factors(name: str) -> None:
    assert environment_factors(name) is None


@pytest.mark.parametrize("base", [gym.Env, TaxiEnv])
def test_a_class_of_the_same_name_has_no_factors(base: Any) -> None:
    kind = type("TaxiEnv", (base,), {"observation_space": gym.spaces.Box(0, 1, (3,)), "__module__": "mine"})
    env = kind()
    env.observation_space = gym.spaces.Box(0, 1, (3,))
    assert described_states(env) is None
