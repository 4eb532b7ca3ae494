"""The activations of a sweep: collected once, kept beside its file, and the same bits in every run that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dt_lens.behaviour.collect_activations import collect_activations
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import KEPT
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import find_matrix
from dt_lens.progress import Tell, silent

__all__ = ["RealInputs"]

EPISODES = 10


class RealInputs:
    """Where a sweep's activations come from.

    Those that are given; else those that its file was made with, from the file beside it or, where that is gone,
    collected once more; else, where they are needed, collected from the agent's own first episodes.

    Args:
        model: the agent.
        file: the sweep's, which need not be there yet.
        given: activations, or a file of some.
        needed: whether the sweep cannot do without.
        setting: what ``collect_activations`` takes, but for the number of episodes.
    """

    def __init__(
        self, model: Any, file: Path, given: Activations | str | Path | None, needed: bool, setting: Mapping[str, Any]
    ) -> None:
        self._model, self._file, self._setting = model, file, dict(setting)
        self._needed = needed
        self._found = Activations.load(given) if isinstance(given, str | Path) else given
        self._looked = self._found is not None

    @property
    def kept(self) -> Path:
        """The file beside the sweep's."""
        return self._file.with_name(KEPT)

    def get(self, tell: Tell = silent) -> Activations | None:
        """The activations, collected now if they have to be.

        Raises:
            DtLensError: when those of the sweep are gone and come out otherwise here.
        """
        if not self._looked:
            self._found, self._looked = self._look(tell), True
        return self._found

    def _look(self, tell: Tell) -> Activations | None:
        named = self._named()
        if named is None:
            return self._collect(EPISODES, tell) if self._needed else None
        if self.kept.is_file():
            found = Activations.load(self.kept)
            wrong = "holds others than the sweep was made with"
        else:
            found = self._collect(int(named.get("episodes", EPISODES)), tell)
            wrong = "is missing, and they come out with other bits here"
        if found.digest != named["digest"]:
            raise DtLensError(
                f"The activations of the sweep are {named['digest']}, and {self.kept} {wrong}; copy that file from "
                "where the sweep was begun."
            )
        return found

    def _named(self) -> dict[str, Any] | None:
        """What the sweep's file says of its activations."""
        try:
            found: dict[str, Any] | None = SweepResults(self._file).options.get("activations")
        except DtLensError:  # there is none, or the store will say what is wrong with it
            return None
        return found

    def _collect(self, episodes: int, tell: Tell) -> Activations:
        return collect_activations(self._model, episodes=episodes, **self._setting, progress=tell)

    def check(self, matrices: list[str]) -> None:
        """Raise ``DtLensError`` where activations that were given are another model's, or lack one of ``matrices``."""
        if self._found is not None:
            for name in matrices:
                self._found.of(find_matrix(self._model, name), self._model)

    def keep(self) -> None:
        """Write them beside the sweep's file, if they are not there."""
        if self._found is None:
            return
        if not (self.kept.is_file() and Activations.load(self.kept).digest == self._found.digest):
            self._found.save(self.kept)
