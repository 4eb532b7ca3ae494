"""What a study found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.edits.edit import Edit
from dt_lens.lens.printing import Printed, Rows, frame_html, listed
from dt_lens.report.page import Section, Video
from dt_lens.statistics.rank_correlation import RankCorrelation
from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["StudyResult"]


@dataclass(frozen=True, repr=False)
class StudyResult(Printed):
    """Everything that the report of a study shows.

    Attributes:
        table: the scan.
        strongest: the best match of each whole matrix.
        verdicts: a row per edit; see ``trials.verdicts``.
        baseline: the unedited model's evaluation.
        edited, controls: an evaluation per edit, and one of its control, in the order of ``verdicts``.
        edits: the edits, in the same order.
        spearman: rank correlation of |cosine| with the damage beyond the control, over the edits.
        sections: what the task shows of the arms, for the page.
        report: the page.
        svd: the decompositions that were scanned and edited.
        facts: what was run: ``model`` (its name), ``seed``, ``value`` (of the edits), ``command``, ``software`` (names
            of packages) and ``without_contrast`` (matrices of strong directions that have no poor match).
        clusters: the table of ``dt_lens.clusters``, where the model says what its labels consist of; a sentence where
            they cannot be tested; ``None`` where it does not say.
    """

    table: pd.DataFrame
    strongest: pd.DataFrame
    verdicts: pd.DataFrame
    baseline: Evaluation
    edited: list[Evaluation]
    controls: list[Evaluation]
    edits: list[Edit]
    spearman: RankCorrelation
    sections: Sequence[Section]
    report: Path
    svd: WeightSVD
    facts: Mapping[str, Any] = field(default_factory=dict)
    clusters: pd.DataFrame | str | None = None

    def _shown(self) -> tuple[str, Rows]:
        terms, scanned = self.baseline.terms, self.table
        places = scanned.groupby(["matrix", "side", "sv"])["q_value"].min()
        rows = [
            ("scanned", f"{len(places)} directions on a side, of {listed(scanned['matrix'].unique(), 3)}"),
            ("matches", f"{int((places < 0.05).sum())} directions with q < 0.05"),
            ("unedited", f"mean {terms.outcome_name} {self.baseline.mean:.4g} over {len(self.baseline)} {terms.units}"),
            ("edits", f"{len(self.edits)}, each beside a control"),
            ("report", str(self.report)),
        ]
        return f"StudyResult of {self.facts.get('model', 'a model')} in {terms.place}", [
            *rows,
            ("next", "verdicts, table, strongest; open the report in a browser"),
        ]

    def _more_html(self) -> str:
        shown = ("role", "matrix", "side", "sv", "label", "cosine", "difference", "control_difference", "q", "verdict")
        return frame_html(self.verdicts, shown)

    @property
    def missing(self) -> list[str]:
        """Why there is no video where the page would show one, in sentences."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [block.reason for block in blocks if isinstance(block, Video) and block.reason]
