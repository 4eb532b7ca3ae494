"""A search and a recording repeat exactly, resume after an interruption, and refuse bad requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.envs.registration import EnvSpec

from dt_lens.errors import DtLensError
from dt_lens.training import recording as module
from dt_lens.training.dataset import read
from dt_lens.training.expert import LinearPolicy, Searcher, SearchSettings, environment, evenly, rollout
from dt_lens.training.recording import balanced, record

TINY: dict[str, Any] = {
    "seed": 2,
    "steps": 1_500,
    "paces": (0.5,),
    "pace_steps": 800,
    "candidates": 60,
    "episodes": 30,
    "bins": 5,
}


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def weights(searcher: Searcher) -> np.ndarray[Any, Any]:
    return np.array([policy.weight for policy in searcher.snapshots])


def test_a_search_does_not_depend_on_workers_or_interruptions(tmp_path: Path) -> None:
    settings = SearchSettings(seed=3, directions=4, best=2)
    alone, together, stopped = Searcher(settings), Searcher(settings), Searcher(settings)
    alone.run(1_500)
    together.run(1_500, workers=2)

    def stop(_: int, __: float) -> None:
        if stopped.iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(1_500, file=tmp_path / "s.npz", report=stop)
    resumed = Searcher(settings)
    resumed.load(tmp_path / "s.npz")
    assert resumed.iteration == 3
    resumed.run(1_500)
    assert alone.iteration > 4
    for other in (together, resumed):
        assert other.steps == alone.steps
        assert np.array_equal(weights(other), weights(alone))
        assert np.array_equal(other.policy.mean, alone.policy.mean)


def test_a_search_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    Searcher(SearchSettings(seed=0)).save(tmp_path / "s.npz")
    with pytest.raises(DtLensError, match="another seed"):
        Searcher(SearchSettings(seed=1)).load(tmp_path / "s.npz")
    (tmp_path / "s.npz").write_bytes(b"PK half a file")
    with pytest.raises(DtLensError, match="damaged or not a saved search"):
        Searcher(SearchSettings(seed=0)).load(tmp_path / "s.npz")


def test_a_pace_rewards_lasting_and_punishes_distance_from_the_pace() -> None:
    env = environment("Hopper-v5")
    policy = LinearPolicy(np.zeros((3, 11)), np.zeros(11), np.ones(11))
    episode = rollout(env, policy, seed=0)
    on_pace = episode._replace(forward=500.0)
    settings = SearchSettings(pace=0.5)
    assert settings.score(on_pace, 1000) == episode.length
    assert settings.score(on_pace._replace(forward=300.0), 1000) == episode.length - 200
    assert settings.score(on_pace._replace(forward=700.0), 1000) == episode.length - 200
    assert SearchSettings().score(episode, 1000) == pytest.approx(episode.rewards.sum() - episode.survive)


def test_rollouts_repeat_and_noise_changes_them() -> None:
    env = environment("Hopper-v5")
    policy = LinearPolicy(np.zeros((3, 11)), np.zeros(11), np.ones(11))
    a, b, c = rollout(env, policy, 1, 0.1), rollout(env, policy, 1, 0.1), rollout(env, policy, 2, 0.1)
    assert np.array_equal(a.observations, b.observations) and np.array_equal(a.actions, b.actions)
    assert not np.array_equal(a.actions[:3], c.actions[:3])
    assert a.actions[:3].any() and not rollout(env, policy, 1).actions.any()


def test_evenly_has_both_ends_and_no_repeats() -> None:
    policies = [LinearPolicy(np.full((1, 1), i), np.zeros(1), np.ones(1)) for i in range(10)]
    assert [int(p.weight[0, 0]) for p in evenly(policies, 4)] == [0, 3, 6, 9]
    assert len(list(evenly(policies, 99))) == 10


def test_balancing_fills_every_bin_alike_and_prefers_long_episodes() -> None:
    rng = np.random.default_rng(0)
    returns = np.concatenate([rng.uniform(0, 10, 500), rng.uniform(10, 20, 50), rng.uniform(20, 30, 10), [0.0, 30.0]])
    lengths = rng.integers(1, 1000, len(returns))
    kept = balanced(returns, lengths, keep=90, bins=3)
    counts = np.histogram(returns[kept], bins=[0, 10, 20, 30.001])[0]
    assert counts.tolist() == [39, 39, 11]
    low = [i for i in range(len(returns)) if returns[i] < 10]
    assert min(lengths[i] for i in kept if i in set(low)) >= sorted(lengths[low])[-39]
    assert balanced(returns, lengths, keep=10_000, bins=3) == list(range(len(returns)))
    few = balanced(returns, lengths, keep=2, bins=3)
    assert len(few) == 2 and max(returns[few]) > 20 and min(returns[few]) < 10


def test_record_is_read_back_and_survives_an_interruption(minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record("Hopper-v5", "test/whole-v0", **TINY, workers=1, folder=minari_root / "a")
    monkeypatch.setattr(module, "CHUNK", 20)

    def stop(phase: str, done: int, total: int, words: str) -> None:
        if phase == "episodes" and done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record("Hopper-v5", "test/parts-v0", **TINY, workers=1, folder=minari_root / "b", report=stop)
    (chunk,) = (minari_root / "b").glob("episodes-*.npz")
    flipped = bytearray(chunk.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    chunk.write_bytes(flipped)  # rolled out again
    record("Hopper-v5", "test/parts-v0", **TINY, workers=1, folder=minari_root / "b")
    assert not list((minari_root / "b").glob("episodes-*.npz"))
    whole, parts = read("test/whole-v0"), read("test/parts-v0")
    assert np.array_equal(whole.states, parts.states) and np.array_equal(whole.actions, parts.actions)
    assert 10 <= len(whole.lengths) <= 30 and whole.environment == "Hopper-v5"
    with pytest.raises(DtLensError, match="already"):
        record("Hopper-v5", "test/whole-v0", **TINY)


def test_an_environment_may_be_named_with_its_module(minari_root: Path) -> None:
    few = {**TINY, "steps": 50, "paces": (), "candidates": 4, "episodes": 4, "bins": 2}
    # NumPy's integers too: all of them are stored as JSON.
    few = {name: np.int64(value) if isinstance(value, int) else value for name, value in few.items()}
    record("gymnasium:Pendulum-v1", "test/named-v0", **few, workers=1, folder=minari_root / "a")
    kept = read("test/named-v0")
    assert (kept.environment, kept.environment_kwargs) == ("Pendulum-v1", {}) and kept.lengths[0] == 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"environment_id": "NoSuch-v5"}, r"'NoSuch-v5': .*[^.]; give the id of one"),
        ({"environment_id": "CartPole-v1"}, "continuous"),
        ({"dataset_id": "no version"}, "is not a Minari id"),
        ({"noises": ()}, "noises"),
        ({"noises": (float("nan"),)}, "noises is"),
        ({"paces": (0.5, 0.5)}, "paces is"),
        ({"paces": (-0.5,)}, "paces is"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"steps": 1e6}, "steps is 1000000.0"),
        ({"folder": Path("/dev/null/x")}, "expert.npz cannot be written: Not a directory"),
        ({"episodes": 0}, "episodes is 0"),
        ({"environment_id": "Pendulum-v1", "paces": (0.5,), "steps": 10, "pace_steps": 10}, "record without paces"),
    ],
)
def test_bad_requests_are_one_sentence_before_the_search(
    minari_root: Path, change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Searcher, "run", lambda *_: pytest.fail("the search began"))
    with pytest.raises(DtLensError, match=words):
        record(**{"dataset_id": "test/x-v0", "workers": 1, "folder": minari_root / "x", **TINY, **change})
    assert not (minari_root / "minari" / "test" / "x-v0").exists()


def test_what_recording_needs_is_found_before_the_search(minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Searcher, "run", lambda *_: pytest.fail("the search began"))
    folder = minari_root / "x"

    def refused(words: str) -> None:
        with pytest.raises(DtLensError, match=words):
            record("Hopper-v5", "test/x-v0", **TINY, workers=1, folder=folder)

    Searcher(SearchSettings(seed=7)).save(folder / "pace-0.5.npz")
    refused(r"pace-0\.5\.npz was written by a search with another seed")
    (folder / "pace-0.5.npz").write_bytes(b"PK half a file")
    refused(r"pace-0\.5\.npz is damaged")
    (folder / "pace-0.5.npz").unlink()
    in_the_way = minari_root / "minari" / "test"
    in_the_way.write_text("")
    refused(r"minari/test/x-v0/data/main_data\.hdf5 cannot be written: Not a directory")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(in_the_way / "below"))
    refused("Minari's folder of data sets cannot be written: Not a directory")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari_root / "minari"))
    in_the_way.unlink()
    monkeypatch.setitem(gym.registry, "Own-v0", EnvSpec("Own-v0", PendulumEnv, max_episode_steps=9))
    with pytest.raises(DtLensError, match=r"cannot store the specification of 'Own-v0' \(Callable found.* as text"):
        record("Own-v0", "test/x-v0", **{**TINY, "paces": ()}, folder=folder)
    monkeypatch.setattr("gymnasium.envs.mujoco.hopper_v5.HopperEnv.step", lambda *_: 1 / 0)
    refused("'Hopper-v5' cannot be run: division by zero")
