"""Checks of the arrays that statistics are given: another type is one sentence, not NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dt_lens.errors import DtLensError, as_written

__all__ = ["numbers", "row", "share"]


def numbers(values: Any, name: str) -> NDArray[np.float64]:
    """``values`` in float64, of any shape; NaN and infinite ones are left to the statistic.

    Raises:
        DtLensError: if they are not numbers.

    >>> numbers([1, True], "values").tolist()
    [1.0, 1.0]
    """
    try:
        made = np.asarray(values)
        if made.dtype.kind not in "biuf" and not (made.dtype.kind == "O" and not isinstance(values, str | bytes)):
            raise TypeError
        return made.astype(np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise DtLensError(f"{name} is {as_written(values)}; it must be numbers.") from None


def row(values: Any, name: str, like: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """``values`` as a row ``[n]`` in float64, as long as ``like`` if that is given.

    Raises:
        DtLensError: if they are not a row of numbers, or another number of them.

    >>> row((1, 2), "values").tolist()
    [1.0, 2.0]
    """
    made = numbers(values, name)
    if made.ndim != 1:
        raise DtLensError(f"{name} has shape {list(made.shape)}; it must be a row of numbers, [n].")
    if like is not None and len(made) != len(like):
        raise DtLensError(f"{name} holds {len(made)} numbers; it must hold {len(like)}, one for each of the others.")
    return made


def share(value: Any, name: str) -> float:
    """``value`` as a number between 0 and 1, both excluded.

    Raises:
        DtLensError: for anything else.

    >>> share(0.95, "confidence")
    0.95
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < 1:
        raise DtLensError(f"{name} is {as_written(value)}; it must be a number between 0 and 1, such as 0.95.")
    return float(value)
