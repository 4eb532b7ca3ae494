"""Fewer bootstrap draws: correlations are the subject of ``tests/statistics/test_rank_correlation.py``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from dt_lens.study.atlas import tables


@pytest.fixture(scope="package", autouse=True)
def few_resamples() -> Iterator[None]:
    """400 in place of 2000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "rank_correlation", partial(tables.rank_correlation, resamples=400))
        patch.setattr("dt_lens.statistics.rank_correlation.RESAMPLES", 400)  # read by at_equal_size
        yield
