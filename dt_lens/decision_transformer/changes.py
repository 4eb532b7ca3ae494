"""Low-rank changes of weights, applied to what a product gives: rows of one batch each have their own.

With ``W + left @ right`` in place of ``W`` a product gives ``x @ W + (x @ left) @ right``. So many edited models share
one forward pass and one copy of the weights. What a row adds, and in which order, does not depend on the other rows,
and so neither do its bits. Row by row, a row without a change is not touched; stacked, as on a GPU, all rows are
computed at once, and one without a change adds zeros.

``ActingModel`` multiplies some weights beforehand: with ``Wq`` a head's ``[W_Q; b_Q]`` and ``Wk`` its ``W_K``, a score
is ``[h, 1] Wq Wk^T h'^T``. A change of either is a change of the product, of the sum of the ranks::

    (Wq + a b) (Wk + c d)^T - Wq Wk^T  =  a (b Wk^T)  +  ((Wq + a b) d^T) c^T

The factors are float64 until then, and rounded once to the model's type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["NONE", "Change", "Product", "RowChanges", "Term", "affine", "composed", "of_weight"]

Product = tuple[int, str]  # a product of the acting model: the block, and which one


class Change(NamedTuple):
    """``W + left @ right`` in place of the weight ``W`` of ``x @ W``, or of one head of it; float64.

    Heads of ``W_Q``, ``W_K``, ``W_V`` and ``W_O`` lie side by side where no head is named.
    """

    weight: str  # canonical name
    head: int | None
    left: Float[Tensor, "d_in r"]
    right: Float[Tensor, "r d_out"]


class Term(NamedTuple):
    """What is added to columns of what a product gives: ``(x[:, source] @ left + offset) @ right``."""

    left: Float[Tensor, "d_in r"]
    offset: Float[Tensor, " r"]
    right: Float[Tensor, "r d_out"]
    source: slice = slice(None)
    target: slice = slice(None)

    def to(self, like: Tensor) -> Term:
        """In the type and on the device of ``like``."""
        left, offset, right = (x.to(like.device, like.dtype).contiguous() for x in self[:3])
        return self._replace(left=left, offset=offset, right=right)


class RowChanges:
    """The terms of each row of a batch.

    Args:
        rows: what each row's changes add to which product.
        stacked: add to all rows at once, to those without a change a zero: for devices on which many small products
            take long. The terms of one product that have the same rank and the same columns are one product.
    """

    def __init__(self, rows: Iterable[Mapping[Product, Sequence[Term]]] = (), stacked: bool = False) -> None:
        self._rows, self._stacked = list(rows), stacked
        self._stacks: dict[Product, list[Term]] = {}
        self._terms: dict[Product, list[tuple[int, Term]]] = {}
        for row, terms in enumerate(self._rows):
            for product, found in terms.items():
                self._terms.setdefault(product, []).extend((row, term) for term in found)

    def row(self, row: int) -> RowChanges:
        """Those of one row, which becomes row 0."""
        return RowChanges(self._rows[row : row + 1], self._stacked) if self._terms else self

    def add(self, product: Product, x: Float[Tensor, "row n d_in"], y: Float[Tensor, "row n d_out"]) -> None:
        """Add to ``y``, which ``product`` makes of ``x``, what the rows' changes add."""
        if self._stacked and product in self._terms:
            if product not in self._stacks:
                self._stacks[product] = _stacks(self._terms[product], len(self._rows))
            for term in self._stacks[product]:
                inner = torch.baddbmm(term.offset, x[:, :, term.source], term.left)
                y[:, :, term.target].baddbmm_(inner, term.right)
            return
        for row, term in self._terms.get(product, ()):
            inner = torch.addmm(term.offset, x[row, :, term.source], term.left)
            y[row, :, term.target].addmm_(inner, term.right)


NONE = RowChanges()


def _stacks(terms: Sequence[tuple[int, Term]], rows: int) -> list[Term]:
    """Terms of rows as terms of all rows, ``[rows, ...]``, zero where a row has none.

    They are ordered by their columns and ranks: by first appearance, a row's sum would depend on the rows before it.
    """
    found: dict[tuple[int, int, int], Term] = {}
    for row, term in terms:
        rank = 1 << (term.left.shape[1] - 1).bit_length()  # few ranks, so that few products
        # Of a row there is at most one: all its changes of one weight are one term.
        key = term.source.start or 0, term.target.start or 0, rank
        if key not in found:
            shapes = (term.left.shape[0], rank), (1, rank), (rank, term.right.shape[1])
            left, offset, right = (term.left.new_zeros(rows, *shape) for shape in shapes)
            found[key] = Term(left, offset, right, term.source, term.target)
        r = term.left.shape[1]
        stack = found[key]
        stack.left[row, :, :r], stack.offset[row, 0, :r], stack.right[row, :r] = term[:3]
    return [found[key] for key in sorted(found)]


def of_weight(
    changes: Iterable[Change], weight: str, heads: int = 1, head: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """All changes of one weight as one ``(left, right)``, or of one of its heads; ``None`` if there are none."""
    left, right = [], []
    for change in changes:
        if change.weight != weight:
            continue
        if head is None or change.head == head:
            left.append(change.left)
            right.append(change.right)
        elif change.head is None:  # of all heads: this one's part
            writes = weight.endswith("W_O")
            left.append(change.left.chunk(heads, 0)[head] if writes else change.left)
            right.append(change.right if writes else change.right.chunk(heads, 1)[head])
    return (torch.cat(left, 1), torch.cat(right, 0)) if left else None


def affine(change: tuple[Tensor, Tensor], source: slice = slice(None), target: slice = slice(None)) -> Term:
    """The term of a change of a weight that the model multiplies by as it is."""
    left, right = change
    return Term(left, left.new_zeros(left.shape[1]), right, source, target)


def composed(
    first: Float[Tensor, "d_in_and_1 e"],
    second: Float[Tensor, "e d_out"],
    of_first: tuple[Tensor, Tensor] | None,
    of_second: tuple[Tensor, Tensor] | None,
    source: slice = slice(None),
    target: slice = slice(None),
) -> Term | None:
    """The term of changes of two weights that the model multiplies by as one: ``[x, 1] @ first @ second``.

    Args:
        first: float64, its bias below it.
        second: float64.
        of_first: the change of ``first``, bias left out.
        of_second: the change of ``second``.
        source, target: see ``Term``.
    """
    lefts, rights = [], []
    if of_first is not None:
        left, right = torch.nn.functional.pad(of_first[0], (0, 0, 0, 1)), of_first[1]  # the bias stays as it is
        lefts.append(left)
        rights.append(right @ second)
        first = first + left @ right
    if of_second is not None:
        lefts.append(first @ of_second[0])
        rights.append(of_second[1])
    if not lefts:
        return None
    left = torch.cat(lefts, 1)
    return Term(left[:-1], left[-1], torch.cat(rights, 0), source, target)
