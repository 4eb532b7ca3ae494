"""Which matrices of two models are equal bit for bit."""

from __future__ import annotations

import torch

from dt_lens.lens.matrices import Matrix, Snapshot
from dt_lens.lens.weights import all_finite, fingerprint, same_bits

__all__ = ["SameWeights"]


class SameWeights:
    """Compares the weights of two models, each weight once however many matrices are computed from it."""

    def __init__(self, a: Snapshot, b: Snapshot) -> None:
        self._a, self._b = a, b
        self._same: dict[str, bool] = {}
        self._finite: dict[str, bool] = {}

    def states(self, matrix: Matrix) -> tuple[bytes, bytes, bool]:
        """Hashes of everything that a matrix is computed from in either model, and whether it is the same matrix.

        Weights that are not finite do not count as the same.
        """
        names = [factor.weight for factor in matrix.factors]
        names += [f"{norm}.w" for norm in (matrix.left_norm, matrix.right_norm) if norm is not None]
        one = fingerprint(self._a, matrix)
        two = one if all(self._equal(name) for name in names) else fingerprint(self._b, matrix)
        same = one == two and self._a.structure.unit_offset == self._b.structure.unit_offset
        return one, two, same and all(self._all_finite(name) for name in names)

    @torch.no_grad()
    def _equal(self, name: str) -> bool:
        if name not in self._same:
            a, b = self._a.weights[name], self._b.weights[name]
            self._same[name] = a.stride() == b.stride() and same_bits(a, b)
        return self._same[name]

    def _all_finite(self, name: str) -> bool:
        if name not in self._finite:
            self._finite[name] = all_finite(self._a.weights[name].detach())
        return self._finite[name]
