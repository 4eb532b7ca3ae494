"""Compare two evaluations over the same windows of text: what an edit or another model changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dt_lens.behaviour.comparison import Comparison
from dt_lens.behaviour.measured import Measured
from dt_lens.behaviour.printing import span
from dt_lens.behaviour.texts.moved import Moved, moved_frame, moved_html, moved_rows, small_span
from dt_lens.statistics.outcomes import Interval, bootstrap_interval

__all__ = ["TextComparison"]


@dataclass(frozen=True, eq=False, repr=False)
class TextComparison(Comparison):
    """A paired comparison of losses; every difference is ``edited`` minus ``baseline``, in nats per token.

    Attributes:
        perplexity_ratio: ``exp`` of the mean difference: perplexity of ``edited`` over that of ``baseline``.
        kl: mean KL of ``edited`` from its own model without edits, and its bootstrap interval.
    """

    perplexity_ratio: float
    perplexity_ratio_interval: Interval
    kl: float
    kl_interval: Interval

    @classmethod
    def _more(cls, edited: Measured, baseline: Measured, options: dict[str, Any]) -> dict[str, Any]:
        d, kl = edited.outcomes - baseline.outcomes, edited.columns["kl"]
        interval = bootstrap_interval(d, **options)
        return {
            "perplexity_ratio": math.exp(d.mean()),
            "perplexity_ratio_interval": Interval(*(float(bound) for bound in np.exp(interval))),
            "kl": float(kl.mean()),
            "kl_interval": bootstrap_interval(kl, **options),
        }

    @property
    def moved(self) -> tuple[Moved, ...]:
        """The tokens whose probability the edits of ``edited`` changed most."""
        return tuple(Moved(*row) for row in self.edited.details.get("moved", ()))

    def moved_frame(self, k: int | None = None) -> pd.DataFrame:
        """The ``k`` tokens that gained and the ``k`` that lost most: token, text, before, after, change."""
        return moved_frame(self.moved, k)

    def to_frame(self) -> pd.DataFrame:
        """A row per pair: index, loss of each, their difference, tokens, and the KL of the edited one."""
        columns = self.edited.columns
        return super().to_frame().assign(tokens=columns["tokens"], kl=columns["kl"])

    def to_dict(self) -> dict[str, Any]:
        """The numbers, as plain JSON values, with the two ``model_id``\\ s and the edits."""
        return {"text": self.edited.details.get("text", ""), **super().to_dict(), "moved": list(map(list, self.moved))}

    def _more_rows(self) -> list[tuple[str, str]]:
        one, other = (math.exp(side.mean) for side in (self.edited, self.baseline))
        ratio = span(self.perplexity_ratio_interval, digits=4)
        level = f"{100 * self.confidence:g} %"
        rows = [
            ("perplexity", f"{one:.2f} against {other:.2f}, times {self.perplexity_ratio:.4g}  {level} {ratio}"),
        ]
        if self.edited.edits:
            kl = f"{self.kl:.3g} nats per token  {level} {small_span(self.kl_interval)}"
            rows.append(("KL from the unedited", kl))
        return rows + moved_rows(self.moved)

    def _repr_html_(self) -> str:
        return super()._repr_html_() + moved_html(self.moved)
