"""``Situations``: what a model can be faced with, one context each, and which factors of it matter for what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from torch import Tensor

__all__ = ["Situations"]


@dataclass(frozen=True)
class Situations:
    """``n`` situations that a model is faced with.

    Attributes:
        name: what they are, in a word: ``"alone"`` for every state by itself, ``"visited"`` for what a model meets.
        inputs: keyword arguments of the model, a row per situation.
        matters: for each factor, in which of them the best that can be done depends on its level.
        reachable: which of them a unit of the task can come to.
    """

    name: str
    inputs: Mapping[str, Tensor]
    matters: Mapping[str, Bool[np.ndarray, " n"]]
    reachable: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.reachable)
