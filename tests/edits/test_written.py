"""An edit is written the same way everywhere: as text, in files, and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dt_lens.edits.several import load_edits, save_edits, written_edits
from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError

W_IN, W_OUT, OV = "blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "blocks.0.attn.OV.0"


@pytest.fixture(scope="module")
def model(make_dt: Callable[..., Any]) -> Any:
    return make_dt(0, state_dim=4, act_dim=2, n_layers=1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        (" zero ", "zero"),
        ("replace:action_out:0", {"replace": ["action_out", 0]}),
        ("towards:action_out:1:-30", {"towards": ["action_out", 1], "angle": -30}),
        ('{"towards": ["action_out", 1], "angle": 30}', ("action_out", 1, 30)),
    ],
)
def test_text_means_what_the_value_means(model: Any, text: str, value: Any) -> None:
    one, other = (SingularEdit(model, W_IN, 1, value=given) for given in (text, value))
    assert one.to_dict() == other.to_dict() and one.energy == other.energy


def test_text_of_directions(model: Any) -> None:
    k = len(SingularEdit(model, W_IN, slice(None)).sv)
    for text, wanted in (("0-3", [0, 1, 2, 3]), ("-1", [k - 1]), ("2,0", [0, 2]), ("all", list(range(k)))):
        assert SingularEdit(model, W_IN, text).sv == wanted
    for text, words in (("x", "sv holds 'x'"), (f"{k}", "out of range"), ("3-1", "empty")):
        with pytest.raises(DtLensError, match=words):
            SingularEdit(model, W_IN, text)
    for text in ("nothing", "{", "replace:action_out:nowhere", "nan"):
        with pytest.raises(DtLensError):
            SingularEdit(model, W_IN, value=text)


def test_edits_come_back_from_their_file(model: Any, tmp_path: Path) -> None:
    edit = SingularEdit(model, OV, "0-1", side="write", value="random", seed=3)
    (alone,) = load_edits(model, edit.save(tmp_path / "edit.json"))
    assert alone.to_dict() == edit.to_dict() and alone.energy == edit.energy
    both = [edit, edit.control(7)]
    assert [e.to_dict() for e in load_edits(model, save_edits(both, tmp_path / "b.json"))] == [
        e.to_dict() for e in both
    ]
    single = tmp_path / "single.json"
    single.write_text(json.dumps(edit.to_dict()))
    assert load_edits(model, single)[0].to_dict() == edit.to_dict()
    for content in ("[]", "3", "{", '["a"]', '[{"kind": "other"}]'):
        single.write_text(content)
        with pytest.raises(DtLensError):
            load_edits(model, single)


def test_one_option_for_all_edits_or_one_for_each(model: Any) -> None:
    two = written_edits(model, [W_IN, W_OUT], ["0-1"], [], ["zero", "0.5"])
    assert [e.sv for e in two] == [[0, 1]] * 2 and [e.to_dict()["value"] for e in two] == ["zero", 0.5]
    with pytest.raises(DtLensError, match="There are 2 edits and 3 of --sv"):
        written_edits(model, [W_IN, W_OUT], ["0", "1", "2"])


def test_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dt_lens.cli.app import app
    from dt_lens.lens.loading import load

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["evaluate", "tiny-gpt2", "--windows", "2", *arguments])

    written = run("--edit", W_IN, "--edit", W_OUT, "--sv", "0-1", "--value", "zero", "--value", "0.5")
    model = load("tiny-gpt2", check=False)
    file = save_edits(written_edits(model, [W_IN, W_OUT], ["0-1"], [], ["zero", "0.5"]), tmp_path / "edits.json")
    read = run("--edits-from", str(file))
    assert written.exit_code == 0 and "2 paired windows" in written.output and written.output == read.output
    for wrong, words in (
        (["--sv", "1"], "--sv belong to an edit"),
        (["--edits-from", str(file), "--sv", "1"], "leave out --sv"),
        (["--edits-from", str(tmp_path / "none.json")], "cannot be read as edits"),
    ):
        with pytest.raises(DtLensError, match=words):
            raise run(*wrong).exception
