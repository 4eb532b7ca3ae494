"""The one file of a sweep: SQLite, written by the driver alone, in transactions.

``kill -9`` leaves either the whole of a transaction or nothing of it. While the driver runs the file is in WAL mode,
with SQLite's two companion files and a lock file next to it; after any orderly end only the one file is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dt_lens.behaviour.sweep.engines.engine import Event
from dt_lens.behaviour.sweep.halving import HalvingState, read_halving_state, rungs_of
from dt_lens.behaviour.sweep.packing import Packed
from dt_lens.behaviour.sweep.plan import Block, Plan, identity_of, merge_arms, split_units, summarise
from dt_lens.behaviour.sweep.schema import (
    APPLICATION,
    add_arms,
    create,
    decoding,
    named_anew,
    quoted,
    read_arms,
    read_options,
    renumber,
    upgrade,
)
from dt_lens.behaviour.sweep.soundness import add_checksum, make_checksums, require_sound
from dt_lens.behaviour.tasks import terms_in
from dt_lens.errors import DtLensError, because, unwritable

__all__ = ["FILE", "KEPT", "Store", "explain_errors"]

FILE = "sweep.sqlite"
KEPT = "activations.safetensors"  # in the same folder


@contextlib.contextmanager
def explain_errors(file: Path, reading: bool = False) -> Iterator[None]:
    """Turn SQLite's errors into one sentence that says what to do."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        said = str(error)
        if isinstance(error, sqlite3.OperationalError):
            if "no such" not in said and "locked" not in said and "decode" not in said:
                raise _unreadable(file, error) if reading else unwritable(file, error) from error
            if "locked" in said:
                raise DtLensError(f"Another program holds {file}; close it and give the same command again.") from error
        raise DtLensError(
            f"{file} is damaged, or not a sweep's file ({because(error)}); move it away, and the sweep begins anew."
        ) from error


def _unreadable(file: Path, error: sqlite3.OperationalError) -> DtLensError:
    return DtLensError(
        f"{file} cannot be read: {because(error)}; check that you may read it, or, if its sweep was cut off and the "
        "folder is read-only, copy the folder to where you can write."
    )


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of a sweep's file. The system releases it when the process ends, however it ends.

    Raises:
        DtLensError: if another process holds it, or the lock file cannot be made.
    """
    lock_file = file.with_name(f"{file.name}.lock")
    # A soft lock, which filelock falls back to where the file system has no real ones, would outlive a killed process.
    lock = FileLock(lock_file, fallback_to_soft=False)
    try:
        # Tried for a moment: the file may be removed between its opening and its locking, when another sweep just ends.
        lock.acquire(timeout=0.2, poll_interval=0.02)
    except Timeout:
        raise DtLensError(
            f"Another process is running the sweep in {file}; wait for it, or give another folder."
        ) from None
    except OSError as error:
        raise unwritable(file, error) from error
    try:
        yield
    finally:
        # filelock leaves its file, and a finished sweep is one file. Removed while the lock is held, the file cannot be
        # another driver's; and since filelock 4 a lock on a file that has been removed counts as not acquired.
        with contextlib.suppress(OSError):  # on Windows, where filelock removes it by itself
            lock_file.unlink()
        lock.release()


class Store:
    """The file, open for its driver. Make one with ``Store.open``.

    Every method that writes must be called inside ``with store.writing():``, except ``advance``.

    Attributes:
        arms: the arms of the file: those of this run and of all runs before.
        options: the options of the file.
    """

    def __init__(self, file: Path, plan: Plan) -> None:
        self.file, self.plan, self.terms = file, plan, terms_in(plan.options)
        with explain_errors(file):
            self._db = sqlite3.connect(file, isolation_level=None, timeout=10)
            self._inode: int | None = None
            try:
                self._prepare()
                self._inode = file.stat().st_ino
            except BaseException:
                self._db.close()
                raise

    @classmethod
    @contextlib.contextmanager
    def open(cls, file: Path, plan: Plan) -> Iterator[Store]:
        """The store of ``plan``, new or resumed; one file is left at the end.

        Raises:
            DtLensError: if the file is another plan's, damaged, in use, or cannot be written.
        """
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(file, error) from error
        with _locked(file):
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
        kept = self._options_in_file() if tables else None
        if tables:
            with named_anew(db):
                require_sound(db, self.terms)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        with self.writing():
            self._merge(kept)

    def _options_in_file(self) -> dict[str, Any]:
        """The options in the file, whose outcomes and the plan's must be fit to stand in one table."""
        options = read_options(self._db)
        with decoding():
            difference, repeats = self.plan.difference(options), self.plan.repeats_sample(options)
        if difference is not None:
            raise DtLensError(
                f"{self.file} holds another sweep: {difference}; give the same options to resume it, or another folder."
            )
        if not repeats:
            raise DtLensError(
                f"The unedited {self.terms.actor}'s first {self.terms.units} come to other bits here than where "
                f"{self.file} was begun (another processor, build of a library, or state of other code that runs); "
                "resume it there, or give another folder."
            )
        return options

    def _merge(self, kept: dict[str, Any] | None) -> None:
        """Add the plan's arms and options to the file, as if everything in it had been planned at once."""
        db, options = self._db, dict(self.plan.options)
        if kept is None:
            create(db, self.terms)
        else:
            upgrade(db)
        make_checksums(db)
        before = read_arms(db)
        with decoding():  # merging the plan's own arms does not raise
            self.arms = merge_arms(self.plan.arms, before, self.plan.catalogue)
        if kept is not None:
            options["units"] = max(options["units"], kept["units"])
            options["activations"] = options.get("activations") or kept.get("activations")
        self.options = {**options, **summarise(self.arms)}
        if self.options != kept:
            db.execute("DELETE FROM plan")
            db.execute("INSERT INTO plan VALUES (?)", (json.dumps(self.options),))
        if self.arms != before:
            by_identity = {identity_of(arm.record): arm for arm in self.arms}
            known = {arm.number: by_identity.pop(identity_of(arm.record)) for arm in before}
            renumber(db, known)
            add_arms(db, list(by_identity.values()))
        if db.execute("SELECT 1 FROM blocks WHERE status = 'failed' LIMIT 1").fetchone():
            db.execute("UPDATE blocks SET status = 'todo' WHERE status = 'failed'")  # tried again

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction: everything inside is written, or nothing."""
        self._require_there()
        with explain_errors(self.file):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # after a full disk SQLite has already rolled back
                    self._db.execute("ROLLBACK")
                raise

    def _require_there(self) -> None:
        """Raise ``DtLensError`` if the file was deleted or replaced: SQLite would go on writing to the deleted one."""
        if self._inode is None:
            return
        try:
            there = self.file.stat().st_ino == self._inode
        except OSError:
            there = False
        if not there:
            raise DtLensError(
                f"{self.file} was deleted or replaced while its sweep ran, so nothing more can be kept in it; leave "
                "the file where it is and run the sweep again."
            )

    def close(self) -> None:
        """Fold SQLite's companion files into the one file."""
        # What cannot be folded in now, on a full disk, is read from the companions next time.
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()

    @property
    def rungs(self) -> list[range]:
        """The units of each rung; the last one has the plan's number of units."""
        return rungs_of(self.options, self.plan.options["units"])

    def halving_state(self) -> HalvingState:
        """How far the sweep has come."""
        with explain_errors(self.file):
            return read_halving_state(self._db, self.rungs, self.terms.outcome)

    def advance(self) -> tuple[list[Block], int]:
        """The blocks that can be run now, and how many blocks the plan has so far, finished ones included.

        Arms of the file that are not in the plan are not run, except under halving, which selects among all.
        """
        wanted = self._wanted_units()
        with explain_errors(self.file):
            rows = self._db.execute("SELECT block, arm, first, count, status FROM blocks").fetchall()
        uncovered = {arm: set(units) for arm, units in wanted.items()}
        for _, arm, first, count, _ in rows:
            if arm in uncovered:
                uncovered[arm].difference_update(range(first, first + count))
        number = 1 + max((row[0] for row in rows), default=-1)
        new = [(arm, *block) for arm, units in uncovered.items() for block in split_units(units, self.plan.block_size)]
        added = [(number + i, *block) for i, block in enumerate(new)]
        if added:
            with self.writing():
                self._db.executemany("INSERT INTO blocks (block, arm, first, count) VALUES (?,?,?,?)", added)
        found = [(Block(*row), status) for *row, status in rows] + [(Block(*row), "todo") for row in added]
        mine = [
            (block, status)
            for block, status in found
            if block.arm in wanted
            and block.units.start < wanted[block.arm].stop
            and block.units.stop > wanted[block.arm].start
        ]
        todo = [block for block, status in mine if status == "todo"]
        return sorted(todo, key=lambda block: (block.arm, block.first)), len(mine)

    def units_ahead(self) -> int:
        """How many units the rungs after the current one will have."""
        rungs = self.rungs
        if len(rungs) == 1:
            return 0
        state, edits = self.halving_state(), sum(arm.kind == "edit" for arm in self.arms)
        controls = sum(arm.kind == "control" for arm in self.arms) / max(edits, 1)
        competing = len(state.reached) - len(state.stopped)
        units = 0.0
        for rung in range(state.rung + 1, len(rungs)):
            competing = -(-competing // 2)
            units += competing * len(rungs[rung]) * (1 + controls * (rung == len(rungs) - 1))
        return round(units)

    def _wanted_units(self) -> dict[int, range]:
        """The units that each arm should have run by the end of the current rung."""
        rungs = self.rungs
        every = range(rungs[0].start, rungs[-1].stop)
        if len(rungs) == 1:
            mine = {identity_of(arm.record) for arm in self.plan.arms}
            return {arm.number: every for arm in self.arms if identity_of(arm.record) in mine}
        reached = self.halving_state().reached
        wanted = {}
        for arm in self.arms:
            if arm.of is None:
                up_to = rungs[reached.get(arm.number, -1)]  # the baseline runs all
                wanted[arm.number] = range(every.start, up_to.stop)
            elif reached[arm.of] == len(rungs) - 1:
                wanted[arm.number] = rungs[-1]
        return wanted

    def model_id_of(self, arm: int) -> str | None:
        """The ``model_id`` of an arm's edited model, kept with its first block; ``None`` if no block was begun."""
        with explain_errors(self.file):
            found: str | None = self._db.execute("SELECT model_id FROM arms WHERE arm = ?", (arm,)).fetchone()[0]
            return found

    def set_packed(self, arm: int, packed: Packed) -> None:
        """Write what is known of an arm once its edit has been made."""
        self._db.execute(
            "UPDATE arms SET energy = ?, output_energy = ?, model_id = ?, note = ? WHERE arm = ?",
            (packed.energy, packed.output_energy, packed.model_id, packed.note, arm),
        )

    def arms_without_output_energy(self) -> list[int]:
        """The arms that were begun and have no output energy."""
        with explain_errors(self.file):
            rows = self._db.execute(
                "SELECT arm FROM arms WHERE model_id IS NOT NULL AND output_energy IS NULL AND kind <> 'baseline'"
            )
            return [arm for (arm,) in rows]

    def set_output_energy(self, arm: int, energy: float) -> None:
        """Write the output energy of an arm that was begun before activations were known."""
        self._db.execute("UPDATE arms SET output_energy = ? WHERE arm = ?", (energy, arm))

    def void(self, arm: int, error: str) -> None:
        """Write that an arm's edit cannot be put in force, and why; its blocks will not be run."""
        self._db.execute("UPDATE arms SET error = ? WHERE arm = ?", (error, arm))
        self._db.execute("UPDATE blocks SET status = 'void' WHERE arm = ? AND status <> 'done'", (arm,))

    def begin(self, block: int) -> int:
        """Log that a block is begun; returns the number of the run."""
        cursor = self._db.execute(
            "INSERT INTO runs (block, driver, began) VALUES (?, ?, ?)", (block, os.getpid(), _now())
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def finish(self, run: int, event: Event) -> None:
        """Write the outcomes of a block, and log that its run is done."""
        kinds = [float if kind == "real" else int for kind in self.terms.measures.values()]
        rows = [
            (event.block, int(unit), *(kind(value) for kind, value in zip(kinds, values, strict=True)))
            for unit, *values in event.rows
        ]
        names = ", ".join(map(quoted, self.terms.measures))
        marks = ", ".join("?" * (2 + len(kinds)))
        self._db.executemany(f"INSERT INTO outcomes (block, unit, {names}) VALUES ({marks})", rows)
        self._db.execute("UPDATE blocks SET status = 'done', error = NULL WHERE block = ?", (event.block,))
        add_checksum(self._db, self.terms, event.block)
        self.end(run, event)

    def fail(self, block: int, error: str) -> None:
        """Write that a block could not be run, and why; the next driver tries it again."""
        self._db.execute("UPDATE blocks SET status = 'failed', error = ? WHERE block = ?", (error, block))

    def end(self, run: int, event: Event) -> None:
        """Log how a run ended."""
        self._db.execute(
            "UPDATE runs SET ended = ?, worker = ?, result = ? WHERE run = ?", (_now(), event.worker, event.kind, run)
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
