"""The tables of a sweep's file, and how arms and options are written to and read from them.

``blocks`` are an arm with some of the task's units, ``outcomes`` a row per unit with a column for every measure of the
task. Files of format 2, from before there were tasks, are of agents: they call blocks ``units`` and outcomes
``episodes``. They are read through views, and take the new names when a sweep resumes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dt_lens.arguments import as_json
from dt_lens.behaviour.sweep.plan import Arm
from dt_lens.behaviour.tasks import terms_in
from dt_lens.behaviour.terms import Measure, Terms
from dt_lens.edits.written import today
from dt_lens.errors import DtLensError

__all__ = [
    "APPLICATION",
    "COLUMNS",
    "add_arms",
    "create",
    "decoding",
    "named_anew",
    "quoted",
    "read_arms",
    "read_options",
    "renumber",
    "require_names",
    "upgrade",
]

APPLICATION = 0x64_74_6C_73  # "dtls"

SCHEMA = """
CREATE TABLE plan (options TEXT NOT NULL);
CREATE TABLE arms (
    arm INTEGER PRIMARY KEY, kind TEXT NOT NULL, of INTEGER REFERENCES arms, matrix TEXT, layer INTEGER, head INTEGER,
    side TEXT, sv INTEGER, value TEXT, control INTEGER, record TEXT,
    energy REAL, model_id TEXT, note TEXT, error TEXT,
    match TEXT, directions TEXT, output_energy REAL
);
CREATE TABLE blocks (
    block INTEGER PRIMARY KEY, arm INTEGER NOT NULL REFERENCES arms, first INTEGER NOT NULL, count INTEGER NOT NULL,
    status TEXT NOT NULL DEFAULT 'todo' CHECK (status IN ('todo', 'done', 'failed', 'void')), error TEXT
);
CREATE TABLE outcomes (
    block INTEGER NOT NULL REFERENCES blocks, unit INTEGER NOT NULL, {measures}, PRIMARY KEY (block, unit)
) WITHOUT ROWID;
CREATE TABLE runs (
    run INTEGER PRIMARY KEY, block INTEGER NOT NULL REFERENCES blocks, driver INTEGER NOT NULL,
    began TEXT NOT NULL, ended TEXT, worker TEXT, result TEXT
);
CREATE INDEX block_arm ON blocks (arm);
"""
TYPES: dict[Measure, str] = {"real": "REAL", "integer": "INTEGER NOT NULL", "boolean": "INTEGER NOT NULL"}
RESERVED = ("block", "unit")  # the other columns of outcomes

# What format 2 called its columns, and now: by the old and the new name of each table.
ANEW: dict[tuple[str, str], dict[str, str]] = {
    ("units", "blocks"): {"unit": "block", "seed": "first", "episodes": "count"},
    ("episodes", "outcomes"): {"unit": "block", "seed": "unit"},
    ("runs", "runs"): {"unit": "block"},
    ("checksums", "checksums"): {"unit": "block"},
}
GONE = ("environment", "environment_kwargs", "target_return", "time_limit", "failure", "episodes", "steps")


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return type(value) in (int, float)


NEEDED: dict[str, Callable[[Any], bool]] = {  # options that every file has, and what they may be
    "format": lambda value: type(value) is int,
    "model": lambda value: isinstance(value, str),
    "units": _counts,
    "first": lambda value: type(value) is int and value >= 0,
    "seed": lambda value: type(value) is int and value >= 0,
    "task": lambda value: isinstance(value, dict),
    "fold_layernorm": lambda value: isinstance(value, bool),
    "baseline": lambda value: isinstance(value, bool),
}
NEEDED_IN_2: dict[str, Callable[[Any], bool]] = {
    "episodes": _counts,
    "seed": lambda value: type(value) is int and value >= 0,
    "environment": lambda value: isinstance(value, str),
    "environment_kwargs": lambda value: isinstance(value, dict),
    "target_return": _number,
    "time_limit": _counts,
}
COLUMNS = Arm._fields[1:]


def create(db: sqlite3.Connection, terms: Terms) -> None:
    """Make the tables, empty, for outcomes with the measures of ``terms``."""
    measures = ", ".join(f"{quoted(name)} {TYPES[kind]}" for name, kind in terms.measures.items())
    for statement in SCHEMA.split(";\n"):
        if statement.strip():
            db.execute(statement.replace("{measures}", measures))
    db.execute(f"PRAGMA application_id = {APPLICATION}")


def quoted(name: str) -> str:
    """The name of a measure, as SQL takes any: ``return`` and ``order`` are words of SQL elsewhere."""
    return '"' + name.replace('"', '""') + '"'


def require_names(terms: Terms) -> None:
    """Raise ``DtLensError`` for measures that cannot be columns of one table, whose names have no case."""
    known = set(RESERVED)
    for name in terms.measures:
        if name.lower() in known:
            raise DtLensError(
                f"The task {terms.task!r} measures {name!r}, which a sweep's file cannot hold beside "
                f"{', '.join(sorted(known))}; give the measure another name."
            )
        known.add(name.lower())


@contextmanager
def named_anew(db: sqlite3.Connection) -> Iterator[None]:
    """Inside, the tables of a file of format 2 also have today's names, as views that only this connection sees."""
    there = _tables(db)
    if "units" not in there:
        yield
        return
    db.execute("PRAGMA temp_store = MEMORY")  # the file's folder may be read-only
    views = []
    for (old, new), names in ANEW.items():
        if old in there:
            columns = ", ".join(
                f"{quoted(name)} AS {names.get(name, quoted(name))}" for (_, name, *_) in _columns_of(db, old)
            )
            db.execute(f"CREATE TEMP VIEW {new} AS SELECT {columns} FROM main.{old}")
            views.append(new)
    try:
        yield
    finally:
        for view in views:
            db.execute(f"DROP VIEW temp.{view}")


def upgrade(db: sqlite3.Connection) -> None:
    """Give the tables of a file of format 2 today's names. No value changes."""
    there = _tables(db)
    if "units" not in there:
        return
    db.execute("DROP INDEX IF EXISTS unit_arm")
    for (old, new), names in ANEW.items():
        if old in there:
            if old != new:
                db.execute(f"ALTER TABLE {old} RENAME TO {new}")
            for before, after in names.items():
                db.execute(f"ALTER TABLE {new} RENAME COLUMN {before} TO {after}")
    db.execute("CREATE INDEX block_arm ON blocks (arm)")


def _tables(db: sqlite3.Connection) -> set[str]:
    return {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _columns_of(db: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    return db.execute(f"PRAGMA main.table_info({table})").fetchall()


@contextmanager
def decoding() -> Iterator[None]:
    """Raise SQLite's own error where a file's text makes no sense. Only code that reads a file belongs inside."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise sqlite3.DatabaseError("its plan or its arms cannot be read") from error


def read_options(db: sqlite3.Connection) -> dict[str, Any]:
    """The options of a file, as a file of today's format has them; ``format`` is the file's own.

    Raises:
        sqlite3.DatabaseError: if they cannot be read.
    """
    with decoding():
        (text,) = db.execute("SELECT options FROM plan").fetchone()
        options: dict[str, Any] = json.loads(text)
        if options["format"] == 2:
            _require(options, NEEDED_IN_2)
            anew = {"units": options["episodes"], "first": options["seed"], "sample": options.get("steps")}
            anew["task"] = as_json(_terms(options).to_dict())
            options = {name: value for name, value in options.items() if name not in GONE} | anew
        _require(options, NEEDED)
        if "edits" in options:
            options["edits"] = [today(value) for value in options["edits"]]
        _terms(options)
        if not all(map(_counts, options.get("halving") or ())):
            raise ValueError("halving")
    return options


def _require(options: dict[str, Any], needed: dict[str, Callable[[Any], bool]]) -> None:
    for name, fits in needed.items():
        if not fits(options[name]):
            raise ValueError(name)


def _terms(options: dict[str, Any]) -> Terms:
    try:
        return terms_in(options)
    except DtLensError as error:
        raise ValueError("task") from error


def read_arms(db: sqlite3.Connection) -> list[Arm]:
    """The arms of a file, in the order of their numbers.

    Raises:
        sqlite3.DatabaseError: if they cannot be read.
    """
    rows = db.execute(f"SELECT arm, {', '.join(COLUMNS)} FROM arms ORDER BY arm")
    with decoding():
        arms = [Arm._make((*row[:-1], None if row[-1] is None else json.loads(row[-1]))) for row in rows]
    return [arm._replace(value=today(arm.value)) for arm in arms]


def add_arms(db: sqlite3.Connection, arms: Sequence[Arm]) -> None:
    """Insert arms, whose numbers must be free."""
    marks = ", ".join("?" * (1 + len(COLUMNS)))
    rows = ((*arm[:-1], None if arm.record is None else json.dumps(arm.record)) for arm in arms)
    db.executemany(f"INSERT INTO arms (arm, {', '.join(COLUMNS)}) VALUES ({marks})", rows)


def renumber(db: sqlite3.Connection, numbers: dict[int, Arm]) -> None:
    """Give each arm, found by its old number, the number of the ``Arm``; its blocks follow."""
    # Through negative numbers, so that no number is taken twice on the way.
    moved = [(-1 - arm.number, old) for old, arm in numbers.items()]
    for table in ("arms", "blocks"):
        db.executemany(f"UPDATE {table} SET arm = ? WHERE arm = ?", moved)
        db.execute(f"UPDATE {table} SET arm = -1 - arm WHERE arm < 0")
    db.executemany("UPDATE arms SET of = ? WHERE arm = ?", [(arm.of, arm.number) for arm in numbers.values()])
