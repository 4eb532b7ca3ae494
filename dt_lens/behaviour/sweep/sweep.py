"""``Sweep``: plans the arms of a sweep, runs their blocks on an engine, and keeps the outcomes in one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pandas as pd

from dt_lens.arguments import as_json, local_path, require_writable, whole_number
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.job import Job
from dt_lens.behaviour.sweep.activation_source import ActivationSource
from dt_lens.behaviour.sweep.arms import make_arms
from dt_lens.behaviour.sweep.driver import Driver
from dt_lens.behaviour.sweep.engines.engine import Engine
from dt_lens.behaviour.sweep.engines.local import LocalEngine
from dt_lens.behaviour.sweep.packing import Packer
from dt_lens.behaviour.sweep.plan import FORMAT, Plan, block_size_of, identity_of, merge_arms
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.schema import require_names
from dt_lens.behaviour.sweep.settings import SweepSettings
from dt_lens.behaviour.sweep.store import FILE, Store
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.tasks import COUNTS, KNOWN, task_of
from dt_lens.behaviour.terms import FailureRule, Terms
from dt_lens.errors import DtLensError, a_type, nearest
from dt_lens.lens.forward_mode import one_thread, usable_cores
from dt_lens.lens.matrices import catalogue
from dt_lens.lens.printing import Printed, Rows
from dt_lens.progress import ProgressCallback, reporting, silent, stage

__all__ = ["Sweep"]

COLLECTING = 0.03  # the share of the whole, for the progress, that collecting activations is taken to be
TOGETHER = 64  # arms whose output energies are written in one transaction


class Sweep(Printed):
    """Many edits of one model, each with its controls, all over the same units as the unedited model.

    What a unit is, the model's task says: an episode of an agent, a window of text of a language model, or whatever a
    ``Task`` of your own counts.

    Everything is kept in ``out/sweep.sqlite``. A sweep that was stopped in any way, ``kill -9`` included, and is run
    again with the same settings resumes where it was, and its table is the same to the bit as if it had never been
    stopped: the result of a block (one arm with some of the units) depends on nothing but the block, and is written
    whole or not at all.

    A file can grow: a sweep of more matrices, directions, edits, controls or units in the same folder runs what the
    file lacks. The table is then that of the larger sweep, to the bit, as if it had been run from the start; the arms
    are renumbered in its order. Arms that the file holds and the settings no longer name stay in the file and its
    table, and are not run further. The model, the task with its setting (an agent's environment, target return and time
    limit; the texts and the context of a language model), first seed, folding and halving belong to the file and cannot
    change.

    Args:
        model: what ``dt_lens.load`` and ``dt_lens.wrap`` return, on the CPU, without hooks.
        out: the folder of the file.
        settings: what to run; ``SweepSettings()`` by default.
        workers: worker processes, each on one core; as many as cores by default. Changes nothing but the time.
        what: an agent's environment, a language model's texts, or a ``Task``; by default the model's own. As for
            ``evaluate``.
        task: a ``Task``, in place of ``what``.
        options: fields of ``SweepSettings`` by keyword, which replace those of ``settings``: ``Sweep(model, out,
            sv="0-9")`` is short for ``Sweep(model, out, SweepSettings(sv="0-9"))``. And what else ``evaluate`` takes to
            say what is run: ``environment``, ``environment_kwargs``, ``target_return``, ``max_steps``, ``failure``
            (kept in the file; it changes no outcome) and ``episodes`` of an agent, ``texts``, ``context`` and
            ``windows`` of a language model.

    Raises:
        DtLensError: if a setting is wrong, does not fit the model or cannot be kept in the file, and if the model
            cannot run in other processes.
        TypeError: for an option that does not exist.
    """

    def __init__(
        self,
        model: Any,
        out: str | Path,
        settings: SweepSettings | None = None,
        *,
        workers: int | None = None,
        what: Any = None,
        task: Task | None = None,
        **options: Any,
    ) -> None:
        if settings is not None and not isinstance(settings, SweepSettings):
            raise DtLensError(f"settings is {a_type(settings)}; it must be a SweepSettings.")
        own = [*(field.name for field in fields(SweepSettings)), "sides"]
        for name in options:
            if name not in own and name not in KNOWN:
                raise TypeError(f"Sweep() has no option {name!r}." + nearest(name, (*own, *KNOWN)))
        self.settings = asked = _changed(
            settings or SweepSettings(), {name: value for name, value in options.items() if name in own}
        )
        if workers is not None:
            whole_number(workers, "workers", 1)
        of_task = {name: value for name, value in options.items() if name not in own}
        if options.get("units") is None and any(of_task.get(name) is not None for name in COUNTS):
            asked = replace(asked, units=None)  # another name for it replaces that of the settings
        self.task, units = task_of(
            model, what, task=task, units=asked.units, seed=asked.seed, caller="Sweep", use="sweep", **of_task
        )
        if getattr(model, "active_edits", ()):
            raise DtLensError("The model has an edit in force; end it first: a sweep makes its own.")
        self.model = model
        self.file = local_path(out, "out") / FILE
        require_writable(self.file)
        self.workers = workers
        terms = self.task.terms
        _check_terms(terms)
        job = self._job()  # raises if the model cannot run in other processes
        units = _with_rungs(self.task, units, asked)
        base_id, model_id = self.task.identity(model)
        self._provenance = job.provenance()
        self._options: dict[str, Any] = {
            "format": FORMAT,
            "model": model_id,
            "base_id": base_id,
            "task": as_json(terms.to_dict()),
            "details": as_json(dict(self.task.about(model).get("details", {}))),
            "first": units.start,
            "units": len(units) - asked.selection,
            "seed": asked.seed,
            "halving": asked.halving,
            "block_size": block_size_of(len(units) - asked.selection, asked.block_size),
            "fold_layernorm": asked.fold_layernorm,
            **self._provenance,
        }
        with one_thread():
            self._arms = make_arms(model, asked)
        self._source = ActivationSource(
            model, self.task, self.file, asked.activations, needed=asked.needs_activations, seed=asked.seed
        )
        self._source.check(list(dict.fromkeys(arm.matrix for arm in self._arms if arm.matrix is not None)))
        for edit in asked.edits or ():
            self._source.check_edit(edit.to_dict())

    def _shown(self) -> tuple[str, Rows]:
        terms = self.task.terms
        kinds = [arm.kind for arm in {identity_of(arm.record): arm for arm in self._arms}.values()]
        rows = [
            ("measures", f"{terms.outcome_name} in {terms.place}"),
            ("arms", f"{kinds.count('edit')} edits, {kinds.count('control')} controls"),
            ("units", f"{self._options['units']} {terms.units} of each"),
        ]
        then = "run()"
        if not self.file.exists():
            done = "none done"
        else:
            try:
                done = f"{self.results.blocks_done}, in the file"
                then = "table(), outcomes(), evaluations(); run() does what is missing"
            except DtLensError as error:
                done = str(error)
        return f"Sweep in {self.file.parent}", [*rows, ("blocks", done), ("next", then)]

    @property
    def plan(self) -> Plan:
        """What the sweep will do; collects activations if the plan depends on them."""
        return self._make_plan(silent)

    def _make_plan(self, tell: ProgressCallback) -> Plan:
        activations, arms = self._source.get(tell), self._arms
        if activations is not None:
            with one_thread():
                arms = make_arms(self.model, self.settings, activations)
        known = None if activations is None else {**activations.record, "digest": activations.digest}
        names = list(catalogue(self.model, per_head=True))
        options = {**self._options, "activations": known, "sample": self._sample}
        return Plan(options, merge_arms(arms, (), names), tuple(self._provenance), names, self.settings.block_size)

    @cached_property
    def _sample(self) -> str | None:
        return self._job().sample()

    def _job(self) -> Job:
        """What workers need: the model as it is now, in its task."""
        return self.task.pack(self.model)

    def run(self, progress: bool | ProgressCallback | None = None, engine: Engine | None = None) -> Self:
        """Run what is not done yet.

        Args:
            progress: ``True`` for a bar, ``False`` for none, or a function of (what is being done, share done); by
                default a bar in a notebook and none elsewhere.
            engine: what runs the blocks; worker processes of this machine by default.

        Raises:
            DtLensError: if the file holds another sweep, was begun where the model's outcomes come to other bits, is
                damaged, cannot be written or is in use, if the model has changed since the plan was made, or if no
                worker can run.
            KeyboardInterrupt: on Ctrl-C, with a sentence; finished blocks are kept.
        """
        if self.task.identity(self.model)[1] != self._options["model"]:
            raise DtLensError("The model's weights have changed since this sweep was planned; make the Sweep again.")
        job = self._job()
        with reporting(progress) as tell:
            plan = self._make_plan(stage(tell, 0.0, COLLECTING))
            with Store.open(self.file, plan) as store:
                self._source.keep()
                packer = Packer(self.model, self.task, self._source.get())
                before = COLLECTING if self._source.get() is not None else 0.0
                self._fill_output_energies(store, packer, stage(tell, before, before + COLLECTING))
                todo, blocks = store.advance()
                if todo:
                    workers = min(self.workers or usable_cores(), len(todo))
                    told = stage(tell, 2 * before, 1.0)
                    Driver(store, packer, todo, blocks, told).run(engine or LocalEngine(workers), job)
        return self

    def _fill_output_energies(self, store: Store, packer: Packer, tell: ProgressCallback) -> None:
        """Compute the output energies of arms that were begun before activations were known."""
        arms = store.arms_without_output_energy() if self._source.get() is not None else []
        for first in range(0, len(arms), TOGETHER):
            tell("output energies", first / len(arms))
            found = {arm: packer.output_energy(store.arms[arm]) for arm in arms[first : first + TOGETHER]}
            with store.writing():
                for arm, energy in found.items():
                    if energy is not None:
                        store.set_output_energy(arm, energy)

    @property
    def results(self) -> SweepResults:
        """What the file holds so far."""
        return SweepResults(self.file)

    def table(self, *, failure: FailureRule | None = None, confidence: float = 0.95) -> pd.DataFrame:
        """A row per edit and control; see ``SweepResults.table``."""
        return self.results.table(failure=failure, confidence=confidence)

    def outcomes(self) -> pd.DataFrame:
        """A row per unit; see ``SweepResults.outcomes``."""
        return self.results.outcomes()

    def episodes(self) -> pd.DataFrame:
        """``outcomes()``, where units are episodes."""
        return self.results.episodes()

    def evaluations(self) -> dict[int, Evaluation]:
        """An ``Evaluation`` for every arm that has outcomes, by its number in the table."""
        return self.results.evaluations()


def _changed(settings: SweepSettings, options: dict[str, Any]) -> SweepSettings:
    """The settings with some replaced; ``sides`` and values given as ``edits`` are other names."""
    if options.get("sides") is not None and options.get("side") is None:
        settings = replace(settings, side=None)
    for name in ("edits", "value"):
        if isinstance(options.get(name), Iterator):  # which can be read once only
            options[name] = list(options[name])
    if options.get("edits") is not None and options.get("value") is None:
        given = SweepSettings(edits=options["edits"])
        if given.edits is None:
            settings = replace(settings, value=None)
    return replace(settings, **options)


def _with_rungs(task: Task, units: range, settings: SweepSettings) -> range:
    """The numbers of the units of all rungs; the last rung has ``units``, or those that are left of them.

    Raises:
        DtLensError: if the task has too few for its rungs.
    """
    before = settings.selection
    found = task.units(len(units) + before, settings.seed, "sweep") if before else units
    if len(found) <= before:
        raise DtLensError(
            f"halving needs {before} {task.terms.units} before its last rung, and there are {len(found)}; give fewer."
        )
    return found


def _check_terms(terms: Terms) -> None:
    """Raise ``DtLensError`` for terms that a sweep's file cannot keep."""
    require_names(terms)
    if callable(terms.failure):
        raise DtLensError("A sweep's file keeps failure as a word or a number; give a function to table().")
    for name, value in terms.setting.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for part, given in parts:
            try:
                json.dumps(given, allow_nan=False)
            except (TypeError, ValueError):
                said = f"{name} holds {part}={given!r}" if part else f"{name} is {given!r}"
                raise DtLensError(
                    f"{said}; a sweep's file takes finite numbers, text, true, false, None, and lists and dictionaries "
                    "of these."
                ) from None
