"""The part of ``certify`` that proves the norms of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dt_lens.lens.diagnosis import Check
from dt_lens.lens.matrices import Snapshot
from dt_lens.lens.weights import CHUNK

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens

__all__ = ["NormProofs", "some_columns", "through"]


class NormProofs:
    """The checks of the norms inside a block; ``check`` and ``kept`` are the walk's."""

    truth: Mapping[str, Tensor]

    def __init__(self, model: Lens) -> None:
        self.norm_eps = float(getattr(model.cfg, "eps", 0.0))
        self.model = Snapshot.of(model)
        self.weights, self.structure = self.model

    def check(self, part: str, computed: Tensor, expected: Tensor) -> Check:
        raise NotImplementedError

    def kept(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def qk_norms(self, layer: int) -> Iterator[Check]:
        """The norms of queries and of keys, of each head's own or of all heads together."""
        for letter in "qk" if self.structure.qk_norm else "":
            norm = f"blocks.{layer}.attn.{letter}_norm"
            x, w = self.truth[f"blocks.{layer}.attn.hook_{letter}"].double(), self.weights[f"{norm}.w"].double()
            heads = (-1,) if w.ndim == 1 else (-2, -1)
            made = x / (x.square().mean(heads, keepdim=True) + self.norm_eps).sqrt() * w
            yield self.check(norm, self.kept(made), self.kept(self.truth[f"blocks.{layer}.attn.{letter}_normed"]))


def through(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x`` times a circuit, factor by factor."""
    for factor in factors:
        x = x @ factor
    return x


def some_columns(W: Tensor) -> Iterator[slice]:
    """The columns of a weight, a few at a time."""
    step = max(1, CHUNK // len(W))
    for start in range(0, W.shape[1], step):
        yield slice(start, min(start + step, W.shape[1]))
