"""Check that the blocks and outcomes in a sweep's file fit together, and that no bit of the outcomes has changed.

SQLite's own check finds pages that are damaged, not numbers. So every finished block has a checksum, of its outcomes
and of the edit that they belong to. Blocks that older versions of dt-lens wrote have none.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from dt_lens.behaviour.sweep.schema import quoted
from dt_lens.behaviour.terms import Measure, Terms

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
    "block {0} has no arm, or a first {unit} or a number of {units} that cannot be": """
        SELECT block FROM blocks WHERE typeof(first) <> 'integer' OR typeof(count) <> 'integer' OR first < 0
        OR count < 1 OR arm NOT IN (SELECT arm FROM arms) OR status NOT IN ('todo', 'done', 'failed', 'void')
    """,
    "blocks {0} and {1} hold the same {unit} of one arm": """
        SELECT before, block FROM (
            SELECT block, first, lag(block) OVER run AS before, lag(first + count) OVER run AS stop
            FROM blocks WINDOW run AS (PARTITION BY arm ORDER BY first, block)
        ) WHERE first < stop
    """,
    "the {unit} with {index} {1} of block {0} has no number": """
        SELECT block, unit FROM outcomes WHERE typeof(unit) <> 'integer'
    """,
    "there are {units} of block {0}, which does not exist": """
        SELECT block FROM outcomes WHERE block NOT IN (SELECT block FROM blocks)
    """,
    "block {0} is {1} and holds {3} of its {2} {units}": """
        SELECT blocks.block, status, blocks.count, count(run.unit) AS found
        FROM blocks LEFT JOIN outcomes AS run ON run.block = blocks.block
            AND run.unit >= blocks.first AND run.unit < blocks.first + blocks.count
        GROUP BY blocks.block HAVING found <> CASE status WHEN 'done' THEN blocks.count ELSE 0 END
    """,
    "block {0} holds {units} of another {index}": """
        SELECT run.block FROM outcomes AS run JOIN blocks USING (block)
        WHERE run.unit < blocks.first OR run.unit >= blocks.first + blocks.count
    """,
}
CANNOT_BE: dict[Measure, str] = {  # values of a measure
    "real": "typeof({0}) NOT IN ('real', 'null')",
    "integer": "typeof({0}) <> 'integer'",
    "boolean": "{0} NOT IN (0, 1)",
}


def _faults(terms: Terms) -> Iterator[tuple[str, str]]:
    """Words and query for everything that must not be in a file."""
    yield from FAULTS.items()
    for name, kind in terms.measures.items():
        column = quoted(name)
        wrong = CANNOT_BE[kind].format(column)
        if terms.lasts is not None and name == terms.lasts[0]:
            wrong += f" OR {column} < 1"
        words = f"the {{unit}} with {{index}} {{1}} of block {{0}} has a value of {name} that cannot be"
        yield words, f"SELECT block, unit FROM outcomes WHERE {wrong}"


def require_sound(db: sqlite3.Connection, terms: Terms) -> None:
    """Check everything in an open file, whose outcomes have the measures of ``terms``.

    Raises:
        sqlite3.DatabaseError: for the first thing that cannot be, in words.
    """
    names = {"unit": terms.unit, "units": terms.units, "index": terms.index}
    for words, query in _faults(terms):
        found = db.execute(query).fetchone()
        if found is not None:
            raise sqlite3.DatabaseError(words.format(*found, **names))
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'checksums'").fetchone() is None:
        return
    said = dict(db.execute("SELECT block, checksum FROM checksums"))
    for block, record, rows in _done(db, terms):
        if block in said and said[block] != _checksum(record, rows):
            raise sqlite3.DatabaseError(f"the outcomes of block {block} have changed since they were written")


def make_checksums(db: sqlite3.Connection) -> None:
    """Make the table of checksums, empty, in a file that has none."""
    db.execute("CREATE TABLE IF NOT EXISTS checksums (block INTEGER PRIMARY KEY REFERENCES blocks, checksum TEXT)")


def add_checksum(db: sqlite3.Connection, terms: Terms, block: int) -> None:
    """Write the checksum of a block whose outcomes have just been written."""
    for _, record, rows in _done(db, terms, block):
        db.execute("INSERT OR REPLACE INTO checksums VALUES (?, ?)", (block, _checksum(record, rows)))


def _done(
    db: sqlite3.Connection, terms: Terms, block: int | None = None
) -> Iterable[tuple[int, str | None, list[Any]]]:
    """Finished blocks, or one of them: its number, its arm's record, and its outcomes by unit."""
    where = "" if block is None else "WHERE outcomes.block = ?"
    # In the order of the file's own columns, so that another order of the terms does not change a checksum.
    there = [name for _, name, *_ in db.execute("PRAGMA table_info(outcomes)")]
    measures = ", ".join(f"outcomes.{quoted(name)}" for name in there if name in terms.measures)
    query = f"""
        SELECT outcomes.block, record, outcomes.unit, {measures}
        FROM outcomes JOIN blocks USING (block) JOIN arms USING (arm) {where} ORDER BY outcomes.block, outcomes.unit
    """
    number, record, rows = -1, None, list[Any]()
    for found, of, *row in db.execute(query, () if block is None else (block,)):
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
