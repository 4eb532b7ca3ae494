"""The result of ``evaluate`` for an agent: its episodes, their summary, and how both are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from dt_lens.behaviour.agents.comparison import Comparison
from dt_lens.behaviour.agents.episodes import GUESSED, Episodes
from dt_lens.behaviour.printing import decimals, html_table, span, text_table
from dt_lens.decision_transformer.environment_wrappers import as_json, environment_in_words
from dt_lens.errors import DtLensError
from dt_lens.lens.environment_names import FileKeywords
from dt_lens.statistics.outcomes import bootstrap_interval, interval_note, iqm, wilson

__all__ = ["Evaluation"]

_KEPT = ("environment", "environment_kwargs", "target_return", "time_limit", "model_id", "failure")


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Episodes):
    """Episodes with a summary and paired comparisons; the arrays and their attributes are those of ``Episodes``.

    Intervals are over episodes of this one checkpoint: they say nothing about how another training run would do.
    """

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """The numbers of the evaluation, as plain values.

        ``mean``, ``mean_interval``, ``iqm``, ``iqm_interval`` (studentised bootstrap, ``nan`` where the outcomes are
        equal), ``interval_note`` (where the mean's covers less than it says), ``std`` (of returns, n - 1), ``min``,
        ``max``, ``mean_length``, ``failures``, ``failure_rate``, ``failure_interval`` (Wilson), ``failure_rule``, and,
        where D4RL defines a score, ``score`` (its mean) and ``score_interval``.

        Args:
            confidence: of the intervals.
            seed: of the bootstrap.
        """
        failures, n = int(self.failed.sum()), len(self)
        interval = bootstrap_interval(self.returns, confidence=confidence, seed=seed)
        result: dict[str, Any] = {
            "environment": self.environment,
            "target_return": self.target_return,
            "episodes": n,
            "time_limit": self.time_limit,
            "mean": self.mean,
            "mean_interval": tuple(interval),
            "iqm": float(iqm(self.returns)),
            "iqm_interval": tuple(bootstrap_interval(self.returns, iqm, confidence=confidence, seed=seed)),
            "interval_note": interval_note(self.returns, "returns"),
            "std": float(self.returns.std(ddof=1)) if n > 1 else float("nan"),
            "min": float(self.returns.min()),
            "max": float(self.returns.max()),
            "mean_length": float(self.lengths.mean()),
            "failures": failures,
            "failure_rate": failures / n,
            "failure_interval": tuple(wilson(failures, n, confidence)),
            "failure_rule": self.failure_rule,
            "failure_guessed": self.failure_guessed,
        }
        if self.reference is not None:
            score = self.reference.score
            result["score"] = float(score(np.array(self.mean)))
            result["score_interval"] = tuple(float(s) for s in score(np.array(interval)))
        return result

    def compare(self, baseline: Episodes, *, confidence: float = 0.95, seed: int = 0) -> Comparison:
        """This evaluation against ``baseline``, paired by seed; differences are this one's minus the baseline's.

        Raises:
            DtLensError: when the two differ in environment, target return, time limit, failure rule or seeds: then the
                difference would not be the model's.
        """
        return Comparison.of(self, baseline, confidence=confidence, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Provenance, ``summary()`` and the episodes, as plain JSON values; a failure function is left out."""
        return {
            "model_id": self.model_id,
            "edits": list(self.edits),
            "notes": list(self.notes),
            "environment_kwargs": as_json(dict(self.environment_kwargs)),
            "environment_role": self.environment_role,
            "failure": self._plain_failure(),
            **self.summary(),
            "per_episode": {name: column.tolist() for name, column in self.to_frame().items()},
        }

    def _plain_failure(self) -> str | float | None:
        if callable(self.failure):
            return None
        return self.failure if isinstance(self.failure, str) else float(self.failure)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of ``to_dict``, to the last bit; a failure function that was left out becomes the default rule.

        Raises:
            DtLensError: for a value that is missing or of the wrong kind.
        """
        from dt_lens.behaviour.agents.rollouts import Outcome  # imports torch, which a result needs nowhere else

        try:
            columns = (values["per_episode"][name] for name in ("seed", "return", "length", "terminated", "truncated"))
            return cls.from_outcomes(
                [Outcome(*row) for row in zip(*columns, strict=True)],
                edits=tuple(values["edits"]),
                notes=tuple(values.get("notes", ())),
                failure_guessed=bool(values.get("failure_guessed", False)),
                **{name: values[name] for name in _KEPT if name != "environment_kwargs"},
                environment_kwargs=FileKeywords(values["environment_kwargs"]),
                environment_role=str(values.get("environment_role", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DtLensError(f"These are not the values of an evaluation's to_dict: {error!r}.") from error

    def _rows(self) -> list[tuple[str, str]]:
        s = self.summary()
        role, made = self.environment_role, environment_in_words(self.environment_kwargs)
        place = " with ".join(part for part in (f"the {role} environment" if role else "", made) if part)
        rows = [("environment", place)] if place else []
        k = decimals(s["min"], s["max"])
        rows += [
            ("mean return", f"{s['mean']:.{k}f}  {span(s['mean_interval'], digits=k)}"),
            ("interquartile mean", f"{s['iqm']:.{k}f}  {span(s['iqm_interval'], digits=k)}"),
            ("standard deviation", f"{s['std']:.{k}f}"),
            ("range", f"{s['min']:.{k}f} to {s['max']:.{k}f}"),
            ("mean length", f"{s['mean_length']:.1f} of {self.time_limit} steps"),
            (
                f"failed ({self.failure_rule})",
                f"{s['failures']} of {len(self)}  {span(s['failure_interval'], percent=True)}",
            ),
        ]
        if self.failure_note:
            rows.append(GUESSED)
        if "score" in s:
            rows.append(("D4RL-normalised score", f"{s['score']:.1f}  {span(s['score_interval'])}"))
        if s["interval_note"]:
            rows.append(("intervals", s["interval_note"]))
        return rows

    def _title(self) -> str:
        edits = f", {len(self.edits)} edit{'s' * (len(self.edits) != 1)}" if self.edits else ""
        return (
            f"{self.environment}, target return {self.target_return:g}: {len(self)} episodes, "
            f"seeds {self.seeds[0]} to {self.seeds[-1]}{edits}"
        )

    def __str__(self) -> str:
        return "\n".join((text_table(self._title(), self._rows()), *self.notes))

    def __repr__(self) -> str:
        return f"<Evaluation {self._title()}; mean return {self.mean:.{decimals(*self.returns)}f}>"

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._rows()) + "".join(f"<p>{escape(note)}</p>" for note in self.notes)
