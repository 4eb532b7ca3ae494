"""Claim 8 in a MiniGrid, whose states cannot be listed: from an agent to a verdict, at a small size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dt_lens.behaviour.agents import situations
from dt_lens.behaviour.agents.environment import make_environment
from dt_lens.behaviour.agents.minigrid_plans import World
from dt_lens.behaviour.agents.recording import actions_of_episode
from dt_lens.behaviour.agents.task import AgentTask
from dt_lens.cli.app import app
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.environment_factors import environment_factors
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.errors import DtLensError
from dt_lens.study.court import causes

pytest.importorskip("minigrid")

ROOM = "minigrid:MiniGrid-DoorKey-5x5-v0"
KWARGS = {
    "max_steps": 24,
    "wrappers": [
        {"name": "minigrid.wrappers.ViewSizeWrapper", "kwargs": {"agent_view_size": 3}},
        {"name": "minigrid.wrappers.OneHotPartialObsWrapper", "kwargs": {}},
        {"name": "gymnasium.wrappers.FilterObservation", "kwargs": {"filter_keys": ["direction", "image"]}},
    ],
}


@pytest.fixture(scope="module")
def agent() -> HookedDecisionTransformer:
    """An agent that has learnt nothing and acts at random, but for one direction that sorts its inputs by object."""
    factors = environment_factors(ROOM, KWARGS)
    assert factors is not None
    n = len(factors["object"])
    torch.manual_seed(0)
    cfg = HookedDecisionTransformerConfig(
        n, 7, d_model=16, n_layers=1, d_mlp=16, n_heads=1, n_ctx=3, max_ep_len=100, discrete_actions=True,
        action_tanh=False,
    )  # fmt: skip
    model = HookedDecisionTransformer(cfg).eval()
    model.facts = RunFacts(
        3, environment=ROOM, environment_kwargs=KWARGS, target_returns=(1.0,), factors={"state_in": factors},
        failure="truncated", deterministic=False,
    )  # fmt: skip
    u = torch.linalg.qr(torch.randn(16, 16))[0]
    weights = model.weights
    with torch.no_grad():
        weights["blocks.0.mlp.W_in"].copy_(u @ torch.diag(torch.cat([torch.tensor([4.0]), torch.linspace(1, 0.5, 15)])))
        along = {"wall": 1.0, "empty": 2.0, "key": 3.0, "door": 4.0}
        for row, level in enumerate(factors["object"]):
            weights["embed.state.W"][row] += 0.04 * along.get(str(level), 0.0) * u[:, 0]
    return model


def test_windows_are_replayed(agent: HookedDecisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The world that the planner is asked about is the one in which the window ends."""
    monkeypatch.setattr(situations, "EPISODES", 5)
    task, ends = AgentTask.of(agent), []
    asked = situations.matters_in_windows

    def watch(made: Any, factors: Any, played: Any, windows: Any, *rest: Any) -> Any:
        ends.extend(windows)
        return asked(made, factors, played, windows, *rest)

    monkeypatch.setattr(situations, "matters_in_windows", watch)
    (visited,) = task.situations(agent, seed=4) or []
    assert visited.name == "visited" and list(visited.matters) == ["object", "colour", "state", "cell"]
    assert visited.reachable.all() and len(visited) == len(ends) > 60 and {seed for seed, _ in ends} == set(range(4, 9))
    assert not visited.matters["colour"].any()
    assert 0 < visited.matters["cell"].mean() < 1 and 0 < visited.matters["state"].mean() < 1
    states = visited.inputs["states"][:, -1].numpy()
    rows = {end: number for number, end in enumerate(ends)}
    for seed in (4, 8):
        env = task.setting.made.make()
        observation, _ = env.reset(seed=seed)
        door_seen: list[bool] = []
        for step, action in enumerate(actions_of_episode(agent, task.setting, seed)):
            np.testing.assert_allclose(states[rows[seed, step]], task.setting.made.state(observation))
            door_seen.append(bool(observation["image"][..., 4].any()))
            if not any(door_seen[-3:]):  # nothing has a state but a door
                assert not visited.matters["state"][rows[seed, step]]
            observation = env.step(int(action))[0]
        assert World.of(env).name == "MiniGrid-DoorKey-5x5-v0"


def test_claim_8_alone(agent: HookedDecisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(situations, "EPISODES", 4)
    monkeypatch.setattr(situations, "WINDOWS", 40)
    monkeypatch.setattr(causes, "CONTROLS", 19)
    monkeypatch.setattr(causes, "MOST", 2)
    folder = save_pretrained(agent, tmp_path / "agent")
    words = ["court", folder, "--claims", "8", "--out", tmp_path / "out", "--workers", "1"]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "1. W_in matches the action output more than W_out does: not applicable." in done.output
    assert "It was not asked for (asked for: 8)" in done.output and not (tmp_path / "out" / "arms").exists()
    rulings = json.loads((tmp_path / "out" / "court.json").read_text())["rulings"]
    eighth = next(r for r in rulings if (r["claim"], r["way"]) == (8, "proper"))
    assert eighth["verdict"] in ("supported", "not supported", "undecided"), eighth["reason"]
    assert eighth["p_value_holm"] == pytest.approx(min(1, 8 * eighth["p_value"]))
    assert "visited (40 contexts)" in eighth["said"] and "object (1)" in eighth["said"]
    assert set(eighth["numbers"]["visited_matters"]) == {"object", "colour", "state", "cell"}
    assert "alone_statistic" not in eighth["numbers"]


@pytest.mark.parametrize("claims", [[], [9], ["8"], 2.5, [0, 8]])
def test_claims_are_numbers(agent: HookedDecisionTransformer, tmp_path: Path, claims: Any) -> None:
    from dt_lens.study.court.court import court

    with pytest.raises(DtLensError, match=r"claims is .*; give numbers of 1 to 8, such as \[8\]"):
        court(agent, tmp_path, claims=claims)


def test_worlds_without_a_planner(agent: HookedDecisionTransformer) -> None:
    task = AgentTask.of(agent)
    for name, said in (
        ("GoToDoor-5x5", "No planner knows what success is in MiniGrid-GoToDoor-5x5-v0: planners know MiniGrids with"),
        ("BlockedUnlockPickup", "has 1 doors and 2 objects besides the one to pick up"),
    ):
        made = make_environment(f"minigrid:MiniGrid-{name}-v0", KWARGS, agent.cfg)
        other = task.setting._replace(made=made, environment=made.environment)
        with pytest.raises(DtLensError, match=said):
            situations.situations_of(agent, other, dict(agent.facts.factors or {})["state_in"], 0, lambda *_: None)
    agent.facts, kept = RunFacts(3, environment=ROOM, environment_kwargs=KWARGS, target_returns=(1.0,)), agent.facts
    try:
        with pytest.raises(DtLensError, match=r"do not say what the labels of state_in consist of"):
            AgentTask.of(agent).situations(agent)
    finally:
        agent.facts = kept
