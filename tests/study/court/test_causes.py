"""Claim 8: a direction that is planted to act where a factor matters is found, and one that acts elsewhere is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dt_lens.behaviour.agents.arms import acting_weights
from dt_lens.behaviour.agents.recording import actions_of_episode
from dt_lens.behaviour.agents.situations import action_chances, situations_of, where_it_matters
from dt_lens.behaviour.agents.tabular import Tabular
from dt_lens.behaviour.agents.task import AgentTask
from dt_lens.behaviour.agents.windows import SlidingPolicy
from dt_lens.behaviour.situations import Situations
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.decision_transformer.model import HookedDecisionTransformer
from dt_lens.decision_transformer.policy import ActingModel
from dt_lens.study.court.case import Case
from dt_lens.study.court.causes import acts_where_it_matters, clustered_directions
from dt_lens.study.court.claims import NotApplicable, verdict_of

N = 16
FACTORS = {"row": [i // 4 for i in range(N)], "column": [i % 4 for i in range(N)]}


@pytest.fixture(scope="module")
def agent() -> HookedDecisionTransformer:
    """An agent of FrozenLake: sixteen states, four actions."""
    torch.manual_seed(0)
    cfg = HookedDecisionTransformerConfig(
        N, 4, d_model=16, n_layers=1, d_mlp=32, n_ctx=3, max_ep_len=100, discrete_actions=True, action_tanh=False
    )
    facts = RunFacts(
        3, environment="FrozenLake-v1", target_returns=(1.0,), factors={"state_in": FACTORS}, failure="truncated"
    )
    model = HookedDecisionTransformer(cfg).eval()
    model.facts = facts
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def acting(agent: HookedDecisionTransformer) -> tuple[AgentTask, list[Situations]]:
    task = AgentTask.of(agent)
    kinds = task.situations(agent, seed=2)
    assert kinds is not None
    return task, list(kinds)


def test_windows_are_those_that_the_agent_acts_on(
    agent: HookedDecisionTransformer, acting: tuple[AgentTask, list[Situations]]
) -> None:
    """The likeliest action in each visited window is the one that was taken, whatever else was in the batch."""
    task, (alone, visited) = acting
    assert [kind.name for kind in (alone, visited)] == ["alone", "visited"] and len(alone) == N
    chances = action_chances(agent, visited)
    assert torch.allclose(chances.sum(1), torch.ones(len(visited), dtype=torch.float64))
    pairs = zip(visited.inputs["states"][:, -1].argmax(1).tolist(), chances.argmax(1).tolist(), strict=True)
    taken: list[tuple[int, int]] = []
    for seed in range(2, 32):
        env = task.setting.made.make()
        state, _ = env.reset(seed=seed)
        for action in actions_of_episode(agent, task.setting, seed):
            taken.append((int(state), int(action)))
            state = env.step(int(action))[0]
    assert set(pairs) <= set(taken)
    # Alone: a first step. FrozenLake begins in state 0.
    first = actions_of_episode(agent, task.setting, 2)[0]
    assert int(action_chances(agent, alone)[0].argmax()) == first
    assert alone.inputs["states"].shape == (N, 1, N) and not alone.inputs["timesteps"].any()


@pytest.mark.parametrize("position", ["none", "learned"])
def test_a_first_step_is_where_the_policy_sees_it(position: str) -> None:
    """Learned positions count from the start of the window, so masked steps before the first may not be cut off."""
    torch.manual_seed(1)
    cfg = HookedDecisionTransformerConfig(
        N, 4, d_model=16, n_layers=1, d_mlp=32, n_ctx=3, max_ep_len=100, discrete_actions=True, action_tanh=False,
        position=position, n_position=8 if position == "learned" else 1,
    )  # fmt: skip
    model = HookedDecisionTransformer(cfg).eval()
    model.facts = RunFacts(3, environment="FrozenLake-v1", target_returns=(1.0,), factors={"state_in": FACTORS})
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    task = AgentTask.of(model)
    alone = (task.situations(model) or [])[0]
    policy = SlidingPolicy(ActingModel(acting_weights(model), cfg), 3, N)
    for row in range(N):
        policy.restart(row)
    logits = policy.act(torch.eye(N), torch.ones(N, 1), torch.zeros(N, dtype=torch.long), torch.zeros(N, 4))
    torch.testing.assert_close(action_chances(model, alone), logits.double().softmax(-1), rtol=1e-5, atol=1e-6)


def test_where_a_factor_matters() -> None:
    """In a corridor of two rows the way to the goal turns on the row, and at the goal's column on nothing."""
    factors = {"row": [0, 0, 1, 1], "column": [0, 1, 0, 1]}
    optimal = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1]], dtype=bool)
    assert where_it_matters("row", factors, optimal).tolist() == [True, False, True, False]
    assert where_it_matters("column", factors, optimal).tolist() == [True, True, True, True]
    factors["row"] = [0, 0, None, 1]
    assert where_it_matters("row", factors, optimal).tolist() == [False] * 4


def test_taxi_by_value_iteration() -> None:
    """The destination matters with the passenger on board, and to nobody on the way to the passenger."""
    import gymnasium as gym

    env = gym.make(max(name for name in gym.registry if name.startswith("Taxi-v")))
    table = Tabular.of(env)
    assert table is not None
    names = ("row", "column", "passenger", "destination")
    columns = zip(*(env.unwrapped.decode(i) for i in range(500)), strict=True)
    factors = {name: list(map(int, column)) for name, column in zip(names, columns, strict=True)}
    optimal = table.optimal_actions()
    destination = where_it_matters("destination", factors, optimal)
    aboard = np.array(factors["passenger"]) == 4
    # Aboard it matters, but where one way alone leads to all destinations.
    assert destination[aboard].mean() > 0.6 and not destination[~aboard & table.reachable].any()
    assert 0 < where_it_matters("row", factors, optimal)[table.reachable].mean() < 1


def row(matrix: str = "blocks.0.mlp.W_in", sv: int = 0, p: float = 0.001, q: float = 0.01, **ps: float) -> Any:
    found = {"matrix": matrix, "side": "read", "sv": sv, "factor": "row", "effect": 0.3, "p_value": p, "q_value": q}
    return found | {f"p_{name}": value for name, value in ({"row": 0.001, "column": 0.5} | ps).items()}


def test_which_directions_are_tried(agent: HookedDecisionTransformer) -> None:
    table = pd.DataFrame(
        [
            row(sv=0, p=0.02),
            row(sv=1, p=0.001, row=0.4, column=0.0001),
            row(sv=2, q=0.06),
            row("blocks.0.attn.OV.0", 0, p=0.03),
            row("blocks.0.attn.OV.0", 0, p=0.01) | {"side": "write"},
        ]
    )
    found = clustered_directions(Case(agent), table)
    assert [(d.matrix, d.side, d.sv, d.factors[0]) for d in found] == [
        ("blocks.0.mlp.W_in", "read", 1, "column"),
        ("blocks.0.attn.OV.0", "write", 0, "row"),
        ("blocks.0.mlp.W_in", "read", 0, "row"),
    ]
    assert len(clustered_directions(Case(agent), table, most=2)) == 2


class Planted:
    """What the model does depends on one direction, in some states only."""

    def choices(self, model: Any, situations: Situations) -> torch.Tensor:
        x = situations.inputs["x"] @ model.weights["blocks.0.mlp.W_in"].double()
        return torch.stack([x[:, 0], torch.zeros(len(x), dtype=torch.float64)], 1).softmax(-1)


@pytest.fixture
def planted(plain: Callable[..., Any]) -> tuple[Any, torch.Tensor, Any]:
    """``W_in`` reads direction 0 far more than the others; the first ten of twenty states lie along it."""
    model = plain(n_layers=1)
    generator = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    with torch.no_grad():
        weight = torch.zeros(64, 96, dtype=torch.float64)
        weight[:, :64] = u @ torch.diag(torch.cat([torch.tensor([9.0]), torch.linspace(1.0, 0.5, 63)]).double())
        model.weights["blocks.0.mlp.W_in"].copy_(weight)
    x = 0.3 * torch.randn(20, 64, generator=generator, dtype=torch.float64)
    x -= x @ u[:, :1] @ u[:, :1].T
    x[:10] += u[:, 0]
    moments = {"blocks.0.hook_resid_mid": x}
    return model, x, moments


@pytest.mark.parametrize("where", ["there", "elsewhere"])
def test_a_planted_cause(planted: tuple[Any, torch.Tensor, Any], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dt_lens.edits.control import Control
    from dt_lens.edits.edit import Edit

    model, x, _ = planted
    # Matched in output energy by hand: these inputs' second moments are isotropic enough.
    monkeypatch.setattr(Edit, "control", lambda edit, seed=0, activations=None: Control(edit, seed))
    matters = np.arange(20) < 10
    if where == "elsewhere":
        matters = ~matters
    half = np.arange(20) % 2 == 0
    kinds = [
        Situations(name, {"x": x}, {"row": matters, "column": half}, np.ones(20, dtype=bool))
        for name in ("alone", "visited")
    ]
    table = pd.DataFrame([row()])
    found = acts_where_it_matters(Case(model), Planted(), kinds, table, None, controls=60)  # type: ignore[arg-type]
    assert found.numbers["alone_statistic"] == found.numbers["visited_statistic"]
    if where == "there":
        assert found.p_value == pytest.approx(1 / 61) and found.effect > found.margin and found.quiet
        assert verdict_of("weights", found, found.p_value) == "supported"
    else:
        assert found.p_value > 0.9 and found.effect < 0
    assert "1 were removed, by their factors: row (1)" in found.said
    everywhere = [
        Situations("alone", {"x": x}, {"row": np.ones(20, dtype=bool), "column": half}, np.ones(20, dtype=bool))
    ]
    with pytest.raises(NotApplicable, match="matter in all situations or in none"):
        acts_where_it_matters(Case(model), Planted(), everywhere, table, None)  # type: ignore[arg-type]
    with pytest.raises(NotApplicable, match="no single direction clusters"):
        acts_where_it_matters(Case(model), Planted(), kinds, pd.DataFrame([row(q=0.2)]), None)  # type: ignore[arg-type]


def test_what_cannot_be_listed(agent: HookedDecisionTransformer) -> None:
    task = AgentTask.of(agent)
    assert situations_of(agent, task.setting, {"row": [0] * 5}, 0, lambda *_: None) is None
    cartpole = HookedDecisionTransformer(
        HookedDecisionTransformerConfig(4, 2, d_model=8, n_layers=1, d_mlp=8, discrete_actions=True, action_tanh=False)
    )
    cartpole.facts = RunFacts(
        3, environment="CartPole-v1", target_returns=(1.0,), factors={"state_in": {"part": ("a", "b", "a", "b")}}
    )
    assert AgentTask.of(cartpole).situations(cartpole) is None
