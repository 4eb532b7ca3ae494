"""The whole court on small agents: rulings, files, resuming, and errors in one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dt_lens
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.behaviour.tasks import task_of
from dt_lens.decision_transformer.facts import RunFacts
from dt_lens.errors import DtLensError
from dt_lens.study.court.claims import CLAIMS, claims_in
from dt_lens.study.court.court import court
from dt_lens.study.court.rollouts import Rollouts, edits_of_sweep

OPTIONS: dict[str, Any] = {"episodes": 4, "max_steps": 6, "draws": 200, "workers": 1}


@pytest.fixture(scope="module")
def agent(plain: Any) -> Any:
    """An untrained hopper, which gets a reward for every step that it does not fall."""
    model = plain(n_layers=1, d_model=32, d_mlp=48, embed_ln=True, normalization="pre", final_ln=True)
    model.facts = RunFacts(context=3, environment="Hopper-v5", target_returns=(100.0,))
    return model


@pytest.fixture(scope="module")
def tried(agent: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("court")
    told: list[tuple[str, float]] = []
    result = court(agent, out, name="small", **OPTIONS, progress=lambda *said: told.append(said))
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[0] == 0.0 and 0.9 < shares[-1] <= 1.0
    named = {what.partition(":")[0] for what, _ in told}
    assert {f"claim {number}" for number in range(1, 9)} <= named
    return result, out


def test_every_claim_has_a_ruling_both_ways(tried: Any) -> None:
    result, _ = tried
    table = result.table
    assert list(table["claim"]) == [1, 2, 3, 4, 5, 6, 7, 8]
    known = {"supported", "not supported", "undecided", "not applicable"}
    assert set(table["verdict"]) | set(table["note_verdict"]) <= known
    # One block has four edits, too few for a correlation; six steps are too few for a series.
    assert list(table.loc[table["verdict"] == "not applicable", "claim"]) == [6, 7, 8]
    applicable = table[table["verdict"] != "not applicable"]
    assert applicable[["statistic", "margin", "p_value"]].notna().all().all()
    assert all(sentence.endswith(".") for sentence in [*table["sentence"], *table["note_sentence"]])
    assert result.facts["arms"] == 11 and result.facts["episodes"] == 4


def test_holm_is_over_the_applicable_claims(tried: Any) -> None:
    result, _ = tried
    raw = sorted(r.found.p_value for r in result.rulings if r.way == "proper" and r.found is not None)
    assert min(r.p_value for r in result.rulings if r.way == "proper" and r.found is not None) == pytest.approx(
        min(1.0, raw[0] * len(raw))
    )


def test_the_files_say_the_same(tried: Any) -> None:
    result, out = tried
    read = pd.read_csv(out / "court.csv")
    assert list(read["verdict"]) == list(result.table["verdict"])
    kept = json.loads((out / "court.json").read_text())
    assert len(kept["rulings"]) == 2 * len(CLAIMS) and kept["facts"]["environment"] == "Hopper-v5"
    page = (out / "court.html").read_text()
    assert all(claim.title in page for claim in CLAIMS) and "undecided" in page


def test_a_folder_with_more_episodes_gives_only_the_requested_ones(tried: Any, agent: Any, tmp_path: Path) -> None:
    result, out = tried
    again = shutil.copytree(out, tmp_path / "again")
    fewer, fresh = (court(agent, folder, name="small", **{**OPTIONS, "episodes": 2}) for folder in (again, tmp_path))
    assert fewer.facts["episodes"] == 2
    pd.testing.assert_frame_equal(fewer.table, fresh.table)
    assert fewer.facts == fresh.facts
    assert fewer.facts["unedited_mean_return"] != result.facts["unedited_mean_return"]


def test_of_two_kinds_of_controls_the_one_matched_by_output_counts(agent: Any, tmp_path: Path) -> None:
    """As in the atlas."""
    options: dict[str, Any] = {"matrices": "*.W_in", "sv": "0-1", "edits": "zero", "controls": 1}
    options |= {"episodes": 2, "max_steps": 3, "workers": 1}
    Sweep(agent, tmp_path, **options).run()
    inputs = dt_lens.collect_activations(agent, episodes=1, max_steps=3)
    results = Sweep(agent, tmp_path, control_match="output", activations=inputs, **options).run().results
    table = results.table()
    of_both = table[table["kind"] == "control"].groupby("of")["match"].apply(set)
    assert of_both.tolist() == [{"frobenius", "output"}] * 2
    controls = results.controls()
    assert sorted(controls) == sorted(of_both.index)
    assert all(list(table.loc[arms, "match"]) == ["output"] for arms in controls.values())
    found, _ = edits_of_sweep(tmp_path, agent)
    evaluations = results.evaluations()
    for edit, (chosen,) in zip(found.edits, controls.values(), strict=True):
        assert np.array_equal(edit.controls, evaluations[chosen].returns[None])


def test_a_sweep_of_several_kinds_of_edits_gives_each_removal_once(agent: Any, tmp_path: Path) -> None:
    """A removal is the same on the read and on the write side; numeric values are ignored."""
    options: dict[str, Any] = {"matrices": "*.OV.0", "sv": "0-1", "sides": ["read", "write"], "controls": 1}
    edits = ["replace:action_out:0", 0.5, "zero"]
    Sweep(agent, tmp_path, edits=edits, episodes=2, max_steps=3, workers=1, **options).run()
    found, value = edits_of_sweep(tmp_path, agent)
    assert value == "zero" and [(edit.sv, edit.side) for edit in found.edits] == [(0, "read"), (1, "read")]
    assert all(edit.record["value"] == "zero" for edit in found.edits)


def test_edits_that_differ_between_sides_all_count(agent: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"matrices": "*.OV.0", "sides": ["read", "write"], "controls": 1}
    Sweep(agent, tmp_path, edits="constant", episodes=2, max_steps=3, workers=1, **options).run()
    found, value = edits_of_sweep(tmp_path, agent)
    assert value == "constant" and [edit.side for edit in found.edits] == ["read", "write"]


def test_finished_sweeps_are_not_run_again(tried: Any, agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, out = tried

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished sweep was run again")

    monkeypatch.setattr(Sweep, "run", never)
    again = court(agent, out, name="small", **OPTIONS)
    pd.testing.assert_frame_equal(again.table, result.table)


def test_the_same_episodes_for_every_arm(tried: Any) -> None:
    _, out = tried
    folded, raw = (SweepResults(out / "arms" / name).episodes() for name in ("folded", "raw"))
    assert folded.groupby("arm")["seed"].apply(list).tolist() == [[0, 1, 2, 3]] * 9
    assert set(folded["matrix"].dropna()) == {"blocks.0.mlp.W_in", "blocks.0.mlp.W_out"}
    assert set(folded["sv"].dropna()) == {0, 2} and set(raw["matrix"]) == {"blocks.0.mlp.W_in"}
    assert set(raw["kind"]) == {"edit"}


def test_without_layernorms_raw_edits_are_the_same_edits(plain: Any, tmp_path: Path) -> None:
    model = plain(n_layers=1, d_model=32, d_mlp=48)
    model.facts = RunFacts(context=3, environment="Hopper-v5", target_returns=(100.0,))
    task, units = task_of(model, units=2, max_steps=3)
    arms = Rollouts(model, tmp_path, task, units, workers=1).run(lambda _what, _share: None)
    assert not (tmp_path / "arms" / "raw").exists()
    assert [arm.sv for arm in arms.raw] == [0, 2] and all(arm in arms.edits for arm in arms.raw)
    assert all(len(arm.controls) == 1 for arm in arms.edits)


def test_claim_7_takes_a_sweep(agent: Any, tried: Any, tmp_path: Path) -> None:
    setting = {"episodes": 3, "max_steps": 6, "workers": 1}
    made = Sweep(agent, tmp_path, matrices="*.W_in", sv="0-11", edits="zero,constant", controls=1, **setting).run()
    _, out = tried
    result = court(agent, out, sweep=tmp_path, **OPTIONS)
    found = result.ruling(7).found
    assert found is not None and "12 of a sweep, zero, 3 episodes each" in found.said
    other = dataclasses.replace(agent.facts, target_returns=(50.0,))
    kept, agent.facts = agent.facts, other
    try:
        with pytest.raises(DtLensError, match="is of another model"):
            court(agent, out, sweep=made.file, **OPTIONS)
    finally:
        agent.facts = kept


def test_a_sweep_without_controls_is_refused(agent: Any, tmp_path: Path) -> None:
    Sweep(agent, tmp_path, matrices="*.W_in", sv="0-1", edits="zero", episodes=2, max_steps=3, workers=1).run()
    with pytest.raises(DtLensError, match="no finished edit with a control"):
        court(agent, tmp_path / "out", sweep=tmp_path, **OPTIONS)


def test_what_a_model_lacks_is_a_reason(plain: Any, tmp_path: Path) -> None:
    model = plain(n_layers=1, d_model=32, d_mlp=48)
    model.facts = RunFacts(context=3)
    result = court(model, tmp_path, draws=200)
    reasons = {r.claim.number: r.reason for r in result.rulings if r.verdict == "not applicable" and r.way == "proper"}
    assert set(reasons) == {2, 3, 7, 8} and "does not say which environment" in reasons[3]
    assert math.isnan(result.ruling(3).p_value)
    left_out = court(
        model, tmp_path, draws=200, rollouts=False, environment="Hopper-v5", target_return=1.0, max_steps=4
    )
    assert left_out.ruling(3).reason == "rollouts were left out" and left_out.ruling(2).found is not None


def test_a_language_model(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    model = dt_lens.wrap(make_lm("gpt2"), check=False)
    for option, value in {"environment": "Hopper-v5", "target_return": 1.0, "max_steps": 3}.items():
        with pytest.raises(DtLensError, match=f"This is a language model, and court reads texts .* leave out {option}"):
            court(model, tmp_path, draws=200, **{option: value})
    result = court(model, tmp_path, draws=200)
    titles = result.table.set_index("claim")["title"]
    assert titles[1] == "W_in matches the token output more than W_out does"
    assert titles[2] == "The first direction of W_in is the most common token"
    assert titles[4].endswith("read the token input") and titles[7] == "The cosine with tokens predicts damage"
    page = (tmp_path / "court.html").read_text(encoding="utf-8")
    assert all(title in page for title in titles) and CLAIMS[1].title not in page
    assert claims_in(None) == CLAIMS  # of an agent, to the letter
    reasons = {r.claim.number: r.reason for r in result.rulings if r.verdict == "not applicable" and r.way == "proper"}
    unread = "the model has no tokenizer to read texts with; wrap it with one: dt_lens.wrap(model, tokenizer=...)"
    assert reasons == {
        2: unread,
        3: unread,
        5: "the model has no reward embedding",
        6: "the model has no timestep embedding",
        7: unread,
        8: unread,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"episodes": 1}, "episodes is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"draws": 10}, "draws is 10"),
        ({"environment": "CartPole-v1"}, "CartPole-v1 gives states of 4 numbers"),
        ({"target_return": float("nan")}, "target_return is nan"),
        ({"sweep": "nowhere"}, "There is no sweep in nowhere"),
        ({"texts": "nowhere"}, "This is an agent, and court runs it in an environment; leave out texts"),
    ],
)
def test_bad_input_is_one_sentence(agent: Any, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DtLensError, match=said) as error:
        court(agent, tmp_path, **{**OPTIONS, **options})
    assert str(error.value).count("\n") == 0


def test_a_text_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(DtLensError, match="takes a wrapped model, not a str"):
        court("hopper", tmp_path)


def test_a_folder_of_another_court_is_refused(agent: Any, tried: Any) -> None:
    _, out = tried
    with pytest.raises(DtLensError, match=r"holds another sweep: its (episodes|seed) is"):
        court(agent, out, **{**OPTIONS, "seed": 5})
