"""``Sweep``: plans the arms, hands their units to workers, and writes what comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pandas as pd

from dt_lens.arguments import local_path, whole_number
from dt_lens.behaviour.agents.episodes import FailureRule
from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.lanes import LEAST_LANES
from dt_lens.behaviour.agents.running import Job, portable_job, setting_of, usable_cores
from dt_lens.behaviour.sweep.arms import SV, listed, make_arms
from dt_lens.behaviour.sweep.driver import Drive
from dt_lens.behaviour.sweep.engines.engine import Engine
from dt_lens.behaviour.sweep.engines.local import LocalEngine
from dt_lens.behaviour.sweep.halving import parse_halving, rungs_of
from dt_lens.behaviour.sweep.packing import Packer
from dt_lens.behaviour.sweep.plan import FORMAT, Plan, block_size_of, unite
from dt_lens.behaviour.sweep.proof import first_steps, registration, software
from dt_lens.behaviour.sweep.real_inputs import RealInputs
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import FILE, Store
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.forward_mode import one_thread
from dt_lens.lens.matrices import catalogue
from dt_lens.lens.protocol import require_agent
from dt_lens.progress import Tell, reporting, silent

__all__ = ["Sweep"]

LAST_SEED = 2**63 - 1  # that SQLite holds
TOGETHER = 64  # arms whose output energies are written at once


class Sweep:
    """Many edits of one agent, each with its controls, all over the same seeds as the unedited agent.

    Everything is kept in ``out/sweep.sqlite``. Stopped in whatever way, killed outright included, and run again with
    the same arguments, a sweep goes on where it was, and its table is the same to the bit as if it had never stopped:
    what a unit (one arm with one block of seeds) gives depends on nothing but itself, and is written whole or not at
    all.

    A file can grow: a sweep of more matrices, directions, edits, controls or episodes in the same folder runs what is
    not there yet, and the table is then that of the larger sweep, to the bit, as if it had been asked for at once. The
    arms are numbered anew in its order. Arms that the file holds and that are not asked for any more stay in the file
    and its table; they are not run further. Model, environment, target return, time limit, first seed, folding and
    halving are the file's.

    Args:
        model: a ``HookedDecisionTransformer`` on the CPU, without hooks.
        out: the folder of the file.
        matrices: names or shell patterns, such as ``"*.W_in"``; all matrices by default.
        sv: which singular directions of each, one edit for each: an index, ``"0-9"``, ``"all"``, or a sequence of
            these; negative ones count from the smallest sigma.
        sides: which sides are edited, such as ``["write"]``; by default every side on the residual stream, and one of
            them where the edit only scales sigma and is the same on each.
        edits: what the singular vector becomes: values of ``SingularEdit``, numbers or ``"scale:0.5"``, and for
            directions of embeddings also, by a label or the number of its row,
            ``"replace:action_out:thigh_joint torque"`` and ``"towards:action_out:thigh_joint torque:30"``.
        controls: random edits of the same size per edit: ``edit.control(seed)``, ``edit.control(seed + 1)``, ...
        control_match: what a control has in common with its edit: ``"frobenius"``, the norm of the change, or
            ``"output"``, that and the output energy on the agent's own inputs.
        directions: ``"plain"``, or ``"activation"`` for those of ``SingularEdit(activations=...)``.
        activations: those that are meant, or a file of some; by default they are collected, where they are needed,
            from the agent's first ten episodes, before anything else. They are kept beside the sweep's file, and used
            by every run that goes on with it.
        episodes: of every arm.
        seed: of the first episode, of the controls, and of ``"random"`` edits.
        environment, environment_kwargs, target_return, max_steps: as for ``evaluate``.
        block_size: episodes of a unit; about 16 by default. Changes no number.
        halving: successive halving: the episodes of each rung before the last, such as ``[4, 8]``. Every edit runs 4
            episodes, the stronger half 8 more, and half of those, with their controls, all ``episodes`` on fresh
            seeds. See ``SweepResults.table`` for what the numbers are then.
        baseline: run the unedited agent too, which differences need.
        fold_layernorm: as for ``SingularEdit``.
        workers: processes, each on one core; one a core by default. Changes nothing but the time.

    Raises:
        DtLensError: for arguments that do not fit the model, or that the file cannot hold, and for a model that cannot
            run in other processes.
    """

    def __init__(
        self,
        model: Any,
        out: str | Path,
        *,
        matrices: Sequence[str] | str | None = None,
        sv: SV = 0,
        sides: Sequence[str] | str | None = None,
        edits: Sequence[Any] | str | float = ("constant",),
        controls: int = 0,
        control_match: str = "frobenius",
        directions: str = "plain",
        activations: Activations | str | Path | None = None,
        episodes: int = 20,
        seed: int = 0,
        environment: str | None = None,
        environment_kwargs: Mapping[str, Any] | None = None,
        target_return: float | None = None,
        max_steps: int | None = None,
        block_size: int | None = None,
        halving: str | int | Sequence[int] | None = None,
        baseline: bool = True,
        fold_layernorm: bool = True,
        workers: int | None = None,
    ) -> None:
        require_agent(model, "Sweep")
        for name, value, least in (("controls", controls, 0), ("episodes", episodes, 1), ("seed", seed, 0)):
            whole_number(value, name, least)
        for name, size in (("max_steps", max_steps), ("block_size", block_size), ("workers", workers)):
            if size is not None:
                whole_number(size, name, 1)
        rungs = parse_halving(halving)
        if rungs is not None and not baseline:
            raise DtLensError("halving selects by the difference from the unedited agent; it needs the baseline.")
        if getattr(model, "active_edits", ()):
            raise DtLensError("The model has an edit in force; end it first: a sweep makes its own.")
        self.model = model
        self.file = local_path(out, "out") / FILE
        self.workers = workers
        setting = setting_of(model, environment, environment_kwargs, target_return, max_steps, "the sweep")
        _check_kwargs(setting.environment_kwargs)
        self._setting = setting
        self._job()  # raises where there is none
        self._block_size = None if block_size is None else int(block_size)
        self._asked: dict[str, Any] = {
            "matrices": None if matrices is None else listed(matrices),
            "sv": sv,
            "sides": None if sides is None else listed(sides),
            "values": edits.split(",") if isinstance(edits, str) else listed(edits),
            "controls": int(controls),
            "seed": int(seed),
            "baseline": baseline,
            "fold_layernorm": fold_layernorm,
            "control_match": control_match,
            "directions": directions,
        }
        self._options: dict[str, Any] = {
            "format": FORMAT,
            "model": model_id(model),
            "episodes": int(episodes),
            "seed": int(seed),
            "halving": rungs,
            "environment": setting.environment,
            "environment_kwargs": setting.environment_kwargs,
            "target_return": setting.target_return,
            "time_limit": setting.task.time_limit,
            "block_size": block_size_of(int(episodes), self._block_size),
            "fold_layernorm": fold_layernorm,
            "registration": registration(setting.task.spec),
            **software(),
        }
        if max(rungs_of(self._options)[-1].stop - 1, int(seed) + int(controls)) > LAST_SEED:
            raise DtLensError(f"seed is {seed}; the last episode's must be below 2**63, so give a smaller one.")
        with one_thread():
            self._arms = make_arms(model, **self._asked)
        self._inputs = RealInputs(
            model,
            self.file,
            activations,
            needed=directions == "activation" or (control_match == "output" and controls > 0),
            setting={
                "seed": int(seed),
                "environment": setting.environment,
                "environment_kwargs": setting.environment_kwargs,
                "target_return": setting.target_return,
                "max_steps": setting.task.time_limit,
            },
        )
        self._inputs.check(list(dict.fromkeys(arm.matrix for arm in self._arms if arm.matrix is not None)))

    @property
    def plan(self) -> Plan:
        """What the sweep will do; activations that this takes are collected now."""
        return self._planned(silent)

    def _planned(self, tell: Tell) -> Plan:
        activations, arms = self._inputs.get(tell), self._arms
        if activations is not None:
            with one_thread():
                arms = make_arms(self.model, **self._asked, activations=activations)
        known = None if activations is None else {**activations.record, "digest": activations.digest}
        names = list(catalogue(self.model, per_head=True))
        options = {**self._options, "activations": known, "steps": self._steps}
        return Plan(options, unite(arms, (), names), names, self._block_size)

    @cached_property
    def _steps(self) -> str | None:
        return first_steps(self._job())

    def _job(self) -> Job:
        """What workers are given: the agent as it is now."""
        job = portable_job(self.model, self._setting, LEAST_LANES)
        if job is None:
            raise DtLensError(
                "This agent cannot run in other processes, because it is not on the CPU, has hooks or a state encoder "
                "of its own; move it, take its hooks off, or use evaluate."
            )
        return job

    def run(self, progress: bool | Tell = False, engine: Engine | None = None) -> Self:
        """Run what is not done yet.

        Args:
            progress: ``True`` for a bar on standard error, or a function of (what is being done, share done).
            engine: what runs the units; worker processes of this machine by default.

        Raises:
            DtLensError: when the file holds another sweep, was begun where the agent's steps come to other bits, is
                damaged, cannot be written or is another driver's, when the model has changed since the plan was made,
                or when no worker can run.
            KeyboardInterrupt: on Ctrl-C, with a sentence; what was finished is kept.
        """
        if model_id(self.model) != self._options["model"]:
            raise DtLensError("The model's weights have changed since this sweep was planned; make the Sweep again.")
        job = self._job()
        with reporting(progress) as tell:
            plan = self._planned(tell)
            with Store.open(self.file, plan) as store:
                self._inputs.keep()
                packer = Packer(self.model, self._inputs.get())
                self._listen(store, packer, tell)
                todo, units = store.advance()
                if todo:
                    workers = min(self.workers or usable_cores(), len(todo))
                    Drive(store, packer, todo, units, tell).run(engine or LocalEngine(workers), job)
        return self

    def _listen(self, store: Store, packer: Packer, tell: Tell) -> None:
        """Find out the output energies of arms that were begun before activations were known."""
        arms = store.arms_without_output_energy() if self._inputs.get() is not None else []
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
