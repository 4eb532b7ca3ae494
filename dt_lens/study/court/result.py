"""What the court found: a ruling on every claim, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from dt_lens.lens.printing import Printed, Rows, grid_html
from dt_lens.study.court.claims import CLAIMS, WAYS, Claim, Finding, Verdict, Way, why_undecided
from dt_lens.study.result_files import json_values

__all__ = ["CourtResult", "Ruling"]


class Ruling(NamedTuple):
    """The verdict on one claim, computed one way.

    Attributes:
        claim: the claim.
        way: how it was computed.
        verdict: by the rule of ``docs/court_registered.md``.
        found: the finding; ``None`` if the claim is not applicable.
        p_value: after Holm's correction; ``nan`` if the claim is not applicable.
        reason: why it is not applicable.
    """

    claim: Claim
    way: Way
    verdict: Verdict
    found: Finding | None
    p_value: float
    reason: str = ""

    @property
    def sentence(self) -> str:
        """The finding in a sentence, or why the claim is not applicable or undecided."""
        if self.found is None:
            return f"Not applicable: {self.reason}."
        why = why_undecided(self.claim.about, self.found, self.p_value) if self.verdict == "undecided" else ""
        return f"{self.found.said} {why}".strip()


@dataclass(frozen=True, repr=False)
class CourtResult(Printed):
    """The rulings on all claims, both ways; ``write_court`` writes them.

    Attributes:
        rulings: in the order of the claims, each as it should be and then as the note's code computed it.
        facts: what was run: model, environment, target return, episodes, seed, ...
    """

    rulings: list[Ruling]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def _title(self) -> str:
        model = self.facts.get("model")
        return f"CourtResult: {len(self.rulings) // len(WAYS)} claims{f' about {model}' if model else ''}"

    def _shown(self) -> tuple[str, Rows]:
        rows = [(f"claim {r.claim.number}", f"{r.verdict}: {r.claim.title}") for r in self.rulings if r.way == "proper"]
        return self._title(), [*rows, ("next", "table, ruling(number); write_court(result, folder)")]

    def _repr_html_(self) -> str:
        rows = [
            (r.claim.number, r.claim.title, r.verdict, self.ruling(r.claim.number, "note").verdict, r.sentence)
            for r in self.rulings
            if r.way == "proper"
        ]
        return grid_html(["claim", "title", "verdict", "as the note computed it", "finding"], rows, self._title())

    def ruling(self, number: int, way: Way = "proper") -> Ruling:
        """The ruling on claim ``number``."""
        return next(r for r in self.rulings if (r.claim.number, r.way) == (number, way))

    @property
    def table(self) -> pd.DataFrame:
        """A row per claim: ``claim title about verdict statistic low high effect margin critical p_value sentence``.

        The same columns with the prefix ``note_`` are as the note's code computed it; ``unit`` says what the statistic
        is. ``low`` and ``high`` are the null's central 95 % for claims about weights, an interval for behaviour.
        """
        rows = []
        for number in (claim.number for claim in CLAIMS):
            claim = self.ruling(number).claim
            row: dict[str, Any] = {"claim": claim.number, "title": claim.title, "about": claim.about}
            for way, prefix in zip(WAYS, ("", "note_"), strict=True):
                ruling = self.ruling(claim.number, way)
                found = ruling.found
                row[f"{prefix}verdict"] = ruling.verdict
                for name in ("statistic", "low", "high", "effect", "margin", "critical"):
                    row[f"{prefix}{name}"] = math.nan if found is None else float(getattr(found, name))
                row[f"{prefix}p_value"] = ruling.p_value
                row[f"{prefix}sentence"] = ruling.sentence
            row["unit"] = claim.statistic
            rows.append(row)
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        rulings = []
        for ruling in self.rulings:
            found = ruling.found
            kept = {} if found is None else {**found.__dict__, "numbers": dict(found.numbers)}
            rulings.append(
                {
                    "claim": ruling.claim.number,
                    "title": ruling.claim.title,
                    "way": ruling.way,
                    "verdict": ruling.verdict,
                    "p_value_holm": ruling.p_value,
                    "reason": ruling.reason,
                    **kept,
                }
            )
        return dict(json_values({"facts": dict(self.facts), "rulings": rulings}))
