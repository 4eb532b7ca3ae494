"""``Sweep``: plans the arms of a sweep, runs their units on an engine, and keeps the outcomes in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pandas as pd

from dt_lens.arguments import local_path, require_writable, whole_number
from dt_lens.behaviour.agents.episodes import FailureRule, known_rule
from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.lanes import LEAST_LANES
from dt_lens.behaviour.agents.running import Job, portable_job, setting_of, usable_cores
from dt_lens.behaviour.sweep.activation_source import ActivationSource
from dt_lens.behaviour.sweep.arms import make_arms
from dt_lens.behaviour.sweep.driver import Driver
from dt_lens.behaviour.sweep.engines.engine import Engine
from dt_lens.behaviour.sweep.engines.local import LocalEngine
from dt_lens.behaviour.sweep.fingerprint import first_steps, registration, software
from dt_lens.behaviour.sweep.packing import Packer
from dt_lens.behaviour.sweep.plan import FORMAT, Plan, block_size_of, merge_arms
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.settings import SweepSettings
from dt_lens.behaviour.sweep.store import FILE, Store
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.forward_mode import one_thread
from dt_lens.lens.matrices import catalogue
from dt_lens.lens.protocol import require_agent
from dt_lens.progress import ProgressCallback, reporting, silent

__all__ = ["Sweep"]

TOGETHER = 64  # arms whose output energies are written in one transaction


class Sweep:
    """Many edits of one agent, each with its controls, all over the same seeds as the unedited agent.

    Everything is kept in ``out/sweep.sqlite``. A sweep that was stopped in any way, ``kill -9`` included, and is run
    again with the same settings resumes where it was, and its table is the same to the bit as if it had never been
    stopped: the result of a unit (one arm with one block of seeds) depends on nothing but the unit, and is written
    whole or not at all.

    A file can grow: a sweep of more matrices, directions, edits, controls or episodes in the same folder runs what the
    file lacks. The table is then that of the larger sweep, to the bit, as if it had been run from the start; the arms
    are renumbered in its order. Arms that the file holds and the settings no longer name stay in the file and its
    table, and are not run further. Model, environment, target return, time limit, first seed, folding and halving
    belong to the file and cannot change.

    Args:
        model: a ``HookedDecisionTransformer`` on the CPU, without hooks.
        out: the folder of the file.
        settings: what to run; ``SweepSettings()`` by default.
        workers: worker processes, each on one core; as many as cores by default. Changes nothing but the time.
        options: fields of ``SweepSettings`` by keyword; they replace those of ``settings``. ``Sweep(model, out,
            sv="0-9")`` is short for ``Sweep(model, out, SweepSettings(sv="0-9"))``.

    Raises:
        DtLensError: if a setting is wrong, does not fit the model or cannot be kept in the file, and if the model
            cannot run in other processes.
    """

    def __init__(
        self,
        model: Any,
        out: str | Path,
        settings: SweepSettings | None = None,
        *,
        workers: int | None = None,
        **options: Any,
    ) -> None:
        require_agent(model, "Sweep")
        if settings is not None and not isinstance(settings, SweepSettings):
            raise DtLensError(f"settings is {a_type(settings)}; it must be a SweepSettings.")
        self.settings = asked = replace(settings or SweepSettings(), **options)
        if workers is not None:
            whole_number(workers, "workers", 1)
        if getattr(model, "active_edits", ()):
            raise DtLensError("The model has an edit in force; end it first: a sweep makes its own.")
        self.model = model
        self.file = local_path(out, "out") / FILE
        require_writable(self.file)
        self.workers = workers
        setting = setting_of(
            model, asked.environment, asked.environment_kwargs, asked.target_return, asked.max_steps, "the sweep"
        )
        _check_kwargs(setting.environment_kwargs)
        self._setting = setting
        self._job()  # raises if the agent cannot run in other processes
        self._options: dict[str, Any] = {
            "format": FORMAT,
            "model": model_id(model),
            "episodes": asked.episodes,
            "seed": asked.seed,
            "halving": asked.halving,
            "environment": setting.environment,
            "environment_kwargs": setting.environment_kwargs,
            "target_return": setting.target_return,
            "time_limit": setting.made.time_limit,
            "failure": known_rule(asked.failure, model.facts, setting.environment),  # type: ignore[arg-type]
            "block_size": block_size_of(asked.episodes, asked.block_size),
            "fold_layernorm": asked.fold_layernorm,
            "registration": registration(setting.made.spec),
            **software(),
        }
        with one_thread():
            self._arms = make_arms(model, asked)
        self._source = ActivationSource(
            model,
            self.file,
            asked.activations,
            needed=asked.needs_activations,
            setting={
                "seed": asked.seed,
                "environment": setting.environment,
                "environment_kwargs": setting.environment_kwargs,
                "target_return": setting.target_return,
                "max_steps": setting.made.time_limit,
            },
        )
        self._source.check(list(dict.fromkeys(arm.matrix for arm in self._arms if arm.matrix is not None)))

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
        options = {**self._options, "activations": known, "steps": self._steps}
        return Plan(options, merge_arms(arms, (), names), names, self.settings.block_size)

    @cached_property
    def _steps(self) -> str | None:
        return first_steps(self._job())

    def _job(self) -> Job:
        """What workers need: the agent as it is now."""
        job = portable_job(self.model, self._setting, LEAST_LANES)
        if job is None:
            raise DtLensError(
                "This agent cannot run in other processes, because it is not on the CPU, has hooks or a state encoder "
                "of its own; move it, take its hooks off, or use evaluate."
            )
        return job

    def run(self, progress: bool | ProgressCallback = False, engine: Engine | None = None) -> Self:
        """Run what is not done yet.

        Args:
            progress: ``True`` for a bar on standard error, or a function of (what is being done, share done).
            engine: what runs the units; worker processes of this machine by default.

        Raises:
            DtLensError: if the file holds another sweep, was begun where the agent's steps come to other bits, is
                damaged, cannot be written or is in use, if the model has changed since the plan was made, or if no
                worker can run.
            KeyboardInterrupt: on Ctrl-C, with a sentence; finished units are kept.
        """
        if model_id(self.model) != self._options["model"]:
            raise DtLensError("The model's weights have changed since this sweep was planned; make the Sweep again.")
        job = self._job()
        with reporting(progress) as tell:
            plan = self._make_plan(tell)
            with Store.open(self.file, plan) as store:
                self._source.keep()
                packer = Packer(self.model, self._source.get())
                self._fill_output_energies(store, packer, tell)
                todo, units = store.advance()
                if todo:
                    workers = min(self.workers or usable_cores(), len(todo))
                    Driver(store, packer, todo, units, tell).run(engine or LocalEngine(workers), job)
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

    def episodes(self) -> pd.DataFrame:
        """A row per episode; see ``SweepResults.episodes``."""
        return self.results.episodes()

    def evaluations(self) -> dict[int, Evaluation]:
        """An ``Evaluation`` for every arm that has episodes, by its number in the table."""
        return self.results.evaluations()


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise DtLensError(
                f"environment_kwargs holds {name}={value!r}; a sweep's file takes finite numbers, text, true, false, "
                "None, and lists and dictionaries of these."
            ) from None
