"""Check that the units and episodes in a sweep's file fit together, and that no bit of the outcomes has changed.

SQLite's own check finds pages that are damaged, not numbers. So every finished unit has a checksum, of its outcomes and
of the edit that they belong to. Units that older versions of dt-lens wrote have none.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from typing import Any

__all__ = ["add_checksum", "make_checksums", "require_sound"]

# What each query finds must not be there; its columns go into the sentence.
FAULTS = {
    "arm {0} is neither a baseline, an edit, nor a control of an edit, or has text for a number": """
        SELECT arm FROM arms WHERE kind NOT IN ('baseline', 'edit', 'control')
        OR (kind = 'baseline') <> (record IS NULL)
        OR (kind = 'control') <> (of IS NOT NULL)
        OR (of IS NOT NULL AND of NOT IN (SELECT arm FROM arms WHERE kind = 'edit'))
        OR typeof(layer) NOT IN ('integer', 'null') OR typeof(head) NOT IN ('integer', 'null')
        OR typeof(sv) NOT IN ('integer', 'null') OR typeof(control) NOT IN ('integer', 'null')
        OR typeof(energy) NOT IN ('real', 'null') OR typeof(output_energy) NOT IN ('real', 'null')
    """,
    "unit {0} has no arm, or a seed or a number of episodes that cannot be": """
        SELECT unit FROM units WHERE typeof(seed) <> 'integer' OR typeof(episodes) <> 'integer' OR seed < 0
        OR episodes < 1 OR arm NOT IN (SELECT arm FROM arms) OR status NOT IN ('todo', 'done', 'failed', 'void')
    """,
    "units {0} and {1} hold the same seed of one arm": """
        SELECT before, unit FROM (
            SELECT unit, seed, lag(unit) OVER run AS before, lag(seed + episodes) OVER run AS stop
            FROM units WINDOW run AS (PARTITION BY arm ORDER BY seed, unit)
        ) WHERE seed < stop
    """,
    "the episode with seed {1} of unit {0} has a length, a return or an ending that cannot be": """
        SELECT unit, seed FROM episodes WHERE typeof(seed) <> 'integer' OR typeof(return) NOT IN ('real', 'null')
        OR typeof(length) <> 'integer' OR length < 1 OR terminated NOT IN (0, 1) OR truncated NOT IN (0, 1)
    """,
    "there are episodes of unit {0}, which does not exist": """
        SELECT unit FROM episodes WHERE unit NOT IN (SELECT unit FROM units)
    """,
    "unit {0} is {1} and holds {3} of its {2} episodes": """
        SELECT units.unit, status, units.episodes, count(run.seed) AS found
        FROM units LEFT JOIN episodes AS run ON run.unit = units.unit
            AND run.seed >= units.seed AND run.seed < units.seed + units.episodes
        GROUP BY units.unit HAVING found <> CASE status WHEN 'done' THEN units.episodes ELSE 0 END
    """,
    "unit {0} holds an episode of another seed": """
        SELECT run.unit FROM episodes AS run JOIN units USING (unit)
        WHERE run.seed < units.seed OR run.seed >= units.seed + units.episodes
    """,
}


def require_sound(db: sqlite3.Connection) -> None:
    """Check everything in an open file.

    Raises:
        sqlite3.DatabaseError: for the first thing that cannot be, in words.
    """
    for words, query in FAULTS.items():
        found = db.execute(query).fetchone()
        if found is not None:
            raise sqlite3.DatabaseError(words.format(*found))
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'checksums'").fetchone() is None:
        return
    said = dict(db.execute("SELECT unit, checksum FROM checksums"))
    for unit, record, rows in _done(db):
        if unit in said and said[unit] != _checksum(record, rows):
            raise sqlite3.DatabaseError(f"the outcomes of unit {unit} have changed since they were written")


def make_checksums(db: sqlite3.Connection) -> None:
    """Make the table of checksums, empty, in a file that has none."""
    db.execute("CREATE TABLE IF NOT EXISTS checksums (unit INTEGER PRIMARY KEY REFERENCES units, checksum TEXT)")


def add_checksum(db: sqlite3.Connection, unit: int) -> None:
    """Write the checksum of a unit whose outcomes have just been written."""
    for _, record, rows in _done(db, unit):
        db.execute("INSERT OR REPLACE INTO checksums VALUES (?, ?)", (unit, _checksum(record, rows)))


def _done(db: sqlite3.Connection, unit: int | None = None) -> Iterable[tuple[int, str | None, list[Any]]]:
    """Finished units, or one of them: its number, its arm's record, and its outcomes by seed."""
    where = "" if unit is None else "WHERE episodes.unit = ?"
    query = f"""
        SELECT episodes.unit, record, episodes.seed, return, length, terminated, truncated
        FROM episodes JOIN units USING (unit) JOIN arms USING (arm) {where} ORDER BY episodes.unit, episodes.seed
    """
    number, record, rows = -1, None, list[Any]()
    for found, of, *row in db.execute(query, () if unit is None else (unit,)):
        if found != number:
            if rows:
                yield number, record, rows
            number, record, rows = found, of, []
        rows.append(row)
    if rows:
        yield number, record, rows


def _checksum(record: str | None, rows: list[Any]) -> str:
    """A hash of every bit of outcomes; ``repr`` gives a float's shortest text that reads back as the same bits."""
    return hashlib.blake2b(repr((record, rows)).encode(), digest_size=16).hexdigest()
