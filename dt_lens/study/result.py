"""TODO docstring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dt_lens.behaviour.agents.evaluation import Evaluation
from dt_lens.behaviour.video.video import SideBySide
from dt_lens.edits.singular import Edit
from dt_lens.statistics.rank_correlation import RankCorrelation

__all__ = [
    "StudyResult",
]


@dataclass(frozen=True)
class StudyResult:
    """Everything the report shows."""

    table: pd.DataFrame  # the scan
    strongest: pd.DataFrame  # the best match of each whole matrix
    verdicts: pd.DataFrame  # a row per edit
    baseline: Evaluation
    edited: list[Evaluation]
    controls: list[Evaluation]
    edits: list[Edit]
    spearman: RankCorrelation  # |cosine| against damage beyond control
    video: SideBySide
    report: Path
