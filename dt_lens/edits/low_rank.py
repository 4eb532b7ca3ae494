"""Low-rank changes: of a matrix, and of the one weight that is written to make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dt_lens.lens.activations import LowRank
from dt_lens.lens.matrices import Factor, Matrix, MatrixFactors, Snapshot, unfold
from dt_lens.lens.weights import memory_of

__all__ = ["Placed", "carry", "remarks_on", "spectrum_of"]


class Placed(NamedTuple):
    """A change ``left @ right`` of one factor (a weight, or one head of it), kept thin so that many fit in memory."""

    factor: Factor
    left: Float[Tensor, "d_left r"]
    right: Float[Tensor, "r d_right"]

    def is_second_in(self, matrix: Matrix) -> bool:
        """Whether this changes the second factor of a circuit, which reads what the first one writes."""
        return self.factor in matrix.factors[1:]

    def dense(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The change of the whole weight, float64, on its device."""
        device = weights[self.factor.weight].device
        return self.factor.scatter(self.left.to(device) @ self.right.to(device), weights)


def spectrum_of(delta: LowRank) -> Float[Tensor, " r"]:
    """The singular values of ``left @ right``, largest first, without forming the product."""
    left, right = delta
    spectrum: Tensor = torch.linalg.svdvals(torch.linalg.qr(left)[1] @ torch.linalg.qr(right.T)[1].T)
    return spectrum


def carry(factors: MatrixFactors, where: Literal["left", "right"], change: LowRank) -> tuple[LowRank, Placed]:
    """Turn a change of the (folded) matrix into the change of the raw matrix and that of the one weight to write.

    A circuit ``A B`` is edited in one factor: ``B += pinv(A) delta`` for the right side, ``A += delta pinv(B)`` for the
    left one. Both are exact, because the singular vectors of the other side lie in the span of the other factor.
    """
    matrix = factors.matrix

    def raw_left() -> Tensor:
        scale = factors.scale("left")
        return change[0] if scale is None else unfold(change[0], scale, str(matrix.left_norm))

    def raw_right() -> Tensor:
        scale = factors.scale("right")
        return change[1] if scale is None else unfold(change[1].T, scale, str(matrix.right_norm)).T

    if len(matrix.factors) == 1:
        delta = raw_left(), raw_right()
        return delta, Placed(matrix.factors[0], *delta)
    # Through the unchanged factor, folded as it acts on the stream; the raw matrix changes by the raw factor times it.
    raw, seen = factors.raw(), factors.effective()
    if where == "right":
        placed = Placed(matrix.factors[1], torch.linalg.pinv(seen[0]) @ change[0], raw_right())
        return (raw[0] @ placed.left, placed.right), placed
    placed = Placed(matrix.factors[0], raw_left(), change[1] @ torch.linalg.pinv(seen[1]))
    return (placed.left, placed.right @ raw[1]), placed


def remarks_on(bare: Snapshot, matrix: Matrix, placed: Placed) -> list[str]:
    """What a reader should know about a change because of the one weight that is written to make it."""
    remarks, factor, shared = [], placed.factor, bare.structure.queries_per_key
    memory = memory_of(bare.weights[factor.weight])
    also = [name for name, other in bare.weights.items() if name != factor.weight and memory_of(other) == memory]
    if also:
        remarks.append(f"{factor.weight} shares its memory with {', '.join(also)}, so the edit changes all of them.")
    if matrix.kind in ("OV", "QK") and shared > 1 and factor.weight.endswith(("W_K", "W_V")):
        first = (matrix.head or 0) // shared * shared
        remarks.append(
            f"Heads {first} to {first + shared - 1} share {factor.weight.rpartition('.')[2]}, so the edit changes "
            "what all of them do."
        )
    lost = _lost_to_rounding(bare, matrix, placed)
    if lost > 0.1:
        remarks.append(
            f"Rounding to the weights' precision alters the change by {100 * lost:.0f} % of its size, in the weights "
            "and in passes through the model; an agent whose episodes need no pass through the model uses the "
            "exact change."
        )
    return remarks


def _lost_to_rounding(bare: Snapshot, matrix: Matrix, placed: Placed) -> float:
    """How much of a matrix's change is lost when the weight is rounded to its dtype, relative to the change's size.

    In a circuit the other factor may pass on little of a large change of the weight, and all of its rounding error.
    """
    name, right = placed.factor.weight, placed.is_second_in(matrix)
    before, wanted = bare.weights[name].double(), placed.dense(bare.weights)
    made = (before + wanted).to(bare.weights[name].dtype).double() - before
    passed = None
    if len(matrix.factors) == 2:
        raw = matrix.raw(bare)
        passed = torch.linalg.qr(raw[0] if right else raw[1].T)[1]  # its effect on lengths

    def size(change: Tensor) -> float:
        part = placed.factor.view({name: change})
        if passed is not None:
            part = passed @ part if right else part @ passed.T
        return float(part.norm())

    return size(made - wanted) / max(size(wanted), 1e-300)
