"""The activations of a sweep: collected once, kept next to its file, and the same bits in every run that resumes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import KEPT
from dt_lens.behaviour.task import Task
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import find_matrix
from dt_lens.progress import ProgressCallback, silent

__all__ = ["ActivationSource"]


class ActivationSource:
    """Where a sweep's activations come from.

    The ones that are given; else those that its file was made with, loaded from the file next to it or, if that is
    missing, collected again; else, if they are needed, collected from the task's first units.

    Args:
        model: the model.
        task: what it does.
        file: the sweep's file, which may not exist yet.
        given: activations, or a file of them.
        needed: whether the sweep needs activations.
        seed: of the first unit, where units have seeds.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        file: Path,
        given: Activations | str | Path | None,
        needed: bool,
        seed: int,
    ) -> None:
        self._model, self._task, self._file, self._seed = model, task, file, seed
        self._needed = needed
        self._found = Activations.load(given) if isinstance(given, str | Path) else given
        self._resolved = self._found is not None

    @property
    def kept(self) -> Path:
        """The file of activations, next to the sweep's."""
        return self._file.with_name(KEPT)

    def get(self, tell: ProgressCallback = silent) -> Activations | None:
        """The activations, collected now if necessary; ``None`` if the sweep has none.

        Raises:
            DtLensError: if the sweep's file of activations is missing, and collecting them gives other bits here.
        """
        if not self._resolved:
            self._found, self._resolved = self._load_or_collect(tell), True
        return self._found

    def _load_or_collect(self, tell: ProgressCallback) -> Activations | None:
        recorded = self._recorded()
        if recorded is None:
            return self._collect(None, tell) if self._needed else None
        if self.kept.is_file():
            found = Activations.load(self.kept)
            wrong = "holds others than the sweep was made with"
        else:
            found = self._collect(recorded.get(self._task.terms.units), tell)
            wrong = "is missing, and they come out with other bits here"
        if found.digest != recorded["digest"]:
            raise DtLensError(
                f"The activations of the sweep are {recorded['digest']}, and {self.kept} {wrong}; copy that file from "
                "where the sweep was begun."
            )
        return found

    def _recorded(self) -> dict[str, Any] | None:
        """The record of the activations in the sweep's file; ``None`` if it has none."""
        try:
            found: dict[str, Any] | None = SweepResults(self._file).options.get("activations")
        except DtLensError:  # there is no file yet, or the store will say what is wrong with it
            return None
        return found

    def _collect(self, count: int | None, tell: ProgressCallback) -> Activations:
        return self._task.activations(self._model, count=count, seed=self._seed, tell=tell)

    def check(self, matrices: list[str]) -> None:
        """Raise ``DtLensError`` if the given activations are another model's, or lack one of ``matrices``."""
        if self._found is not None:
            for name in matrices:
                self._found.of(find_matrix(self._model, name), self._model)

    def check_edit(self, record: Mapping[str, Any]) -> None:
        """Raise ``DtLensError`` if an edit was made with activations other than those that are given."""
        wanted = record.get("activations")
        if wanted and (self._found is None or self._found.digest != wanted):
            raise DtLensError(
                f"A given edit of {record['matrix']} was made with the activations {wanted}; give the sweep those: "
                "activations=."
            )

    def keep(self) -> None:
        """Write the activations next to the sweep's file, if they are not there yet."""
        if self._found is None:
            return
        if not (self.kept.is_file() and Activations.load(self.kept).digest == self._found.digest):
            self._found.save(self.kept)
