"""``Evaluation``: what ``evaluate`` returns: a model's units, their summary, and how both are printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any, ClassVar, Self

import numpy as np

from dt_lens.arguments import as_json
from dt_lens.behaviour.comparison import GUESSED, Comparison, numbered
from dt_lens.behaviour.measured import Measured
from dt_lens.behaviour.printing import decimals, span
from dt_lens.behaviour.terms import Terms
from dt_lens.errors import DtLensError
from dt_lens.lens.printing import html_table, text_table
from dt_lens.statistics.outcomes import bootstrap_interval, interval_note, iqm, wilson

__all__ = ["Evaluation"]


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Measured):
    """Units with a summary and paired comparisons; the arrays and their attributes are those of ``Measured``.

    Intervals are over units of this one checkpoint: they say nothing about how another training run would do.
    """

    comparison: ClassVar[type[Comparison]] = Comparison

    def mean_size(self, *, seed: int = 0) -> float:
        """The size of the mean outcome, of which effects are shares; ``nan`` if it cannot be told from 0.

        Args:
            seed: of the bootstrap interval, 95 %, that must leave out 0.
        """
        low, high = bootstrap_interval(self.outcomes, seed=seed)
        return math.nan if low <= 0 <= high or not self.mean else abs(self.mean)

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """The numbers of the evaluation, as plain values.

        The setting, the number of units, ``mean``, ``mean_interval``, ``iqm``, ``iqm_interval`` (studentised bootstrap,
        ``nan`` where the outcomes are equal), ``interval_note`` (where the mean's covers less than it says), ``std``
        (of outcomes, n - 1), ``min`` and ``max``; where units end ``mean_length``; where failing has a meaning
        ``failures``, ``failure_rate``, ``failure_interval`` (Wilson), ``failure_rule`` and ``failure_guessed``.

        Args:
            confidence: of the intervals.
            seed: of the bootstrap.
        """
        terms, n = self.terms, len(self)
        options: dict[str, Any] = {"confidence": confidence, "seed": seed}
        result: dict[str, Any] = {
            **{name: value for name, value in terms.setting.items() if isinstance(value, str | int | float)},
            terms.units: n,
            "mean": self.mean,
            "mean_interval": tuple(bootstrap_interval(self.outcomes, **options)),
            "iqm": float(iqm(self.outcomes)),
            "iqm_interval": tuple(bootstrap_interval(self.outcomes, iqm, **options)),
            "interval_note": interval_note(
                self.outcomes, f"{terms.outcome_name}{'es' * terms.outcome.endswith('s') or 's'}"
            ),
            "std": float(self.outcomes.std(ddof=1)) if n > 1 else float("nan"),
            "min": float(self.outcomes.min()),
            "max": float(self.outcomes.max()),
        }
        if terms.lasts is not None:
            result["mean_length"] = float(self.lengths.mean())
        if terms.failure is not None:
            failures = int(self.failed.sum())
            result |= {
                "failures": failures,
                "failure_rate": failures / n,
                "failure_interval": tuple(wilson(failures, n, confidence)),
                "failure_rule": terms.failure_rule,
                "failure_guessed": bool(terms.failure_note),
            }
        return result

    def compare(
        self, baseline: Measured, *, confidence: float = 0.95, seed: int = 0, other_model: bool = False
    ) -> Comparison:
        """This evaluation against ``baseline``, paired by unit; differences are this one's minus the baseline's.

        Args:
            baseline: another evaluation of the same task, in the same setting, over the same units.
            confidence: of the intervals.
            seed: of the bootstrap and the sign flips.
            other_model: allow another model, where the two say which model they are of without their edits.

        Raises:
            DtLensError: when the two differ in anything but the model: then the difference would not be the model's.
        """
        return self.comparison.of(self, baseline, confidence=confidence, seed=seed, other_model=other_model)

    def to_dict(self) -> dict[str, Any]:
        """The task's terms, provenance, ``summary()`` and the units, as plain JSON values.

        A failure function is left out.
        """
        return {
            "task": as_json(self.terms.to_dict()),
            "model_id": self.model_id,
            "base_id": self.base_id,
            "edits": list(self.edits),
            "notes": list(self.notes),
            **as_json(dict(self.terms.setting)),
            **as_json(dict(self.details)),
            **self.summary(),
            "details": as_json(dict(self.details)),
            f"per_{self.terms.unit}": {name: column.tolist() for name, column in self.to_frame().items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``, to the last bit; a failure function that was left out becomes no rule.

        Raises:
            DtLensError: for a value that is missing or of the wrong kind.
        """
        try:
            terms = Terms.from_dict(values["task"])
            rows = values[f"per_{terms.unit}"]
            return cls(
                terms,
                np.asarray(rows[terms.index], dtype=np.int64),
                {name: np.asarray(rows[name], dtype=terms.dtype(name)) for name in terms.measures},
                model_id=str(values["model_id"]),
                base_id=str(values["base_id"]),
                edits=tuple(values["edits"]),
                notes=tuple(values["notes"]),
                details=dict(values["details"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DtLensError(f"These are not the values of an evaluation's to_dict: {error!r}.") from error

    def with_terms(self, terms: Terms) -> Self:
        """The same units under other words or another failure rule."""
        return replace(self, terms=terms)

    def _rows(self) -> list[tuple[str, str]]:
        s, terms, k = self.summary(), self.terms, self._decimals()
        rows = [
            (f"mean {terms.outcome_name}", f"{s['mean']:.{k}f}{terms.in_scale}  {span(s['mean_interval'], digits=k)}"),
            ("interquartile mean", f"{s['iqm']:.{k}f}  {span(s['iqm_interval'], digits=k)}"),
            ("standard deviation", f"{s['std']:.{k}f}"),
            ("range", f"{s['min']:.{k}f} to {s['max']:.{k}f}"),
        ]
        if terms.lasts is not None:
            rows.append(("mean length", f"{s['mean_length']:.1f} of {terms.limit} {terms.step}s"))
        if terms.failure is not None:
            failed = f"{s['failures']} of {len(self)}  {span(s['failure_interval'], percent=True)}"
            rows += [(f"failed ({terms.failure_rule})", failed), *([GUESSED] if terms.failure_note else [])]
        rows += self.more_rows(s)
        return rows + ([("intervals", s["interval_note"])] if s["interval_note"] else [])

    def more_rows(self, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What a subclass adds to the table, from ``summary()``."""
        return []

    def _decimals(self) -> int:
        given = self.terms.digits
        return decimals(float(self.outcomes.min()), float(self.outcomes.max())) if given is None else given

    def _title(self) -> str:
        edits = f", {len(self.edits)} edit{'s' * (len(self.edits) != 1)}" if self.edits else ""
        count = f"{len(self)} {self.terms.unit}{'s' * (len(self) != 1)}"
        return f"{self.terms.place}: {count}{self.terms.of_size}{numbered(self)}{edits}"

    def __str__(self) -> str:
        return "\n".join((text_table(self._title(), self._rows()), *self.notes))

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self._title()}; mean {self.terms.outcome_name} {self.mean:.{self._decimals()}f}>"
        )

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._rows()) + "".join(f"<p>{escape(note)}</p>" for note in self.notes)
