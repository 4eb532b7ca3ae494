"""The arms of a sweep from its settings: which directions of which matrices, which edits, which controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dt_lens.arguments import as_list
from dt_lens.behaviour.sweep.plan import Arm
from dt_lens.behaviour.sweep.settings import SweepSettings
from dt_lens.edits.written import parse_value, resolve_sv
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.matrices import Matrix, MatrixFactors, SideName, Snapshot, select_matrices
from dt_lens.lens.protocol import Lens
from dt_lens.svd.decomposition import decompose_matrix
from dt_lens.svd.weighted import decompose_weighted

__all__ = ["make_arms", "scales_sigma"]


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
    bare = Snapshot.of(model)
    parsed = dict(parse_value(value, getattr(model, "embeddings", None)) for value in as_list(settings.edits))
    digest = "" if activations is None else activations.digest
    known = sorted({side for matrix in select_matrices(bare) for side in (matrix.left, matrix.right)})
    sides, directions, fold, seed = settings.sides, settings.directions, settings.fold_layernorm, settings.seed
    for side in sides or ():
        if side not in known:
            raise DtLensError(f"The model has no side {side!r}; sides are {', '.join(known)}.")
    matching = {"match": "output", "activations": digest} if settings.control_match == "output" else {}
    arms = [Arm(0, "baseline")] if settings.baseline else []
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
                    record = {
                        "kind": "singular",
                        "matrix": matrix.name,
                        "sv": [index],
                        "side": side,
                        "value": value,
                        "seed": seed,
                        "fold_layernorm": fold or not (matrix.foldable or isinstance(value, dict)),
                        **({"activations": digest} if directions == "activation" else {}),
                    }
                    edit = Arm(
                        len(arms),
                        "edit",
                        matrix=matrix.name,
                        layer=matrix.layer,
                        head=matrix.head,
                        side=side,
                        sv=index,
                        value=text,
                        directions=directions,
                        record=record,
                    )
                    arms.append(edit)
                    for draw in range(seed, seed + settings.controls):
                        of = {"kind": "control", "seed": draw, **matching, "of": record}
                        control = edit._replace(number=len(arms), kind="control", of=edit.number, record=of)
                        arms.append(control._replace(control=draw, match=settings.control_match))
    return arms
