"""Compare two evaluations over the same seeds: what an edit, another target or another model changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.behaviour.agents.episodes import GUESSED, Episodes
from dt_lens.behaviour.printing import decimals, difference_tests, html_table, p_text, span, text_table
from dt_lens.errors import DtLensError, a_type
from dt_lens.statistics.outcomes import (
    Interval,
    bootstrap_interval,
    cohen_dz,
    interval_note,
    iqm,
    logrank,
    mcnemar,
    mean_test,
    sign_flip,
    wilson,
)

__all__ = ["Comparison"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """A paired comparison of returns, failures and survival; every difference is ``edited`` minus ``baseline``.

    Attributes:
        difference: mean paired difference of returns, in the environment's units, and its interval (studentised
            bootstrap; ``nan`` where all differences are equal).
        interval_note: where that interval covers less than it says, and why; see ``statistics.interval_note``.
        iqm_difference: interquartile mean of the paired differences, and its interval.
        effect_size: Cohen's d_z, the mean paired difference over the differences' standard deviation.
        p_value: two-sided sign-flip permutation test that the paired differences are symmetric about 0.
        mean_p_value: two-sided studentised bootstrap test that their mean is 0; the differences may be skewed.
        failure_*: share of failed episodes, with Wilson intervals; McNemar's exact test of the pairs.
        survival_*: log-rank test of the two survival curves; positive where ``edited`` ends earlier. It does not
            use the pairing, which makes it cautious.
    """

    edited: Episodes
    baseline: Episodes
    confidence: float
    difference: float
    difference_interval: Interval
    interval_note: str
    iqm_edited: float
    iqm_baseline: float
    iqm_difference: float
    iqm_difference_interval: Interval
    effect_size: float
    p_value: float
    mean_p_value: float
    failure_edited: float
    failure_edited_interval: Interval
    failure_baseline: float
    failure_baseline_interval: Interval
    failure_p_value: float
    survival_statistic: float
    survival_p_value: float

    @classmethod
    def of(cls, edited: Episodes, baseline: Episodes, *, confidence: float = 0.95, seed: int = 0) -> Comparison:
        """Compare; see ``Evaluation.compare``."""
        _check_pairs(edited, baseline)
        d = edited.returns - baseline.returns
        n, failures = len(d), (int(edited.failed.sum()), int(baseline.failed.sum()))
        statistic, survival_p = logrank(edited.lengths, edited.terminated, baseline.lengths, baseline.terminated)
        return cls(
            edited=edited,
            baseline=baseline,
            confidence=confidence,
            difference=float(d.mean()),
            difference_interval=bootstrap_interval(d, confidence=confidence, seed=seed),
            interval_note=interval_note(d, "differences"),
            iqm_edited=float(iqm(edited.returns)),
            iqm_baseline=float(iqm(baseline.returns)),
            iqm_difference=float(iqm(d)),
            iqm_difference_interval=bootstrap_interval(d, iqm, confidence=confidence, seed=seed),
            effect_size=cohen_dz(d),
            p_value=sign_flip(d, seed=seed),
            mean_p_value=mean_test(d, seed=seed),
            failure_edited=failures[0] / n,
            failure_edited_interval=wilson(failures[0], n, confidence),
            failure_baseline=failures[1] / n,
            failure_baseline_interval=wilson(failures[1], n, confidence),
            failure_p_value=mcnemar(edited.failed, baseline.failed),
            survival_statistic=statistic,
            survival_p_value=survival_p,
        )

    def to_frame(self) -> pd.DataFrame:
        """A row per pair: seed, return and length of each, difference of the returns, and whether each failed."""
        a, b = self.edited, self.baseline
        return pd.DataFrame(
            {
                "seed": a.seeds,
                "return_edited": a.returns,
                "return_baseline": b.returns,
                "difference": a.returns - b.returns,
                "length_edited": a.lengths,
                "length_baseline": b.lengths,
                "failed_edited": a.failed,
                "failed_baseline": b.failed,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers, as plain JSON values, with the two ``model_id``\\ s and the edits."""
        numbers = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.__dict__.items()
            if name not in ("edited", "baseline")
        }
        return {
            "environment": self.edited.environment,
            "target_return": self.edited.target_return,
            "episodes": len(self.edited),
            "seed": int(self.edited.seeds[0]),
            "mean_edited": self.edited.mean,
            "mean_baseline": self.baseline.mean,
            **numbers,
            "failure_rule": self.edited.failure_rule,
            "failure_guessed": self.edited.failure_guessed,
            "model_id_edited": self.edited.model_id,
            "model_id_baseline": self.baseline.model_id,
            "edits": list(self.edited.edits),
            "edits_baseline": list(self.baseline.edits),
        }

    def _rows(self) -> list[tuple[str, str]]:
        a, b = self.edited, self.baseline
        level = f"{100 * self.confidence:g} %"
        failed = [
            f"{100 * rate:.1f} % {span(interval, percent=True)}"
            for rate, interval in (
                (self.failure_edited, self.failure_edited_interval),
                (self.failure_baseline, self.failure_baseline_interval),
            )
        ]
        k = self._decimals()
        lengths = f"{a.lengths.mean():.1f} against {b.lengths.mean():.1f} steps"
        rows = [
            ("mean return", f"{a.mean:.{k}f} against {b.mean:.{k}f}"),
            ("paired difference", f"{self.difference:+.{k}f}  {level} {span(self.difference_interval, digits=k)}"),
            *difference_tests(self.p_value, self.mean_p_value, bool(np.any(a.returns != b.returns)), "return"),
            ("interquartile mean", f"{self.iqm_edited:.{k}f} against {self.iqm_baseline:.{k}f}"),
            (
                "  of the differences",
                f"{self.iqm_difference:+.{k}f}  {level} {span(self.iqm_difference_interval, digits=k)}",
            ),
            ("effect size (Cohen's d_z)", f"{self.effect_size:+.2f}"),
            (f"failed ({a.failure_rule})", f"{failed[0]} against {failed[1]}  p = {p_text(self.failure_p_value)}"),
            *([GUESSED] if a.failure_note else []),
            ("survival (log-rank)", f"mean length {lengths}  p = {p_text(self.survival_p_value)}"),
        ]
        return rows + ([("intervals", self.interval_note)] if self.interval_note else [])

    def _title(self) -> str:
        a = self.edited
        seeds = f"seeds {a.seeds[0]} to {a.seeds[-1]}"
        return f"{a.environment}, target return {a.target_return:g}: {len(a)} paired episodes, {seeds}"

    def __str__(self) -> str:
        return text_table(self._title(), self._rows())

    def __repr__(self) -> str:
        k = self._decimals()
        difference = f"{self.difference:+.{k}f} {span(self.difference_interval, digits=k)}"
        return f"<Comparison {self._title()}; paired difference {difference}>"

    def _decimals(self) -> int:
        return decimals(*self.edited.returns, *self.baseline.returns)

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._rows())


def _check_pairs(edited: Episodes, baseline: Episodes) -> None:
    if not isinstance(baseline, Episodes):
        raise DtLensError(f"compare takes another evaluation of an agent, not {a_type(baseline)}.")

    def rule(e: Episodes) -> Any:
        return e.failure if callable(e.failure) else str(e.failure)

    for what, one, other in (
        ("environment", edited.environment, baseline.environment),
        ("environment_kwargs", dict(edited.environment_kwargs), dict(baseline.environment_kwargs)),
        ("target return", edited.target_return, baseline.target_return),
        ("time limit", edited.time_limit, baseline.time_limit),
        ("failure rule", rule(edited), rule(baseline)),
    ):
        if one != other:
            raise DtLensError(
                f"The two evaluations differ in their {what} ({one} and {other}); "
                f"evaluate both with the same {what} to compare them."
            )
    if not np.array_equal(edited.seeds, baseline.seeds):
        raise DtLensError(
            f"The two evaluations ran different seeds ({_seeds(edited)} and {_seeds(baseline)}); "
            "evaluate both with the same seed and episodes to compare them in pairs."
        )


def _seeds(evaluation: Episodes) -> str:
    return f"{len(evaluation)} from {evaluation.seeds[0]}"
