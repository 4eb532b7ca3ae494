"""Directions that may steer, their doses, and doses of random directions to compare them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dt_lens.arguments import as_list
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.readout import Matching
from dt_lens.edits.edit import Edit
from dt_lens.edits.singular import SingularEdit
from dt_lens.edits.written import parse_value
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import Matrix, SideName, Snapshot, find_matrix, select_matrices
from dt_lens.svd.decomposition import Decomposition
from dt_lens.svd.weight_svd import WeightSVD

__all__ = [
    "DOES",
    "Candidate",
    "candidates_of",
    "dosed",
    "downstream_gain",
    "first_side",
    "gain_scale",
    "given_candidates",
    "output_energy_scale",
    "put_side",
    "slopes",
]

Array = NDArray[np.float64]
# What a direction does on each side.
DOES = {
    "read": "reads", "write": "writes", "neuron": "has at the neurons", "head": "has in the head",
    "query": "has on the query side", "key": "has on the key side",
}  # fmt: skip
READERS = ("W_Q", "W_K", "W_V", "W_in", "W_gate")
FIRST = 40  # directions of a matrix that are compared with the embedding


class Candidate(NamedTuple):
    """A direction that may steer, and why it is tried."""

    matrix: str
    sv: int
    sigma: float
    cosine: float  # with the embedding that it was matched with; nan if there was none
    why: str
    side: SideName | None = None  # on which it is dosed; None for the side that faces what the matrix reads

    @property
    def name(self) -> str:
        """Matrix and index."""
        return f"{self.matrix} sv={self.sv}"


def candidates_of(
    model: Any,
    count: int,
    matching: Matching | None = None,
    kinds: Sequence[str] = ("W_in", "OV"),
    across: bool = False,
) -> list[Candidate]:
    """Choose directions that may steer: half by their match with an embedding, half by sigma; all by sigma without one.

    By sigma means the first of each matrix, block by block, or with ``across`` the largest of all matrices together.

    Raises:
        DtLensError: if no matrix of these kinds has a direction.
    """
    svd, places = WeightSVD(model), [m for m in select_matrices(model) if m.kind in kinds]
    if matching is not None and matching.embedding not in model.embeddings:
        matching = None
    cosine = {m.name: _cosines(svd, m.name, matching) for m in places}
    matched = sorted(
        ((m.name, sv) for m in places for sv in range(min(FIRST, len(svd[m.name].sigma))) if matching is not None),
        key=lambda place: -float(cosine[place[0]][place[1]]),
    )[: (count + 1) // 2]
    largest = [(m.name, sv) for sv in range(FIRST) for m in places if sv < len(svd[m.name].sigma)]
    chosen = dict.fromkeys(matched, "" if matching is None else matching.why)
    if across:
        largest.sort(key=lambda place: -float(svd[place[0]].sigma[place[1]]))
    for place in largest:
        if len(chosen) < count:
            chosen.setdefault(place, "large sigma")
    if not chosen:
        raise DtLensError(f"The model has no {' and no '.join(kinds)} with a direction to steer by.")
    return [
        Candidate(name, sv, float(svd[name].sigma[sv]), float(cosine[name][sv]), why)
        for (name, sv), why in chosen.items()
    ]


def given_candidates(model: Any, edits: Sequence[Edit], matching: Matching | None = None) -> list[Candidate]:
    """The directions of edits that the caller names, each by itself: an edit says which, and a dose what becomes of it.

    Raises:
        DtLensError: for what are no such edits, or edits whose value or directions are not a dose's.
    """
    svd, found = WeightSVD(model), dict[tuple[str, int, str], Candidate]()
    for edit in as_list(edits):
        if not isinstance(edit, SingularEdit):
            raise DtLensError(f"edits holds {a_type(edit)}; steering takes a list of edits that SingularEdit makes.")
        name = edit.matrix.name
        if edit.model is not model:
            raise DtLensError(f"The edit of {name} was made of another model; make it of the one that is steered.")
        if edit.value != "constant":
            raise DtLensError(
                f"The edit of {name} has the value {parse_value(edit.value)[0]!r}; in steering the dose is the value: "
                "leave --value out, or make the edit without one."
            )
        if edit.activations or not edit.to_dict()["fold_layernorm"]:
            raise DtLensError(
                f"The edit of {name} counts other directions than steering, which takes those of the weights with "
                "LayerNorm folded in; make it without --raw, and without activations."
            )
        cosines = _cosines(svd, name, matching if matching and matching.embedding in model.embeddings else None)
        for sv in edit.sv:
            place = Candidate(name, sv, float(svd[name].sigma[sv]), float(cosines[sv]), "given", edit.side)
            found.setdefault((name, sv, edit.side), place)
    if not found:
        raise DtLensError("edits is empty; give at least one edit, or leave it out.")
    return list(found.values())


def _cosines(svd: WeightSVD, matrix: str, matching: Matching | None) -> Array:
    """``[k]``, the largest |cosine| of each direction with the matched rows; nan without any to compare with."""
    own = svd[matrix]
    if matching is None or matching.side not in (own.matrix.left, own.matrix.right):
        return np.full(len(own.sigma), np.nan)
    found = svd.cosines(matrix, matching.embedding, matching.side).abs()
    rows = found if matching.rows is None else found.iloc[:, list(matching.rows)]
    return np.asarray(rows.max(axis=1))


def dosed(
    model: Any,
    direction: Candidate,
    dose: float,
    random: int | None = None,
    scale: float = 1.0,
    side: SideName | None = None,
    svd: WeightSVD | None = None,
) -> SingularEdit:
    """The edit that adds ``(dose - 1) sigma v u^T``, made on one side: sigma times ``dose``.

    With a seed ``random``, ``scale`` times that change with a random unit vector in place of the side's own: what is
    read, or where it is written, is random, and the rest stays. ``side`` is by default the direction's own, or the one
    that faces what the matrix reads; ``svd`` saves decomposing the matrix again.
    """
    side = side or direction.side or first_side(model, direction)
    if random is None:
        return SingularEdit(model, direction.matrix, direction.sv, side=side, value=dose)
    found = (svd or WeightSVD(model))[direction.matrix]
    own = found.side(side)[direction.sv]
    value = own + scale * (dose - 1) * _drawn(found, random, side)
    return SingularEdit(model, direction.matrix, direction.sv, side=side, value=value)


def _drawn(found: Decomposition, random: int, side: SideName) -> Tensor:
    """The random unit vector that takes the place of a side's own."""
    own = found.side(side)
    drawn = torch.randn(own.shape[1], generator=torch.Generator().manual_seed(random), dtype=own.dtype)
    if found.folded and found.matrix.centred(found.matrix.side(side)):
        drawn = drawn - drawn.mean()
    return torch.nn.functional.normalize(drawn, dim=0)


def first_side(model: Any, direction: Candidate) -> SideName:
    """The side that faces what the matrix reads: ``"read"``, or ``"neuron"`` for ``W_out``."""
    return find_matrix(model, direction.matrix).left


def put_side(model: Any, direction: Candidate) -> SideName:
    """The side opposite the read side: ``"write"``, or ``"neuron"`` for ``W_in``."""
    return find_matrix(model, direction.matrix).right


def output_energy_scale(
    model: Any,
    direction: Candidate,
    random: int,
    activations: Activations,
    side: SideName,
    svd: WeightSVD | None = None,
) -> float:
    """The scale at which a random direction's doses have the same output energy as the direction's own.

    On real inputs a random read direction mostly reads less than one of the model's own, so at the same norm it is too
    weak a control. Where only the output is random, the scale is 1.
    """
    edits = (dosed(model, direction, 2.0, seed, side=side, svd=svd) for seed in (None, random))
    own, other = (edit.output_energy(activations) for edit in edits)
    return own / other


def downstream_gain(model: Any, matrix: Matrix, vector: Tensor) -> float:
    """How strongly what ``matrix`` writes along a unit ``vector [d_model]`` is read later; 1 for an average direction.

    The root mean square, over the folded matrices ``M`` that read the stream behind ``matrix`` (``W_Q``, ``W_K``,
    ``W_V``, ``W_in``, ``W_gate``), of ``|v M| / (|M|_F / sqrt(d))``. 0.0 where nothing reads it but the heads.
    """
    bare, found = Snapshot.of(model), []
    for reader in select_matrices(bare):
        later = reader.layer > matrix.layer
        if reader.kind in ("W_in", "W_gate") and ".attn." in matrix.name and not bare.structure.parallel:
            later = reader.layer >= matrix.layer
        if later and reader.kind in READERS:
            M = reader.dense(bare)
            found.append(float((vector.to(M) @ M).square().sum() * M.shape[0] / M.square().sum()))
    return float(np.sqrt(np.mean(found))) if found else 0.0


def gain_scale(model: Any, direction: Candidate, random: int, svd: WeightSVD | None = None) -> float:
    """The scale at which a random write direction has the downstream gain of the direction's own.

    1.0 where no later matrix reads the stream: then only its length, and so the output energy, is the same.
    """
    found = (svd or WeightSVD(model))[direction.matrix]
    own = downstream_gain(model, found.matrix, found.side("write")[direction.sv])
    other = downstream_gain(model, found.matrix, _drawn(found, random, "write"))
    return own / other if other > 0 else 1.0


def slopes(arms: Mapping[float, Evaluation]) -> Array:
    """The least-squares slope of the outcome per unit of dose for each unit, ``[n]``."""
    x = np.array(sorted(arms))
    y = np.array([arms[dose].outcomes for dose in x])
    centred = x - x.mean()
    return np.asarray(centred @ y / (centred @ centred))
