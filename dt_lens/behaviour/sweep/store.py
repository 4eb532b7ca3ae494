"""The one file of a sweep: SQLite, written by the driver alone, in transactions.

``kill -9`` leaves either the whole of a transaction or nothing of it. While the driver runs the file is in WAL mode,
with two companions beside it and a third that holds the lock; when it ends, in whatever orderly way, one file is left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from dt_lens.behaviour.sweep.engine import Event
from dt_lens.behaviour.sweep.plan import Block, Plan
from dt_lens.errors import DtLensError, because

__all__ = ["FILE", "Lock", "Store", "in_words"]

FILE = "sweep.sqlite"
APPLICATION = 0x64_74_6C_73  # "dtls"

SCHEMA = """
CREATE TABLE plan (options TEXT NOT NULL);
CREATE TABLE arms (
    arm INTEGER PRIMARY KEY, kind TEXT NOT NULL, of INTEGER REFERENCES arms, matrix TEXT, layer INTEGER, head INTEGER,
    side TEXT, sv INTEGER, value TEXT, control INTEGER, record TEXT,
    energy REAL, model_id TEXT, note TEXT, error TEXT
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


class Lock:
    """Held by the one driver of a file, and by the system for it: it ends with the process, however that ends."""

    def __init__(self, file: Path) -> None:
        self.file = file.with_name(f"{file.name}.lock")
        self._sweep = file

    def __enter__(self) -> Self:
        while True:
            try:
                self._handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise _unwritable(self._sweep, error) from error
            try:
                _lock(self._handle)
                # The last driver may have removed the file between the two lines above.
                if os.fstat(self._handle).st_ino == self.file.stat().st_ino:
                    return self
            except FileNotFoundError:
                pass
            except OSError as error:
                os.close(self._handle)
                if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                    raise _unwritable(self._sweep, error) from error
                raise DtLensError(
                    f"Another process is running the sweep in {self._sweep}; wait for it, or give another folder."
                ) from None
            os.close(self._handle)

    def __exit__(self, *_: object) -> None:
        if os.name == "posix":
            self.file.unlink(missing_ok=True)  # while it is still held, so that nobody holds a file that is gone
            os.close(self._handle)
        else:
            os.close(self._handle)
            with contextlib.suppress(OSError):
                self.file.unlink()


def _lock(handle: int) -> None:
    if os.name == "posix":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]


def _unwritable(file: Path, error: Exception) -> DtLensError:
    why = getattr(error, "strerror", None) or because(error)
    return DtLensError(f"{file} cannot be written: {why}; choose another folder or make room.")


@contextlib.contextmanager
def in_words(file: Path) -> Iterator[None]:
    """SQLite's errors as one sentence that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        said = str(error)
        if isinstance(error, sqlite3.OperationalError):
            if "no such" not in said and "locked" not in said:
                raise _unwritable(file, error) from error
            if "locked" in said:
                raise DtLensError(f"Another program holds {file}; close it and give the same command again.") from error
        raise DtLensError(
            f"{file} is damaged, or no sweep's file ({because(error)}); move it away, and the sweep begins anew."
        ) from error


class Store:
    """The file, open for its driver. Make one with ``Store.open``.

    Every method that writes must stand inside ``with store.writing():``.
    """

    def __init__(self, file: Path, plan: Plan) -> None:
        self.file, self.plan = file, plan
        with in_words(file):
            self._db = sqlite3.connect(file, isolation_level=None, timeout=10)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    @classmethod
    @contextlib.contextmanager
    def open(cls, file: Path, plan: Plan) -> Iterator[Store]:
        """The store of ``plan``, made new or gone on with; one file is left at the end.

        Raises:
            DtLensError: when the file is another plan's, damaged, in use, or cannot be written.
        """
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(file, error) from error
        with Lock(file):
            store = cls(file, plan)
            try:
                yield store
            finally:
                store.close()

    def _prepare(self) -> None:
        db = self._db
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if tables and application != APPLICATION:
            raise DtLensError(f"{self.file} is a database of something else; give the sweep another folder.")
        if tables and (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
        if tables:
            self._require_same_plan()
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if not tables:
            with self.writing():
                self._create()

    def _require_same_plan(self) -> None:
        try:
            (options,) = self._db.execute("SELECT options FROM plan").fetchone()
            difference = self.plan.difference(json.loads(options))
        except (TypeError, ValueError) as error:
            raise sqlite3.DatabaseError("its plan cannot be read") from error
        if difference is not None:
            raise DtLensError(
                f"{self.file} holds another sweep: {difference}; give the same options to go on with it, or another "
                "folder."
            )

    def _create(self) -> None:
        db = self._db
        for statement in SCHEMA.split(";\n"):
            if statement.strip():
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute("INSERT INTO plan VALUES (?)", (json.dumps(self.plan.options),))
        columns = "arm, kind, of, matrix, layer, head, side, sv, value, control, record"
        arms = ((*arm[:-1], None if arm.record is None else json.dumps(arm.record)) for arm in self.plan.arms)
        db.executemany(f"INSERT INTO arms ({columns}) VALUES (?,?,?,?,?,?,?,?,?,?,?)", arms)
        db.executemany("INSERT INTO units (unit, arm, seed, episodes) VALUES (?,?,?,?)", self.plan.blocks())

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction: all of what is written inside, or nothing of it."""
        with in_words(self.file):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled it back already
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Fold the companions into the one file."""
        # What cannot be folded in now, on a full disk, is read from the companions next time.
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()

    def todo(self) -> list[Block]:
        """The units that have no outcomes yet, those that failed in an earlier run included."""
        with in_words(self.file):
            rows = self._db.execute(
                "SELECT unit, arm, seed, episodes FROM units WHERE status IN ('todo', 'failed') ORDER BY unit"
            )
            return [Block(*row) for row in rows]

    def model_id_of(self, arm: int) -> str | None:
        """The ``model_id`` with which an arm's first unit was begun; ``None`` where none was."""
        with in_words(self.file):
            found: str | None = self._db.execute("SELECT model_id FROM arms WHERE arm = ?", (arm,)).fetchone()[0]
            return found

    def describe(self, arm: int, energy: float, model_id: str, note: str) -> None:
        """Keep what is known of an arm once its edit is made."""
        self._db.execute(
            "UPDATE arms SET energy = ?, model_id = ?, note = ? WHERE arm = ?", (energy, model_id, note, arm)
        )

    def void(self, arm: int, error: str) -> None:
        """Keep that an arm's edit cannot be put in force, and why; its units will not be run."""
        self._db.execute("UPDATE arms SET error = ? WHERE arm = ?", (error, arm))
        self._db.execute("UPDATE units SET status = 'void' WHERE arm = ? AND status <> 'done'", (arm,))

    def begin(self, unit: int) -> int:
        """Log that a unit is begun; the number of the run."""
        cursor = self._db.execute(
            "INSERT INTO runs (unit, driver, began) VALUES (?, ?, ?)", (unit, os.getpid(), _now())
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def finish(self, run: int, event: Event) -> None:
        """Keep the outcomes of a unit."""
        rows: list[tuple[Any, ...]] = [
            (event.unit, o.seed, float(o.total), int(o.length), int(o.terminated), int(o.truncated))
            for o in event.outcomes
        ]
        self._db.executemany("INSERT INTO episodes VALUES (?,?,?,?,?,?)", rows)
        self._db.execute("UPDATE units SET status = 'done', error = NULL WHERE unit = ?", (event.unit,))
        self.end(run, event)

    def fail(self, unit: int, error: str) -> None:
        """Keep that a unit could not be run, and why; the next driver tries it again."""
        self._db.execute("UPDATE units SET status = 'failed', error = ? WHERE unit = ?", (error, unit))

    def end(self, run: int, event: Event) -> None:
        """Log how a run ended."""
        self._db.execute(
            "UPDATE runs SET ended = ?, worker = ?, result = ? WHERE run = ?", (_now(), event.worker, event.kind, run)
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
