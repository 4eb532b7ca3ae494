"""Compare two evaluations over the same units: what an edit, another setting or another model changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import pandas as pd

from dt_lens.behaviour.measured import Measured
from dt_lens.behaviour.printing import decimals, difference_tests, p_text, span
from dt_lens.behaviour.terms import Terms
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.printing import html_table, text_table
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

__all__ = ["GUESSED", "Comparison", "numbered"]

GUESSED = ("  this rule is a guess", "say terminated, truncated or a number by --failure, failure= or dt_lens.json")
NAN = float("nan")


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """A paired comparison of outcomes, failures and survival; every difference is ``edited`` minus ``baseline``.

    Attributes:
        difference: mean paired difference of the outcomes, in their own units, and its interval (studentised
            bootstrap; ``nan`` where all differences are equal).
        interval_note: where that interval covers less than it says, and why; see ``statistics.interval_note``.
        iqm_difference: interquartile mean of the paired differences, and its interval.
        effect_size: Cohen's d_z, the mean paired difference over the differences' standard deviation.
        p_value: two-sided sign-flip permutation test that the paired differences are symmetric about 0.
        mean_p_value: two-sided studentised bootstrap test that their mean is 0; the differences may be skewed.
        failure_*: share of failed units, with Wilson intervals; McNemar's exact test of the pairs. ``nan`` where
            failing has no meaning.
        survival_*: log-rank test of the two survival curves; positive where ``edited`` ends earlier. It does not
            use the pairing, which makes it cautious. ``nan`` where units do not end.
    """

    edited: Measured
    baseline: Measured
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
    def of(
        cls,
        edited: Measured,
        baseline: Measured,
        *,
        confidence: float = 0.95,
        seed: int = 0,
        other_model: bool = False,
    ) -> Self:
        """Compare; see ``Evaluation.compare``."""
        _check_pairs(edited, baseline, other_model)
        d = edited.outcomes - baseline.outcomes
        options: dict[str, Any] = {"confidence": confidence, "seed": seed}
        return cls(
            edited=edited,
            baseline=baseline,
            confidence=confidence,
            difference=float(d.mean()),
            difference_interval=bootstrap_interval(d, **options),
            interval_note=interval_note(d, "differences"),
            iqm_edited=float(iqm(edited.outcomes)),
            iqm_baseline=float(iqm(baseline.outcomes)),
            iqm_difference=float(iqm(d)),
            iqm_difference_interval=bootstrap_interval(d, iqm, **options),
            effect_size=cohen_dz(d),
            p_value=sign_flip(d, seed=seed),
            mean_p_value=mean_test(d, seed=seed),
            **_failures(edited, baseline, confidence),
            **_survival(edited, baseline),
            **cls._more(edited, baseline, options),
        )

    @classmethod
    def _more(cls, edited: Measured, baseline: Measured, options: dict[str, Any]) -> dict[str, Any]:
        """The fields that a subclass adds; ``options`` are those of a bootstrap."""
        return {}

    @property
    def damage(self) -> float:
        """How much worse ``edited`` is on average: the difference, with its sign by which way is better."""
        return -self.edited.terms.sign * self.difference

    @property
    def damage_interval(self) -> Interval:
        """The interval of ``damage``."""
        low, high = self.difference_interval
        return Interval(-high, -low) if self.edited.terms.sign > 0 else self.difference_interval

    def to_frame(self) -> pd.DataFrame:
        """A row per pair: outcome and length of each, difference of the outcomes, and whether each failed."""
        a, b, terms = self.edited, self.baseline, self.edited.terms
        columns: dict[str, Any] = {
            terms.index: a.units,
            f"{terms.outcome}_edited": a.outcomes,
            f"{terms.outcome}_baseline": b.outcomes,
            "difference": a.outcomes - b.outcomes,
        }
        if terms.lasts is not None:
            name = terms.lasts[0]
            columns |= {f"{name}_edited": a.lengths, f"{name}_baseline": b.lengths}
        if terms.failure is not None:
            columns |= {"failed_edited": a.failed, "failed_baseline": b.failed}
        return pd.DataFrame(columns)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, as plain JSON values, with the two ``model_id``\\ s and the edits."""
        a, b = self.edited, self.baseline
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in numbers.items()
            if name not in ("edited", "baseline")
        }
        return {
            **{name: value for name, value in a.terms.setting.items() if isinstance(value, str | int | float)},
            a.terms.units: len(a),
            a.terms.index: int(a.units[0]),
            "mean_edited": a.mean,
            "mean_baseline": b.mean,
            **plain,
            "failure_rule": a.terms.failure_rule,
            "failure_guessed": bool(a.terms.failure_note),
            "model_id_edited": a.model_id,
            "model_id_baseline": b.model_id,
            "edits": list(a.edits),
            "edits_baseline": list(b.edits),
        }

    def _rows(self) -> list[tuple[str, str]]:
        a, b, terms, k = self.edited, self.baseline, self.edited.terms, self._decimals()
        level = f"{100 * self.confidence:g} %"
        rows = [
            (f"mean {terms.outcome_name}", f"{a.mean:.{k}f} against {b.mean:.{k}f}{terms.in_scale}"),
            ("paired difference", f"{self.difference:+.{k}f}  {level} {span(self.difference_interval, digits=k)}"),
            *difference_tests(self.p_value, self.mean_p_value, bool(np.any(a.outcomes != b.outcomes)), terms.outcome),
            ("interquartile mean", f"{self.iqm_edited:.{k}f} against {self.iqm_baseline:.{k}f}"),
            (
                "  of the differences",
                f"{self.iqm_difference:+.{k}f}  {level} {span(self.iqm_difference_interval, digits=k)}",
            ),
            ("effect size (Cohen's d_z)", f"{self.effect_size:+.2f}"),
        ]
        if terms.failure is not None:
            failed = [
                f"{100 * rate:.1f} % {span(interval, percent=True)}"
                for rate, interval in (
                    (self.failure_edited, self.failure_edited_interval),
                    (self.failure_baseline, self.failure_baseline_interval),
                )
            ]
            said = f"{failed[0]} against {failed[1]}  p = {p_text(self.failure_p_value)}"
            rows += [(f"failed ({terms.failure_rule})", said), *([GUESSED] if terms.failure_note else [])]
        if terms.lasts is not None:
            lengths = f"{a.lengths.mean():.1f} against {b.lengths.mean():.1f} {terms.step}s"
            rows.append(("survival (log-rank)", f"mean length {lengths}  p = {p_text(self.survival_p_value)}"))
        rows += self._more_rows()
        return rows + ([("intervals", self.interval_note)] if self.interval_note else [])

    def _more_rows(self) -> list[tuple[str, str]]:
        """What a subclass adds to the table."""
        return []

    def _title(self) -> str:
        a = self.edited
        return f"{a.terms.place}: {len(a)} paired {a.terms.units}{a.terms.of_size}{numbered(a)}"

    def __str__(self) -> str:
        return text_table(self._title(), self._rows())

    def __repr__(self) -> str:
        k = self._decimals()
        difference = f"{self.difference:+.{k}f} {span(self.difference_interval, digits=k)}"
        return f"<{type(self).__name__} {self._title()}; paired difference {difference}>"

    def _decimals(self) -> int:
        given = self.edited.terms.digits
        return decimals(*self.edited.outcomes, *self.baseline.outcomes) if given is None else given

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._rows())


def numbered(units: Measured) -> str:
    """Which units of those that there could be: empty for the first ones by index, seeds always."""
    first, last, name = int(units.units[0]), int(units.units[-1]), units.terms.index
    if name == "index" and first == 0:
        return ""
    return f", {name}s {first} to {last}"


def _failures(edited: Measured, baseline: Measured, confidence: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    known, n = edited.terms.failure is not None, len(edited)
    for name, units in (("failure_edited", edited), ("failure_baseline", baseline)):
        failures = int(units.failed.sum())
        found[name] = failures / n if known else NAN
        found[f"{name}_interval"] = wilson(failures, n, confidence) if known else Interval(NAN, NAN)
    return found | {"failure_p_value": mcnemar(edited.failed, baseline.failed) if known else NAN}


def _survival(edited: Measured, baseline: Measured) -> dict[str, Any]:
    statistic = p = NAN
    if edited.terms.lasts is not None:
        statistic, p = logrank(edited.lengths, edited.ended, baseline.lengths, baseline.ended)
    return {"survival_statistic": statistic, "survival_p_value": p}


def _check_pairs(edited: Measured, baseline: Measured, other_model: bool) -> None:
    """Raise ``DtLensError`` unless the two differ in nothing but the model."""
    if not isinstance(baseline, Measured):
        raise DtLensError(f"compare takes another evaluation, not {a_type(baseline)}.")
    one, other = edited.terms, baseline.terms
    if (one.task, one.outcome, one.better) != (other.task, other.outcome, other.better):
        raise DtLensError(
            f"The two evaluations are of different tasks ({one.task}, {one.outcome}; {other.task}, {other.outcome}); "
            "evaluate both on the same task to compare them."
        )
    names = {**one.setting, **other.setting}
    pairs = [(one.named(name), _plain(one.setting.get(name)), _plain(other.setting.get(name))) for name in names]
    for what, here, there in [*pairs, ("failure rule", _rule(one), _rule(other))]:
        if here != there:
            raise DtLensError(
                f"The two evaluations differ in their {what} ({here} and {there}); "
                f"evaluate both with the same {what} to compare them."
            )
    if not np.array_equal(edited.units, baseline.units):
        raise DtLensError(
            f"The two evaluations ran different {one.units} ({_units(edited)} and {_units(baseline)}); "
            f"evaluate both on the same ones to compare them in pairs."
        )
    if edited.base_id and baseline.base_id and edited.base_id != baseline.base_id and not other_model:
        raise DtLensError(
            f"The two evaluations are of different models ({edited.base_id} and {baseline.base_id} without their "
            "edits); pass other_model=True to compare them."
        )


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _rule(terms: Terms) -> Any:
    return terms.failure if callable(terms.failure) else str(terms.failure)


def _units(units: Measured) -> str:
    return f"{len(units)} from {units.units[0]}"
