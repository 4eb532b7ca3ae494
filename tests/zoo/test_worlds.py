"""The bundled agents of discrete worlds are what their cards say."""

from __future__ import annotations

import re
import sys
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest

import dt_lens
from dt_lens.decision_transformer.environment_factors import environment_factors
from dt_lens.decision_transformer.environment_labels import environment_labels
from dt_lens.lens import environment_names
from dt_lens.lens.environment_names import specification
from dt_lens.training.planners import planner_for
from dt_lens.zoo.models import bundled

CARDS = {
    "taxi": ("Taxi-v4", 500, 6),
    "doorkey": ("minigrid:MiniGrid-DoorKey-8x8-v0", 984, 7),
    "unlockpickup": ("minigrid:MiniGrid-UnlockPickup-v0", 984, 7),
}


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_card_has_its_facts(name: str) -> None:
    environment, state_dim, act_dim = CARDS[name]
    model = dt_lens.load(name, check=False)
    facts, folder = model.facts, bundled()[name]
    assert (facts.environment, facts.failure, model.cfg.discrete_actions) == (environment, "truncated", True)
    assert (model.cfg.state_dim, model.cfg.act_dim, facts.state_mean) == (state_dim, act_dim, None)
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    assert len(facts.target_returns) >= 5 and sorted(facts.target_returns, reverse=True) == list(facts.target_returns)
    assert tuple(model.embeddings["state_in"].labels) == facts.state_labels
    # The file's labels and factors are the environment's own.
    if environment.startswith("minigrid"):
        pytest.importorskip("minigrid")
    assert facts.factors == {"state_in": environment_factors(environment, facts.environment_kwargs)}
    assert environment_labels(environment, facts.environment_kwargs) == (facts.state_labels, facts.action_labels)
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    recipe = facts.about["recipe"]
    asked = f"--steps {recipe['steps']} --warmup {recipe['warmup']} --context {recipe['context']}"
    targets = ",".join(f"{target:g}" for target in recipe["targets"])
    assert f"dt-lens train {recipe['dataset']} " in card and asked in card and f"--targets {targets} " in card
    assert recipe["targets"] == list(facts.target_returns)


def on_card(name: str) -> dict[float, float]:
    """Target returns and the mean returns at them, as the card's table has them."""
    rows = re.findall(
        r"^\| (-?[\d.]+) \| (-?[\d.]+) \|", (bundled()[name] / "CARD.md").read_text("utf-8"), re.MULTILINE
    )
    return {float(target): float(mean) for target, mean in rows}


@pytest.mark.acceptance(minutes=1)
def test_taxi_drives_as_its_card_says() -> None:
    """It delivers, within 1 of what is possible from the same first states, and obeys its targets."""
    model, said = dt_lens.load("taxi", check=False), on_card("taxi")
    found = {t: dt_lens.evaluate(model, episodes=12, seed=0, target_return=t) for t in said}
    assert list(said) == list(model.facts.target_returns) and said == pytest.approx({t: t for t in said}, abs=3)
    best = found[10.0]
    assert (best.to_frame()["terminated"]).mean() >= 0.95
    env = gym.make(specification("Taxi-v4"))
    planner, possible = planner_for(env), []
    assert planner is not None
    for seed in range(12):
        env.reset(seed=seed)
        total, ended = 0.0, False
        while not ended:
            _, reward, ended, _, _ = env.step(planner.action(env))
            total += float(reward)
        possible.append(total)
    assert np.mean(possible) - 1 <= best.mean <= np.mean(possible)
    assert all(better > worse for better, worse in pairwise(evaluation.mean for evaluation in found.values()))
    for target, evaluation in found.items():
        assert evaluation.mean == pytest.approx(said[target], abs=2)


@pytest.mark.acceptance(minutes=1)
@pytest.mark.parametrize(("name", "least"), [("doorkey", 0.95), ("unlockpickup", 0.85)])
def test_minigrid_agents_act_as_their_cards_say(name: str, least: float) -> None:
    """They succeed at every target, in 16 episodes of each, and obey."""
    pytest.importorskip("minigrid")
    model, said = dt_lens.load(name, check=False), on_card(name)
    assert list(said) == list(model.facts.target_returns)
    found = {t: dt_lens.evaluate(model, episodes=16, seed=0, target_return=t) for t in said}
    assert np.mean([evaluation.to_frame()["terminated"].mean() for evaluation in found.values()]) >= least
    assert all(better > worse for better, worse in pairwise(evaluation.mean for evaluation in found.values()))
    for target, evaluation in found.items():
        assert evaluation.mean == pytest.approx(said[target], abs=0.1)


@pytest.mark.parametrize("name", ["doorkey", "unlockpickup"])
def test_minigrid_agents_scan_without_minigrid_and_say_what_running_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == "minigrid"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(environment_names, "find_spec", lambda name: None)
    model = dt_lens.load(name, check=False)
    table = dt_lens.WeightSVD(model, rank=2).scan("blocks.0.mlp.W_in", embeddings="state_in")
    assert " at cell (" in table["label"].iloc[0]
    with pytest.raises(dt_lens.DtLensError, match=r"needs the package minigrid.*pip install 'dt-lens\[minigrid\]'"):
        dt_lens.evaluate(model, episodes=1)
