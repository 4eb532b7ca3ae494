"""Names of states and actions, from the environment itself."""

from __future__ import annotations

import gymnasium as gym
import pytest

from dt_lens.decision_transformer.environment_labels import environment_labels

CARTPOLE = ("cart position", "cart velocity", "pole angle", "pole angular velocity")


def test_hopper() -> None:
    state, action = environment_labels("Hopper-v5")
    assert state is not None and action is not None and len(state) == 11
    # The model's own joints in the order of qpos without the first, then qvel.
    assert state[:5] == (
        "rootz position",
        "rooty position",
        "thigh_joint position",
        "leg_joint position",
        "foot_joint position",
    )
    assert state[5] == "rootx velocity" and state[-1] == "foot_joint velocity"
    assert action == ("thigh_joint torque", "leg_joint torque", "foot_joint torque")


@pytest.mark.parametrize("name", ["Walker2d-v5", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5", "InvertedPendulum-v5"])
def test_every_coordinate_has_a_name_of_its_own(name: str) -> None:
    env = gym.make(name)
    state, action = environment_labels(name)
    assert action is not None and len(action) == env.action_space.shape[0] == len(set(action))
    if state is not None:
        assert len(state) == env.observation_space.shape[0] == len(set(state))
    env.close()


def test_free_joints_have_seven_positions_and_six_velocities() -> None:
    state, _ = environment_labels("Ant-v5")
    assert state is not None
    assert state[:5] == tuple(f"root {axis} position" for axis in ("z", "qw", "qx", "qy", "qz"))
    assert state[13:19] == tuple(f"root {axis} velocity" for axis in ("x", "y", "z", "rx", "ry", "rz"))


@pytest.mark.parametrize(
    ("name", "state", "action"),
    [
        ("CartPole-v1", CARTPOLE, ("push left", "push right")),
        ("Pendulum-v1", ("cos(angle)", "sin(angle)", "angular velocity"), None),
        ("NoSuchEnvironment-v0", None, None),
        ("not a name at all", None, None),
        ("", None, None),
    ],
)  # fmt: skip
def test_other_environments(name: str, state: object, action: object) -> None:
    assert environment_labels(name) == (state, action)


def test_arguments_change_what_is_labelled() -> None:
    plain, _ = environment_labels("Hopper-v5")
    whole, _ = environment_labels("Hopper-v5", {"exclude_current_positions_from_observation": False})
    assert plain is not None and whole is not None
    assert len(whole) == 12 and whole[0] == "rootx position" and whole[1:] == plain
    small, _ = environment_labels("FrozenLake-v1", {"desc": ["SF", "HG"]})  # a list as an argument
    assert small == ("row 0, column 0", "row 0, column 1", "row 1, column 0", "row 1, column 1")
    assert environment_labels("Hopper-v5", {"no_such_argument": 1}) == (None, None)


def test_action_meanings() -> None:
    class Meaningful(gym.Env):  # type: ignore[type-arg]
        observation_space = gym.spaces.Box(-1, 1, (2,))
        action_space = gym.spaces.Discrete(3)

        def get_action_meanings(self) -> list[str]:
            return ["NOOP", "FIRE", "RIGHT"]

    gym.register("Meaningful-v0", entry_point=lambda: Meaningful())
    assert environment_labels("Meaningful-v0") == (None, ("noop", "fire", "right"))
