"""How large a match chance alone would give, and what that makes of a table of matches.

Each null is a class with ``p_value(match)``, ``z(match)`` and ``assumes``, one sentence on what a direction without
meaning is taken to be:

- ``HaarMaximum``: points anywhere;
- ``CovarianceMaximum``: is a draw from the stream's own Gaussian;
- ``UntrainedMaximum``: is what a freshly initialised model of the same shape has;
- ``ShuffledMaximum``: is what the same weights have when their entries are put in random order.

``SubspaceOverlap`` is the null of whole subspaces.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from numpy.typing import ArrayLike

from dt_lens.statistics.nulls.covariance import CovarianceMaximum
from dt_lens.statistics.nulls.haar import Array, HaarMaximum, LabelBlocks, cap_probability, frame_maximum
from dt_lens.statistics.multiplicity import q_values, tail_or_share
from dt_lens.statistics.nulls.pooled import PooledMaximum, ShuffledMaximum, UntrainedMaximum
from dt_lens.statistics.nulls.subspaces import SubspaceOverlap

__all__ = [
    "NULLS",
    "CovarianceMaximum",
    "HaarMaximum",
    "LabelBlocks",
    "Null",
    "PooledMaximum",
    "ShuffledMaximum",
    "SubspaceOverlap",
    "UntrainedMaximum",
    "cap_probability",
    "frame_maximum",
    "q_values",
    "tail_or_share",
]


class Null(Protocol):
    """What every null can do."""

    assumes: ClassVar[str]

    def p_value(self, cosine: ArrayLike) -> Array:
        """The chance of a best match as good or better, any shape."""
        ...

    def z(self, cosine: ArrayLike) -> Array:
        """How many of the null's standard deviations a best match lies above the null's mean."""
        ...


NULLS: dict[str, type[Null]] = {
    "haar": HaarMaximum,
    "covariance": CovarianceMaximum,
    "untrained": UntrainedMaximum,
    "shuffled": ShuffledMaximum,
}
