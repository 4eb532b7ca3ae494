"""``evaluate(edits=)``, an edit in force and the arms of a sweep are one path, whose bits depend on nothing beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dt_lens import DtLensError, SingularEdit, evaluate
from dt_lens.behaviour.agents import running
from dt_lens.behaviour.agents.evaluation import AgentEvaluation
from dt_lens.behaviour.agents.task import AgentTask
from dt_lens.behaviour.sweep.blocks import Work, run_together, run_work
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.edits.edit import Edit, suspended

Make = Callable[..., Any]
SETTINGS: dict[str, Any] = {"episodes": 5, "max_steps": 9, "workers": 1}
PLACES = ("blocks.0.mlp.W_in", "blocks.0.attn.W_Q", "blocks.1.mlp.W_out", "blocks.1.attn.W_V", "blocks.0.attn.W_O")


@pytest.fixture(scope="module")
def agent(make_model: Make) -> Any:
    return make_model("Pendulum-v1")


@pytest.fixture(scope="module")
def edits(agent: Any) -> list[Edit]:
    found: list[Edit] = [SingularEdit(agent, place, value="flip") for place in PLACES]
    return [*found, SingularEdit(agent, "blocks.0.attn.QK.1", [0, 1], side="key", value="zero"), found[0].control(1)]


@pytest.fixture(scope="module")
def together(agent: Any, edits: list[Edit]) -> list[AgentEvaluation]:
    return evaluate(agent, edits=[None, *edits], **SETTINGS)


def same(one: Any, other: Any) -> bool:
    """The same episodes of the same model, to the bit."""
    return (
        all(np.array_equal(one.columns[name], column) for name, column in other.columns.items())
        and (one.model_id, one.edits, one.notes) == (other.model_id, other.edits, other.notes)
        and one.terms == other.terms
    )


def test_it_is_each_edit_in_force(agent: Any, edits: list[Edit], together: list[AgentEvaluation]) -> None:
    before = {name: weight.clone() for name, weight in agent.weights.items()}
    assert same(evaluate(agent, **SETTINGS), together[0]) and together[0].edits == ()
    for edit, found in zip(edits[::3], together[1::3], strict=True):
        with edit:
            assert same(evaluate(agent, **SETTINGS), found)
        assert found.edits == (edit.to_dict(),)
    assert len({tuple(found.returns) for found in together}) == len(together)
    assert all(torch.equal(before[name], weight) for name, weight in agent.weights.items()) and not agent.active_edits


def test_companions_rows_and_lanes_change_no_bit(
    agent: Any, edits: list[Edit], together: list[AgentEvaluation]
) -> None:
    order = [5, None, 2, 2, 6, 0]
    chosen = [None if n is None else edits[n] for n in order]
    for options in ({"lanes": 8}, {"lanes": 13}):
        found = evaluate(agent, edits=chosen, **{**SETTINGS, **options})
        for n, one in zip(order, found, strict=True):
            assert same(one, together[0 if n is None else n + 1]), (n, options)
    assert same(evaluate(agent, edits=iter(edits[3:4]), **SETTINGS)[0], together[4])


def test_edits_in_force_stay_in_force(agent: Any, edits: list[Edit], together: list[AgentEvaluation]) -> None:
    with edits[0]:
        found = evaluate(agent, edits=[edits[2], None], **SETTINGS)
        assert agent.active_edits == [edits[0]] and same(found[1], together[1])
        with suspended(agent):  # still listed, and not in the weights
            assert same(evaluate(agent, **SETTINGS), together[0])
            with edits[6]:  # of the same weight
                assert same(evaluate(agent, **SETTINGS), together[7])
    for one, other in ((edits[0], edits[2]), (edits[2], edits[0])):
        with one, other:  # in whatever order they came
            assert np.array_equal(evaluate(agent, **SETTINGS).returns, found[0].returns)
    with edits[0], pytest.raises(DtLensError, match="already"):
        evaluate(agent, edits=[edits[0]], **SETTINGS)


def test_a_weight_that_is_not_what_the_edit_makes_of_it(
    agent: Any, edits: list[Edit], together: list[AgentEvaluation]
) -> None:
    """Written while an edit of it is in force: the model acts as it is now."""
    with edits[0]:
        agent.weights[PLACES[0]].zero_()
        (changed,) = evaluate(agent, edits=[None], **SETTINGS)
    kept = agent.weights[PLACES[0]].clone()
    agent.weights[PLACES[0]].zero_()
    try:
        written = evaluate(agent, **SETTINGS)
    finally:
        agent.weights[PLACES[0]].copy_(kept)
    assert np.array_equal(changed.returns, written.returns)
    assert not np.array_equal(changed.returns, together[1].returns)


def test_a_model_with_hooks_runs_them_one_after_another(agent: Any, edits: list[Edit]) -> None:
    counts: list[tuple[float, int]] = []
    agent.blocks[0].hook_resid_pre.add_hook(lambda x, hook: x * 1.1)
    try:
        found = evaluate(agent, edits=[edits[0], None], **SETTINGS, progress=lambda *seen: counts.append(seen))
        with edits[0]:
            assert same(evaluate(agent, **SETTINGS), found[0])
    finally:
        agent.reset_hooks()
    assert not np.array_equal(found[0].returns, found[1].returns)
    assert counts[-1] == (10, 10) and counts == sorted(counts)
    with pytest.raises(DtLensError, match="one after another"):
        arm = running_arm(agent)
        agent.blocks[0].hook_resid_pre.add_hook(lambda x, hook: x)
        try:
            running.run(agent, running.setting_of(agent, None, None, None, 3), [0], arms=[arm, arm])
        finally:
            agent.reset_hooks()


def running_arm(agent: Any) -> Any:
    from dt_lens.behaviour.agents.arms import arm_of

    return arm_of(agent)


def test_a_sweep_runs_the_same_episodes(
    agent: Any, edits: list[Edit], together: list[AgentEvaluation], tmp_path: Path
) -> None:
    sweep = Sweep(agent, tmp_path, edits=[edits[0], edits[5]], controls=1, max_steps=9, episodes=5, workers=1, seed=0)
    sweep.run()
    table, found = sweep.table(), sweep.evaluations()
    assert list(table.query("kind == 'edit'").matrix) == ["blocks.0.attn.QK.1", "blocks.0.mlp.W_in"]
    base, qk, w_in = found[0], found[1], found[3]
    for one, other in ((base, together[0]), (qk, together[6]), (w_in, together[1])):
        assert np.array_equal(one.returns, other.returns) and one.model_id == other.model_id


def test_blocks_run_together_or_alone(agent: Any, edits: list[Edit]) -> None:
    """To the same bits; one that cannot be run leaves those that are not done to be run alone."""
    task = AgentTask.of(agent, max_steps=9)
    job = task.pack(agent)
    with edits[0]:
        change = dict(task.change(agent, {}))
    bad = save({name: factor * np.nan for name, factor in change.items()})
    first, broken, last = Work(0, save(change), 2, 4), Work(1, bad, 0, 4), Work(2, b"", 0, 9)
    done: dict[int, Any] = {}
    keep = lambda work, rows: done.update({work.number: rows})  # noqa: E731
    assert run_together(job, [first, broken, last], keep) == [first, broken, last] and not done
    assert run_together(job, [first], keep) == [first]
    assert run_together(job, [first, last], keep) == []
    assert done == {0: run_work(job, first), 2: run_work(job, last)} and [row[0] for row in done[0]] == [2, 3, 4, 5]
    with pytest.raises(DtLensError, match="not finite"):
        run_work(job, broken)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("blocks.0.mlp.W_in", "edits is a str; it must be a list of edits"),
        ([], "edits is empty; give at least one edit"),
        (["blocks.0.mlp.W_in"], "edits holds a str; each must be an edit"),
        (3, "edits is an int"),
    ],
)
def test_what_is_no_list_of_edits(agent: Any, given: Any, words: str) -> None:
    with pytest.raises(DtLensError, match=words):
        evaluate(agent, edits=given, **SETTINGS)


def test_edits_of_another_model(agent: Any, make_model: Make, edits: list[Edit]) -> None:
    with pytest.raises(DtLensError, match="made on another model; make it on this one"):
        evaluate(make_model("Pendulum-v1", seed=1), edits=[edits[0]], **SETTINGS)
