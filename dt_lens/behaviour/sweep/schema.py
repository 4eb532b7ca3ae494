"""The tables of a sweep's file, and how arms and options are written to and read from them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dt_lens.behaviour.sweep.plan import Arm

__all__ = [
    "APPLICATION",
    "COLUMNS",
    "add_arms",
    "create",
    "decoding",
    "read_arms",
    "read_options",
    "renumber",
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
"""


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return type(value) in (int, float)


NEEDED: dict[str, Callable[[Any], bool]] = {  # options that every file has, and what they may be
    "format": lambda value: type(value) is int,
    "model": lambda value: isinstance(value, str),
    "episodes": _counts,
    "seed": lambda value: type(value) is int and value >= 0,
    "environment": lambda value: isinstance(value, str),
    "environment_kwargs": lambda value: isinstance(value, dict),
    "target_return": _number,
    "time_limit": _counts,
    "fold_layernorm": lambda value: isinstance(value, bool),
    "baseline": lambda value: isinstance(value, bool),
}
COLUMNS = Arm._fields[1:]


def create(db: sqlite3.Connection) -> None:
    """Make the tables, empty."""
    for statement in SCHEMA.split(";\n"):
        if statement.strip():
            db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION}")


@contextmanager
def decoding() -> Iterator[None]:
    """Raise SQLite's own error where a file's text makes no sense. Only code that reads a file belongs inside."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise sqlite3.DatabaseError("its plan or its arms cannot be read") from error


def read_options(db: sqlite3.Connection) -> dict[str, Any]:
    """The options of a file.

    Raises:
        sqlite3.DatabaseError: if they cannot be read.
    """
    with decoding():
        (text,) = db.execute("SELECT options FROM plan").fetchone()
        options: dict[str, Any] = json.loads(text)
        for name, fits in NEEDED.items():
            if not fits(options[name]):
                raise ValueError(name)
        if not all(map(_counts, options.get("halving") or ())):
            raise ValueError("halving")
    return options


def read_arms(db: sqlite3.Connection) -> list[Arm]:
    """The arms of a file, in the order of their numbers.

    Raises:
        sqlite3.DatabaseError: if they cannot be read.
    """
    rows = db.execute(f"SELECT arm, {', '.join(COLUMNS)} FROM arms ORDER BY arm")
    with decoding():
        return [Arm._make((*row[:-1], None if row[-1] is None else json.loads(row[-1]))) for row in rows]


def add_arms(db: sqlite3.Connection, arms: Sequence[Arm]) -> None:
    """Insert arms, whose numbers must be free."""
    marks = ", ".join("?" * (1 + len(COLUMNS)))
    rows = ((*arm[:-1], None if arm.record is None else json.dumps(arm.record)) for arm in arms)
    db.executemany(f"INSERT INTO arms (arm, {', '.join(COLUMNS)}) VALUES ({marks})", rows)


def renumber(db: sqlite3.Connection, numbers: dict[int, Arm]) -> None:
    """Give each arm, found by its old number, the number of the ``Arm``; its units follow."""
    # Through negative numbers, so that no number is taken twice on the way.
    moved = [(-1 - arm.number, old) for old, arm in numbers.items()]
    for table in ("arms", "units"):
        db.executemany(f"UPDATE {table} SET arm = ? WHERE arm = ?", moved)
        db.execute(f"UPDATE {table} SET arm = -1 - arm WHERE arm < 0")
    db.executemany("UPDATE arms SET of = ? WHERE arm = ?", [(arm.of, arm.number) for arm in numbers.values()])
