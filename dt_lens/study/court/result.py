"""TODO docstring."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dt_lens.arguments import local_path
from dt_lens.study.court.claims import CLAIMS, WAYS, Claim, Found, Verdict, Way, why_undecided
from dt_lens.study.tables import plain, write_tables

__all__ = [
    "Ruling",
    "CourtResult",
]


class Ruling(NamedTuple):
    """What became of one claim, computed one way; ``found`` is ``None`` where it is not applicable."""

    claim: Claim
    way: Way
    verdict: Verdict
    found: Found | None
    p_value: float
    reason: str = ""

    @property
    def sentence(self) -> str:
        """What was found, or why nothing was."""
        if self.found is None:
            return f"Not applicable: {self.reason}."
        why = why_undecided(self.claim.about, self.found, self.p_value) if self.verdict == "undecided" else ""
        return f"{self.found.said} {why}".strip()


@dataclass(frozen=True)
class CourtResult:
    """The rulings on all claims, both ways.

    Attributes:
        rulings: in the order of the claims, as it should be and then as the note's code did it.
        facts: what was run: model, environment, target return, episodes, seed, ...
    """

    rulings: list[Ruling]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def ruling(self, number: int, way: Way = "proper") -> Ruling:
        """The ruling on claim ``number``."""
        return next(r for r in self.rulings if (r.claim.number, r.way) == (number, way))

    @property
    def table(self) -> pd.DataFrame:
        """A row per claim: ``claim title verdict statistic low high margin p_value``, the same with ``note_`` in front
        as the note's code computed it, ``unit`` (what the statistic is), and a sentence for each way. ``low`` and
        ``high`` are the null's central 95 % for claims about weights (``about``), and an interval for behaviour.
        """
        rows = []
        for claim in CLAIMS:
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
        return dict(plain({"facts": dict(self.facts), "rulings": rulings}))

    def save(self, folder: str | Path) -> Path:
        """Write ``court.csv``, ``court.json`` and ``court.html`` into ``folder``; returns the page.

        Raises:
            DtLensError: when they cannot be written.
        """
        from dt_lens.study.court.page import write_court

        folder = local_path(folder, "folder")
        write_tables(folder, "court", self.table, self.to_dict())
        return write_court(folder / "court.html", self)
