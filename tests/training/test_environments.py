"""What a Minari data set says of its environments holds for the agent that is trained on it, wherever it runs."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium.wrappers import RescaleAction, TimeLimit
from minari.data_collector.episode_buffer import EpisodeBuffer

import dt_lens
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.recording import record_actions
from dt_lens.behaviour.agents.running import portable_job, run_job, setting_of
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.behaviour.video import video
from dt_lens.behaviour.video.rendering import _make
from dt_lens.errors import DtLensError
from dt_lens.training.agent import train
from dt_lens.training.settings import AgentSettings

SMALL = AgentSettings(steps=1, d_model=8, n_layers=1, context=3, batch_size=4, targets=(-90.0,))
HALF = [{"name": "gymnasium.wrappers.RescaleAction", "kwargs": {"min_action": -4.0, "max_action": 4.0}}]
TWICE = [{"name": "gymnasium.wrappers.RescaleAction", "kwargs": {"min_action": -1.0, "max_action": 1.0}}]
TRAINING = {"max_episode_steps": 12, "wrappers": HALF}
EVALUATION = {"max_episode_steps": 15, "wrappers": TWICE}


def _wrapped(low: float, high: float, steps: int, **options: Any) -> Any:
    return TimeLimit(RescaleAction(gym.make("Pendulum-v1", disable_env_checker=True, **options), low, high), steps)


def _store(name: str, env: Any, eval_env: Any = None) -> None:
    rng, buffers = np.random.default_rng(0), []
    for number in range(3):
        rows, actions, rewards = [env.reset(seed=number)[0]], [], []
        for _ in range(12):
            actions.append(rng.uniform(-4, 4, 1).astype(np.float32))
            observation, reward, *_ = env.step(actions[-1])
            rows.append(observation)
            rewards.append(float(reward))
        ends = [step == 11 for step in range(12)]
        buffers.append(
            EpisodeBuffer(number, None, None, np.array(rows), np.array(actions), rewards, [False] * 12, ends)
        )
    minari.create_dataset_from_buffers(name, buffers, env=env, eval_env=eval_env)


@pytest.fixture(scope="module", autouse=True)
def _data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        env = _wrapped(-4.0, 4.0, 12, render_mode="rgb_array")
        _store("test/two-v0", env, _wrapped(-1.0, 1.0, 15))
        _store("test/one-v0", env)
        # A specification that JSON cannot hold, which Minari leaves out.
        _store("test/none-v0", RescaleAction(env, np.float32(-1), np.float32(1)))
        yield


@pytest.fixture(scope="module")
def folder(_data: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent of a data set with an environment for training and another one for evaluation."""
    out = tmp_path_factory.mktemp("agent")
    train("test/two-v0", out, SMALL, eval_every=1, eval_episodes=1)
    return out


@pytest.fixture(scope="module")
def agent(folder: Path) -> Any:
    return dt_lens.load(folder, check=False)


def test_what_the_data_say_stands_in_the_file(folder: Path) -> None:
    facts = json.loads((folder / "dt_lens.json").read_text())
    assert (facts["environment"], facts["environment_kwargs"]) == ("Pendulum-v1", TRAINING)  # without render_mode
    assert facts["evaluation_environment"] == {"id": "Pendulum-v1", "kwargs": EVALUATION}


def test_the_evaluation_environment_is_used_and_named(agent: Any) -> None:
    evaluated = dt_lens.evaluate(agent, episodes=2, workers=1)
    assert evaluated.lengths.tolist() == [15, 15] and evaluated.time_limit == 15
    assert "the evaluation environment with max_episode_steps=15, RescaleAction(min_action=-1.0" in str(evaluated)
    assert type(evaluated).from_dict(json.loads(json.dumps(evaluated.to_dict())))._rows() == evaluated._rows()
    # The same actions, in an environment that is wrapped by hand, give the same return.
    for setting, low, high, steps in ((EVALUATION, -1.0, 1.0, 15), (TRAINING, -4.0, 4.0, 12)):
        result = dt_lens.evaluate(agent, episodes=1, workers=1, environment_kwargs=setting)
        actions = record_actions(agent, result, 0)
        env = _wrapped(low, high, steps)
        env.reset(seed=0)
        assert sum(float(env.step(action)[1]) for action in actions) == result.returns[0]
        assert len(actions) == steps and np.abs(actions).max() <= high
    assert "the training environment with max_episode_steps=12" in str(result)
    bare = dt_lens.evaluate(agent, "Pendulum-v1", episodes=1, workers=1, environment_kwargs={"wrappers": []})
    assert bare.returns[0] != evaluated.returns[0] and bare.environment_role == ""


def test_other_processes_get_the_wrappers(agent: Any) -> None:
    setting = setting_of(agent, None, None, None, None)
    job = pickle.loads(pickle.dumps(portable_job(agent, setting, 8)))
    outcome = run_job(job, iter([1]))[0]
    assert outcome.total == dt_lens.evaluate(agent, episodes=1, seed=1, workers=1).returns[0]


def test_a_sweeps_file_names_the_wrappers(agent: Any, tmp_path: Path) -> None:
    plans = [
        Sweep(agent, tmp_path, matrices="blocks.0.mlp.W_in", sv="0", episodes=2, environment_kwargs=kwargs).plan
        for kwargs in (None, TRAINING, {**EVALUATION, "wrappers": HALF})
    ]
    assert (
        plans[0].options["task"]["setting"]["environment_kwargs"] == EVALUATION
        and plans[0].options["task"]["limit"] == 15
    )
    assert plans[0].difference(json.loads(json.dumps(plans[0].options))) is None
    for other in plans[1:]:
        assert "environment_kwargs" in str(plans[0].difference(json.loads(json.dumps(other.options))))
    assert plans[0].options["sample"] != plans[2].options["sample"]


def test_a_video_is_of_the_wrapped_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Any] = []

    def draw(place: Path, *_: Any) -> video.SideBySide:
        made.append(_make(pickle.loads((place / "job.pickle").read_bytes())))
        return video.SideBySide(None, "not drawn")

    monkeypatch.setattr(video, "_draw", draw)
    still = np.zeros((3, 1), np.float32)
    video.side_by_side("Pendulum-v1", still, still, seed=0, file=tmp_path / "x.mp4", environment_kwargs=TRAINING)
    assert made[0].action_space.high.tolist() == [4.0] and made[0].spec.max_episode_steps == 12


def test_model_id_depends_on_the_wrappers_and_not_on_a_field_that_older_files_lack(make_dt: Any) -> None:
    model = make_dt(n_layers=1)
    newer = ("evaluation_environment", "failure", "factors", "ignores", "texts", "deterministic", "choices")
    facts = {name: value for name, value in asdict(model.facts).items() if name not in newer}
    before = hashlib.sha256(json.dumps([model.cfg.to_dict(), facts], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.weights.items()):
        before.update(f"{name} {weight.dtype} {list(weight.shape)}".encode() + weight.detach().numpy().tobytes())
    ids = [model_id(model)]
    assert ids == [before.hexdigest()[:16]]  # as version 0.2.0 had it
    for change in ({"environment_kwargs": TRAINING}, {"evaluation_environment": {"id": "A-v0", "kwargs": {}}}):
        model.facts = replace(model.facts, **change)
        ids.append(model_id(model))
    assert len(set(ids)) == 3
    assert json.loads(model.facts.to_json())["evaluation_environment"] is not None


def test_an_environment_that_the_user_gives_is_where_the_agent_is_evaluated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the data say of the training environment stays."""
    monkeypatch.setitem(gym.registry, "Other-v0", replace(gym.spec("Pendulum-v1"), id="Other-v0"))
    for number, (given, id_, kwargs) in enumerate(
        (
            ({"environment": "Other-v0"}, "Other-v0", {}),
            ({"environment_kwargs": {"g": 5.0}}, "Pendulum-v1", {"g": 5.0, **EVALUATION}),
            ({"environment": "Pendulum-v1", "environment_kwargs": TRAINING}, "Pendulum-v1", TRAINING),
        )
    ):
        facts = train("test/two-v0", tmp_path / str(number), SMALL, eval_every=0, **given).facts
        assert json.loads(facts.to_json()) == json.loads((tmp_path / str(number) / "dt_lens.json").read_text())
        assert (facts.environment, facts.environment_kwargs) == ("Pendulum-v1", TRAINING)
        assert facts.environment_for()[:2] == (id_, kwargs)
        assert (facts.evaluation_environment is None) == (kwargs == TRAINING)
    same = train("test/one-v0", tmp_path / "same", SMALL, eval_every=0, environment="Pendulum-v1")
    assert same.facts.environment_for() == ("Pendulum-v1", TRAINING, "")  # the same id: what the data say of it
    assert same.facts.evaluation_environment is None
    loaded = dt_lens.load(folder, check=False, environment="Pendulum-v1", environment_kwargs={"wrappers": []})
    assert loaded.facts.environment_for()[1:] == ({"max_episode_steps": 15, "wrappers": []}, "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"environment_kwargs": {"nonsense": 1}}, "'Pendulum-v1' cannot be made: .*nonsense"),
        ({"environment": "Nope-v0"}, "no Gymnasium environment 'Nope-v0'"),
        ({"environment": "CartPole-v1"}, "CartPole-v1 gives states of 4 numbers"),
        ({"environment": 3}, "environment is 3; it must be a Gymnasium id"),
        ({"environment_kwargs": 3}, "environment_kwargs is 3; it must be a dictionary"),
        ({"environment_kwargs": {"g": print}}, "cannot be written as JSON"),
    ],
)
@pytest.mark.parametrize("eval_every", [0, 1])
def test_a_wrong_environment_of_the_users_is_an_error_before_training(
    tmp_path: Path, given: dict[str, Any], said: str, eval_every: int
) -> None:
    with pytest.raises(DtLensError, match=said):
        train("test/two-v0", tmp_path, SMALL, eval_every=eval_every, **given)
    assert not (tmp_path / "dt_lens.json").exists()


def test_data_without_an_environment_are_a_warning_and_take_the_users(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"'test/none-v0' names no environment; pass environment=.* without evaluat"):
        assert train("test/none-v0", tmp_path / "none", SMALL, eval_every=1).facts.environment is None
    with pytest.raises(DtLensError, match="names no environment for environment_kwargs; pass environment= as well"):
        train("test/none-v0", tmp_path / "given", SMALL, environment_kwargs={"g": 5.0})
    given = {"environment": "Pendulum-v1", "environment_kwargs": {"g": 5.0}}
    facts = train("test/none-v0", tmp_path / "given", SMALL, eval_every=1, eval_episodes=1, **given).facts
    assert facts.environment_for() == ("Pendulum-v1", {"g": 5.0}, "") and facts.evaluation_environment is None
    assert json.loads((tmp_path / "given" / "curve.jsonl").read_text())["returns"]


class Half(gym.RewardWrapper[Any, Any], gym.utils.RecordConstructorArgs):
    """A wrapper of a package that is not Gymnasium's."""

    def __init__(self, env: Any) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.RewardWrapper.__init__(self, env)

    def reward(self, reward: Any) -> float:
        return float(reward) / 2


def test_a_wrapper_of_another_package_asks_for_an_environment(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _store("test/half-v0", Half(_wrapped(-4.0, 4.0, 12)))
    said = r"'[\w.]*test_environments\.Half' .*pass environment="
    with pytest.warns(UserWarning, match=f"{said}.* without evaluations"):
        model = train("test/half-v0", tmp_path, SMALL, eval_every=1)
    assert model.facts.environment_kwargs["wrappers"][0] == HALF[0]
    with pytest.raises(DtLensError, match=said):
        dt_lens.evaluate(model, episodes=1)
