"""Episodes as arrays: which of them failed, by which rule, and how long they survived."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.failure import known_rule
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.errors import DtLensError


def _episodes(returns: Any, lengths: Any = None, environment: str = "Hopper-v5") -> AgentEvaluation:
    lengths = np.full(len(returns), 1000) if lengths is None else lengths
    outcomes = [
        Outcome(i, float(r), int(n), bool(n < 1000), bool(n >= 1000))
        for i, (r, n) in enumerate(zip(returns, lengths, strict=True))
    ]
    return AgentEvaluation.from_outcomes(outcomes[::-1], environment=environment, target_return=3600.0, time_limit=1000)


RNG = np.random.default_rng(0)
RETURNS = RNG.normal(2400, 200, 40)
LENGTHS = np.where(np.arange(40) < 30, RNG.integers(100, 900, 40), 1000)


def test_survival_is_of_termination_and_censors_the_time_limit() -> None:
    curve = _episodes(RETURNS, LENGTHS).survival
    assert curve.survival[-1] == pytest.approx(0.25)
    assert curve.times[-1] == 1000


def test_failure_rules() -> None:
    e = _episodes(RETURNS, LENGTHS)
    assert e.with_failure("truncated").failed.sum() == 10
    assert e.with_failure(2400).failed.tolist() == (RETURNS < 2400).tolist()
    short = e.with_failure(lambda frame: frame["length"] < 300)
    assert short.failed.tolist() == (LENGTHS < 300).tolist()
    assert e.failed.sum() == 30  # the original is as it was
    assert _episodes([1.0], environment="MountainCar-v0").failure == "truncated"
    maze = _episodes([0.0, -1.0, 0.1, 0.9], environment="a.module:Flat/MiniGrid-Dynamic-Obstacles-8x8-v0")
    assert maze.failed.tolist() == [True, True, False, False]  # the goal pays, and a collision ends it too
    with pytest.raises(DtLensError, match="one per episode"):
        _ = e.with_failure(lambda frame: [True]).failed
    with pytest.raises(DtLensError, match="failure is True"):
        e.with_failure(True)


def test_a_guessed_rule_says_that_it_is_one() -> None:
    """Reaching the goal ends this environment: "failed 5 of 5" was all that was said."""
    guessed = _episodes([1.0] * 5, [7] * 5, environment="Goal-v0")
    assert guessed.failed.all() and guessed.failure_guessed
    assert "this is a guess; say it with failure= (--failure)" in guessed.failure_note
    told = guessed.with_failure("truncated")
    assert not told.failed.any() and not told.failure_guessed and told.failure_note == ""
    facts = RunFacts(context=2, environment="Goal-v0", failure="truncated")
    assert known_rule(None, facts, "module:Goal-v0") == "truncated"
    assert known_rule(0.5, facts, "Goal-v0") == 0.5
    assert known_rule(None, facts, "Hopper-v5") is None  # the facts' rule is of their own environment
    with pytest.raises(DtLensError, match="failure is 'fell'"):
        known_rule("fell", facts, "Goal-v0")  # type: ignore[arg-type]
    with pytest.raises(DtLensError, match="facts' failure is 'fell'; it must be 'terminated', 'truncated' or a return"):
        RunFacts(context=2, failure="fell")


def test_a_return_equal_to_the_bound_has_not_failed() -> None:
    assert _episodes([1.0, 2.0, 3.0]).with_failure(2.0).failed.tolist() == [True, False, False]
