"""Atlases: random changes beside directions, unequal numbers of episodes, and noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, kstest

from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.sweep.plan import Arm
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.statistics.multiplicity import q_values
from dt_lens.study.atlas import tables
from dt_lens.study.atlas.atlas import _removed, make_atlas
from dt_lens.study.atlas.page import write_atlas
from dt_lens.study.atlas.sentences import sentences

Run = Callable[..., SweepResults]


@pytest.fixture
def run(agent: Any, scripted: Any, tmp_path: Path) -> Run:
    """Sweep all removals of one matrix; ``lost`` says what an arm costs."""

    def made(lost: Callable[[Arm], float], engine: dict[str, Any] | None = None, **options: Any) -> SweepResults:
        given = {"matrices": "blocks.0.mlp.W_out", "edits": "zero", "sv": "all", "episodes": 4, "workers": 1}
        sweep = Sweep(agent, tmp_path / "sweep", **(given | options))
        sweep.run(engine=scripted(sweep, lost, **(engine or {})))
        return sweep.results

    return made


@pytest.mark.parametrize("unedited", [1000.0, -1000.0])
def test_a_loss_is_a_loss_whatever_the_sign_of_the_return(agent: Any, run: Run, unedited: float) -> None:
    found = make_atlas(agent, run(lambda arm: 300.0 * (arm.kind == "edit"), {"unedited": unedited}, controls=1))
    assert "removal costs **+30." in sentences(found)[2] or "removal costs **+29.9" in sentences(found)[2]
    assert found.shares["controlled_large"].iloc[0] == 16
    assert found.shares["controls_large"].iloc[0] == 0


def test_a_return_of_about_zero_has_no_shares(agent: Any, run: Run) -> None:
    found = make_atlas(agent, run(lambda arm: 300.0 * (arm.kind == "edit"), {"unedited": 0.0}, controls=1))
    text = " ".join(sentences(found))
    assert "removal costs **+300** points of return [+" in text
    assert "10 %" not in text
    assert found.shares[["large", "controlled_large", "controls_large"]].isna().all(axis=None)


def test_random_changes_are_counted_one_by_one(agent: Any, run: Run) -> None:
    """One of two costs 15 %: their mean is below a tenth, and half of them are above."""
    results = run(lambda arm: 150.0 * (arm.kind == "control" and arm.control == 0), controls=2)
    found = make_atlas(agent, results)
    assert len(results.table().query("kind == 'control' and difference < -100")) == 16
    row = found.shares.iloc[0]
    assert (row["controls"], row["controls_large"], row["controlled_large"]) == (32, 16, 0)
    assert "**16 of 32** random changes cost more than 10 %, and **0 of 16** of those directions" in sentences(found)[1]


def test_a_direction_is_ranked_among_its_random_changes(agent: Any, run: Run, tmp_path: Path) -> None:
    """Direction 0 costs more than all nineteen, direction 1 than all but two, the others nothing, like the rest."""
    cost = {0: 300.0, 1: 150.0}

    def lost(arm: Arm) -> float:
        if arm.kind == "edit":
            return cost.get(arm.sv or 0, 0.0)
        return 200.0 if arm.kind == "control" and (arm.control or 0) < 2 else 0.0

    found = make_atlas(agent, run(lost, controls=19, sv="0-5"))
    rows = found.directions.set_index("sv")
    assert rows["controls_as_costly"][[0, 1]].tolist() == [0, 2]
    assert rows["rank_p_value"][[0, 1]].tolist() == pytest.approx([1 / 20, 3 / 20])
    assert (rows["controls_as_costly"][2:] >= 2).all()
    (said,) = [sentence for sentence in sentences(found) if "19 random changes or more" in sentence]
    best = int((rows["rank_p_value"] <= 0.05).sum())
    assert said.startswith(f"**{best} of 6** directions") and best >= 1
    # They were chosen for nothing here; where they are chosen for their damage, chance does far more.
    assert "beforehand 0.3 would by chance" in said and said.endswith("with probability 0.87.")
    assert f"the least q of the 6 is {q_values(rows['rank_p_value']).min():.2g})" in said
    page = write_atlas(found, tmp_path / "page").read_text()
    assert ">controls as costly<" in page
    few = make_atlas(agent, run(lost, controls=2, sv="0-5"))  # the file keeps what it has
    assert few.directions["controls"].tolist() == [19] * 6


def test_a_random_change_has_any_rank_among_random_changes() -> None:
    """If a direction is one more random change, p <= 0.05 happens 5 % of the time."""
    rng, episodes = np.random.default_rng(0), np.arange(4)
    row = pd.Series(dict.fromkeys(("matrix", "layer", "head", "sv", "energy", "output_energy"), 0))
    row = pd.concat([row, pd.Series(dict.fromkeys(("episodes", "mean_return", "failure_rate", "mean_length"), 0))])
    row = pd.concat([row, pd.Series(dict.fromkeys(("difference", "difference_low", "difference_high", "p_value"), 0))])

    def arm(cost: float) -> AgentEvaluation:
        outcomes = [Outcome(int(i), 1000 - cost + rng.standard_normal(), 5, False, True) for i in episodes]
        return AgentEvaluation.from_outcomes(outcomes, environment="E-v0", target_return=1.0, time_limit=5)

    trials = 400
    p = [
        _removed(row, arm(c[0]), arm(0.0), [arm(cost) for cost in c[1:]], 1000.0, 0)["rank_p_value"]
        for c in rng.exponential(100, (trials, 20))
    ]
    assert binomtest(sum(value <= 0.05 for value in p), trials, 0.05).pvalue > 1e-3
    assert kstest(p, "uniform").statistic < 0.1


def test_with_controls_beside_some_only_those_are_compared(agent: Any, run: Run, tmp_path: Path) -> None:
    """W_out has random changes and OV none; the first of each costs 20 %, and two episodes never reach q < 0.05."""

    def lost(arm: Arm) -> float:
        return 200.0 if arm.kind == "edit" and arm.sv == 0 else 0.0

    run(lost, matrices=["blocks.0.mlp.W_out", "blocks.0.attn.OV.*"], episodes=2, sv="0-6")
    found = make_atlas(agent, run(lost, controls=1, episodes=2, sv="0-6"))
    shares: Any = found.shares.set_index("what")
    assert shares["controlled"][["all", "W_out", "OV"]].tolist() == [7, 7, 0]
    assert shares.loc["all", ["hurts", "controlled_large", "controls_large"]].tolist() == [0, 1, 0]
    said = sentences(found)
    assert said[1].startswith("Beside 7 of 21 directions (all of W_out, none of OV) random changes")
    assert "**0 of 7** random changes cost more than 10 %, and **1 of 7** of those directions" in said[1]
    assert said[2].startswith("On average over those directions")
    assert said[3].startswith("Each direction against its one random change: in 1 pair only the direction costs more")
    assert "than 10 %, in 0 only the change (McNemar's exact p = 1)" in said[3]
    assert "not finished" not in said[-1]
    both = found.directions[["beyond_odd", "beyond_even"]]
    np.testing.assert_allclose(both.mean(axis=1), found.directions["beyond"])
    page = write_atlas(found, tmp_path / "page").read_text()
    assert "7 beside 7 of 21 directions (all of W_out, none of OV)" in page
    assert pd.read_csv(tmp_path / "page" / "shares.csv")["controlled_large"].iloc[0] == 1
    assert set(found.correlations.query("response == 'beyond'")["kind"]) == {"W_out"}


def test_controls_that_are_still_to_run_are_counted(agent: Any, run: Run, tmp_path: Path) -> None:
    run(lambda arm: float(arm.number))
    with pytest.raises(KeyboardInterrupt):
        run(lambda arm: float(arm.number), {"stops": 21}, controls=1)
    found = make_atlas(agent, SweepResults(tmp_path / "sweep"))
    done = int(found.directions["controls"].sum())
    assert 0 < done < 5
    ending = f"16 of 16 directions are measured, and random changes beside {done} of 16."
    assert sentences(found)[-1] == f"The sweep is not finished: {ending}"
    # Too few for a test.
    assert found.correlations.query("response == 'beyond'").empty


def test_halving_compares_the_directions_that_it_kept(agent: Any, run: Run, tmp_path: Path) -> None:
    found = make_atlas(agent, run(lambda arm: float(arm.sv or 0), controls=1, episodes=8, halving=[2]))
    assert "Beside 8 of 16 directions (those that successive halving kept, selected" in sentences(found)[1]
    assert "not finished" not in sentences(found)[-1]
    assert found.reliability.empty
    page = write_atlas(found, tmp_path / "page").read_text()
    assert "for 2 to 8 episodes" in page
    assert "Successive halving gave more episodes" in page


def test_a_grown_sweep_gives_its_range_of_episodes(agent: Any, run: Run, tmp_path: Path) -> None:
    run(lambda arm: float(arm.number))
    results = run(lambda arm: float(arm.number), sv="0-3", episodes=6)
    page = write_atlas(make_atlas(agent, results), tmp_path / "page").read_text()
    assert "for 4 to 6 episodes" in page
    assert "halving" not in page


@pytest.mark.parametrize(("noise", "reliability"), [(1.0, 0.5), (0.5, 0.8), (1e9, 0.0)])
def test_reliability_is_what_was_planted(noise: float, reliability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """If noise is as large as the effect, two measurements correlate by 0.5."""
    rng, n = np.random.default_rng(0), 3000
    size, true = np.tile(np.linspace(1, 30, n // 2), 2), rng.standard_normal(n)
    table = pd.DataFrame({"matrix": np.repeat(["a", "b"], n // 2), "kind": "W_in", "energy": size})
    for half in ("odd", "even"):
        table[f"damage_{half}"] = 3 * size + true + np.sqrt(2) * noise * rng.standard_normal(n)
        table[f"beyond_{half}"] = np.nan  # no controls
    monkeypatch.setattr(tables, "_groups", lambda rows: [("W_in", "W_in", rows)])
    found = tables.reliability_of(table, 0).set_index(["what", "inside"])
    assert (found["of"] == "damage").all()
    row = found.loc[("W_in", "equal size")]
    assert row["reliability"] == pytest.approx(reliability, abs=0.06)
    assert row["reliability_low"] <= row["reliability"] <= row["reliability_high"]
    # Over all sizes damage is mostly size, which repeats.
    assert found.loc[("W_in", "matrices"), "reliability"] > 0.99 or noise > 100


def test_halves_are_of_all_episodes(agent: Any, run: Run) -> None:
    found = make_atlas(agent, run(lambda arm: float(arm.number)))
    halves = found.directions[["damage_odd", "damage_even"]]
    assert halves.mean(axis=1).to_numpy() == pytest.approx(found.directions["damage"].to_numpy())
    assert (halves["damage_odd"] != halves["damage_even"]).all()
    (said,) = [sentence for sentence in sentences(found) if "Damage is measured with noise" in sentence]
    assert "times as large in W_out" in said
