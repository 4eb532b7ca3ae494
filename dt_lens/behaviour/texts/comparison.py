"""Compare two evaluations over the same windows of text: what an edit or another model changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.behaviour.printing import difference_tests, html_table, span, text_table
from dt_lens.behaviour.texts.losses import Losses, Moved, moved_html, moved_rows, small_span
from dt_lens.errors import DtLensError, a_type
from dt_lens.statistics.outcomes import (
    Interval,
    bootstrap_interval,
    cohen_dz,
    interval_note,
    iqm,
    mean_test,
    sign_flip,
)

__all__ = ["TextComparison"]


@dataclass(frozen=True, eq=False)
class TextComparison:
    """A paired comparison of losses; every difference is ``edited`` minus ``baseline``, in nats per token.

    Attributes:
        difference: mean paired difference of the windows' losses, and its interval (studentised bootstrap; ``nan``
            where all differences are equal).
        interval_note: where that interval covers less than it says, and why; see ``statistics.interval_note``.
        iqm_difference: interquartile mean of the paired differences, and its bootstrap interval.
        perplexity_ratio: ``exp`` of the mean difference: perplexity of ``edited`` over that of ``baseline``.
        effect_size: Cohen's d_z, the mean paired difference over the differences' standard deviation.
        p_value: two-sided sign-flip permutation test that the paired differences are symmetric about 0.
        mean_p_value: two-sided studentised bootstrap test that their mean is 0; the differences may be skewed.
        kl: mean KL of ``edited`` from its own model without edits, and its bootstrap interval.
        moved: the tokens whose probability the edits of ``edited`` changed most.
    """

    edited: Losses
    baseline: Losses
    confidence: float
    difference: float
    difference_interval: Interval
    interval_note: str
    iqm_edited: float
    iqm_baseline: float
    iqm_difference: float
    iqm_difference_interval: Interval
    perplexity_ratio: float
    perplexity_ratio_interval: Interval
    effect_size: float
    p_value: float
    mean_p_value: float
    kl: float
    kl_interval: Interval

    @classmethod
    def of(
        cls,
        edited: Losses,
        baseline: Losses,
        *,
        confidence: float = 0.95,
        seed: int = 0,
        other_model: bool = False,
    ) -> TextComparison:
        """Compare; see ``TextEvaluation.compare``."""
        _check_pairs(edited, baseline, other_model)
        d = edited.loss - baseline.loss
        options: dict[str, Any] = {"confidence": confidence, "seed": seed}
        interval = bootstrap_interval(d, **options)
        return cls(
            edited=edited,
            baseline=baseline,
            confidence=confidence,
            difference=float(d.mean()),
            difference_interval=interval,
            interval_note=interval_note(d, "differences"),
            iqm_edited=float(iqm(edited.loss)),
            iqm_baseline=float(iqm(baseline.loss)),
            iqm_difference=float(iqm(d)),
            iqm_difference_interval=bootstrap_interval(d, iqm, **options),
            perplexity_ratio=math.exp(d.mean()),
            perplexity_ratio_interval=Interval(*(float(bound) for bound in np.exp(interval))),
            effect_size=cohen_dz(d),
            p_value=sign_flip(d, seed=seed),
            mean_p_value=mean_test(d, seed=seed),
            kl=float(edited.kl.mean()),
            kl_interval=bootstrap_interval(edited.kl, **options),
        )

    @property
    def moved(self) -> tuple[Moved, ...]:
        return self.edited.moved

    def moved_frame(self, k: int | None = None) -> pd.DataFrame:
        """The ``k`` tokens that gained and the ``k`` that lost most: token, text, before, after, change."""
        return self.edited.moved_frame(k)

    def to_frame(self) -> pd.DataFrame:
        """A row per pair: index, tokens, loss of each, their difference, and the KL of the edited one."""
        a, b = self.edited, self.baseline
        return pd.DataFrame(
            {
                "index": np.arange(len(a)),
                "tokens": a.tokens,
                "loss_edited": a.loss,
                "loss_baseline": b.loss,
                "difference": a.loss - b.loss,
                "kl": a.kl,
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
            "text": self.edited.text,
            "text_id": self.edited.text_id,
            "windows": len(self.edited),
            "context": self.edited.context,
            "mean_edited": self.edited.mean,
            "mean_baseline": self.baseline.mean,
            **numbers,
            "moved": [list(row) for row in self.moved],
            "model_id_edited": self.edited.model_id,
            "model_id_baseline": self.baseline.model_id,
            "edits": list(self.edited.edits),
            "edits_baseline": list(self.baseline.edits),
        }

    def _rows(self) -> list[tuple[str, str]]:
        a, b = self.edited, self.baseline
        level = f"{100 * self.confidence:g} %"
        interval, ratios = (span(i, digits=4) for i in (self.difference_interval, self.perplexity_ratio_interval))
        rows = [
            ("mean loss", f"{a.mean:.4f} against {b.mean:.4f} nats per token"),
            ("paired difference", f"{self.difference:+.4f}  {level} {interval}"),
            *difference_tests(self.p_value, self.mean_p_value, bool(np.any(a.loss != b.loss)), "loss"),
            ("interquartile mean", f"{self.iqm_edited:.4f} against {self.iqm_baseline:.4f}"),
            (
                "  of the differences",
                f"{self.iqm_difference:+.4f}  {level} {span(self.iqm_difference_interval, digits=4)}",
            ),
            (
                "perplexity",
                f"{a.perplexity:.2f} against {b.perplexity:.2f}, times {self.perplexity_ratio:.4g}  {level} {ratios}",
            ),
            ("effect size (Cohen's d_z)", f"{self.effect_size:+.2f}"),
        ]
        if a.edits:
            kl = f"{self.kl:.3g} nats per token  {level} {small_span(self.kl_interval)}"
            rows.append(("KL from the unedited", kl))
        if self.interval_note:
            rows.append(("intervals", self.interval_note))
        return rows + moved_rows(self.moved)

    def _title(self) -> str:
        a = self.edited
        return f"{a.text}: {len(a)} paired windows of up to {a.context} tokens"

    def __str__(self) -> str:
        return text_table(self._title(), self._rows())

    def __repr__(self) -> str:
        difference = f"{self.difference:+.4f} {span(self.difference_interval, digits=4)}"
        return f"<TextComparison {self._title()}; paired difference {difference}>"

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._rows()) + moved_html(self.moved)


def _check_pairs(edited: Losses, baseline: Losses, other_model: bool) -> None:
    if not isinstance(baseline, Losses):
        raise DtLensError(f"compare takes another evaluation of text, not {a_type(baseline)}.")
    if edited.context != baseline.context or len(edited) != len(baseline):
        raise DtLensError(
            f"The two evaluations cut the text into different windows ({len(edited)} of {edited.context} tokens and "
            f"{len(baseline)} of {baseline.context}); evaluate both with the same context and windows to compare them."
        )
    if edited.text_id != baseline.text_id:
        raise DtLensError(
            f"The two evaluations read different texts or tokens ({edited.text}, {edited.text_id}, and "
            f"{baseline.text}, {baseline.text_id}); evaluate both on the same text to compare them in pairs."
        )
    if edited.base_id != baseline.base_id and not other_model:
        raise DtLensError(
            f"The two evaluations are of different models ({edited.base_id} and {baseline.base_id} without their "
            "edits); pass other_model=True to compare them."
        )
