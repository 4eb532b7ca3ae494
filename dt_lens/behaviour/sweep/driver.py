"""``Sweep``: plans the arms, hands their units to workers, and writes what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pandas as pd

from dt_lens.behaviour.evaluate import (
    _check_count,
    _check_model,
    _cores,
    model_id,
    portable_job,
    setting_of,
)
from dt_lens.behaviour.lanes import LEAST_LANES
from dt_lens.behaviour.outcomes import Evaluation, FailureRule
from dt_lens.behaviour.sweep.arms import SV, make_arms
from dt_lens.behaviour.sweep.engine import Engine
from dt_lens.behaviour.sweep.halving import parse_halving
from dt_lens.behaviour.sweep.local import LocalEngine
from dt_lens.behaviour.sweep.packing import Packer
from dt_lens.behaviour.sweep.plan import FORMAT, Plan, block_size_of, software, unite
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.running import Drive
from dt_lens.behaviour.sweep.store import FILE, Store
from dt_lens.behaviour.workers import one_thread
from dt_lens.errors import DtLensError
from dt_lens.matrices import catalogue
from dt_lens.progress import Tell, reporting

__all__ = ["Sweep"]


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
        edits: what the singular vector becomes: values of ``SingularEdit``, numbers or ``"scale:0.5"``.
        controls: random edits of the same energy per edit: ``edit.control(seed)``, ``edit.control(seed + 1)``, ...
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
        DtLensError: for arguments that do not fit the model, and for a model that cannot run in other processes.
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
        if hasattr(model, "tokenizer"):
            raise DtLensError("This is a language model, and a sweep runs agents; use evaluate for its texts.")
        _check_model(model)
        for name, value, least in (("controls", controls, 0), ("episodes", episodes, 1), ("seed", seed, 0)):
            _check_count(name, value, least)
        for name, size in (("max_steps", max_steps), ("block_size", block_size), ("workers", workers)):
            if size is not None:
                _check_count(name, size, 1)
        rungs = parse_halving(halving)
        if rungs is not None and not baseline:
            raise DtLensError("halving selects by the difference from the unedited agent; it needs the baseline.")
        if getattr(model, "active_edits", ()):
            raise DtLensError("The model has an edit in force; end it first: a sweep makes its own.")
        self.model = model
        self.file = Path(out) / FILE
        self.workers = workers
        setting = setting_of(model, environment, environment_kwargs, target_return, max_steps, "the sweep")
        job = portable_job(model, setting.task, setting.conditions, range(0), LEAST_LANES)
        if job is None:
            raise DtLensError(
                "This agent cannot run in other processes, because it is not on the CPU, has hooks or a state encoder "
                "of its own; move it, take its hooks off, or use evaluate."
            )
        self._job = job
        values = edits.split(",") if isinstance(edits, str) else [edits] if isinstance(edits, float | int) else edits
        with one_thread():
            arms = make_arms(
                model,
                matrices,
                sv,
                [sides] if isinstance(sides, str) else sides,
                list(values),
                int(controls),
                int(seed),
                baseline,
                fold_layernorm,
            )
        options: dict[str, Any] = {
            "format": FORMAT,
            "model": model_id(model),
            "episodes": int(episodes),
            "seed": int(seed),
            "halving": rungs,
            "environment": setting.environment,
            "environment_kwargs": setting.environment_kwargs,
            "target_return": setting.target_return,
            "time_limit": setting.task.time_limit,
            "block_size": block_size_of(int(episodes), block_size),
            "fold_layernorm": fold_layernorm,
            "activations": None,
            **software(),
        }
        names = list(catalogue(model, per_head=True))
        self.plan = Plan(options, unite(arms, (), names), names, block_size)

    def run(self, progress: bool | Tell = False, engine: Engine | None = None) -> Self:
        """Run what is not done yet.

        Args:
            progress: ``True`` for a bar on standard error, or a function of (what is being done, share done).
            engine: what runs the units; worker processes of this machine by default.

        Raises:
            DtLensError: when the file holds another sweep, is damaged, cannot be written or is another driver's, when
                the model has changed since the plan was made, or when no worker can run.
            KeyboardInterrupt: on Ctrl-C, with a sentence; what was finished is kept.
        """
        if model_id(self.model) != self.plan.options["model"]:
            raise DtLensError("The model's weights have changed since this sweep was planned; make the Sweep again.")
        with reporting(progress) as tell, Store.open(self.file, self.plan) as store:
            todo, units = store.advance()
            if todo:
                drive = Drive(store, Packer(self.model), todo, units, tell)
                drive.run(engine or LocalEngine(min(self.workers or _cores(), len(todo))), self._job)
        return self

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
