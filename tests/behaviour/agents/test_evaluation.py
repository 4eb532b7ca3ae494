"""Evaluations and their comparison: right numbers, sensible edge cases, readable tables."""

from __future__ import annotations

import json
import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.errors import DtLensError
from dt_lens.statistics.outcomes import mcnemar, wilson


def _evaluation(
    returns: Any, lengths: Any = None, *, seed: int = 0, environment: str = "Hopper-v5", **rest: Any
) -> AgentEvaluation:
    lengths = np.full(len(returns), 1000) if lengths is None else lengths
    outcomes = [
        Outcome(seed + i, float(r), int(n), bool(n < 1000), bool(n >= 1000))
        for i, (r, n) in enumerate(zip(returns, lengths, strict=True))
    ]
    options = {"target_return": 3600.0, "time_limit": 1000, "model_id": "0123456789abcdef"}
    return AgentEvaluation.from_outcomes(outcomes[::-1], environment=environment, **(options | rest))


RNG = np.random.default_rng(0)
GOOD = RNG.normal(2900, 30, 40)
LENGTHS = np.where(np.arange(40) < 30, RNG.integers(100, 900, 40), 1000)
BAD = GOOD - 500 + RNG.normal(0, 200, 40)


def test_summary() -> None:
    e = _evaluation(BAD, LENGTHS)
    s = e.summary()
    assert e.mean == s["mean"] == pytest.approx(BAD.mean())
    assert s["std"] == pytest.approx(BAD.std(ddof=1))
    assert s["mean_interval"][0] < s["mean"] < s["mean_interval"][1]
    assert s["iqm"] == pytest.approx(np.sort(BAD)[10:30].mean())
    assert (s["failures"], s["failure_rate"]) == (30, 0.75)
    assert s["failure_interval"] == tuple(wilson(30, 40))
    assert s["score"] == pytest.approx(100 * (BAD.mean() + 20.272305) / (3234.3 + 20.272305))
    assert s["score"] == pytest.approx(e.to_frame()["score"].mean())
    assert s == e.summary()
    assert e.seeds.tolist() == list(range(40))
    assert e.returns.tolist() == BAD.tolist()


def test_comparison() -> None:
    edited, baseline = _evaluation(BAD, LENGTHS), _evaluation(GOOD)
    c = edited.compare(baseline)
    d = BAD - GOOD
    assert c.difference == pytest.approx(d.mean())
    assert c.difference_interval.low < d.mean() < c.difference_interval.high < 0
    assert c.effect_size == pytest.approx(d.mean() / d.std(ddof=1))
    assert c.p_value == pytest.approx(1 / 10_001)
    assert (c.failure_edited, c.failure_baseline) == (0.75, 0.0)
    assert c.failure_p_value == mcnemar(edited.failed, baseline.failed) < 1e-6
    assert c.survival_statistic > 0
    assert c.survival_p_value < 1e-6
    back = baseline.compare(edited)
    assert back.difference == -c.difference
    assert back.p_value == c.p_value
    frame = c.to_frame()
    assert frame["difference"].tolist() == d.tolist()
    assert frame.shape == (40, 8)


def test_the_paired_interval_is_narrower_than_unpaired_noise() -> None:
    """Pairing removes what the seeds share: a hard seed is hard for both."""
    hardness = RNG.normal(0, 1000, 60)
    baseline = _evaluation(2000 + hardness)
    edited = _evaluation(1990 + hardness + RNG.normal(0, 5, 60))
    c = edited.compare(baseline)
    assert c.difference_interval.high < 0
    assert c.p_value < 0.001
    assert c.difference_interval.high - c.difference_interval.low < 5


@pytest.mark.parametrize("n", [1, 2, 40])
def test_equal_evaluations_differ_by_nothing(n: int) -> None:
    e = _evaluation(GOOD[:n])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = e.compare(_evaluation(GOOD[:n]))
        text = str(c) + str(e) + c._repr_html_()
    assert (c.difference, c.p_value, c.failure_p_value, c.survival_p_value) == (0.0, 1.0, 1.0, 1.0)
    assert c.effect_size == 0.0 or n == 1
    assert "p = 1" in text
    json.dumps(c.to_dict())


def test_small_returns_are_printed_with_their_digits() -> None:
    """As MiniGrid's, between 0 and 1: one decimal would say that an edit changes the return by +0.0."""
    returns = np.linspace(0.85, 0.95, 11)
    baseline, edited = _evaluation(returns), _evaluation(returns - 0.031)
    assert "0.900  [0." in str(baseline) and "0.850 to 0.950" in str(baseline)
    assert "-0.031  95 %" in str(edited.compare(baseline)) and "-0.031" in repr(edited.compare(baseline))


def test_equal_returns_are_not_said_to_be_equal_episodes() -> None:
    """Lengths and failures may differ where returns do not."""
    equal = np.ones(20)
    said = str(_evaluation(equal, np.full(20, 10)).compare(_evaluation(equal)))
    assert "no return changed" in said and "10.0 against 1000.0 steps" in said and "nothing changed" not in said
    assert "100.0 %" in said


def test_a_failure_function_says_true_or_false() -> None:
    e = _evaluation(GOOD)
    assert e.with_failure(lambda frame: 1.0 * (frame["return"] < 2900)).failed.any()
    for answer in (np.full(40, np.nan), np.full(40, 2), np.full(40, "yes")):
        with pytest.raises(DtLensError, match="must give True or False for each episode"):
            e.with_failure(lambda frame, answer=answer: answer).failed  # noqa: B018
    assert type(e.with_failure(np.float32(7.5)).failure) is float


def test_a_constant_difference() -> None:
    c = _evaluation(GOOD - 7.0).compare(_evaluation(GOOD))
    assert c.difference == pytest.approx(-7.0)
    assert c.p_value < 0.001
    assert c.effect_size < -1e6


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"environment": "Hopper-v4"}, "environment"),
        ({"environment_kwargs": {"a": 1}}, "environment_kwargs"),
        ({"target_return": 1800.0}, "target return"),
        ({"time_limit": 500}, "time limit"),
        ({"failure": 100.0}, "failure rule"),
        ({"seed": 1}, "different episodes"),
    ],
)
def test_evaluations_that_cannot_be_paired_are_refused(other: dict[str, Any], what: str) -> None:
    with pytest.raises(DtLensError, match=what):
        _evaluation(GOOD).compare(_evaluation(GOOD, **other))
    with pytest.raises(DtLensError, match=r"different episodes \(40 from 0 and 39 from 0\)"):
        _evaluation(GOOD).compare(_evaluation(GOOD[:39]))
    with pytest.raises(DtLensError, match="compare takes another evaluation, not a NoneType"):
        _evaluation(GOOD).compare(None)  # type: ignore[arg-type]


def test_printed_tables() -> None:
    e = _evaluation(BAD, LENGTHS, edits=({"matrix": "blocks.0.mlp.W_in"},))
    text = str(e.compare(_evaluation(GOOD)))
    for line in (
        "40 paired episodes, seeds 0 to 39",
        "paired difference",
        "75.0 % [",
        "p = ",
        "log-rank",
        "Cohen's d_z",
    ):
        assert line in text
    assert max(map(len, text.splitlines())) <= 120
    assert "mean return" in str(e)
    assert "1 edit" in repr(e)
    assert e._repr_html_().startswith("<table>")
    assert "&lt;lambda&gt;" in e.with_failure(lambda frame: frame["length"] < 3)._repr_html_()


def test_an_evaluation_stays_one_through_pickle_and_another_rule() -> None:
    e = _evaluation(BAD, LENGTHS)
    assert e.failed.any()  # a cached value travels too
    back = pickle.loads(pickle.dumps(e))
    assert isinstance(back, AgentEvaluation)
    assert back.to_dict() == e.to_dict()
    c = pickle.loads(pickle.dumps(e.compare(_evaluation(GOOD))))
    assert repr(c) == repr(e.compare(_evaluation(GOOD)))
    assert isinstance(e.with_failure(2400.0), AgentEvaluation)


def test_everything_is_plain_json() -> None:
    e = _evaluation(BAD, LENGTHS)
    written = json.loads(json.dumps(e.with_failure(2400.0).to_dict()))
    assert pd.DataFrame(written["per_episode"]).equals(e.to_frame())
    read = AgentEvaluation.from_dict(written)
    assert json.loads(json.dumps(read.to_dict())) == written
    assert read.compare(e.with_failure(2400.0)).difference == 0.0
    assert (
        AgentEvaluation.from_dict(e.with_failure(lambda frame: frame["length"] < 3).to_dict()).failure == "terminated"
    )
    of_users = _evaluation(BAD, LENGTHS, environment_kwargs={"reward": abs, "g": np.float32(9.5)})
    assert json.loads(json.dumps(of_users.to_dict()))["environment_kwargs"] == {"reward": repr(abs), "g": 9.5}
    with pytest.raises(DtLensError, match="per_episode"):
        AgentEvaluation.from_dict({name: value for name, value in written.items() if name != "per_episode"})
    of_0_3 = {name: value for name, value in written.items() if name not in ("task", "base_id", "details")}
    older = AgentEvaluation.from_dict(of_0_3 | {"failure": 2400.0})
    assert json.loads(json.dumps(older.to_dict())) == written
    assert json.loads(json.dumps(e.compare(_evaluation(GOOD)).to_dict()))["failure_edited"] == 0.75
