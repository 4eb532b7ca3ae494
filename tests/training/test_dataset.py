"""Returns-to-go, windows and padding are what the episodes say, and Minari data sets are read back."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector.episode_buffer import EpisodeBuffer

from dt_lens.errors import DtLensError
from dt_lens.training.dataset import Trajectories, Windows, read


def planted(lengths: list[int]) -> Trajectories:
    """Episodes whose numbers identify them: state (step of the data, 1), action the step of the episode, reward 1."""
    n = sum(lengths)
    step = np.concatenate([np.arange(length) for length in lengths]).astype(np.float32)
    return Trajectories(
        states=np.stack([np.arange(n), np.ones(n)], 1).astype(np.float32),
        actions=step[:, None],
        rewards=np.ones(n, np.float32),
        lengths=np.array(lengths),
        discrete=False,
        bounded=False,
    )


def test_returns_to_go_restart_with_each_episode() -> None:
    data = planted([3, 5])
    assert data.returns_to_go.tolist() == [3, 2, 1, 5, 4, 3, 2, 1]
    assert data.returns.tolist() == [3, 5]


def test_returns_to_go_are_exact_far_from_the_end_of_a_long_data_set() -> None:
    rng = np.random.default_rng(0)
    lengths = [100] * 2000
    data = planted(lengths)
    rewards = rng.random(len(data.rewards)).astype(np.float32)
    data = Trajectories(data.states, data.actions, rewards, data.lengths, False, False)
    naive = rewards.reshape(2000, 100)[:, ::-1].cumsum(1, dtype=np.float64)[:, ::-1].ravel()
    assert np.allclose(data.returns_to_go, naive, atol=1e-4)


def test_a_window_inside_an_episode() -> None:
    data = planted([3, 5])
    batch = Windows(data, context=3).at(torch.tensor([4]))
    mean, std = data.state_mean[0], data.state_std[0]
    assert torch.allclose(batch["states"][0, :, 0] * std + mean, torch.tensor([4.0, 5.0, 6.0]))
    assert batch["actions"][0, :, 0].tolist() == [1, 2, 3]
    assert batch["returns_to_go"][0, :, 0].tolist() == [4, 3, 2]  # the scale is 1 for returns below 10
    assert batch["timesteps"][0].tolist() == [1, 2, 3]
    assert batch["attention_mask"][0].tolist() == [True, True, True]


def test_a_window_beyond_the_end_is_padded_on_the_left_and_never_reads_the_next_episode() -> None:
    batch = Windows(planted([3, 5]), context=4).at(torch.tensor([2, 1]))
    assert batch["attention_mask"].tolist() == [[False] * 3 + [True], [False] * 2 + [True] * 2]
    assert batch["timesteps"].tolist() == [[0, 0, 0, 2], [0, 0, 1, 2]]
    assert batch["actions"][..., 0].tolist() == [[0, 0, 0, 2], [0, 0, 1, 2]]
    assert batch["returns_to_go"][..., 0].tolist() == [[0, 0, 0, 1], [0, 0, 2, 1]]
    assert batch["states"][0, :3].abs().max() == 0


def test_episodes_are_drawn_in_proportion_to_their_length() -> None:
    torch.manual_seed(0)
    batch = Windows(planted([10, 90]), context=1).sample(20_000)
    first = (batch["returns_to_go"][:, 0, 0] + batch["timesteps"][:, 0] / 10 < 1.01).float().mean()
    assert abs(float(first) - 0.1) < 0.01


def test_a_share_of_windows_is_shortened_and_none_loses_every_step() -> None:
    torch.manual_seed(0)
    batch = Windows(planted([4, 50]), context=8).sample(4_000, shortened=0.5)
    mask, seen = batch["attention_mask"], batch["attention_mask"].sum(1)
    assert seen.min() == 1 and (mask.int().diff(dim=1) >= 0).all()  # padding only on the left
    assert 0.4 < (seen == 8).float().mean() < 0.6
    assert all((batch[name] * ~mask.unsqueeze(-1)).abs().max() == 0 for name in ("states", "actions", "returns_to_go"))
    assert (batch["timesteps"] * ~mask).max() == 0
    assert torch.equal(batch["actions"][..., 0] * mask, batch["timesteps"] * mask)


def test_a_share_of_windows_comes_from_the_first_steps_of_all_episodes_alike() -> None:
    torch.manual_seed(0)
    batch = Windows(planted([3, 1000]), context=4).sample(4_000, early=0.5)
    first = batch["timesteps"][:, -1] - batch["attention_mask"].sum(1) + 1
    short = batch["returns_to_go"][:, -1, 0] * 1000 + batch["timesteps"][:, -1] < 4
    assert 0.45 < (first < 4).float().mean() < 0.55
    assert 0.2 < short.float().mean() < 0.3


def test_a_constant_entry_is_divided_by_one() -> None:
    data = planted([3, 5])
    assert data.state_std[1] == 1
    assert torch.isfinite(Windows(data, 2).sample(4)["states"]).all()


@pytest.mark.parametrize(
    ("largest", "scale"), [(3300.0, 1000.0), (20.0, 10.0), (9.0, 1.0), (-250.0, 100.0), (0.0, 1.0)]
)
def test_return_scale_brings_returns_below_ten(largest: float, scale: float) -> None:
    one = np.array([[0.0]], np.float32)
    data = Trajectories(one, one, np.array([largest], np.float32), np.array([1]), False, False)
    assert data.return_scale == scale


def test_states_that_are_not_finite_are_refused() -> None:
    one = np.array([[0.0]], np.float32)
    with pytest.raises(DtLensError, match="states that are not finite"):
        Trajectories(one * np.nan, one, np.ones(1, np.float32), np.array([1]), False, False)


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_minari_round_trip_with_discrete_actions_and_dict_observations(minari_root: Path) -> None:
    box = gym.spaces.Box(-10, 10, (2,), np.float64)
    space = gym.spaces.Dict({"observation": box, "goal": gym.spaces.Box(-10, 10, (1,), np.float64)})
    rng = np.random.default_rng(0)
    observation, goal = rng.normal(size=(2, 4, 2)), rng.normal(size=(2, 4, 1))
    buffers = [
        EpisodeBuffer(
            id=i,
            observations={"observation": observation[i], "goal": goal[i]},
            actions=np.array([2, 3, 4]),
            rewards=[1.0, 2.0, 3.0],
            terminations=[False, False, True],
            truncations=[False] * 3,
        )
        for i in range(2)
    ]
    minari.create_dataset_from_buffers(
        "planted/dict-v0", buffers, observation_space=space, action_space=gym.spaces.Discrete(3, start=2)
    )
    data = read("planted/dict-v0")
    flat = np.concatenate([np.concatenate([goal[i], observation[i]], 1)[:3] for i in range(2)])
    order = list(space.spaces)  # Gymnasium's own order
    assert order == ["goal", "observation"] or order == ["observation", "goal"]
    if order[0] == "observation":
        flat = flat[:, [1, 2, 0]]
    assert np.allclose(data.states, flat)
    assert data.actions.tolist() == np.eye(3).tolist() * 2
    assert data.lengths.tolist() == [3, 3] and data.returns.tolist() == [6, 6]
    assert data.discrete and data.environment is None


@pytest.mark.parametrize("name", ["no-such-thing-v0", "not an id"])
def test_an_unknown_data_set_is_one_sentence(minari_root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("minari.storage.hosting.list_remote_datasets", refuse)
    with pytest.raises(DtLensError, match=name):
        read(name)
