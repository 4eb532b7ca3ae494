"""The null that a scan compares a single direction with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dt_lens import WeightSVD
from dt_lens.statistics.nulls.haar import cap_probability
from dt_lens.svd import side_labels

Make = Callable[..., Any]


@pytest.mark.parametrize("whole", [True, False], ids=["labels at once", "labels in blocks"])
@pytest.mark.parametrize(
    ("matrix", "embedding", "options", "dimension"),
    [
        ("blocks.0.mlp.W_in", "reward_in", {}, 15),
        ("blocks.0.mlp.W_in", "reward_in", {"fold_layernorm": False}, 16),
        ("blocks.0.mlp.W_out", "reward_out", {}, 16),
    ],
)
def test_behind_a_centring_chance_has_one_dimension_less(
    make_dt: Make,
    monkeypatch: pytest.MonkeyPatch,
    whole: bool,
    matrix: str,
    embedding: str,
    options: dict[str, Any],
    dimension: int,
) -> None:
    """For a single label p is known exactly: the square of the cosine is Beta(1/2, (d - 1)/2)."""
    if not whole:
        monkeypatch.setattr(side_labels, "WHOLE", 0)
    table = WeightSVD(make_dt(), **options).scan(matrix, embeddings=embedding)
    assert len(table) == (15 if dimension == 15 else 16)
    np.testing.assert_allclose(table["p_value"], cap_probability(table["cosine"], dimension), rtol=1e-9)
