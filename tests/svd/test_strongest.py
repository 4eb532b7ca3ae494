"""The null of a whole matrix: its directions, its labels, and the dimension that both lie in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dt_lens import WeightSVD
from dt_lens.statistics.multiplicity import tail_or_share
from dt_lens.statistics.nulls.haar import HaarMaximum, frame_maximum

Make = Callable[..., Any]
SAMPLES, SEED = 200, 3


@pytest.mark.parametrize(
    ("matrix", "embedding", "count", "dimension"),
    [("blocks.0.mlp.W_in", "state_in", 15, 15), ("blocks.0.mlp.W_out", "action_out", 16, 16)],
)
def test_the_null_rotates_all_directions_in_their_own_space(
    make_dt: Make, matrix: str, embedding: str, count: int, dimension: int
) -> None:
    """Behind a LayerNorm's centring, that is a space of one dimension less than the stream's 16."""
    model = make_dt()
    labels = model.embeddings[embedding].effective.double().numpy()
    labels = labels - labels.mean(1, keepdims=True) if dimension < 16 else labels
    row = WeightSVD(model).strongest(matrix, embedding, samples=SAMPLES, seed=SEED).iloc[0]
    drawn = frame_maximum(labels, count, dimension, SAMPLES, SEED)
    assert row["null_median"] == pytest.approx(np.median(drawn), rel=1e-5)
    share = (1 + int((drawn >= abs(row["cosine"])).sum())) / (1 + SAMPLES)
    union = count * float(HaarMaximum.of(labels, dimension, SEED).p_value(row["cosine"]))
    assert row["p_value"] == pytest.approx(float(tail_or_share(min(1.0, union), share, SAMPLES)), rel=1e-5, abs=0)
