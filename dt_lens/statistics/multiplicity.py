"""Adjusting many p-values for multiple testing, and choosing between two p-values of one statistic.

A p-value that is NaN is not ranked: the adjustments raise ``DtLensError``, because whether a hypothesis that was not
tested counts is for the caller to say, and the choice between two p-values gives ``nan``. No p-value comes out as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control

from dt_lens.arguments import whole_number
from dt_lens.errors import DtLensError
from dt_lens.statistics.arrays import numbers, row
from dt_lens.statistics.outcomes import LEAST_P

__all__ = ["holm", "q_values", "tail_or_share"]


def q_values(p_values: ArrayLike) -> NDArray[Any]:
    """Benjamini and Hochberg's (1995) adjusted p-values: the share of false discoveries over the whole table.

    Args:
        p_values: ``[n]``, without those of hypotheses that were not tested.

    Raises:
        DtLensError: unless ``p_values`` is a row of numbers between 0 and 1.

    >>> [round(float(q), 3) for q in q_values([0.01, 0.02, 0.9])]
    [0.03, 0.03, 0.9]
    """
    p = _checked(p_values)
    return np.asarray(false_discovery_control(p, method="bh")) if p.size else p


def _checked(p_values: ArrayLike) -> NDArray[np.float64]:
    try:
        p = np.asarray(p_values, dtype=np.float64)
    except (TypeError, ValueError):
        p = np.full((), np.nan)
    if p.ndim != 1 or not bool(((p >= 0) & (p <= 1)).all()):
        raise DtLensError("p_values must be a row of numbers between 0 and 1; leave out what was not tested.")
    return p


def tail_or_share(bound: ArrayLike, share: ArrayLike, draws: int) -> NDArray[np.float64]:
    """An exact upper bound on the p-value in the far tail, and elsewhere the share of ``draws`` random draws.

    The smaller of the two would not be valid: 37 % more statistics than allowed would reach ``1 / (draws + 1)``, the
    smallest share, because either of the two may be small. So the bound decides: it is used where it says that fewer
    than 100 of the draws would be as extreme, whatever the draws were. With fewer than 99 draws, and a bound of at
    most 1, the share is not used.

    >>> tail_or_share([1e-6, 0.0005, 0.3], [0.001, 0.001, 0.2], 999).tolist()
    [1e-06, 0.0005, 0.2]
    """
    exact, drawn = numbers(bound, "bound"), numbers(share, "share")
    if drawn.ndim and drawn.shape != exact.shape:
        raise DtLensError(f"share has shape {list(drawn.shape)} and bound {list(exact.shape)}; give one for each.")
    chosen = np.where(exact < 100 / (whole_number(draws, "draws", 1) + 1), np.minimum(exact, 1.0), drawn)
    return np.where(np.isnan(exact), np.nan, np.maximum(chosen, LEAST_P))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: the chance that any claim is wrongly supported is at most alpha.

    Raises:
        DtLensError: unless ``p_values`` is a row of numbers between 0 and 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    _checked(p_values)
    p_values = [float(p) for p in row(p_values, "p_values")]
    adjusted, worst = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted
