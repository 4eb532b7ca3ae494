"""The labels that a matrix's directions have moved towards or away from between two models."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dt_lens.errors import DtLensError
from dt_lens.lens.embeddings import Embedding
from dt_lens.lens.matrices import SideName
from dt_lens.svd.decomposition import Decomposition
from dt_lens.svd.pairings import natural_side
from dt_lens.svd.side_labels import row_blocks, unit_rows
from dt_lens.svd.two_models.direction_pairs import match_directions

__all__ = ["By", "Owner", "label_changes"]

By = Literal["subspace", "directions", "change"]
Owner = Literal["own", "a"]
Array = NDArray[np.float64]


def label_changes(
    models: tuple[Any, Any],
    found: tuple[Decomposition, Decomposition],
    embedding: str,
    side: SideName | None,
    *,
    by: By,
    k: int,
    n: int | None,
    folded: bool,
    owner: Owner,
) -> pd.DataFrame:
    """The rows of ``ModelChanges.labels`` for the first ``k`` directions of ``found``."""
    if by not in ("subspace", "directions", "change") or owner not in ("own", "a"):
        raise DtLensError(
            f"by is {by!r} and embeddings {owner!r}; by is 'subspace', 'directions' or 'change', and embeddings 'own' "
            "or 'a'."
        )
    matrix = found[0].matrix
    one = models[0].embeddings[embedding]
    two = one if owner == "a" else models[1].embeddings[embedding]
    side = natural_side(matrix, one, side)
    common_a, common_b = _common(one, two)
    centred = folded and matrix.centred(matrix.side(side))
    directions = [d.side(side).cpu() for d in found]
    spans: list[tuple[list[int], list[int], float]]
    if by == "directions":
        pairs = [pair for pair in match_directions(*found) if pair.a and pair.b and pair.a[0] < k]
        spans = [(list(pair.a), list(pair.b), _aligned(directions, pair.a, pair.b)) for pair in pairs]
    elif by == "change":
        spans = [([i], [i], 1.0) for i in range(len(directions[0]))]
    else:
        spans = [(list(range(k)), list(range(k)), 1.0)]
    values_a = _values(directions[0], [a for a, _, _ in spans], one, common_a, folded, centred)
    values_b = _values(directions[1], [b for _, b, _ in spans], two, common_b, folded, centred)
    values_b = values_b * np.array([sign for *_, sign in spans])[:, None]
    if by == "subspace":
        values_a, values_b = np.abs(values_a), np.abs(values_b)
    change = values_b - values_a
    weight = np.maximum(np.abs(values_a), np.abs(values_b)) if by == "change" else np.abs(change)
    order = np.argsort(-weight, axis=None, kind="stable")[: n if n is not None else weight.size]
    which, row = np.unravel_index(order, weight.shape)
    at_a, at_b = np.asarray(common_a)[row], np.asarray(common_b)[row]
    columns: dict[str, Any] = {}
    if by == "directions":
        columns = {"sv_a": [spans[i][0][0] for i in which], "sv_b": [spans[i][1][0] for i in which]}
        columns["block"] = [
            max(
                len(members) + d.indistinct(members[0], side) - len(range(*d.block_of(members[0])))
                for d, members in zip(found, spans[i][:2], strict=True)
            )
            for i in which
        ]
    elif by == "change":
        columns = {"sv": which, "sigma": found[0].sigma.cpu().numpy()[which]}
    columns |= {"label": [one.labels[i] for i in at_a], "index": at_a, "a": values_a[which, row]}
    columns["b"] = values_b[which, row]
    if by != "change":
        columns["change"] = change[which, row]
    columns["label_cosine"] = _label_cosines(one, two, at_a, at_b, folded, centred)
    table = pd.DataFrame(columns)
    whose = "each model's own" if owner == "own" else "the first model's for both"
    table.attrs = {"matrix": matrix.name, "side": side, "embedding": embedding, "embeddings": whose, "by": by, "k": k}
    return table


def _common(one: Embedding, two: Embedding) -> tuple[list[int], list[int]]:
    """The rows of the labels that both have: paired in order where the labels are the same, otherwise by name.

    Raises:
        DtLensError: when they have none in common.
    """
    first, second = list(one.labels), list(two.labels)
    if first == second:
        return list(range(len(first))), list(range(len(second)))
    if first[: len(second)] == second[: len(first)]:  # a vocabulary that has grown
        shared = list(range(min(len(first), len(second))))
        return shared, shared
    place = {label: i for i, label in reversed(list(enumerate(second)))}
    known: dict[str, int] = {}
    for i, label in enumerate(first):
        if label in place:
            known.setdefault(label, i)
    if not known:
        raise DtLensError(f"The two models have no label of {one.name} in common; use embeddings='a' for A's in both.")
    return list(known.values()), [place[label] for label in known]


def _aligned(directions: list[torch.Tensor], a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """The sign that aligns B's direction with A's on this side; 1 for blocks, whose lengths have no sign."""
    if len(a) > 1 or len(b) > 1:
        return 1.0
    return -1.0 if float(directions[0][a[0]] @ directions[1][b[0]]) < 0 else 1.0


def _values(
    directions: torch.Tensor, spans: list[list[int]], embedding: Embedding, rows: list[int], folded: bool, centred: bool
) -> Array:
    """``[spans, labels]``: cosines with single directions, lengths of projections on spans of several."""
    parts = []
    members = sorted({i for span in spans for i in span})
    place = {i: j for j, i in enumerate(members)}
    for _, E in row_blocks(embedding, rows, len(members), folded, centred):
        cosines = directions[members] @ E.T
        parts.append(
            torch.stack(
                [
                    cosines[place[span[0]]] if len(span) == 1 else cosines[[place[i] for i in span]].norm(dim=0)
                    for span in spans
                ]
            )
            if spans
            else E.new_zeros(0, len(E))
        )
    return np.asarray(torch.cat(parts, 1).numpy())


def _label_cosines(
    one: Embedding, two: Embedding, rows_a: NDArray[Any], rows_b: NDArray[Any], folded: bool, centred: bool
) -> Array:
    if not len(rows_a):
        return np.zeros(0)
    a = unit_rows(one, torch.as_tensor(rows_a), folded, centred)
    b = unit_rows(two, torch.as_tensor(rows_b), folded, centred)
    return np.asarray((a * b).sum(1).numpy())
