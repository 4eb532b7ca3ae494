"""The arms of a sweep from its settings: which directions of which matrices, which edits, which controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dt_lens.behaviour.sweep.plan import Arm, sv_of
from dt_lens.behaviour.sweep.settings import SweepSettings
from dt_lens.edits.edit import Edit
from dt_lens.edits.singular import load_edit
from dt_lens.edits.written import parse_value, resolve_sv, values_of
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import Matrix, MatrixFactors, SideName, Snapshot, select_matrices
from dt_lens.lens.protocol import Lens
from dt_lens.svd.decomposition import decompose_matrix
from dt_lens.svd.weighted import decompose_weighted

__all__ = ["is_of_sweep", "make_arms", "scales_sigma"]


def sides_of(matrix: Matrix, wanted: Sequence[str] | None) -> list[SideName]:
    """The sides of ``matrix`` to edit: the wanted ones that it has; by default all on the residual stream."""
    if wanted is None:
        return list(matrix.residual_sides)
    both: list[SideName] = [matrix.left, matrix.right]
    found = [side for side in both if side in wanted]
    if not found:
        raise DtLensError(f"{matrix.name} has none of the sides {', '.join(wanted)}; it has {both[0]} and {both[1]}.")
    return found


def scales_sigma(value: Any) -> bool:
    """Whether the edit only multiplies sigma, and is therefore the same edit on either side."""
    return isinstance(value, float) or value in ("zero", "flip")


def make_arms(model: Lens, settings: SweepSettings, activations: Activations | None = None) -> list[Arm]:
    """The arms of a sweep: a baseline, then each edit followed by its controls.

    The edits of one matrix stand together, with ascending directions, so that they share decompositions. Without
    ``activations`` the arms that need them are listed but cannot be made into edits.

    Raises:
        DtLensError: if a matrix, direction, side or value does not exist.
    """
    arms = [Arm(0, "baseline")] if settings.baseline else []
    if settings.matrices is not None or settings.edits is None:
        arms += _chosen(model, settings, activations)
    else:
        _require_default(settings)
    if settings.edits is not None:
        arms += [_given(edit, model, activations) for edit in settings.edits]
    digest = "" if activations is None else activations.digest
    matching = {"match": "output", "activations": digest} if settings.control_match == "output" else {}
    every: list[Arm] = []
    for arm in arms:
        edit = arm._replace(number=len(every))
        every.append(edit)
        for draw in range(settings.seed, settings.seed + settings.controls * (arm.kind == "edit")):
            of = {"kind": "control", "seed": draw, **matching, "of": arm.record}
            control = edit._replace(number=len(every), kind="control", of=edit.number, record=of)
            every.append(control._replace(control=draw, match=settings.control_match))
    return every


def _require_default(settings: SweepSettings) -> None:
    """Raise ``DtLensError`` for what says something of matrices, where there are given edits alone."""
    plain = {"sv": 0, "side": None, "value": None, "directions": "plain"}
    wrong = [name for name, default in plain.items() if getattr(settings, name) != default]
    if wrong:
        raise DtLensError(
            f"{' and '.join(wrong)} is for the directions of matrices, and only edits of your own are given; give "
            f"matrices too, or leave {' and '.join(wrong)} out."
        )


def _chosen(model: Lens, settings: SweepSettings, activations: Activations | None) -> list[Arm]:
    """An edit of each value, for each side of each direction of each matrix."""
    bare, embeddings = Snapshot.of(model), getattr(model, "embeddings", None)
    given = "constant" if settings.value is None else settings.value
    parsed = dict(parse_value(value, embeddings) for value in values_of(given, embeddings))
    if not parsed:
        raise DtLensError("value is empty; give at least one, such as constant.")
    digest = "" if activations is None else activations.digest
    known = sorted({side for matrix in select_matrices(bare) for side in (matrix.left, matrix.right)})
    sides, directions, fold, seed = settings.side, settings.directions, settings.fold_layernorm, settings.seed
    for side in sides or ():
        if side not in known:
            raise DtLensError(f"The model has no side {side!r}; sides are {', '.join(known)}.")
    arms = []
    for matrix in select_matrices(bare, settings.matrices):
        factors = MatrixFactors.of(bare, matrix, fold)
        if directions == "activation" and activations is not None:
            k = len(decompose_weighted(factors, activations).sigma)
        else:
            k = len(decompose_matrix(factors).sigma)
        for index in resolve_sv(settings.sv, k, matrix.name):
            chosen = sides_of(matrix, sides)
            for side in chosen:
                for text, value in parsed.items():
                    if sides is None and side != chosen[0] and scales_sigma(value):
                        continue
                    _require_length(value, factors, side)
                    record = {
                        "kind": "singular",
                        "matrix": matrix.name,
                        "sv": [index],
                        "side": side,
                        "value": value,
                        "seed": seed,
                        "fold_layernorm": _folding(fold, matrix, value),
                        **({"activations": digest} if directions == "activation" else {}),
                    }
                    arms.append(_arm(matrix, record, text, directions))
    return arms


def _require_length(value: Any, factors: MatrixFactors, side: SideName) -> None:
    """Raise ``DtLensError`` for a direction that does not fit the side."""
    matrix, stored = factors.matrix, factors.stored()
    length = stored[0].shape[0] if matrix.side(side) == "left" else stored[-1].shape[-1]
    if isinstance(value, list) and len(value) != length:
        raise DtLensError(
            f"value has {len(value)} numbers, and the {side} side of {matrix.name} has {length} dimensions."
        )


def _folding(fold: bool, matrix: Matrix, value: Any) -> bool:
    """What an edit's record says of folding."""
    return fold or not (matrix.foldable or isinstance(value, Mapping))


def is_of_sweep(record: Mapping[str, Any], matrix: Matrix, fold: bool) -> bool:
    """Whether an edit is of one direction of its matrix, folded as in the sweep; a given edit may be of others."""
    return len(sv_of(record)) == 1 and record["fold_layernorm"] == _folding(fold, matrix, record["value"])


def _given(edit: Edit, model: Lens, activations: Activations | None) -> Arm:
    """An edit that the caller made."""
    record = edit.to_dict()
    if edit.model is not model:
        record = load_edit(model, record, activations).to_dict()
    text, _ = parse_value(record["value"], getattr(model, "embeddings", None))
    return _arm(edit.matrix, record, text, "activation" if record.get("activations") else "plain")


def _arm(matrix: Matrix, record: dict[str, Any], text: str, directions: str) -> Arm:
    """The arm of an edit's record; one of several directions has no ``sv``."""
    sv = record["sv"][0] if len(record["sv"]) == 1 else None
    place = {"matrix": matrix.name, "layer": matrix.layer, "head": matrix.head, "side": record["side"]}
    return Arm(0, "edit", **place, sv=sv, value=text, directions=directions, record=record)
