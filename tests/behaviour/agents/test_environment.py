"""Tasks: which environments fit a model, and how observations and actions are converted."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from dt_lens.behaviour.agents.environment import make_environment, score_reference
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.errors import DtLensError


def _cfg(state_dim: int, act_dim: int, discrete: bool = False) -> HookedDecisionTransformerConfig:
    return HookedDecisionTransformerConfig(state_dim, act_dim, discrete_actions=discrete, max_ep_len=77)


class _Start(gym.Env):  # type: ignore[type-arg]
    observation_space = gym.spaces.Dict({"b": gym.spaces.Box(0, 1, (1,)), "a": gym.spaces.Box(0, 1, (1,))})
    action_space = gym.spaces.Discrete(3, start=10)


@pytest.mark.parametrize(
    ("environment", "cfg", "sentence"),
    [
        ("Hopper-v5", _cfg(17, 3), r"gives states of 11 numbers and this model reads 17"),
        ("Hopper-v5", _cfg(11, 6), r"takes 3 numbers per action and this model predicts 6"),
        ("Hopper-v5", _cfg(11, 3, True), r"takes continuous actions and this model predicts discrete"),
        ("CartPole-v1", _cfg(4, 2), r"takes discrete actions and this model predicts continuous"),
        ("CartPole-v1", _cfg(4, 3, True), r"takes 2 kinds of action and this model predicts 3"),
        ("Hoper-v5", _cfg(11, 3), r"no Gymnasium environment 'Hoper-v5'.*Did you mean 'Hopper-v5'"),
        ("no_such_package:Maze-v0", _cfg(11, 3), r"comes from a file, .* import it yourself, or pass environment="),
        ("", _cfg(11, 3), r"no Gymnasium environment ''"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(
    environment: str, cfg: HookedDecisionTransformerConfig, sentence: str
) -> None:
    with pytest.raises(DtLensError, match=sentence) as caught:
        make_environment(environment, {}, cfg)
    assert "\n" not in str(caught.value)


def test_unknown_keyword_arguments_are_refused() -> None:
    with pytest.raises(DtLensError, match=r"'Hopper-v5' cannot be made: .*wings"):
        make_environment("Hopper-v5", {"wings": 2}, _cfg(11, 3))


@pytest.mark.parametrize("raised", [RuntimeError("no licence\nfound."), AssertionError(), SystemExit(3), KeyError("x")])
def test_whatever_a_constructor_raises_is_one_sentence(raised: BaseException) -> None:
    def make() -> None:
        raise raised

    gym.register("dt-lens-test/Broken-v0", entry_point=make)
    try:
        with pytest.raises(DtLensError, match=r"^The environment 'dt-lens-test/Broken-v0' cannot be made: .+\.$"):
            make_environment("dt-lens-test/Broken-v0", {}, _cfg(2, 3))
    finally:
        del gym.registry["dt-lens-test/Broken-v0"]


def test_keyword_arguments_reach_the_environment() -> None:
    env = make_environment("Hopper-v5", {"terminate_when_unhealthy": False}, _cfg(11, 3)).make()
    assert env.unwrapped._terminate_when_unhealthy is False


def test_the_shortest_limit_holds() -> None:
    assert make_environment("Hopper-v5", {}, _cfg(11, 3)).time_limit == 1000
    assert make_environment("Hopper-v5", {}, _cfg(11, 3), max_steps=20).time_limit == 20
    assert make_environment("Hopper-v5", {}, _cfg(11, 3), max_steps=2000).time_limit == 1000


class _Counting(_Start):
    """As MiniGrid's: it counts its steps itself, and is registered without a limit."""

    max_steps = 100


def test_an_environments_own_limit_holds_beyond_the_models_timestep_table() -> None:
    for number, kind in enumerate((_Counting, _Start)):
        gym.register(f"dt-lens-test/Limit-v{number}", entry_point=kind)
    try:
        assert (
            make_environment("dt-lens-test/Limit-v0", {}, _cfg(2, 3, True)).time_limit == 100
        )  # the table has 77 rows
        assert make_environment("dt-lens-test/Limit-v0", {}, _cfg(2, 3, True), max_steps=90).time_limit == 90
        assert make_environment("dt-lens-test/Limit-v1", {}, _cfg(2, 3, True), max_steps=90).time_limit == 90
        with pytest.warns(UserWarning, match="no time limit that dt-lens can see.*after 77 steps"):
            assert make_environment("dt-lens-test/Limit-v1", {}, _cfg(2, 3, True)).time_limit == 77
    finally:
        for number in range(2):
            del gym.registry[f"dt-lens-test/Limit-v{number}"]


def test_same_dynamics_as_gym_make() -> None:
    ours, theirs = make_environment("Hopper-v5", {}, _cfg(11, 3)).make(), gym.make("Hopper-v5")
    np.testing.assert_array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32):
        a, b = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:4] == b[1:4]


def test_continuous_actions_are_clipped_and_not_rescaled() -> None:
    task = make_environment("Pendulum-v1", {}, _cfg(3, 1))
    env = task.make()  # torques from -2 to 2
    for predicted, expected in ((0.5, 0.5), (1.7, 1.7), (9.0, 2.0), (-9.0, -2.0)):
        actions, taken = task.actions(np.array([[predicted]], np.float32))
        assert actions[0] == pytest.approx(expected)
        assert taken == pytest.approx(expected)
        assert actions[0].dtype == env.action_space.dtype


def test_discrete_actions_are_the_largest_logit_and_come_back_one_hot() -> None:
    gym.register("dt-lens-test/Start-v0", entry_point=_Start, max_episode_steps=3)
    try:
        task = make_environment("dt-lens-test/Start-v0", {}, _cfg(2, 3, True))
        actions, taken = task.actions(np.array([[-1.0, 0.5, 0.2], [3.0, 0.5, 0.2]], np.float32))
    finally:
        del gym.registry["dt-lens-test/Start-v0"]
    assert actions == [11, 10]  # of 10, 11, 12
    assert taken.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_observations_that_are_not_vectors_are_flattened() -> None:
    task = make_environment("FrozenLake-v1", {}, _cfg(16, 4, True))
    assert task.state(3).tolist() == np.eye(16)[3].tolist()


def test_several_choices_at_once_are_the_largest_logit_of_each() -> None:
    class Two(_Start):
        action_space = gym.spaces.MultiDiscrete([2, 3], start=[0, 5])  # type: ignore[assignment]

    task = make_environment(Two, {"max_episode_steps": 3}, _cfg(2, 5, True))
    actions, taken = task.actions(np.array([[0, 1, 3, 1, 2], [4, 1, 0, 1, 2]], np.float32))
    assert [action.tolist() for action in actions] == [[1, 5], [0, 7]]
    assert taken.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]


def test_actions_of_other_spaces_are_refused() -> None:
    class Two(_Start):
        action_space = gym.spaces.MultiBinary(2)  # type: ignore[assignment]

    with pytest.raises(DtLensError, match="only flat continuous"):
        make_environment(Two, {"max_episode_steps": 3}, _cfg(2, 2, True))


def test_scores() -> None:
    hopper = score_reference("Hopper-v4")
    assert hopper is not None
    assert hopper.score(np.array([hopper.random, hopper.expert])).tolist() == [0.0, 100.0]
    assert score_reference("HopperMaze-v1") is None
