"""An agent with scripted answers to doses, so that the right verdict is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import dt_lens
from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.readouts import RETURN_TO_GO
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.edits.edit import Edit
from dt_lens.study.steering import steering
from dt_lens.study.steering.doses import (
    Candidate,
    candidates_of,
)

TARGETS = (100.0, 200.0, 300.0)
Answer = Callable[[str, int, float], tuple[float, float]]  # matrix, sv, dose -> change of the return, chance to fail


@pytest.fixture(scope="module")
def agent(make_dt: Callable[..., Any]) -> Any:
    model = make_dt(3, state_dim=11, act_dim=3, d_model=32, d_mlp=40, n_layers=2, n_heads=1, n_ctx=3)
    model.facts = RunFacts(context=3, environment="Hopper-v5", target_returns=TARGETS)
    return model


@pytest.fixture
def answering(agent: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer, Any], None]:
    """Replace episodes by ``target + change + noise``; a random direction does nothing unless ``random`` says what."""
    inputs = dt_lens.collect_activations(agent, episodes=1, max_steps=4)
    monkeypatch.setattr(steering._Search, "_inputs", lambda *_: inputs)

    def put(answer: Answer, obeys: float = 1.0, random: Callable[[Edit], tuple[float, float]] | None = None) -> None:
        def evaluate(self: Any, edit: Edit | None, target: float, units: range) -> AgentEvaluation:
            change, fails, key = 0.0, 0.0, 0
            if edit is not None:
                record = edit.to_dict()
                value, sv = record["value"], record["sv"][0]
                if isinstance(value, float):
                    change, fails = answer(record["matrix"], sv, value)
                    key = int(1000 * value) + sv
                elif random is not None:
                    change, fails = random(edit)
            outcomes = []
            for i in units:
                own = np.random.default_rng([i, 1]).standard_normal()  # what the pair shares
                noise, coin = (
                    np.random.default_rng([i, key]).standard_normal(),
                    np.random.default_rng([i, key, 2]).random(),
                )
                total = 200 + obeys * (target - 200) + change + 5 * own + 5 * noise
                outcomes.append(Outcome(i, float(total), 10, bool(coin < fails), not coin < fails))
            return AgentEvaluation.from_outcomes(
                outcomes, environment="Hopper-v5", target_return=target, time_limit=10, model_id=model_id(self.model)
            )

        monkeypatch.setattr(steering._Search, "_evaluate", evaluate)

    return put


@pytest.fixture
def few_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """One random direction on either side, where the verdict does not depend on them."""
    monkeypatch.setattr(steering, "RANDOM", 1)


@pytest.fixture(scope="module")
def planted(agent: Any) -> Candidate:
    return candidates_of(agent, 6, RETURN_TO_GO)[4]
