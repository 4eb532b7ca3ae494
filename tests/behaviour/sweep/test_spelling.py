"""A sweep's values and edits are written as everywhere, and files that write a number otherwise go on."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from dt_lens.behaviour.evaluate import evaluate
from dt_lens.behaviour.sweep import sweep as sweeps
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.sweep import Sweep
from dt_lens.cli.app import app
from dt_lens.decision_transformer.checkpoint import save_pretrained
from dt_lens.edits.several import save_edits
from dt_lens.edits.singular import SingularEdit
from dt_lens.edits.written import parse_value, values_of
from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding, EmbeddingRegistry
from dt_lens.study.court.rollouts import measured_edits

Make = Callable[..., Any]
same = pd.testing.assert_frame_equal
W_IN, OV = "blocks.0.mlp.W_in", "blocks.0.attn.OV.1"


@pytest.fixture(scope="module")
def labelled() -> EmbeddingRegistry:
    registry = EmbeddingRegistry(3, "a model")
    registry["e"] = Embedding(torch.eye(5, 3) + 1, ["a", "a,zero", "1", "b:c", " d "])
    return registry


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("zero,0.5", ["zero", "0.5"]),
        (["zero,-2", 0.25], ["zero", "-2", "0.25"]),
        ("replace:e:a,flip", ["replace:e:a", "flip"]),
        ("replace:e:a,zero", ["replace:e:a,zero"]),  # such a label exists
        ("towards:e:a,zero:30,replace:e:b:c", ["towards:e:a,zero:30", "replace:e:b:c"]),
        ('{"replace": ["e", "a,zero"]},zero', ["replace:e:a,zero", "zero"]),
        (("e", "b:c"), ["replace:e:b:c"]),
        ([("e", 4), ("e", 0, 30)], ['{"replace": ["e", " d "]}', "towards:e:a:30"]),  # text would lose the space
        ({"replace": ["e", 2]}, ["replace:e:1"]),
        ([torch.tensor(0.5), torch.tensor([1.0, 0.0, 2.0])], ["0.5", parse_value([1, 0, 2])[0]]),
    ],
)
def test_values_and_their_texts(labelled: EmbeddingRegistry, given: Any, texts: list[str]) -> None:
    meant = [parse_value(value, labelled) for value in values_of(given, labelled)]
    assert [text for text, _ in meant] == texts
    for text, value in meant:  # what a table says can be given again
        assert text.startswith("vector ") or parse_value(text, labelled) == (text, value)


def test_a_file_that_says_scale_goes_on(make_sweep: Make, finished: Make, remembering: Make, tmp_path: Path) -> None:
    options = {"edits": "zero,0.5", "matrices": ["*.0.mlp.W_in"]}
    sweep = finished(tmp_path / "old", **options)
    with closing(sqlite3.connect(sweep.file)) as db, db:  # as it was written before
        db.execute("UPDATE arms SET value = 'scale:0.5' WHERE value = '0.5'")
        db.execute("UPDATE plan SET options = json_set(options, '$.edits', json('[\"zero\", \"scale:0.5\"]'))")
    old = SweepResults(sweep.file)
    whole = make_sweep(tmp_path / "whole", **options | {"controls": 2, "sv": "0,1"}).run(engine=remembering())
    assert list(old.table()["value"]) == ["zero", "zero", "0.5", "0.5"] and old.options["edits"] == ["zero", "0.5"]
    assert set(old.episodes()["value"].dropna()) == {"zero", "0.5"}
    for value in ("zero,0.5", "zero,scale:0.5", ["zero", 0.5]):  # one sweep, however it is written
        grown = make_sweep(sweep.file.parent, **options | {"edits": value, "controls": 2, "sv": "0,1"})
        grown.run(engine=remembering())
    same(grown.table(), whole.table(), check_exact=True)
    assert grown.results.options == whole.results.options
    with closing(sqlite3.connect(sweep.file)) as db:
        runs = db.execute("SELECT block, result FROM runs").fetchall()
    assert len(runs) == len({block for block, _ in runs})  # no unit ran twice


def test_given_edits_are_arms_with_controls(agent: Any, make_sweep: Make, remembering: Make, tmp_path: Path) -> None:
    edits = [
        SingularEdit(agent, OV, "0-2", side="write", value="zero"),
        SingularEdit(agent, OV, 1, side="read", value="random", seed=1),
        SingularEdit(agent, OV, 1, side="read", value="random", seed=2),
        SingularEdit(agent, W_IN, 0, value="zero", seed=3),
        SingularEdit(agent, W_IN, 0, value="zero", seed=3, fold_layernorm=False),
    ]
    options: dict[str, Any] = {"matrices": None, "edits": edits, "episodes": 3, "controls": 2}
    sweep = make_sweep(tmp_path / "alone", **options).run(engine=remembering())
    table = sweep.table()
    assert len(table) == 3 * len(edits) and set(table["svs"]) == {"0-2", "1", "0"}
    assert table["sv"].isna().sum() == 3
    baseline = evaluate(agent, episodes=3, seed=3, max_steps=9)
    of_edits = table[table["kind"] == "edit"]
    records = [found.edits[0] for arm, found in sweep.evaluations().items() if arm in of_edits.index]
    assert sorted(map(json.dumps, records)) == sorted(json.dumps(edit.to_dict()) for edit in edits)
    for arm, record in zip(of_edits.index, records, strict=True):
        edit = SingularEdit.from_dict(agent, record)
        for which, change in ((arm, edit), (arm + 1, edit.control(3)), (arm + 2, edit.control(4))):
            with change:
                edited = evaluate(agent, episodes=3, seed=3, max_steps=9)
            assert table["difference"][which] == edited.compare(baseline).difference
            assert table["energy"][which] == pytest.approx(change.energy)
    # Added to those that are chosen, in any order of growing; what is chosen anyway is one arm.
    more = options | {"matrices": [W_IN], "value": ["zero", "0.5"]}
    grown = make_sweep(sweep.file.parent, **more).run(engine=remembering()).table()
    same(grown, make_sweep(tmp_path / "more", **more).run(engine=remembering()).table(), check_exact=True)
    assert len(grown) == len(table) + 3
    # The court and the atlas take only what is of one direction, counted as the sweep counts.
    _, measured = measured_edits(sweep.results, agent)
    found = sorted((edit.matrix, edit.sv, edit.record["seed"], str(edit.record["value"])) for edit in measured)
    assert found == [(OV, 1, 1, "random"), (OV, 1, 2, "random"), (W_IN, 0, 3, "0.5"), (W_IN, 0, 3, "zero")]


def test_edits_that_a_sweep_cannot_take(agent: Any, make_sweep: Make, tmp_path: Path) -> None:
    edit = SingularEdit(agent, W_IN, 0)
    for edits, words in (([edit, edit.control()], "holds a Control"), ([edit, "zero"], "holds a str")):
        with pytest.raises(DtLensError, match=words):
            make_sweep(edits=edits)
    for more, words in (({"value": "zerro"}, "^value is for the"), ({"side": "read", "sv": 7}, "^sv and side is for")):
        with pytest.raises(DtLensError, match=words):
            make_sweep(matrices=None, edits=(one for one in [edit]), **more)
    with pytest.raises(DtLensError, match=rf"value has 7 numbers, and the read side of {W_IN} has \d+ dimensions"):
        make_sweep(matrices=[W_IN], edits=None, value=torch.ones(7))
    record = {**edit.to_dict(), "activations": "other"}
    edit.to_dict = lambda: record  # type: ignore[method-assign]
    with pytest.raises(DtLensError, match="made with the activations other; give the sweep those"):
        make_sweep(edits=[edit])


def test_the_command_line(agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembering: Make) -> None:
    monkeypatch.setattr(sweeps, "LocalEngine", remembering)
    model = save_pretrained(agent, tmp_path / "model")
    out = tmp_path / "out"
    file = save_edits([SingularEdit(agent, OV, "0,1", side="read", value=2.0)], tmp_path / "edits.json")

    def arms(*words: Any, to: Path = out) -> list[tuple[Any, ...]]:
        plan: list[Any] = []
        monkeypatch.setattr(Sweep, "run", lambda self, *_: plan.append(self.plan) or (_ for _ in ()).throw(Done))
        found = CliRunner().invoke(app, ["sweep", str(model), "--episodes", "1", "--out", str(to), *map(str, words)])
        if not isinstance(found.exception, Done):
            raise found.exception or AssertionError(found.output)
        return [(arm.matrix, arm.record["sv"], arm.side, arm.value) for arm in plan[0].arms if arm.kind == "edit"]

    chosen = ["--matrices", W_IN, "--sv", "0,1"]
    both = [(W_IN, [sv], "read", value) for sv in (0, 1) for value in ("zero", "0.5")]
    for spelling in (["--value", "zero,0.5"], ["--value", "zero", "--value", "0.5"], ["--edits", "zero,scale:0.5"]):
        assert arms(*chosen, *spelling) == both
    assert arms(*chosen, "--value", "zero", "--value", "0.5", "--edits-from", file)[-4:] == both  # OV comes first
    assert arms("--edits-from", file) == [(OV, [0, 1], "read", "2")]
    two = ["--edit", OV, "--edit", W_IN, "--sv", "0-1", "--side", "read", "--value", "zero", "--value", "flip"]
    assert arms(*two) == [(OV, [0, 1], "read", "zero"), (W_IN, [0, 1], "read", "flip")]
    for sides in (["--side", "write"], ["--sides", "write"]):
        assert arms("--matrices", OV, *sides) == [(OV, [0], "write", "constant")]
    assert arms("--edit", W_IN, *chosen[:2], "--sv=-1") == arms("--matrices", W_IN, "--sv", "-1")
    for words, said in (
        ([*two, *chosen[:2]], "several --sv, --value or --side may belong to either"),
        (["--edits-from", file, "--value", "zero"], "leave out --value"),
        ([*chosen, "--edits-from", file, "--edit", OV], "leave out --edit"),
        ([*chosen, "--edits", "zero", "--value", "zero"], "--edits is another name for --value"),
    ):
        with pytest.raises(DtLensError, match=said):
            arms(*words)


class Done(Exception):
    """Raised where the sweep would begin."""
