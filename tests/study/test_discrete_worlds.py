"""From data to report in discrete worlds, with nothing flattened by hand: a toy-text environment and MiniGrid."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import dt_lens
from dt_lens.behaviour.agents.environment import make_environment
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.state_vector import StateVector
from dt_lens.errors import DtLensError
from dt_lens.study.study import Study
from dt_lens.training.agent import train
from dt_lens.training.settings import AgentSettings
from tests.training.test_spaces import record

SIZES: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "context": 3, "batch_size": 32, "warmup": 5}


@pytest.fixture(autouse=True)
def _minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def test_a_frozen_lake_from_data_to_report(tmp_path: Path) -> None:
    kwargs = {"desc": ["SFFF", "HFHF", "FFFH", "HFFG"], "is_slippery": False}
    env = gym.make("FrozenLake-v1", **kwargs)
    way = {0: 2, 1: 1, 5: 1, 9: 1, 13: 2, 14: 2}

    def policy(state: int, rng: Any) -> int:
        return way[state] if state in way and rng.random() > 0.2 else int(rng.integers(4))

    record("test/lake-v0", env, policy, episodes=40)
    settings = AgentSettings(steps=40, **SIZES, lr=1e-2, targets=(1.0, 0.0), bf16=False)
    model = train("test/lake-v0", tmp_path / "agent", settings, eval_every=0, environment_kwargs=kwargs)
    assert model.facts.state_mean is None and model.embeddings["action_out"].labels == ["left", "down", "right", "up"]
    assert list(model.embeddings["state_in"].labels)[:2] == ["row 0, column 0", "row 0, column 1"]
    unedited = dt_lens.evaluate(model, episodes=4, workers=1)
    assert unedited.mean == 1 and unedited.failure == 0.05 and not unedited.failed.any()
    assert 0 < dt_lens.evaluate(model, episodes=20, workers=1, deterministic=False).mean <= 1
    Study(
        model, tmp_path / "study", edits=1, matrices=["*.W_in"], episodes=2, workers=1, deterministic=False, video=False
    ).run()
    page = (tmp_path / "study" / "report.html").read_text()
    assert "actions sampled" in page and "choice of actions" in page


def test_a_minigrid_from_data_to_report(tmp_path: Path) -> None:
    pytest.importorskip("minigrid")
    env = gym.make("minigrid:MiniGrid-Empty-5x5-v0")
    own = env.observation_space
    assert isinstance(own, spaces.Dict)
    # Minari cannot store MiniGrid's space of missions.
    stored = spaces.Dict({**own.spaces, "mission": spaces.Text(64)})
    way = iter([2, 2, 1, 2, 2] * 6)
    record("test/grid-v0", env, lambda *_: next(way), episodes=6, observation_space=stored)
    settings = AgentSettings(steps=20, **SIZES, lr=1e-2, bf16=False)
    model = train("test/grid-v0", tmp_path / "agent", settings, eval_every=0)
    assert model.facts.ignores == ("mission",) and model.cfg.state_dim == 4 + 147
    assert model.facts.state_mean is not None and not any(model.facts.state_mean[:4])  # one-hot directions
    found = dt_lens.evaluate(model, episodes=2, workers=1)
    assert (found.lengths == 5).all() and (found.returns > 0.9).all() and found.failure == 0.05
    Study(model, tmp_path / "study", edits=1, matrices=["*.W_in"], episodes=2, workers=1, video=False).run()
    page = (tmp_path / "study" / "report.html").read_text()
    assert "MiniGrid-Empty-5x5-v0" in page and "at cell (3, 6)" in page and "action_out" in page


def test_every_environment_of_toy_text_and_minigrid_fits(tmp_path: Path) -> None:
    """Each is made, and its first observations become a state; a few of different kinds stand for all of MiniGrid's."""
    toys = [name for name, spec in gym.registry.items() if "toy_text" in str(spec.entry_point)]
    assert len(toys) >= 5
    grids = ["Empty-5x5", "DoorKey-5x5", "Fetch-5x5-N2", "GoToDoor-5x5", "Dynamic-Obstacles-5x5", "MemoryS7"]
    try:
        import minigrid  # noqa: F401
    except ImportError:
        grids = []
    for name in [*toys, *(f"MiniGrid-{grid}-v0" for grid in grids)]:
        env = gym.make(name, disable_env_checker=True)
        vector = StateVector.of(env.observation_space, ["mission"])
        actions: Any = env.action_space
        cfg = HookedDecisionTransformerConfig(vector.size, int(actions.n), discrete_actions=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about those that have no time limit
            made = make_environment(name, {}, cfg, ignores=["mission"])
        assert made.state(env.reset(seed=0)[0]).shape == (vector.size,)
        assert np.isfinite(made.state(env.step(int(actions.start))[0])).all()
        if name.startswith("MiniGrid"):
            with pytest.raises(DtLensError, match="gives a text, 'mission', which"):
                make_environment(name, {}, cfg)
