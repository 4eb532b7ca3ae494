"""Many p-values at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control

__all__ = ["q_values"]


def q_values(p_values: ArrayLike) -> NDArray[Any]:
    """Benjamini and Hochberg's (1995) adjusted p-values: the share of false discoveries over the whole table.

    >>> [round(float(q), 3) for q in q_values([0.01, 0.02, 0.9])]
    [0.03, 0.03, 0.9]
    """
    p = np.asarray(p_values, dtype=np.float64)
    return np.asarray(false_discovery_control(p, method="bh")) if p.size else p
