"""Environments that an extra brings, that Gymnasium renamed, and what a file may ask of them."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium as gym
import pytest

from dt_lens.behaviour.agents.environment import make_environment
from dt_lens.behaviour.agents.failure import known_rule
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.environment_wrappers import specify
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.errors import DtLensError
from dt_lens.lens import environment_names as module
from dt_lens.lens.environment_names import FileKeywords, specification

NAME = "minigrid:MiniGrid-Empty-5x5-v0"


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "minigrid", raising=False)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        DtLensError, match=r"'MiniGrid-Empty-5x5-v0' needs the package minigrid, which is not .*dt-lens\[minigrid\]'"
    ):
        specification(NAME)


@pytest.mark.filterwarnings("ignore:.*already in registry")
def test_a_file_may_name_minigrid_and_not_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minigrid")
    (tmp_path / "minigrid.py").write_text("raise SystemExit('imported')")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "minigrid")
        patch.chdir(tmp_path)
        patch.syspath_prepend("")
        with pytest.raises(DtLensError, match="comes from a file, and dt-lens imports nothing that a file names"):
            specification(NAME)
    monkeypatch.delitem(sys.modules, "minigrid")
    assert specification(NAME).id == "MiniGrid-Empty-5x5-v0" and "minigrid" in sys.modules


def test_taxi_is_found_by_the_version_that_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gymnasium 1.4 has Taxi-v4 alone, and older ones have Taxi-v3 alone."""
    here = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"
    other = module.VERSIONS[here]
    assert specification(other).id == here
    spec = gym.registry[here]
    monkeypatch.delitem(gym.registry, here)
    with pytest.raises(DtLensError, match="no Gymnasium environment 'Taxi-v"):
        specification(other)
    gym.register(other, spec.entry_point, max_episode_steps=200)
    try:
        assert specification(here).id == other
    finally:
        gym.registry.pop(other)


def test_a_file_may_ask_for_minigrids_own_time_limit() -> None:
    pytest.importorskip("minigrid")
    spec = specification("minigrid:MiniGrid-Empty-5x5-v0")
    assert specify(spec, FileKeywords(max_steps=9))[1] == {"max_steps": 9}
    for wrong in ("9", 0, True, 10**9, [9]):
        with pytest.raises(DtLensError, match="the keyword max_steps="):
            specify(spec, FileKeywords(max_steps=wrong))
    with pytest.raises(DtLensError, match="the keyword max_steps=9"):
        specify(gym.spec("Pendulum-v1"), FileKeywords(max_steps=9))


def test_an_agent_of_taxi_runs_in_either_version() -> None:
    cfg = HookedDecisionTransformerConfig(state_dim=500, act_dim=6, d_model=8, n_layers=1, n_heads=1,
        discrete_actions=True, action_tanh=False)  # fmt: skip
    here = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"
    for name in module.VERSIONS:
        made = make_environment(name, {}, cfg)
        assert (made.environment, made.time_limit) == (here, 200)  # what runs is what the result says
        assert known_rule(None, RunFacts(context=4, environment=name, failure="truncated"), here) == "truncated"
