"""Steering on an agent with scripted answers to doses, so that the right verdict is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import dt_lens
from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.agents.task import AgentTask
from dt_lens.behaviour.readout import of_task
from dt_lens.behaviour.readouts import RETURN_TO_GO
from dt_lens.edits.edit import Edit
from dt_lens.errors import DtLensError
from dt_lens.study.steering import page, steering
from dt_lens.study.steering.doses import (
    Candidate,
    candidates_of,
    dosed,
    gain_scale,
    output_energy_scale,
    put_side,
    slopes,
)
from dt_lens.study.steering.result import SteeringResult
from dt_lens.study.steering.steering import steer
from dt_lens.study.steering.verdict import verdict_of
from dt_lens.svd.weight_svd import WeightSVD


def tried(agent: Any, out: Path, **options: Any) -> SteeringResult:
    return steer(agent, out, **{"episodes": 40, "choosing": 8, "candidates": 6, **options})


def test_a_planted_direction_is_found(agent: Any, planted: Candidate, answering: Any, tmp_path: Path) -> None:
    answering(lambda name, sv, dose: (40 * (dose - 1) * ((name, sv) == (planted.matrix, planted.sv)), 0.0))
    result = tried(agent, tmp_path)
    assert result.verdict == "found" and result.best is not None
    assert (result.best.matrix, result.best.sv) == (planted.matrix, planted.sv)
    assert result.numbers["reach"] == pytest.approx(80 / 200, abs=0.03)  # doses 0 to 2, of a range of 200
    assert result.numbers["operating_target"] == 200
    assert len(result.table) == 5 and set(result.table["episodes"]) == {40}
    assert len(result.randoms) == 40 and list(result.randoms["side"].unique()) == ["read", result.numbers["put_side"]]
    assert result.numbers["read_p_value"] == result.numbers["put_p_value"] == 0.05
    chosen = result.randoms["seed"].isna()
    assert result.randoms["reach"][chosen].tolist() == pytest.approx([80 / 200, 80 / 200], abs=0.05)
    assert result.randoms["reach"][~chosen].abs().max() < 0.1
    kept = json.loads((tmp_path / "steering.json").read_text())
    assert [(row["matrix"], row["sv"]) for row in kept["choosing"]] == list(
        result.choosing[["matrix", "sv"]].itertuples(index=False, name=None)
    )
    assert not set(result.numbers) & {field.name for field in dataclasses.fields(result)}
    page = (tmp_path / "steering.html").read_text()
    assert page.index(">set aside<") < page.index(">why<")
    assert kept["verdict"] == "found" and "steering" in (tmp_path / "steering.html").read_text()


def test_the_report_is_of_other_seeds_than_the_choice(
    agent: Any, answering: Any, few_random: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(lambda *_: (0.0, 0.0))
    answer, seen = steering._Search._evaluate, list[tuple[bool, int, int]]()

    def watched(self: Any, edit: Edit | None, target: float, units: range) -> AgentEvaluation:
        scaling = edit is not None and isinstance(edit.to_dict()["value"], float)
        seen.append((scaling, units.start, units.stop))
        return answer(self, edit, target, units)

    monkeypatch.setattr(steering._Search, "_evaluate", watched)
    tried(agent, tmp_path)
    choice, report = seen[: 3 + 6 * 4], seen[3 + 6 * 4 :]
    assert {(begin, end) for _, begin, end in choice} == {(0, 8)}
    assert {(begin, end) for _, begin, end in report[:5]} == {(1000, 1040)}
    assert {(begin, end) for _, begin, end in report[5:]} == {(1000, 1008)} and len(report) == 5 + 2 * (1 + 1 + 1)


def test_a_direction_that_lowers_the_return_is_found_too(
    agent: Any, planted: Candidate, answering: Any, tmp_path: Path
) -> None:
    answering(lambda name, sv, dose: (-40 * (dose - 1) * ((name, sv) == (planted.matrix, planted.sv)), 0.0))
    result = tried(agent, tmp_path)
    assert result.verdict == "found" and result.numbers["slope_when_chosen"] < 0 < result.numbers["reach"]


def test_without_an_effect_none_is_found(agent: Any, answering: Any, few_random: None, tmp_path: Path) -> None:
    answering(lambda *_: (0.0, 0.0))
    result = tried(agent, tmp_path)
    assert result.verdict == "none found" and abs(result.numbers["reach"]) < 0.1


def test_noise_is_seldom_a_steering_direction(agent: Any, answering: Any, few_random: None, tmp_path: Path) -> None:
    """The best of six on a few noisy seeds is reported on others, where luck does not repeat."""
    answering(
        lambda name, sv, dose: (30 * np.random.default_rng([sv, int(10 * dose), len(name)]).standard_normal(), 0.0)
    )
    assert tried(agent, tmp_path / "noisy").best is not None  # doses differ here, on fresh seeds too
    reaches = []
    for seed in range(0, 240, 60):
        answering(lambda *_: (0.0, 0.0))
        reaches.append(tried(agent, tmp_path / str(seed), seed=seed, choosing=3, episodes=30).numbers["reach"])
    assert abs(float(np.mean(reaches))) < 0.03


def test_a_direction_that_moves_the_return_by_failing_is_reported_so(
    agent: Any, planted: Candidate, answering: Any, few_random: None, tmp_path: Path
) -> None:
    answering(lambda *_: (0.0, 0.0))
    below = next(c for c in candidates_of(agent, 6, RETURN_TO_GO) if c != planted)

    def answer(name: str, sv: int, dose: float) -> tuple[float, float]:
        mine, other = (name, sv) == (planted.matrix, planted.sv), (name, sv) == (below.matrix, below.sv)
        return (60 * (dose - 1) * mine + 15 * (dose - 1) * other, 0.6 * mine * (dose != 1))

    answering(answer)
    result = tried(agent, tmp_path)
    assert result.best is not None and result.best.sv == below.sv and result.best.matrix == below.matrix
    aside = result.choosing.set_index(["matrix", "sv"])["set_aside"]
    assert aside[planted.matrix, planted.sv] and not aside[below.matrix, below.sv]
    answering(lambda name, sv, dose: (30 * (dose - 1), 0.6))
    assert tried(agent, tmp_path / "all").verdict == "moves the return by failing"


def test_what_random_directions_do_too_is_not_found(agent: Any, answering: Any, tmp_path: Path) -> None:
    """Random directions of the same output energy move the return as far; those that do it by failing do not count."""
    answering(lambda _name, _sv, dose: (30 * (dose - 1), 0.0))
    assert tried(agent, tmp_path / "still").verdict == "found"
    own = WeightSVD(agent)

    def random(fails: float, sides: Collection[str]) -> Callable[[Edit], tuple[float, float]]:
        def answer(edit: Edit) -> tuple[float, float]:
            record: Any = edit.to_dict()
            if record["side"] not in sides:
                return 0.0, 0.0
            vector = own[record["matrix"]].side(record["side"])[record["sv"][0]]
            change = torch.as_tensor(record["value"], dtype=vector.dtype) - vector
            drawn = torch.randn(len(change), generator=torch.Generator().manual_seed(3), dtype=vector.dtype)
            drawn -= drawn.mean()
            return float(60 * torch.sign(change @ drawn)), fails  # the larger dose moves it one way, the smaller back

        return answer

    both = ("read", "write", "neuron")
    for sides, as_far in ((both, (19, 19)), (("read",), (19, 0)), (("write", "neuron"), (0, 19))):
        answering(lambda _name, _sv, dose: (30 * (dose - 1), 0.0), random=random(0.0, sides))
        result = tried(agent, tmp_path / "random")
        assert result.verdict == "no more than random", sides
        assert (result.numbers["read_as_far"], result.numbers["put_as_far"]) == as_far
        assert f"{as_far[0]} move it as far without failing in place of what it reads" in result.sentence
        assert f"and {as_far[1]} in place of what it" in result.sentence
        where = {"read": "random in what it reads, and more in", "write": "random in where it puts what it reads, and"}
        assert [where[side] in result.sentence for side in where] == [sides == ("read",), sides == ("write", "neuron")]
    answering(lambda _name, _sv, dose: (30 * (dose - 1), 0.0), random=random(0.9, both))
    assert tried(agent, tmp_path / "failing").verdict == "found"


def test_a_target_that_does_nothing_is_seldom_a_curve() -> None:
    """Best and worst are picked anew in every permutation, as in the data."""
    rng, trials = np.random.default_rng(8), 200
    found = sum(steering._differ(rng.standard_normal((5, 8)), seed, 199) < 0.05 for seed in range(trials))
    assert stats.binomtest(found, trials, 0.05).pvalue > 1e-3
    assert steering._differ(rng.standard_normal((5, 8)) + 2 * np.arange(5)[:, None], 0) < 0.001


def test_an_agent_that_ignores_its_target_has_no_curve(agent: Any, answering: Any, tmp_path: Path) -> None:
    answering(lambda *_: (50.0, 0.0), obeys=0.0)
    result = tried(agent, tmp_path)
    assert result.verdict == "not applicable" and result.best is None and "no curve" in result.sentence
    assert (tmp_path / "steering.html").exists()


@pytest.mark.parametrize(
    ("reach", "interval", "wanted"),
    [(0.0, (np.nan, np.nan), "none found"), (0.5, (np.nan, np.nan), "undecided"), (0.5, (0.3, 0.6), "found")],
)
def test_what_is_the_same_in_every_episode_has_no_interval(
    agent: Any, planted: Candidate, reach: float, interval: tuple[float, float], wanted: str
) -> None:
    found = {
        "reach": reach, "reach_interval": interval, "rise": 0.0, "rise_interval": (np.nan, np.nan),
        "read_p_value": 0.05, "put_p_value": 0.05, "random_directions": 19, "read_as_far": 0, "put_as_far": 0,
        "put_side": "write", "first_side": "read",
    }  # fmt: skip
    readout = of_task(AgentTask.of(agent), 4, 4, 0, points={1.0: AgentTask.of(agent)})
    verdict, sentence = verdict_of(planted, found, 0.41, readout)
    assert verdict == wanted and "nan" not in sentence and "curve's range of 0.410," in sentence


def test_a_figure_shows_means_without_an_interval() -> None:
    curve = pd.DataFrame(
        {"target": [1.0, 2.0], "mean": [120.0, 500.0], "mean_low": [100.0, np.nan], "mean_high": [150.0, np.nan]}
    )
    for table in (curve, curve[::-1]):
        result = SteeringResult("not applicable", "", None, table, *[pd.DataFrame()] * 3, {})
        low, high = page.steering_figure(result).layout.yaxis.range
        assert low < 100 and high > 500


def test_slopes() -> None:
    def arm(returns: list[float]) -> AgentEvaluation:
        outcomes = [Outcome(i, value, 5, False, True) for i, value in enumerate(returns)]
        return AgentEvaluation.from_outcomes(outcomes, environment="E-v0", target_return=1.0, time_limit=5)

    arms = {0.0: arm([1.0, 5.0]), 1.0: arm([2.0, 5.0]), 2.0: arm([3.0, 2.0])}
    np.testing.assert_allclose(slopes(arms), [1.0, -1.5])


@pytest.mark.parametrize("dose", [0.0, 0.5, 2.0])
def test_a_random_direction_has_the_same_output_energy(agent: Any, planted: Candidate, dose: float) -> None:
    inputs = dt_lens.collect_activations(agent, episodes=1, max_steps=4)
    scale = output_energy_scale(agent, planted, 7, inputs, "read")
    edit, other = dosed(agent, planted, dose), dosed(agent, planted, dose, 7, scale)
    assert other.output_energy(inputs) == pytest.approx(edit.output_energy(inputs), rel=1e-5)
    same = dosed(agent, planted, dose, 7)
    assert same.effective_energy == pytest.approx(edit.effective_energy, rel=1e-6)
    mine, theirs = (left @ right for left, right in (edit.delta, other.delta))
    assert abs(float((mine * theirs).sum() / mine.norm() / theirs.norm())) < 0.6
    # Twice as far is twice as much, in the same random direction.
    left, right = dosed(agent, planted, 1 + 2 * (dose - 1), 7, scale).delta
    torch.testing.assert_close(left @ right, 2 * theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dose", [0.0, 2.0])
@pytest.mark.parametrize("name", ["blocks.0.mlp.W_in", "blocks.1.attn.OV.0"])
def test_a_random_put_direction_reads_the_same_with_the_same_output_energy(agent: Any, name: str, dose: float) -> None:
    inputs = dt_lens.collect_activations(agent, episodes=1, max_steps=4)
    sigma = WeightSVD(agent)[name].sigma[1]
    place = Candidate(name, 1, float(sigma), 0.0, "")
    side = put_side(agent, place)
    assert side == ("neuron" if name.endswith("W_in") else "write")
    edit, other = dosed(agent, place, dose, side=side), dosed(agent, place, dose, 7, side=side)
    assert output_energy_scale(agent, place, 7, inputs, side) == pytest.approx(1, rel=1e-9)
    assert other.output_energy(inputs) == pytest.approx(edit.output_energy(inputs), rel=1e-9)
    assert other.effective_energy == pytest.approx(abs(dose - 1) * float(sigma), rel=1e-9)
    # What is read is the direction's own, with its sign; where it is written is random.
    (mine, put), (theirs, elsewhere) = edit.delta, other.delta
    own, drawn = (
        torch.linalg.svd(left @ right, full_matrices=False) for left, right in ((mine, put), (theirs, elsewhere))
    )
    assert abs(float(own[0][:, 0] @ drawn[0][:, 0])) == pytest.approx(1, abs=1e-6)
    assert abs(float(own[2][0] @ drawn[2][0])) < 0.6
    # On either side a dose is the same change, up to what the LayerNorm removes.
    norm = agent.weights[f"{name.partition('.attn')[0].partition('.mlp')[0]}.{'ln2' if 'mlp' in name else 'ln1'}.w"]
    left, right = dosed(agent, place, dose).delta
    seen, same = (norm.double()[:, None] * change for change in (mine @ put, left @ right))
    torch.testing.assert_close(seen - seen.mean(0), same - same.mean(0), rtol=1e-6, atol=1e-9)


def test_a_random_write_direction_is_read_as_strongly(agent: Any) -> None:
    """By the second block's folded matrices and, behind the attention, the first block's MLP; computed by hand."""
    name = "blocks.0.attn.OV.0"
    place = Candidate(name, 0, float(WeightSVD(agent)[name].sigma[0]), 0.0, "")
    scale = gain_scale(agent, place, 7)
    w, d = agent.weights, 32
    readers = [("blocks.0.mlp.W_in", "blocks.0.ln2.w"), ("blocks.1.mlp.W_in", "blocks.1.ln2.w")]
    readers += [(f"blocks.1.attn.W_{letter}", "blocks.1.ln1.w") for letter in "QKV"]

    def gain(vector: torch.Tensor) -> float:
        squares = []
        for weight, norm in readers:
            M = w[norm].double()[:, None] * w[weight].double().reshape(-1, d, w[weight].shape[-1])[0]
            M = M - M.mean(0)
            squares.append(float((vector @ M).square().sum() / M.square().sum()) * d)
        return float(np.sqrt(np.mean(squares)))

    (_, own), (_, other) = (dosed(agent, place, 2.0, *more, side="write").delta for more in ((), (7, scale)))
    # The same input is read, so the written vectors are the changes' right factors, as long as their norms say.
    found = [gain(torch.linalg.svd(right, full_matrices=False)[2][0].double()) for right in (own, other)]
    assert scale == pytest.approx(found[0] / found[1], rel=1e-5)
    assert abs(scale - 1) > 0.02
    last = Candidate("blocks.1.attn.OV.0", 0, 1.0, 0.0, "")
    assert gain_scale(agent, last, 7) != 1.0  # its MLP reads it


def test_candidates(agent: Any) -> None:
    found = candidates_of(agent, 6, RETURN_TO_GO)
    assert len({(c.matrix, c.sv) for c in found}) == 6
    assert [c.why for c in found] == ["matches the return-to-go input"] * 3 + ["large sigma"] * 3
    cosines = WeightSVD(agent).cosines(found[0].matrix, "reward_in", "read").abs()
    assert found[0].cosine == pytest.approx(float(cosines.to_numpy()[found[0].sv].max()))
    assert found[0].cosine >= found[1].cosine >= found[2].cosine
    assert all(c.sv <= 1 for c in found[3:])


def test_a_search_resumes_from_its_files(
    agent: Any, few_random: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "_differ", lambda *_: 0.0)  # so that the search runs though this agent has no curve
    options = {"episodes": 2, "choosing": 2, "candidates": 1, "doses": (0.0, 2.0), "max_steps": 4, "workers": 1}
    result = steer(agent, tmp_path, **options)
    assert result.verdict != "not applicable" and len(result.randoms) == 2 * (1 + 1)
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "arms").iterdir()}
    # Three targets; two doses of the candidate; three on fresh seeds; two doses of a random direction on each side, and
    # of the chosen one on the other side.
    assert len(files) == 3 + 2 + 3 + 2 * 2 + 2
    again = steer(agent, tmp_path, **options)
    assert again.to_dict() == result.to_dict()
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "arms").iterdir()} == files


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"episodes": 1}, "episodes is 1"),
        ({"doses": [1.0, 2.0]}, "give at least two finite numbers besides 1"),
        ({"doses": [float("nan"), 2.0, 3.0]}, "doses is .*; it must be several finite numbers"),
        ({"doses": "0,2"}, "doses is '0,2'; it must be several finite numbers"),
        ({"doses": 2.0}, "doses is 2.0"),
        ({"targets": ["a", "b"]}, r"targets is \['a', 'b'\]; it must be several finite numbers"),
        ({"targets": [10**400, 1]}, "targets is .*finite"),
        ({"out": 3}, "out is '3'; it must be the path of a file or folder"),
        ({"targets": [5.0]}, "There are 1 target returns"),
        ({"environment": "Nowhere-v0"}, "no Gymnasium environment 'Nowhere-v0'"),
        ({"choosing": 2000}, "at most 1000"),
    ],
)
def test_bad_input_is_one_sentence(agent: Any, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DtLensError, match=said) as error:
        steer(agent, **{"out": tmp_path, "candidates": 6, **options})
    assert "\n" not in str(error.value)
    with pytest.raises(DtLensError, match="steer takes a wrapped model"):
        steer("hopper", tmp_path)
