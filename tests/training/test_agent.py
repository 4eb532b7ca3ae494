"""An agent is trained on real steps only, resumed exactly, and evaluated without changing the training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector.episode_buffer import EpisodeBuffer

import dt_lens
from dt_lens.errors import DtLensError
from dt_lens.training.agent import AgentProgress, _facts, action_loss, train
from dt_lens.training.dataset import Trajectories, Windows
from dt_lens.training.settings import AgentSettings


def small(**changes: Any) -> AgentSettings:
    sizes = {"d_model": 16, "n_layers": 2, "context": 5, "batch_size": 8, "warmup": 2}
    return AgentSettings(**{**sizes, **changes})


@pytest.fixture(scope="module")
def _root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning):
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        _cartpole()
        _linear()
    return root


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on matrices this small spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def minari_root(_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(_root))
    return _root


def _cartpole() -> None:
    """A policy that pushes where the pole leans: a rule that a model can learn."""
    env = gym.make("CartPole-v1", max_episode_steps=60)
    buffers = []
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        rows: list[Any] = [observation]
        actions: list[int] = []
        done = False
        while not done:
            actions.append(int(observation[2] + observation[3] > 0))
            observation, _, terminated, truncated, _ = env.step(actions[-1])
            rows.append(observation)
            done = terminated or truncated
        n = len(actions)
        ends = [i == n - 1 for i in range(n)]
        buffers.append(
            EpisodeBuffer(
                id=seed, observations=np.array(rows), actions=np.array(actions), rewards=[1.0] * n,
                terminations=[False] * n, truncations=ends,
            )
        )  # fmt: skip
    minari.create_dataset_from_buffers("test/cartpole-v0", buffers, env=env)
    endless = gym.make("CartPole-v1", max_episode_steps=1_000_000)
    minari.create_dataset_from_buffers("test/endless-v0", buffers[:2], env=endless)


def _linear() -> None:
    """Actions that are a linear function of the state."""
    rng = np.random.default_rng(0)
    rule = rng.normal(size=(3, 2)) / 4
    box = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    buffers = []
    for i in range(10):
        states = rng.normal(size=(31, 3))
        buffers.append(
            EpisodeBuffer(
                id=i, observations=states, actions=np.clip(states[:-1] @ rule, -1, 1).astype(np.float32),
                rewards=[1.0] * 30, terminations=[False] * 30, truncations=[False] * 29 + [True],
            )
        )  # fmt: skip
    minari.create_dataset_from_buffers(
        "test/linear-v0", buffers, observation_space=box, action_space=gym.spaces.Box(-1, 1, (2,), np.float32)
    )


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings, often = small(steps=24), {"eval_every": 0, "checkpoint_every": 5}
    whole = train("test/linear-v0", tmp_path / "whole", settings, **often)

    def stop(progress: AgentProgress) -> None:
        if progress.step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("test/linear-v0", tmp_path / "parts", settings, **often, report=stop)
    seen: list[int] = []
    parts = train("test/linear-v0", tmp_path / "parts", settings, **often, report=lambda p: seen.append(p.step))
    assert seen == list(range(11, 25))  # from the last checkpoint
    for name, weight in whole.weights.items():
        assert torch.equal(weight, parts.weights[name]), name
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "curve.jsonl").open()] for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_a_run_of_version_0_2_is_resumed_with_its_longer_timestep_table(tmp_path: Path) -> None:
    often = {"eval_every": 0, "checkpoint_every": 2}

    def stop(progress: AgentProgress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    whole = train("test/linear-v0", tmp_path / "whole", small(steps=4, max_ep_len=200), **often)
    with pytest.raises(KeyboardInterrupt):
        train("test/linear-v0", tmp_path, small(steps=4, max_ep_len=200), **often, report=stop)
    file = tmp_path / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    settings = json.loads(state["settings"])
    del settings["max_ep_len"]  # as many rows as the time limit, in version 0.2.0
    older = {**state, "settings": json.dumps(settings)}
    for damage, said in (
        ({"model": {}}, "Missing key"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "loaded state dict"),
        ({"curve": "{"}, "Expecting"),
    ):
        torch.save(older | damage, file)
        with pytest.raises(DtLensError, match=rf"checkpoint\.pt does not fit this run's model \(.*{said}.*--fresh"):
            train("test/linear-v0", tmp_path, small(steps=4), **often)
    torch.save(older, file)
    resumed = train("test/linear-v0", tmp_path, small(steps=4), **often)
    assert resumed.cfg.max_ep_len == 200
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name


def test_the_seed_decides_and_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (
        train("test/linear-v0", tmp_path / str(i), small(steps=3, seed=s), eval_every=0)
        for i, s in enumerate((0, 0, 1))
    )
    assert torch.equal(torch.get_rng_state(), before)
    name = "blocks.0.mlp.W_in"
    assert torch.equal(a.weights[name], b.weights[name]) and not torch.equal(a.weights[name], c.weights[name])


def test_continuous_actions_are_learned_and_written_in_hugging_faces_format(tmp_path: Path) -> None:
    model = train("test/linear-v0", tmp_path, small(steps=250, lr=5e-3, dropout=0.0), eval_every=0)
    loss = json.loads((tmp_path / "curve.jsonl").read_text().splitlines()[-1])["loss"]
    assert loss < 0.05  # actions have variance 0.19
    assert model.cfg.action_tanh and not model.training
    assert model.facts.trained_heads == ("action",)
    assert model.facts.state_mean is not None and len(model.facts.state_mean) == 3
    assert model.facts.return_scale == 10 and model.facts.target_returns == (30,)
    assert model.cfg.max_ep_len == 30
    # Heads without a loss keep their random start, so that comparing with them stays a null.
    fresh = train("test/linear-v0", tmp_path / "one", small(steps=1, dropout=0.0), eval_every=0)
    assert torch.equal(fresh.weights["predict.state.W"], model.weights["predict.state.W"])

    from transformers import DecisionTransformerModel

    theirs = DecisionTransformerModel.from_pretrained(tmp_path).eval()
    batch = {
        "states": torch.randn(2, 5, 3),
        "actions": torch.randn(2, 5, 2),
        "returns_to_go": torch.randn(2, 5, 1),
        "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": torch.ones(2, 5),
    }
    with torch.no_grad():
        assert torch.allclose(model(**batch).action_preds, theirs(**batch).action_preds, atol=1e-5)


def test_quantiles_of_small_returns_keep_their_digits(tmp_path: Path) -> None:
    returns = np.linspace(0.004, 0.968, 41)
    one = np.zeros((41, 1), np.float32)
    data = Trajectories(one, one, returns.astype(np.float32), np.ones(41, np.int64), False, True)
    kept = _facts(small(), data).about["dataset"]["return_quantiles"]
    assert kept == pytest.approx([0.004, 0.245, 0.486, 0.727, 0.968], rel=1e-4)


def test_the_timestep_table_is_as_long_as_the_longest_episode_or_as_asked(tmp_path: Path) -> None:
    spec = gym.spec("CartPole-v1")
    endless = minari.load_dataset("test/endless-v0").env_spec
    assert spec.max_episode_steps == 500 and endless is not None and endless.max_episode_steps == 1_000_000
    assert train("test/endless-v0", tmp_path / "longest", small(steps=1), eval_every=0).cfg.max_ep_len == 60
    options = {"eval_every": 0, "failure": "truncated"}
    asked = train("test/endless-v0", tmp_path / "asked", small(steps=1, max_ep_len=90), **options)
    assert asked.cfg.max_ep_len == 90
    assert json.loads((tmp_path / "asked" / "dt_lens.json").read_text())["failure"] == "truncated"
    with pytest.raises(DtLensError, match="failure is 'crashed'"):
        train("test/endless-v0", tmp_path / "wrong", small(steps=1), eval_every=0, failure="crashed")
    with pytest.raises(DtLensError, match="max_ep_len is 59; it must be at least 60, the steps of the longest"):
        train("test/endless-v0", tmp_path / "short", small(steps=1, max_ep_len=59), eval_every=0)


def test_discrete_actions_are_learned(tmp_path: Path) -> None:
    model = train("test/cartpole-v0", tmp_path, small(steps=200, lr=5e-3, dropout=0.0), eval_every=0)
    loss = json.loads((tmp_path / "curve.jsonl").read_text().splitlines()[-1])["loss"]
    assert loss < 0.55  # guessing has 0.69
    assert model.cfg.discrete_actions and not model.cfg.action_tanh and model.cfg.act_dim == 2
    assert model.facts.environment == "CartPole-v1"


def test_evaluations_make_a_curve_and_leave_the_training_alone(tmp_path: Path) -> None:
    unwatched = train("test/cartpole-v0", tmp_path / "unwatched", small(steps=6), eval_every=0)
    returns: list[dict[float, float]] = []
    losses: list[float] = []
    halfway: list[str] = []

    def report(p: AgentProgress) -> None:
        returns.append(p.returns)
        losses.append(p.loss)
        if p.step == 3:
            agent = dt_lens.load(tmp_path / "watched", check=False)
            halfway.extend((repr(agent), str(dt_lens.evaluate(agent, episodes=1, workers=1, max_steps=2))))

    watched = train(
        "test/cartpole-v0",
        tmp_path / "watched",
        small(steps=6, targets=(50, 20)),
        eval_every=3,
        eval_episodes=8,
        environment="CartPole-v1",
        report=report,
    )
    assert all(losses)  # those of the evaluations too, where the sums begin anew
    for said in (*halfway, repr(watched)):
        assert ("Half-trained: these are the weights after 3 of 6 training steps." in said) == (said in halfway)
    rows = [json.loads(line) for line in (tmp_path / "watched" / "curve.jsonl").open()]
    assert [row["step"] for row in rows] == [3, 6] and list(rows[0]["returns"]) == ["50", "20"]
    assert returns[1] == {} and set(returns[2]) == {50.0, 20.0} and returns[2][50.0] > 1
    assert watched.facts.target_returns == (50, 20)
    for name, weight in unwatched.weights.items():
        assert torch.equal(weight, watched.weights[name]), name


def test_the_episodes_of_evaluations_can_be_cut(tmp_path: Path) -> None:
    last: list[dict[float, float]] = []
    how: dict[str, Any] = {"eval_every": 1, "eval_episodes": 2, "max_steps": 3, "environment": "CartPole-v1"}
    settings = small(steps=1, targets=(50,))
    train("test/cartpole-v0", tmp_path, settings, **how, report=lambda p: last.append(p.returns))
    assert last[-1] == {50.0: 3.0}  # a reward of 1 a step, and no pole falls in three


def test_an_environment_that_does_not_fit_is_said_before_training(tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(DtLensError, match="Pendulum"):
        train(
            "test/cartpole-v0", tmp_path, small(steps=2), eval_every=1, environment="Pendulum-v1",
            report=lambda p: steps.append(p.step),
        )  # fmt: skip
    assert not steps


def test_a_data_set_whose_environment_is_not_installed_trains_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(gym.envs.registry, "CartPole-v1")
    with pytest.warns(UserWarning, match="without evaluations"):
        model = train("test/cartpole-v0", tmp_path, small(steps=2), eval_every=1)
    assert model.facts.environment == "CartPole-v1"


def test_another_run_in_the_folder_is_not_resumed(tmp_path: Path) -> None:
    train("test/linear-v0", tmp_path, small(steps=2), eval_every=0)
    with pytest.raises(DtLensError, match="another n_heads"):
        train("test/linear-v0", tmp_path, small(steps=2, n_heads=2), eval_every=0)
    with pytest.raises(DtLensError, match="another dataset"):
        train("test/cartpole-v0", tmp_path, small(steps=2, targets=(30,)), eval_every=0)
    again = train("test/linear-v0", tmp_path, small(steps=2, n_heads=2), eval_every=0, resume=False)
    assert again.cfg.n_heads == 2
    file = tmp_path / "checkpoint.pt"
    whole, weight = file.read_bytes(), again.weights["blocks.0.mlp.W_in"].detach().T.contiguous().numpy().tobytes()
    place = max(whole.find(weight), whole.find(again.weights["blocks.0.mlp.W_in"].detach().numpy().tobytes()))
    assert place > 0
    for damaged in (b"half", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
        file.write_bytes(damaged)
        with pytest.raises(DtLensError, match=r"checkpoint\.pt is damaged"):
            train("test/linear-v0", tmp_path, small(steps=2, n_heads=2), eval_every=0)


@pytest.mark.parametrize("name", ["eval_every", "eval_episodes", "max_steps", "checkpoint_every"])
def test_bad_intervals_are_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(DtLensError, match=f"{name} is -1; it must be a whole number of at least [01]"):
        train("test/linear-v0", tmp_path, small(), **{name: -1})


@pytest.mark.parametrize("discrete", [False, True])
def test_padding_does_not_count_in_the_loss(discrete: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(2, 4, 3, generator=generator, requires_grad=True)
    actions = torch.eye(3)[torch.randint(3, (2, 4), generator=generator)]
    mask = torch.tensor([[False, False, False, True], [False, True, True, True]])
    loss = action_loss(predicted, {"actions": actions * mask.unsqueeze(-1), "attention_mask": mask}, discrete)
    loss.backward()
    assert predicted.grad is not None
    assert (predicted.grad[~mask] == 0).all() and (predicted.grad[mask] != 0).all()
    real = [(b, t) for b in range(2) for t in range(4) if mask[b, t]]
    if discrete:
        each = [-predicted[at].log_softmax(-1)[actions[at].argmax()] for at in real]
    else:
        each = [(predicted[at] - actions[at]).square().mean() for at in real]
    assert float(loss.detach()) == pytest.approx(sum(float(one.detach()) for one in each) / 4, rel=1e-6)


def test_a_step_learns_from_real_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs whose windows differ in the padded steps alone end with the same weights."""
    sample = Windows.sample

    def spoiled(self: Windows, *shares: Any) -> dict[str, torch.Tensor]:
        batch = sample(self, *shares)
        padding = ~batch["attention_mask"]
        assert padding.any()
        batch["actions"][padding] = 9.0
        return batch

    settings = small(steps=3, shortened=0.5)
    clean = train("test/linear-v0", tmp_path / "clean", settings, eval_every=0)
    monkeypatch.setattr(Windows, "sample", spoiled)
    other = train("test/linear-v0", tmp_path / "spoiled", settings, eval_every=0)
    for name, weight in clean.weights.items():
        assert torch.equal(weight, other.weights[name]), name
