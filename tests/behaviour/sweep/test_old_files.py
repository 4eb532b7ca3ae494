"""Files of agents from before there were tasks (format 2): they open read-only, and grow, to the same numbers."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import FILE

Make = Callable[..., Any]
same = pd.testing.assert_frame_equal

# As dt-lens 0.3 made them.
TABLES = """
CREATE TABLE plan (options TEXT NOT NULL);
CREATE TABLE arms (
    arm INTEGER PRIMARY KEY, kind TEXT NOT NULL, of INTEGER REFERENCES arms, matrix TEXT, layer INTEGER, head INTEGER,
    side TEXT, sv INTEGER, value TEXT, control INTEGER, record TEXT,
    energy REAL, model_id TEXT, note TEXT, error TEXT,
    match TEXT, directions TEXT, output_energy REAL
);
CREATE TABLE units (
    unit INTEGER PRIMARY KEY, arm INTEGER NOT NULL REFERENCES arms, seed INTEGER NOT NULL, episodes INTEGER NOT NULL,
    status TEXT NOT NULL DEFAULT 'todo' CHECK (status IN ('todo', 'done', 'failed', 'void')), error TEXT
);
CREATE TABLE episodes (
    unit INTEGER NOT NULL REFERENCES units, seed INTEGER NOT NULL, return REAL, length INTEGER NOT NULL,
    terminated INTEGER NOT NULL, truncated INTEGER NOT NULL, PRIMARY KEY (unit, seed)
) WITHOUT ROWID;
CREATE TABLE runs (
    run INTEGER PRIMARY KEY, unit INTEGER NOT NULL REFERENCES units, driver INTEGER NOT NULL,
    began TEXT NOT NULL, ended TEXT, worker TEXT, result TEXT
);
CREATE INDEX unit_arm ON units (arm);
CREATE TABLE checksums (unit INTEGER PRIMARY KEY REFERENCES units, checksum TEXT);
"""
COLUMNS = "arm, kind, of, matrix, layer, head, side, sv, value, control, record, energy, model_id, note, error, match"
COPIES = {
    "arms": f"SELECT {COLUMNS}, directions, output_energy FROM new.arms",
    "units": "SELECT block, arm, first, count, status, error FROM new.blocks",
    "episodes": "SELECT block, unit, return, length, terminated, truncated FROM new.outcomes",
    "runs": "SELECT run, block, driver, began, ended, worker, result FROM new.runs",
    "checksums": "SELECT block, checksum FROM new.checksums",
}
BEFORE = ("model", "seed", "halving", "block_size", "fold_layernorm", "activations", "baseline", "matrices", "sv")
BEFORE += ("sides", "edits", "controls", "control_match", "directions", "registration")


def aged(file: Path, out: Path, *lacks: str) -> Path:
    """The sweep in ``file`` as dt-lens 0.3 would have kept it, without the options that it ``lacks``."""
    out.mkdir()
    with closing(sqlite3.connect(out / FILE)) as db:
        db.executescript(TABLES)
        db.execute(f"PRAGMA application_id = {0x64746C73}")
        db.execute("ATTACH ? AS new", (str(file),))
        for table, query in COPIES.items():
            db.execute(f"INSERT INTO main.{table} {query}")
        options = json.loads(db.execute("SELECT options FROM new.plan").fetchone()[0])
        old = {name: value for name, value in options.items() if name in BEFORE or name.startswith("version of")}
        old |= {"format": 2, "episodes": options["units"], "steps": options["sample"], "failure": None}
        old |= options["task"]["setting"]
        db.execute("INSERT INTO main.plan VALUES (?)", (json.dumps({k: v for k, v in old.items() if k not in lacks}),))
        db.commit()
    return out / FILE


@pytest.mark.parametrize("lacks", [(), ("registration", "steps", "failure")])
def test_it_opens_read_only(finished: Make, tmp_path: Path, lacks: tuple[str, ...]) -> None:
    new = finished(tmp_path / "new").results
    file = aged(new.file, tmp_path / "old", *lacks)
    file.chmod(0o400)
    bytes_ = file.read_bytes()
    old = SweepResults(file)
    same(old.table(), new.table(), check_exact=True)
    assert old.table().attrs == new.table().attrs
    same(old.episodes(), new.episodes(), check_exact=True)
    assert old.status() == new.status() and old.controls() == new.controls() and old.failures() == []
    assert str(old.baseline()) == str(new.baseline())
    assert old.terms == new.terms and old.options["units"] == 6 and old.options["first"] == 3
    assert file.read_bytes() == bytes_ and [entry.name for entry in file.parent.iterdir()] == [FILE]


@pytest.mark.parametrize("more", [{"episodes": 8, "controls": 2}, {"sv": "0,1"}])
def test_it_grows(
    make_sweep: Make, finished: Make, remembering: Make, interrupted: Make, tmp_path: Path, more: dict[str, Any]
) -> None:
    new = finished(tmp_path / "new")
    file = aged(new.file, tmp_path / "old", "registration")
    with closing(sqlite3.connect(file)) as db:
        checksums = db.execute("SELECT * FROM checksums ORDER BY unit").fetchall()
    whole = make_sweep(tmp_path / "whole", **more).run(engine=remembering())
    with pytest.raises(KeyboardInterrupt):
        make_sweep(file.parent, **more).run(engine=interrupted(3))
    grown = make_sweep(file.parent, **more).run(engine=remembering(2))
    same(grown.table(), whole.table(), check_exact=True)
    same(grown.episodes(), whole.episodes(), check_exact=True)
    assert grown.results.options == whole.results.options
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("SELECT * FROM checksums ORDER BY block").fetchall()[: len(checksums)] == checksums
        assert {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'")} == {"block_arm"}
        runs = db.execute("SELECT block, result FROM runs WHERE result = 'done'").fetchall()
    assert len(runs) == len(set(runs))  # nothing that was finished ran again


def test_another_order_of_the_measures_changes_nothing(finished: Make, remembering: Make, tmp_path: Path) -> None:
    """Terms are by name: another version may list the measures in another order."""
    sweep = finished(tmp_path)
    before = sweep.table()
    with closing(sqlite3.connect(sweep.file)) as db, db:
        options = json.loads(db.execute("SELECT options FROM plan").fetchone()[0])
        options["task"]["measures"] = dict(reversed(options["task"]["measures"].items()))
        db.execute("UPDATE plan SET options = ?", (json.dumps(options),))
    same(SweepResults(sweep.file).table(), before, check_exact=True)
    same(sweep.run(engine=remembering()).table(), before, check_exact=True)


def test_what_is_damaged_in_it_is_one_sentence(finished: Make, tmp_path: Path) -> None:
    file = aged(finished(tmp_path / "new").file, tmp_path / "old")
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE episodes SET return = return + 1e-9 WHERE unit = 2 AND seed = 4")
    with pytest.raises(Exception, match="the outcomes of block 2 have changed since they were written"):
        SweepResults(file)
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE plan SET options = json_set(options, '$.time_limit', -9)")
    with pytest.raises(Exception, match="its plan or its arms cannot be read"):
        SweepResults(file)
