"""Read a sweep's file: a row per edit, a row per unit, and the evaluations behind them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dt_lens.arguments import local_path
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.sweep.halving import read_halving_state, rungs_of
from dt_lens.behaviour.sweep.plan import FORMATS, edit_of, sv_of
from dt_lens.behaviour.sweep.schema import decoding, named_anew, quoted, read_options
from dt_lens.behaviour.sweep.soundness import require_sound
from dt_lens.behaviour.sweep.store import FILE, KEPT, explain_errors
from dt_lens.behaviour.tasks import evaluation_class, terms_in
from dt_lens.behaviour.terms import FailureRule, Terms
from dt_lens.edits.written import today, written_sv
from dt_lens.errors import DtLensError, because
from dt_lens.lens.printing import Printed, Rows
from dt_lens.statistics.multiplicity import q_values
from dt_lens.statistics.outcomes import bootstrap_interval, interval_note, logrank, sign_flip, wilson

if TYPE_CHECKING:
    from dt_lens.lens.activations import Activations

__all__ = ["SweepResults"]

PLACE = ("kind", "of", "matrix", "layer", "head", "side", "sv", "value", "directions", "control", "match")
ENERGIES = ("energy", "output_energy")
NUMBERS = ("of", "layer", "head", "sv", "control")
NAN = float("nan")


class SweepResults(Printed):
    """Reads a sweep's file, without the model, and also while its driver runs.

    Args:
        source: the file, or the folder it is in.

    Raises:
        DtLensError: if there is no such file, or it is not a sweep's.
    """

    def __init__(self, source: str | Path) -> None:
        path = local_path(source, "source")
        try:
            self.file = path / FILE if path.is_dir() else path
            there = self.file.is_file()
        except OSError as error:  # a folder that may not be entered
            raise DtLensError(f"{str(path)[:200]!r} cannot be accessed: {because(error)}.") from error
        if not there:
            raise DtLensError(f"There is no sweep in {path}; run it first.")
        self._sound: tuple[int, ...] = ()  # the state in which the file was last checked
        with self._reading():
            pass

    @contextmanager
    def _reading(self) -> Iterator[tuple[sqlite3.Connection, dict[str, Any]]]:
        """A consistent view of the file, and its options. Only code that reads the file belongs inside."""
        if not self.file.is_file():
            raise DtLensError(f"The sweep's file {self.file} was moved or deleted meanwhile; open it where it is now.")
        with explain_errors(self.file, reading=True):
            db = sqlite3.connect(f"{self.file.resolve().as_uri()}?mode=ro", uri=True, timeout=10, isolation_level=None)
            try:
                db.execute("BEGIN")
                if db.execute("SELECT 1 FROM sqlite_master").fetchone() is None:  # its driver has made no table yet
                    raise DtLensError(f"The sweep in {self.file} has not begun; run it first.")
                with decoding():
                    options = read_options(db)
                    if options["format"] not in FORMATS:
                        raise DtLensError(
                            f"The format of {self.file} is {options['format']} and this version of dt-lens reads "
                            f"{' and '.join(map(str, FORMATS))}; read it with the version that wrote it."
                        )
                    state = self._state()
                    with named_anew(db):
                        if state != self._sound:
                            require_sound(db, terms_in(options))
                            self._sound = state
                        yield db, options
            except pd.errors.DatabaseError as error:
                raise error.__cause__ or error from None  # pandas wraps what SQLite raises
            finally:
                db.close()

    def _shown(self) -> tuple[str, Rows]:
        title = f"{type(self).__name__} of {self.file}"
        try:
            with self._reading() as (db, options):
                kinds = dict(db.execute("SELECT kind, count(*) FROM arms GROUP BY kind"))
                terms, units = terms_in(options), options["units"]
            done = self.blocks_done
        except DtLensError as error:
            return title, [("file", str(error))]
        rows = [
            ("measured", f"{terms.outcome_name} in {terms.place}"),
            ("arms", f"{kinds.get('edit', 0)} edits, {kinds.get('control', 0)} controls"),
            ("units", f"{units} {terms.units} of each"),
        ]
        return title, [*rows, ("blocks", done), ("next", "table(), outcomes(), evaluations()")]

    @property
    def blocks_done(self) -> str:
        """How many of the file's blocks are done, in words."""
        found = self.status()
        failed = f", {found['failed']} failed: see failures()" if found["failed"] else ""
        return f"{found['done']} of {found['todo'] + found['done'] + found['failed']} done{failed}"

    def _state(self) -> tuple[int, ...]:
        """What changes when the file is written to."""
        parts = (self.file, self.file.with_name(f"{self.file.name}-wal"))
        found = [part.stat() for part in parts if part.exists()]
        return tuple(number for stat in found for number in (stat.st_mtime_ns, stat.st_size))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the file: the settings of all runs so far, as plain JSON values."""
        with self._reading() as (_, options):
            return options

    def activations(self) -> Activations | None:
        """The activations kept next to the file; ``None`` if the sweep used none, or if their file is missing."""
        from dt_lens.lens.activations import Activations

        kept = self.file.with_name(KEPT)
        return Activations.load(kept) if self.options.get("activations") and kept.is_file() else None

    def controls(self) -> dict[int, list[int]]:
        """The numbers of the controls of each edit that has some, planned or run.

        If an edit has controls of both kinds, those that match the output energy as well: the closer match.
        """
        found: dict[int, dict[str, list[int]]] = {}
        with self._reading() as (db, _):
            for arm, of, match in db.execute("SELECT arm, of, match FROM arms WHERE kind = 'control' ORDER BY arm"):
                found.setdefault(of, {}).setdefault(match, []).append(arm)
        return {of: by_match.get("output") or by_match["frobenius"] for of, by_match in found.items()}

    def status(self) -> dict[str, int]:
        """Blocks by status: ``todo``, ``done``, ``failed`` (tried again by the next run), ``void`` (see ``table``)."""
        with self._reading() as (db, _):
            found = dict(db.execute("SELECT status, count(*) FROM blocks GROUP BY status"))
        return {name: int(found.get(name, 0)) for name in ("todo", "done", "failed", "void")}

    def failures(self) -> list[str]:
        """Why blocks failed, each sentence once."""
        with self._reading() as (db, _):
            rows = db.execute("SELECT error FROM blocks WHERE status = 'failed' ORDER BY block").fetchall()
        return list(dict.fromkeys(error for (error,) in rows))

    @property
    def terms(self) -> Terms:
        """What the sweep's task measures, and the words for it."""
        return terms_in(self.options)

    def outcomes(self) -> pd.DataFrame:
        """A row per unit: arm, what identifies the arm, the unit's number (an episode's ``seed``, a window's
        ``index``), and every measure of the task."""
        with self._reading() as (db, options):
            terms = terms_in(options)
            query = f"""
                SELECT arms.arm, {_columns(*PLACE)}, outcomes.unit AS {quoted(terms.index)}, {_measures(terms)}
                FROM outcomes JOIN blocks USING (block) JOIN arms USING (arm) ORDER BY arms.arm, outcomes.unit
            """
            frame = pd.read_sql_query(query, db)
        # SQLite keeps a NaN as NULL, and has no type of its own for booleans.
        return _typed(frame.astype({name: np.dtype(terms.dtype(name)) for name in terms.measures}))

    def episodes(self) -> pd.DataFrame:
        """``outcomes()``, where units are episodes: arm, seed, return, length, terminated, truncated."""
        return self.outcomes()

    def evaluations(self, failure: FailureRule | None = None) -> dict[int, Evaluation]:
        """An ``Evaluation`` for every arm that has outcomes, by its number in the table; 0 is the baseline.

        Of an agent an ``AgentEvaluation``, of a language model a ``TextEvaluation``.
        """
        with self._reading() as (db, options):
            terms = terms_in(options)
            measured = _measured(db, options, terms)
        return _judged(_ruled(terms, failure), measured)

    def baseline(self, failure: FailureRule | None = None) -> Evaluation | None:
        """The unedited model's evaluation; ``None`` if it has no outcomes yet, or was left out."""
        with self._reading() as (db, options):
            terms = terms_in(options)
            measured = _measured(db, options, terms)
        if not options["baseline"] or 0 not in measured:
            return None
        return _judged(_ruled(terms, failure), {0: measured[0]})[0]

    def table(self, *, failure: FailureRule | None = None, confidence: float = 0.95) -> pd.DataFrame:
        """A row per edit and control, in the order of the plan, indexed by the arm's number.

        ``kind`` (edit or control), ``of`` (a control's edit), ``matrix``, ``layer``, ``head``, ``side``, ``sv``,
        ``value``, ``directions``, ``control`` (a control's seed), ``match`` (what it shares with its edit), ``energy``
        and ``output_energy`` (if activations are known) describe the arm. An edit of several directions has no ``sv``;
        where there is one, a column ``svs`` names them, as text: ``"0-3"``. Then the number of units
        and the mean outcome, under the task's names: ``episodes`` and ``mean_return`` of an agent, ``windows`` and
        ``mean_loss`` of a language model; ``difference`` (mean paired difference of the outcome from the unedited
        model), its interval (studentised bootstrap), ``difference_note`` (where that covers less than it says, or why
        there is none) and ``p_value`` (sign flips, which test symmetry about 0), as ``Comparison`` gives them;
        ``q_value`` (Benjamini-Hochberg over the edits; none for controls); where failing has a meaning
        ``failure_rate`` with its Wilson interval; where units end ``mean_length``, ``survival`` (Kaplan and Meier's
        share still running at the end) and ``survival_p_value`` (log-rank); the mean of every other real measure, such
        as ``mean_kl``; ``note``: what to know about the edit, or why it could not be measured.

        ``attrs`` says by which rule units failed (``failure_rule``) and whether it is a guess (``failure_guessed``).

        Before the sweep is finished, the numbers are computed from the units so far, differences from the pairs.

        With successive halving a column ``rung`` says which rung an edit has reached. The numbers of an edit that
        reached the last rung, and of its controls, come from the last rung's units, which the selection did not see.
        Those of an edit that was stopped come from the units of the selection, its p-values are 1, and it counts in
        ``q_value``. An edit about which nothing is decided yet has no p-value.

        Args:
            failure: what counts as failing, as for ``Evaluation``; by default what the file says, else a guess.
            confidence: of the intervals.

        Raises:
            DtLensError: for a confidence that is not between 0 and 1, or a failure rule where failing has no meaning.
        """
        if not (isinstance(confidence, int | float) and 0 < confidence < 1):
            raise DtLensError(f"confidence is {confidence!r}; it must be a number between 0 and 1, such as 0.95.")
        with self._reading() as (db, options):
            note = "trim(coalesce(note, '') || ' ' || coalesce(error, '')) AS note"
            names = _columns(*PLACE, *ENERGIES, "record")
            query = f"SELECT arm, {names}, {note} FROM arms WHERE kind <> 'baseline' ORDER BY arm"
            arms = _with_directions(pd.read_sql_query(query, db))
            terms = terms_in(options)
            measured = _measured(db, options, terms)
            rungs = rungs_of(options)
            state = read_halving_state(db, rungs, terms.outcome)
            edits = [arm if pd.isna(of) else int(of) for arm, of in zip(arms["arm"], arms["of"], strict=True)]
            reached = [state.reached[edit] for edit in edits]
        terms = _ruled(terms, failure)
        evaluations = _judged(terms, measured)
        baseline = evaluations.get(0) if options["baseline"] else None
        rows = []
        for arm, of, rung in zip(arms["arm"], arms["of"], reached, strict=True):
            evaluation = evaluations.get(arm)
            if len(rungs) > 1 and evaluation is not None:
                evaluation = _counted(evaluation, rungs, rung, control=not pd.isna(of))
            row = _numbers(terms, evaluation, baseline, confidence)
            if rung < len(rungs) - 1:
                p = 1.0 if arm in state.stopped and row[terms.units] else NAN
                row |= {name: p for name in ("p_value", "survival_p_value") if name in row}
            rows.append(row | ({"rung": rung} if len(rungs) > 1 else {}))
        table = pd.concat([arms, pd.DataFrame(rows, index=arms.index)], axis=1)
        for energy in ENERGIES:
            table[energy] = table[energy].astype(np.float64)
        if len(rungs) > 1:  # controls that were begun before their edit was overtaken count as not begun
            idle = (table["kind"] == "control") & (table["rung"] < len(rungs) - 1)
            for energy in ENERGIES:
                table.loc[idle, energy] = NAN
            table.loc[idle, "note"] = ""
        tested = (table["kind"] == "edit") & table["p_value"].notna()
        q = pd.Series(NAN, index=table.index)
        q[tested] = q_values(table.loc[tested, "p_value"])
        table.insert(list(table).index("p_value") + 1, "q_value", q)
        table["note"] = table.pop("note")  # last
        table = _typed(table).set_index("arm")
        if terms.failure is not None and evaluations:
            table.attrs |= {"failure_rule": terms.failure_rule, "failure_guessed": bool(terms.failure_note)}
        return table


def _columns(*names: str) -> str:
    """Columns of ``arms`` for a SELECT, with the table's name, so that a join is not ambiguous."""
    return ", ".join(f"arms.{name}" for name in names)


def _measures(terms: Terms) -> str:
    """The measures of ``outcomes`` for a SELECT."""
    return ", ".join(f"outcomes.{quoted(name)}" for name in terms.measures)


def _measured(db: sqlite3.Connection, options: Mapping[str, Any], terms: Terms) -> dict[int, dict[str, Any]]:
    """The arguments of an ``Evaluation`` besides its terms, for every arm that has outcomes."""
    arms = db.execute("SELECT arm, record, model_id FROM arms ORDER BY arm").fetchall()
    rows: dict[int, list[tuple[Any, ...]]] = {}
    query = (
        f"SELECT arm, outcomes.unit, {_measures(terms)} FROM outcomes JOIN blocks USING (block) "
        "ORDER BY arm, outcomes.unit"
    )
    for arm, *row in db.execute(query):
        rows.setdefault(arm, []).append(tuple(row))
    found = {}
    for arm, record, model_id in arms:
        if arm in rows:
            units, *columns = zip(*rows[arm], strict=True)
            found[arm] = {
                "units": np.asarray(units, dtype=np.int64),
                "columns": {
                    name: np.asarray(column, dtype=terms.dtype(name))  # SQLite keeps a NaN as NULL
                    for name, column in zip(terms.measures, columns, strict=True)
                },
                "model_id": model_id,
                "base_id": options.get("base_id", ""),
                "edits": () if record is None else (json.loads(record),),
                "details": options.get("details", {}),
            }
    return found


def _judged(terms: Terms, measured: Mapping[int, Mapping[str, Any]]) -> dict[int, Evaluation]:
    kind = evaluation_class(terms)
    return {arm: kind(terms, **of_arm) for arm, of_arm in measured.items()}


def _ruled(terms: Terms, failure: FailureRule | None) -> Terms:
    """The terms with another failure rule, unless it is ``None``."""
    if failure is None:
        return terms
    if terms.failure is None:
        raise DtLensError(f"Failing has no meaning in the task {terms.task!r}; leave out failure.")
    return replace(terms, failure=terms.rule(failure), failure_note="")


def _counted(evaluation: Evaluation, rungs: Sequence[range], rung: int, control: bool) -> Evaluation | None:
    """The units that an arm's numbers come from: those of the last rung, or those by which it was stopped."""
    last = rung == len(rungs) - 1
    units = rungs[-1] if last else range(0 if control else rungs[rung].stop)
    found = np.intersect1d(evaluation.units, units)
    return evaluation.at(found) if len(found) else None


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    values = frame["value"].map(today)  # files of older versions write a number otherwise
    return frame.assign(value=values).astype(dict.fromkeys(NUMBERS, "Int64"))


def _with_directions(arms: pd.DataFrame) -> pd.DataFrame:
    """The arms without their records; with a column ``svs`` if one is of several directions."""
    with decoding():
        found = [sv_of(edit_of(json.loads(record))) for record in arms.pop("record")]
    if any(len(sv) > 1 for sv in found):
        arms.insert(list(arms).index("sv") + 1, "svs", [written_sv(sv) for sv in found])
    return arms


def _numbers(
    terms: Terms, evaluation: Evaluation | None, baseline: Evaluation | None, confidence: float
) -> dict[str, Any]:
    """The numbers of an arm; those that have no meaning in the task are left out."""
    others = [name for name, kind in terms.measures.items() if kind == "real" and name != terms.outcome]
    tests = ("difference", "difference_low", "difference_high", "difference_note", "p_value")
    names = [terms.units, f"mean_{terms.outcome}", *tests]
    if terms.failure is not None:
        names += ["failure_rate", "failure_low", "failure_high"]
    if terms.lasts is not None:
        names += [f"mean_{terms.lasts[0]}", "survival", "survival_p_value"]
    row: dict[str, Any] = dict.fromkeys([*names, *(f"mean_{name}" for name in others)], NAN)
    row[terms.units] = 0 if evaluation is None else len(evaluation)
    row["difference_note"] = ""
    if evaluation is None:
        return row
    row[f"mean_{terms.outcome}"] = evaluation.mean
    row |= {f"mean_{name}": float(evaluation.columns[name].mean()) for name in others}
    if terms.failure is not None:
        failures = int(evaluation.failed.sum())
        row["failure_rate"] = failures / len(evaluation)
        row["failure_low"], row["failure_high"] = wilson(failures, len(evaluation), confidence)
    if terms.lasts is not None:
        row[f"mean_{terms.lasts[0]}"] = float(evaluation.lengths.mean())
        row["survival"] = float(evaluation.survival.survival[-1])
    pair = _pair(evaluation, baseline)
    if pair is not None:
        # As Evaluation.compare, without the bootstraps for which the table has no column.
        edited, unedited = pair
        differences = edited.outcomes - unedited.outcomes
        row["difference"] = float(differences.mean())
        row["difference_low"], row["difference_high"] = bootstrap_interval(differences, confidence=confidence)
        row["difference_note"] = interval_note(differences, "differences")
        row["p_value"] = sign_flip(differences)
        if terms.lasts is not None:
            row["survival_p_value"] = logrank(edited.lengths, edited.ended, unedited.lengths, unedited.ended)[1]
    return row


def _pair(edited: Evaluation, baseline: Evaluation | None) -> tuple[Evaluation, Evaluation] | None:
    """Both evaluations at the units that both have."""
    if baseline is None:
        return None
    common = np.intersect1d(edited.units, baseline.units)
    return (edited.at(common), baseline.at(common)) if len(common) else None
