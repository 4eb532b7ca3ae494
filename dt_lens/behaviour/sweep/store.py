"""The one file of a sweep: SQLite, written by the driver alone, in transactions.

``kill -9`` leaves either the whole of a transaction or nothing of it. While the driver runs the file is in WAL mode,
with two companions beside it and a third that holds the lock; when it ends, in whatever orderly way, one file is left.
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

from dt_lens.behaviour.sweep.engines.engine import Event
from dt_lens.behaviour.sweep.file_lock import Lock
from dt_lens.behaviour.sweep.halving import Standing, read_standing, rungs_of
from dt_lens.behaviour.sweep.packing import Packed
from dt_lens.behaviour.sweep.plan import FORMAT, Block, Plan, contents, cut, identity_of, unite
from dt_lens.behaviour.sweep.schema import (
    APPLICATION,
    add_arms,
    create,
    decoding,
    read_arms,
    read_options,
    renumber,
    upgrade,
)
from dt_lens.errors import DtLensError, because, unwritable

__all__ = ["FILE", "KEPT", "Store", "in_words"]

FILE = "sweep.sqlite"
KEPT = "activations.safetensors"  # beside it


@contextlib.contextmanager
def in_words(file: Path, reading: bool = False) -> Iterator[None]:
    """SQLite's errors as one sentence that says what to do."""
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
            f"{file} is damaged, or no sweep's file ({because(error)}); move it away, and the sweep begins anew."
        ) from error


def _unreadable(file: Path, error: sqlite3.OperationalError) -> DtLensError:
    return DtLensError(
        f"{file} cannot be read: {because(error)}; see that you may read it, or, if its sweep was cut off and the "
        "folder is read-only, copy the folder to where you can write."
    )


class Store:
    """The file, open for its driver. Make one with ``Store.open``.

    Every method that writes must stand inside ``with store.writing():``, but for ``advance``.

    Attributes:
        arms: those of the file, which holds what all commands so far asked for.
        options: of the file.
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
            raise unwritable(file, error) from error
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
        kept = self._kept_options() if tables else None
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        with self.writing():
            self._take_up(kept)

    def _kept_options(self) -> dict[str, Any]:
        """The options in the file; what it holds and what the plan asks for must be able to stand in one table."""
        options = read_options(self._db)
        with decoding():
            difference, at_home = self.plan.difference(options), self.plan.is_at_home(options)
        if difference is not None:
            raise DtLensError(
                f"{self.file} holds another sweep: {difference}; give the same options to go on with it, or another "
                "folder."
            )
        if not at_home:
            raise DtLensError(
                f"The agent's first steps come to other bits here than where {self.file} was begun (another processor, "
                "build of a library, or state of the environment's code); go on with it there, or give another folder."
            )
        return options

    def _take_up(self, kept: dict[str, Any] | None) -> None:
        """Make the file one of all that it holds and all that the plan asks for, as if both had been asked at once."""
        db, options = self._db, dict(self.plan.options)
        if kept is None:
            create(db)
        elif kept["format"] < FORMAT:
            upgrade(db)
        before = read_arms(db)
        with decoding():  # the plan's own arms are known to go together
            self.arms = unite(self.plan.arms, before, self.plan.catalogue)
        if kept is not None:
            options["episodes"] = max(options["episodes"], kept["episodes"])
            options["activations"] = options.get("activations") or kept.get("activations")
        self.options = {**options, **contents(self.arms)}
        if self.options != kept:
            db.execute("DELETE FROM plan")
            db.execute("INSERT INTO plan VALUES (?)", (json.dumps(self.options),))
        if self.arms != before:
            by_identity = {identity_of(arm.record): arm for arm in self.arms}
            known = {arm.number: by_identity.pop(identity_of(arm.record)) for arm in before}
            renumber(db, known)
            add_arms(db, list(by_identity.values()))
        if db.execute("SELECT 1 FROM units WHERE status = 'failed' LIMIT 1").fetchone():
            db.execute("UPDATE units SET status = 'todo' WHERE status = 'failed'")  # they get another chance

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

    @property
    def rungs(self) -> list[range]:
        """The seeds of each rung, as many in the last one as the plan asks for."""
        return rungs_of(self.options, self.plan.options["episodes"])

    def standing(self) -> Standing:
        """How far the sweep has come."""
        with in_words(self.file):
            return read_standing(self._db, self.rungs)

    def advance(self) -> tuple[list[Block], int]:
        """What can be run now, and how many units the plan has up to now.

        Arms of the file that the plan does not ask for are left as they are, unless all are needed to select among.
        """
        wanted = self._wanted()
        with in_words(self.file):
            rows = self._db.execute("SELECT unit, arm, seed, episodes, status FROM units").fetchall()
        uncovered = {arm: set(seeds) for arm, seeds in wanted.items()}
        for _, arm, seed, episodes, _ in rows:
            if arm in uncovered:
                uncovered[arm].difference_update(range(seed, seed + episodes))
        number = 1 + max((row[0] for row in rows), default=-1)
        new = [(arm, *unit) for arm, seeds in uncovered.items() for unit in cut(seeds, self.plan.block_size)]
        added = [(number + i, *unit) for i, unit in enumerate(new)]
        if added:
            with self.writing():
                self._db.executemany("INSERT INTO units (unit, arm, seed, episodes) VALUES (?,?,?,?)", added)
        found = [(Block(*row), status) for *row, status in rows] + [(Block(*row), "todo") for row in added]
        mine = [
            (block, status)
            for block, status in found
            if block.arm in wanted
            and block.seed < wanted[block.arm].stop
            and block.seed + block.episodes > wanted[block.arm].start
        ]
        todo = [block for block, status in mine if status == "todo"]
        return sorted(todo, key=lambda block: (block.arm, block.seed)), len(mine)

    def later(self) -> int:
        """How many episodes the rungs after this one will have."""
        rungs = self.rungs
        if len(rungs) == 1:
            return 0
        standing, edits = self.standing(), sum(arm.kind == "edit" for arm in self.arms)
        controls = sum(arm.kind == "control" for arm in self.arms) / max(edits, 1)
        going = len(standing.reached) - len(standing.stopped)
        episodes = 0.0
        for rung in range(standing.rung + 1, len(rungs)):
            going = -(-going // 2)
            episodes += going * len(rungs[rung]) * (1 + controls * (rung == len(rungs) - 1))
        return round(episodes)

    def _wanted(self) -> dict[int, range]:
        """The seeds that each arm should have by now."""
        rungs = self.rungs
        every = range(rungs[0].start, rungs[-1].stop)
        if len(rungs) == 1:
            mine = {identity_of(arm.record) for arm in self.plan.arms}
            return {arm.number: every for arm in self.arms if identity_of(arm.record) in mine}
        reached = self.standing().reached
        wanted = {}
        for arm in self.arms:
            if arm.of is None:
                up_to = rungs[reached.get(arm.number, -1)]  # the baseline runs all
                wanted[arm.number] = range(every.start, up_to.stop)
            elif reached[arm.of] == len(rungs) - 1:
                wanted[arm.number] = rungs[-1]
        return wanted

    def model_id_of(self, arm: int) -> str | None:
        """The ``model_id`` with which an arm's first unit was begun; ``None`` where none was."""
        with in_words(self.file):
            found: str | None = self._db.execute("SELECT model_id FROM arms WHERE arm = ?", (arm,)).fetchone()[0]
            return found

    def describe(self, arm: int, packed: Packed) -> None:
        """Keep what is known of an arm once its edit is made."""
        self._db.execute(
            "UPDATE arms SET energy = ?, output_energy = ?, model_id = ?, note = ? WHERE arm = ?",
            (packed.energy, packed.output_energy, packed.model_id, packed.note, arm),
        )

    def arms_without_output_energy(self) -> list[int]:
        """The arms that were begun without knowing their output energy."""
        with in_words(self.file):
            rows = self._db.execute(
                "SELECT arm FROM arms WHERE model_id IS NOT NULL AND output_energy IS NULL AND kind <> 'baseline'"
            )
            return [arm for (arm,) in rows]

    def set_output_energy(self, arm: int, energy: float) -> None:
        """Keep the output energy of an arm that was begun before activations were known."""
        self._db.execute("UPDATE arms SET output_energy = ? WHERE arm = ?", (energy, arm))

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
