"""The nulls of single directions by name, and their interface."""

from __future__ import annotations

from typing import ClassVar, Protocol

from numpy.typing import ArrayLike

from dt_lens.statistics.nulls.covariance import CovarianceMaximum
from dt_lens.statistics.nulls.haar import Array, HaarMaximum
from dt_lens.statistics.nulls.pooled import ShuffledMaximum, UntrainedMaximum
from dt_lens.statistics.nulls.spectrum import BandMaximum, SpectrumMaximum

__all__ = ["NULLS", "Null"]


class Null(Protocol):
    """The interface of every null of single directions."""

    assumes: ClassVar[str]

    def p_value(self, cosine: ArrayLike) -> Array:
        """The probability of a best match as good or better, any shape."""
        ...

    def z(self, cosine: ArrayLike) -> Array:
        """How many of the null's standard deviations a best match lies above the null's mean."""
        ...


NULLS: dict[str, type[Null]] = {
    "haar": HaarMaximum,
    "covariance": CovarianceMaximum,
    "spectrum": SpectrumMaximum,
    "bands": BandMaximum,
    "untrained": UntrainedMaximum,
    "shuffled": ShuffledMaximum,
}
