"""``Measured``: the units of one model as arrays, one entry per unit: what evaluations hold and comparisons take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dt_lens.behaviour.terms import FailureRule, Terms
from dt_lens.errors import DtLensError
from dt_lens.statistics.outcomes import SurvivalCurve, kaplan_meier

__all__ = ["Measured"]

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measured:
    """Units of one task that one model ran; one unit is one unit of evidence.

    Attributes:
        terms: what the task measures, and the words for it.
        units: ``[n]``, their numbers, ascending: seeds of episodes, indices of windows.
        columns: ``[n]`` values of every measure, by its name.
        model_id: hash of what ran, edits included.
        base_id: the same without the edits; where both results have one, only those of one model are paired.
        edits: records of the edits that were active.
        notes: what was assumed of the model, in sentences.
        details: what was measured of all units together, as JSON values.
    """

    terms: Terms
    units: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]]
    model_id: str = ""
    base_id: str = ""
    edits: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bring every column into its type and order, and refuse what is no column."""
        terms, n = self.terms, len(self.units)
        units = np.asarray(self.units, dtype=np.int64)
        order = np.argsort(units, kind="stable")
        if units.ndim != 1 or not n or (np.diff(units[order]) == 0).any():
            raise DtLensError(f"The task {terms.task!r} gave no {terms.units}, or one of them twice.")
        found = {name: column[order] for name, column in terms.arrays(self.columns, n).items()}
        object.__setattr__(self, "units", units[order])
        object.__setattr__(self, "columns", found)

    def __len__(self) -> int:
        return len(self.units)

    @property
    def outcomes(self) -> Numbers:
        """``[n]``, the measure that is compared."""
        return np.asarray(self.columns[self.terms.outcome])

    @property
    def mean(self) -> float:
        """Mean outcome."""
        return float(self.outcomes.mean())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``[n]``, how long each unit went on.

        Raises:
            DtLensError: where units do not end.
        """
        if self.terms.lasts is None:
            raise DtLensError(f"{self.terms.units.capitalize()} of the task {self.terms.task!r} have no length.")
        return np.asarray(self.columns[self.terms.lasts[0]])

    @property
    def ended(self) -> NDArray[np.bool_]:
        """``[n]``, whether each unit ended of itself, before the limit."""
        if self.terms.lasts is None:
            return np.ones(len(self), dtype=bool)
        return np.asarray(self.columns[self.terms.lasts[1]])

    @cached_property
    def survival(self) -> SurvivalCurve:
        """Share of units still running after each step; those cut by the limit are censored.

        Raises:
            DtLensError: where units do not end.
        """
        return kaplan_meier(self.lengths, self.ended)

    @cached_property
    def failed(self) -> NDArray[np.bool_]:
        """``[n]``, by the rule ``terms.failure``; nothing fails where failing has no meaning."""
        rule = self.terms.failure
        if rule is None:
            return np.zeros(len(self), dtype=bool)
        if callable(rule):
            failed = np.asarray(rule(self.to_frame()))
            if failed.shape != self.units.shape:
                raise DtLensError(
                    f"The failure function gave {list(failed.shape)} values; it must give one per {self.terms.unit}, "
                    f"{len(self)}."
                )
            if failed.dtype.kind not in "biuf" or not np.isin(failed, (0, 1)).all():
                raise DtLensError(
                    f"The failure function gave {failed[~np.isin(failed, (0, 1))][:1]}; it must give True or False for "
                    f"each {self.terms.unit}."
                )
            return failed.astype(bool)
        if isinstance(rule, str):
            return np.asarray(self.columns[rule])
        return np.asarray(self.terms.sign * (self.outcomes - float(rule)) < 0)

    def with_failure(self, failure: FailureRule) -> Self:
        """The same units under another failure rule.

        Raises:
            DtLensError: for what is no rule of the task.
        """
        return replace(self, terms=replace(self.terms, failure=self.terms.rule(failure), failure_note=""))

    def at(self, units: NDArray[np.int64] | range) -> Self:
        """Only these units, which must be among them."""
        places = np.searchsorted(self.units, np.asarray(units))
        return replace(
            self, units=self.units[places], columns={name: column[places] for name, column in self.columns.items()}
        )

    def to_frame(self) -> pd.DataFrame:
        """A row per unit: its number, then every measure."""
        return pd.DataFrame({self.terms.index: self.units, **self.columns})
