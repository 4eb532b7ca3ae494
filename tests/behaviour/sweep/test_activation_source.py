"""Activations of a sweep: controls with their edits' output energy, and the same bits in every run that resumes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dt_lens.behaviour.collect_activations import collect_activations
from dt_lens.behaviour.evaluate import evaluate
from dt_lens.behaviour.sweep.arms import parse_value
from dt_lens.behaviour.sweep.store import FILE, KEPT
from dt_lens.edits.singular import SingularEdit, load_edit
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations

Make = Callable[..., Any]
same = pd.testing.assert_frame_equal


def identical(one: Any, other: Any) -> None:
    same(one.table(), other.table(), check_exact=True)
    same(one.episodes(), other.episodes(), check_exact=True)


def test_controls_with_the_same_output_energy(make_sweep: Make, remembering: Make, agent: Any, tmp_path: Path) -> None:
    sweep = make_sweep(control_match="output").run(engine=remembering(2))
    assert sorted(file.name for file in tmp_path.iterdir()) == [KEPT, FILE]
    activations = Activations.load(tmp_path / KEPT)
    again = collect_activations(agent, episodes=10, seed=3, max_steps=9)
    assert activations.digest == again.digest == sweep.results.options["activations"]["digest"]
    table = sweep.table()
    of = table.loc[table["kind"] == "control"]
    assert (of["match"] == "output").all() and len(of) == 3
    edits = table.loc[of["of"]]
    assert list(of["energy"]) == pytest.approx(list(edits["energy"]), rel=1e-9)
    assert list(of["output_energy"]) == pytest.approx(list(edits["output_energy"]), rel=1e-6)
    edit = SingularEdit(agent, of.iloc[0]["matrix"], 0, value="zero", seed=3)
    assert edits.iloc[0]["output_energy"] == edit.output_energy(activations)
    with edit.control(3, activations):
        matched = evaluate(agent, episodes=6, seed=3, max_steps=9, workers=1)
    same(sweep.evaluations()[of.index[0]].to_frame(), matched.to_frame(), check_exact=True)
    with edit.control(3):
        unmatched = evaluate(agent, episodes=6, seed=3, max_steps=9, workers=1)
    assert unmatched.mean != matched.mean


def test_a_file_without_activations_can_take_some(make_sweep: Make, remembering: Make, tmp_path: Path) -> None:
    larger = {"controls": 2, "control_match": "output"}
    whole = make_sweep(tmp_path / "whole", **larger).run(engine=remembering())
    grown = make_sweep(tmp_path / "grown", controls=0).run(engine=remembering())
    assert grown.table()["output_energy"].isna().all()
    grown = make_sweep(tmp_path / "grown", **larger).run(engine=remembering())
    identical(grown, whole)
    # An edit with both kinds of control.
    both = make_sweep(tmp_path / "grown", controls=1).run(engine=remembering())
    assert list(both.table()["match"].fillna("-"))[:4] == ["-", "frobenius", "output", "output"]
    assert both.table()["output_energy"].notna().all()


def test_a_run_that_resumes_has_the_same_activations(make_sweep: Make, remembering: Make, tmp_path: Path) -> None:
    options = {"control_match": "output", "matrices": "*.0.mlp.W_in", "episodes": 3}
    sweep = make_sweep(**options).run(engine=remembering())
    digest = Activations.load(tmp_path / KEPT).digest
    (tmp_path / KEPT).unlink()
    make_sweep(**options | {"episodes": 4}).run(engine=remembering())  # collected again
    assert Activations.load(tmp_path / KEPT).digest == digest
    other = collect_activations(sweep.model, episodes=2, seed=50, max_steps=9)
    with pytest.raises(
        DtLensError, match=rf"holds another sweep: its activations are \w+ and this one's {other.digest}"
    ):
        make_sweep(**options, activations=other).run(engine=remembering())
    other.save(tmp_path / KEPT)
    with pytest.raises(DtLensError, match=r"activations.safetensors holds others than the sweep was made with; copy"):
        make_sweep(**options).run(engine=remembering())
    (tmp_path / KEPT).unlink()
    with closing(sqlite3.connect(sweep.file)) as db, db:
        db.execute("UPDATE plan SET options = json_set(options, '$.activations.digest', 'elsewhere')")
    with pytest.raises(DtLensError, match="is missing, and they come out with other bits here") as caught:
        make_sweep(**options).run(engine=remembering())
    assert "\n" not in str(caught.value)


def test_given_activations(make_sweep: Make, remembering: Make, make_model: Make, agent: Any, tmp_path: Path) -> None:
    options = {"matrices": "*.0.mlp.W_in", "episodes": 3, "control_match": "output"}
    own = collect_activations(agent, episodes=2, seed=50, max_steps=9)
    own.save(tmp_path / "own.safetensors")
    sweep = make_sweep(tmp_path / "out", **options, activations=tmp_path / "own.safetensors").run(engine=remembering())
    assert sweep.results.options["activations"] == {**own.record, "digest": own.digest}
    make_sweep(tmp_path / "out", **options | {"episodes": 4}).run(engine=remembering())  # found next to the file
    stranger = collect_activations(make_model("Pendulum-v1", seed=1), episodes=1, max_steps=9)
    with pytest.raises(DtLensError, match=r"of another model, whose blocks\.0\.mlp\.W_in differs"):
        make_sweep(**options, activations=stranger)


def test_directions_by_their_output_and_towards_labels(make_sweep: Make, remembering: Make, agent: Any) -> None:
    edits = ["replace:action_out:action 0", ("action_out", 0, 30), "zero"]
    label = agent.embeddings["action_out"].labels[0]
    edits[0] = f"replace:action_out:{label}"
    options = {"matrices": "*.1.mlp.W_out", "edits": edits, "controls": 0, "episodes": 3}
    sweep = make_sweep(**options).run(engine=remembering())
    sweep = make_sweep(**options, directions="activation").run(engine=remembering())
    table = sweep.table()
    named = [f"replace:action_out:{label}", f"towards:action_out:{label}:30", "zero"]
    assert list(table["value"]) == named * 2
    assert list(table["directions"]) == ["plain"] * 3 + ["activation"] * 3
    assert (table["episodes"] == 3).all() and table["difference"].notna().all()
    activations = Activations.load(sweep.file.with_name(KEPT))
    plan = sweep.plan
    for arm in plan.arms[1:]:
        assert load_edit(agent, arm.record, activations).to_dict() == arm.record
    assert table["energy"].nunique() == 6


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("replace:nothing:0", "nothing"),
        ("replace:action_out:nobody", "nobody"),
        ("replace:action_out:7", "has 1 directions"),
        ("towards:action_out:0:far", "value is 'towards:action_out:0:far'"),
        ({"replace": ["action_out"]}, "with an embedding it must be"),
        ({"replace": ["action_out", 0], "angle": 30}, "with an embedding it must be"),
        ({"towards": ["action_out", 0]}, "with an embedding it must be"),
        ({"replace": ["action_out", 0], "towards": ["state_out", 1], "angle": 5}, "with an embedding it must be"),
        (["action_out", True], "text, or the number of its row, not True"),
        (["action_out", None], "text, or the number of its row, not None"),
        (["action_out", 1.5], "text, or the number of its row, not 1.5"),
        (["action_out", 0, True], "a number of degrees"),
        ([], "must be .name, label"),
        ("replace:action_out:²", "no label '²'"),
        (True, "value is True"),
    ],
)
def test_labels_that_do_not_exist(agent: Any, value: Any, sentence: str) -> None:
    with pytest.raises(DtLensError, match=sentence):
        parse_value(value, agent.embeddings)
    if isinstance(value, Mapping | list):  # an edit refuses the same
        with pytest.raises(DtLensError):
            SingularEdit(agent, "blocks.1.mlp.W_out", value=value)
