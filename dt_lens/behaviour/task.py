"""``Task``: what a model does, in units that can be counted and paired. It is all that differs between models.

Evaluations, comparisons, sweeps, studies, atlases and steering work in a task's units and outcomes, and never ask what
kind of model it is. ``dt_lens.behaviour.agents`` has the task of agents (a unit is an episode), ``dt_lens.behaviour.
texts`` that of language models (a window of text). For another, subclass ``Task`` and give it ``terms`` and ``run``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from dt_lens.arguments import LAST_SEED, as_json, whole_number
from dt_lens.behaviour.arms import Arms
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.identity import base_and_model_id
from dt_lens.behaviour.job import Job, Row, repeated, versions_of
from dt_lens.behaviour.situations import Situations
from dt_lens.behaviour.terms import FailureRule, Terms
from dt_lens.behaviour.watched import activations_of_batches
from dt_lens.edits.edit import Edit
from dt_lens.edits.state import unsuspended
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.activations import Activations
from dt_lens.lens.assumed import notes
from dt_lens.lens.forward_mode import measuring
from dt_lens.lens.weights import hash_of, replaced
from dt_lens.progress import Count, ProgressCallback, silent

if TYPE_CHECKING:  # plotly takes a second, and workers draw nothing
    from dt_lens.report.page import Section

__all__ = ["Columns", "ModelJob", "Task", "require_portable"]

Columns = Mapping[str, Any] | pd.DataFrame  # a value per unit under the name of each measure


class Task(ABC):
    """What a model does: its units, what is measured of each, which way is better, and how they run.

    A subclass gives ``terms`` and ``run``. What a unit gives must depend on the model, the terms' ``setting`` and the
    unit's number alone, not on the other units or their order: then two evaluations of the same units are paired.

    Attributes:
        counts: how many units ``evaluate``, a sweep (``sweep``), a study (``study``) and steering (``steer``, and
            ``choose`` while it chooses) and the court (``court``) run where nobody says, and how many
            ``activations`` are collected from. What a subclass leaves out is as here.
        software: the packages on which the bits of an outcome depend, by their names on PyPI.
        evaluation: the class of a result.
        usual: values that ``setting`` leaves out where they are as usual, so that older files stay valid.
    """

    evaluation: ClassVar[type[Evaluation]] = Evaluation

    counts: ClassVar[Mapping[str, int]] = {
        "evaluate": 100,
        "sweep": 20,
        "study": 50,
        "steer": 40,
        "choose": 8,
        "court": 200,
        "activations": 10,
    }
    software: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    usual: ClassVar[Mapping[str, Any]] = {}

    @property
    @abstractmethod
    def terms(self) -> Terms:
        """What is measured, and the words for it."""

    @abstractmethod
    def run(
        self, model: Any, units: Sequence[int], *, workers: int | None = None, progress: Count | None = None
    ) -> Columns:
        """Run ``units`` with ``model`` as it is now, edits included.

        Called with dropout off, without gradients and on one torch thread.

        Args:
            model: a wrapped model.
            units: the numbers of the units.
            workers: worker processes to use, if the task can use any.
            progress: a function of (units done, units), or ``None``.

        Returns:
            a column for every measure of the terms, with a value per unit, in the order of ``units``.
        """

    def units(self, count: int | None, seed: int = 0, use: str = "evaluate") -> range:
        """The numbers of ``count`` units; by default as many as ``use`` runs.

        Raises:
            DtLensError: for numbers that are none.
        """
        seed = whole_number(seed, "seed", 0, LAST_SEED)
        count = whole_number({**Task.counts, **self.counts}[use] if count is None else count, self.terms.units, 1)
        if seed + count - 1 > LAST_SEED:
            raise DtLensError(
                f"seed is {seed}; the last {self.terms.unit}'s must be below 2**63, so give a smaller one."
            )
        return range(seed, seed + count)

    def with_failure(self, failure: FailureRule | None) -> Task:
        """The same task under another failure rule; ``None`` leaves it as it is."""
        if failure is None:
            return self
        raise DtLensError(f"Failing has no meaning in the task {self.terms.task!r}; leave out failure.")

    def identity(self, model: Any) -> tuple[str, str]:
        """Hashes of what decides what the model does: without its edits, and as it is now; see ``Measured``."""
        return base_and_model_id(model)

    def evaluate(
        self, model: Any, units: Sequence[int], *, workers: int | None = None, progress: Count | None = None
    ) -> Evaluation:
        """Run ``units`` and collect what they give.

        Raises:
            DtLensError: for a column that is missing, of another length, or an outcome that is not finite.
        """
        with measuring(model):
            columns = self.run(model, units, workers=workers, progress=progress)
        return self.result(units, columns, **self.about(model))

    def evaluate_each(
        self,
        model: Any,
        edits: Sequence[Edit | None],
        units: Sequence[int],
        *,
        workers: int | None = None,
        progress: Count | None = None,
    ) -> list[Evaluation]:
        """``evaluate`` under each of ``edits``, one after another here; agents run them side by side.

        Raises:
            DtLensError: as ``evaluate``, and if an edit cannot be put in force.
        """
        found: list[Evaluation] = []
        for edit in edits:
            count = None if progress is None else _counted(progress, len(found) * len(units), len(edits) * len(units))
            with edit or nullcontext():
                found.append(self.evaluate(model, units, workers=workers, progress=count))
        return found

    def about(self, model: Any) -> dict[str, Any]:
        """What a result says of the model: its identity, edits in force, and notes."""
        base_id, model_id = self.identity(model)
        edits = tuple(edit.to_dict() for edit in unsuspended(model))
        about = {"base_id": base_id, "model_id": model_id, "edits": edits, "notes": notes(model)}
        return {**about, "details": dict(self.details)}

    @property
    def details(self) -> dict[str, Any]:
        """What results say of the task beyond its terms, as JSON values."""
        return {}

    def result(self, units: Sequence[int], columns: Columns, **about: Any) -> Evaluation:
        """An evaluation of units that ran; ``about`` is what ``about`` gives."""
        terms = self.terms
        _require_columns(terms, columns)
        known = {name: np.asarray(columns[name]) for name in terms.measures if name in columns}
        found = self.evaluation(terms, np.asarray(units, dtype=np.int64), known, **about)
        _require_finite(terms, found.units.tolist(), found.outcomes)
        return found

    def pack(self, model: Any) -> Job:
        """Pack ``model`` as it is now for other processes.

        Raises:
            DtLensError: if it cannot run in another process.
        """
        require_portable(model)
        return ModelJob(self, model)

    def weights(self, model: Any) -> Mapping[str, Tensor]:
        """The live weights that ``run`` takes, by canonical name; what else an edit changes does not count."""
        found: Mapping[str, Tensor] = model.weights
        return found

    def change(self, model: Any, base: Mapping[str, bytes]) -> Mapping[str, Tensor]:
        """What the edits in force change, as named tensors that ``run`` of what ``pack`` gave takes.

        By default the weights that differ, whole, by name.

        Args:
            model: a wrapped model.
            base: a hash of each of ``weights`` without the edits: ``hash_of``.
        """
        return {name: w.detach().contiguous() for name, w in self.weights(model).items() if hash_of(w) != base[name]}

    def common_outputs(self, model: Any, tell: ProgressCallback = silent) -> np.ndarray[Any, Any] | None:
        """How much of each output a model gives in a few units of this task: the court asks for the most common one.

        Args:
            model: a wrapped model, as it is now.
            tell: receives the progress.

        Returns:
            ``[labels]`` counts or sizes, in the order of the labels of the model's output embedding; ``None``, as by
            default, if outputs cannot be counted.
        """
        return None

    def situations(self, model: Any, seed: int = 0, tell: ProgressCallback = silent) -> Sequence[Situations] | None:
        """All that a model can be faced with in this task, and which factors matter where: the court asks for it.

        Args:
            model: a wrapped model, as it is now.
            seed: of what is drawn.
            tell: receives the progress.

        Returns:
            the situations, of one kind or several; ``None``, as by default, if they cannot be listed.
        """
        return None

    def choices(self, model: Any, situations: Situations) -> Float[Tensor, "n outputs"]:
        """What a model does in each situation, as it is now: the probability of each of its outputs.

        Raises:
            DtLensError: unless a subclass that lists situations gives it.
        """
        raise DtLensError(f"The task {self.terms.task!r} does not say what a model chooses; give it a method choices.")

    def sections(self, arms: Arms, folder: Path) -> list[Section]:
        """What a study's report shows of this task beyond its tables; nothing by default.

        Args:
            arms: the unedited model, the edits and their controls.
            folder: where files that a section needs may be written.
        """
        return []

    def batches(self, model: Any, units: Sequence[int]) -> Iterable[Any]:
        """What the model is fed in ``units``, for activations: arguments of ``collect_activations(batches=)``.

        Raises:
            DtLensError: unless a subclass gives them.
        """
        raise DtLensError(
            f"The task {self.terms.task!r} does not say what it feeds the model; output energies need that: give it a "
            "method batches."
        )

    def activations(
        self,
        model: Any,
        *,
        count: int | None = None,
        seed: int = 0,
        matrices: Sequence[str] | str | None = None,
        tell: ProgressCallback = silent,
    ) -> Activations:
        """The moments of what the model's matrices read in ``count`` of its units, without its edits."""
        units = self.units(self.counts["activations"] if count is None else count, seed)
        record = {
            **{name: value for name, value in self.details.items() if isinstance(value, str)},
            **as_json(dict(self.terms.setting)),
            "seed": seed,
            "model_id": self.identity(model)[0],
            self.terms.units: len(units),
        }
        batches = self.batches(model, units)
        return activations_of_batches(model, batches, tell, total=len(units), matrices=matrices, record=record)


def _counted(progress: Count, before: float, total: int) -> Count:
    """What counts units of one of several evaluations, ``before`` units done."""
    return lambda done, _: progress(before + done, total)


def require_portable(model: Any) -> None:
    """Raise ``DtLensError`` for a model that only this process can run: one with hooks, or not on the CPU."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in _modules(model)) or any(
        weight.device.type != "cpu" for weight in model.weights.values()
    ):
        raise DtLensError(
            "This model cannot run in other processes, because it is not on the CPU or has hooks of yours; move it, "
            "take its hooks off, or use evaluate."
        )


@dataclass
class ModelJob:
    """A live model, packed whole; the weights of a unit are written into it, and taken back."""

    task: Task
    model: Any

    def provenance(self) -> dict[str, Any]:
        return versions_of(self.task.software)

    def sample(self) -> str | None:
        return repeated(lambda: self.run({}, self.task.units(2)))

    def run(self, change: Mapping[str, Tensor], units: Sequence[int]) -> list[Row]:
        with measuring(self.model), replaced(self.model.weights, change):
            return rows_of(self.task.terms, units, self.task.run(self.model, units))


def rows_of(terms: Terms, units: Sequence[int], columns: Columns) -> list[Row]:
    """A row per unit, ascending, of Python's own values."""
    _require_columns(terms, columns)
    found = terms.arrays(columns, len(units))
    _require_finite(terms, units, found[terms.outcome])
    return sorted(zip(list(units), *(column.tolist() for column in found.values()), strict=True))


def _require_columns(terms: Terms, columns: Any) -> None:
    if not isinstance(columns, Mapping | pd.DataFrame):
        raise DtLensError(
            f"The task {terms.task!r} gave {a_type(columns)}; its run must give columns by name: a dictionary or a "
            "DataFrame."
        )


def _require_finite(terms: Terms, units: Sequence[int], outcomes: np.ndarray[Any, Any]) -> None:
    bad = ~np.isfinite(outcomes)
    if bad.any():
        first = int(bad.argmax())
        raise DtLensError(
            f"The {terms.outcome} of {terms.unit} {units[first]} is {outcomes[first]}; the task {terms.task!r} must "
            "give a finite number."
        )


def _modules(model: Any) -> Iterable[Any]:
    return model.modules() if hasattr(model, "modules") else ()
