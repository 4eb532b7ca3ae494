"""What every figure takes: a title, a size in pixels, a level of significance, and one word of a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from dt_lens.arguments import is_finite_number, whole_number
from dt_lens.errors import DtLensError, as_written, nearest

__all__ = ["LARGEST", "require_level", "require_word", "sized", "titled"]

LARGEST = 16_000  # pixels on a side: browsers draw no larger image


def titled(title: str | None, otherwise: str) -> str:
    """``title``, or what stands there when it is ``None``.

    Raises:
        DtLensError: for anything else than text.
    """
    if title is None:
        return otherwise
    if not isinstance(title, str):
        raise DtLensError(f"title is {as_written(title)}; it must be text, or None for the figure's own.")
    return title


def sized(figure: go.Figure, width: int | None, height: int | None) -> go.Figure:
    """Give ``figure`` a size in pixels, in place; ``None`` leaves what it has.

    Raises:
        DtLensError: for a size that is not a whole number from 10 to ``LARGEST``.
    """
    for name, size in (("width", width), ("height", height)):
        if size is not None:
            figure.update_layout({name: whole_number(size, name, 10, LARGEST)})
    return figure


def require_level(alpha: Any) -> None:
    """Raise ``DtLensError`` unless ``alpha`` is a false discovery rate: a number above 0 and at most 1."""
    if not (is_finite_number(alpha) and 0 < alpha <= 1):
        raise DtLensError(f"alpha is {as_written(alpha)}; it must be a number above 0 and at most 1, such as 0.05.")


def require_word(word: Any, name: str, known: Sequence[str]) -> None:
    """Raise ``DtLensError``, with the nearest one, unless ``word`` is one of ``known``."""
    if not isinstance(word, str) or word not in known:
        *most, last = (repr(one) for one in known)
        said = f"{name} is {as_written(word)}; it must be {', '.join(most)} or {last}."
        raise DtLensError(said + nearest(word, known))
