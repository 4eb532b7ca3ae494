"""What a study found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.video.video import SideBySide
from dt_lens.edits.edit import Edit
from dt_lens.statistics.rank_correlation import RankCorrelation
from dt_lens.svd.weight_svd import WeightSVD

__all__ = ["StudyResult"]


@dataclass(frozen=True)
class StudyResult:
    """Everything that the report of a study shows.

    Attributes:
        table: the scan.
        strongest: the best match of each whole matrix.
        verdicts: a row per edit; see ``trials.verdicts``.
        baseline: the unedited model's evaluation.
        edited, controls: an evaluation per edit, and one of its control, in the order of ``verdicts``.
        edits: the edits, in the same order.
        spearman: rank correlation of |cosine| with the damage beyond the control, over the edits.
        video: the worst edit beside the unedited agent, or why there is no video.
        report: the page.
        svd: the decompositions that were scanned and edited.
        facts: what was run: ``model`` (its name), ``seed``, ``value`` (of the edits) and ``command``.
    """

    table: pd.DataFrame
    strongest: pd.DataFrame
    verdicts: pd.DataFrame
    baseline: Evaluation
    edited: list[Evaluation]
    controls: list[Evaluation]
    edits: list[Edit]
    spearman: RankCorrelation
    video: SideBySide
    report: Path
    svd: WeightSVD
    facts: Mapping[str, Any] = field(default_factory=dict)
