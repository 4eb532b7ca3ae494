"""``--json``: one object on standard output with the keys that docs/command_line.md lists, and nothing else there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dt_lens as library
from dt_lens.cli.output import SCHEMA, plain
from dt_lens.version import __version__

Run = Callable[..., Any]
PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"
ROW = re.compile(r"^\| `(\w+)` \| (`.+`) \|$", re.MULTILINE)


def documented() -> dict[str, list[str]]:
    """The keys of each command's object, after those that all have."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8").partition("| command | keys |")[2])
    return {command: re.findall(r"`(\w+)`", keys) for command, keys in rows}


def nothing_else(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert text.count("\n") == 1 and text.endswith("\n")
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def found(dt_lens: Run, cartpole: Path) -> Callable[..., Any]:
    """Run a command with ``--json`` and give its object, whose keys are the documented ones."""

    def run(command: str, *words: object, status: int = 0) -> Any:
        result = dt_lens(command, cartpole, *words, "--json", "--quiet")
        assert result.returncode == status, result.stderr
        record = nothing_else(result.stdout)
        assert list(record) == ["schema", "command", "version", *documented()[command]]
        assert (record["schema"], record["command"], record["version"]) == (SCHEMA, command, __version__)
        return record

    return run


def same(records: list[dict[str, Any]], table: pd.DataFrame) -> None:
    """The records are the table: the same columns, the same numbers to the last digit."""
    assert [list(record) for record in records] == [list(table.columns)] * len(table)
    for name in table.columns:
        for record, value in zip(records, table[name].tolist(), strict=True):
            missing = value is None or value is pd.NA or value != value
            assert record[name] == (None if missing else value), name


def test_all_ten_are_documented_and_the_number_of_the_schema_too() -> None:
    ten = ["scan", "top", "evaluate", "compare", "study", "sweep", "atlas", "court", "steer", "certify"]
    assert list(documented()) == ten
    assert f"| `schema` | the number of this description: {SCHEMA}." in PAGE.read_text(encoding="utf-8")


def test_values_have_a_form_in_json() -> None:
    table = pd.DataFrame({"a": [1.5, float("inf")], "b": ["x", None], "c": pd.array([1, None], dtype="Int64")})
    assert plain(table) == [{"a": 1.5, "b": "x", "c": 1}, {"a": None, "b": None, "c": None}]
    mixed = {1: (np.float32(0.5), np.bool_(True), float("nan")), "file": Path("a/b"), "of": np.arange(2)}
    assert plain(mixed) == {"1": [0.5, True, None], "file": "a/b", "of": [0, 1]}
    with pytest.raises(TypeError):
        plain({"what": object()})


def test_a_scan_and_its_labels(found: Run, cartpole: Path) -> None:
    svd = library.WeightSVD(library.load(cartpole))
    record = found("scan", "--top", 0)
    whole = svd.scan()
    same(record["table"], whole.sort_values("z", ascending=False, kind="stable"))
    assert record["rows"] == len(whole) and record["about"]["null"] == "haar"
    assert len(found("scan", "--top", 2, "--matrices", "*.W_in")["table"]) == 2
    assert found("scan", "--subspaces", "--matrices", "*.W_in")["table"][0]["k"] == 1
    same(found("top", "blocks.0.mlp.W_in", "-k", 2)["table"], svd.tokens("blocks.0.mlp.W_in", k=2, n=10).rows)


def test_a_certificate_and_a_comparison_of_weights(found: Run, cartpole: Path) -> None:
    assert found("certify")["errors"]["blocks.0.mlp.W_in"] < 1e-4
    record = found("compare", cartpole, "--top", 3)
    assert record["matrices"] > 3 == len(record["table"]) and record["differ"] == 0 and record["report"] is None


def test_an_evaluation_with_and_without_an_edit(found: Run, cartpole: Path) -> None:
    options = ("--episodes", 3, "--max-steps", 5, "--workers", 1)
    base = library.evaluate(library.load(cartpole), episodes=3, max_steps=5, workers=1)
    record = found("evaluate", *options)
    assert record["edited"] is None and record["comparison"] is None
    assert record["unedited"] == plain(base.summary())
    same(record["table"], base.to_frame())
    record = found("evaluate", *options, "--edit", "blocks.0.mlp.W_out", "--value", "zero")
    assert record["comparison"]["edits"][0]["matrix"] == "blocks.0.mlp.W_out"
    assert [row["arm"] for row in record["table"]] == ["unedited"] * 3 + ["edited"] * 3
    assert record["comparison"]["difference_interval"][0] is None  # all differences are equal


def test_a_sweep_and_its_atlas(found: Run, dt_lens: Run, cartpole: Path, tmp_path: Path) -> None:
    words = ("--matrices", "*.W_in", "--value", "zero", "--controls", 1, "--episodes", 2, "--max-steps", 5)
    record = found("sweep", *words, "--workers", 1, "--out", tmp_path)
    results = library.behaviour.sweep.SweepResults(tmp_path)
    same(record["table"], results.table().reset_index())
    assert record["blocks"]["done"] == 3 and record["unedited"]["episodes"] == 2
    record = found("atlas", "--sweep", tmp_path)
    assert record["page"] == str(tmp_path / "atlas.html") and record["value"] == "zero"
    assert [row["sv"] for row in record["directions"]] == [0]


def test_a_court_without_edits(found: Run, tmp_path: Path) -> None:
    record = found("court", "--no-rollouts", "--draws", 200, "--out", tmp_path)
    assert [row["claim"] for row in record["table"]] == list(range(1, 9)) and record["facts"]["draws"] == 200


def test_steering(found: Run, tmp_path: Path) -> None:
    few = ("--episodes", 2, "--choosing", 2, "--candidates", 1, "--doses", "0,2", "--max-steps", 3, "--workers", 1)
    record = found("steer", *few, "--targets", "5,100", "--out", tmp_path)
    assert record["verdict"] == "not applicable" and record["best"] is None and len(record["curve"]) == 2


def test_an_error_leaves_standard_output_empty(dt_lens: Run, cartpole: Path) -> None:
    result = dt_lens("scan", cartpole, "--matrices", "nothing", "--json")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("dt-lens: No matrix")
