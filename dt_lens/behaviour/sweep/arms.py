"""The arms of a sweep from its settings: which directions of which matrices, which edits, which controls."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dt_lens.behaviour.sweep.plan import Arm
from dt_lens.behaviour.sweep.settings import SV, SweepSettings, as_list
from dt_lens.edits.replacements import VALUES, embedded_direction, find_direction
from dt_lens.errors import DtLensError, nearest
from dt_lens.lens.activations import Activations
from dt_lens.lens.embeddings import EmbeddingRegistry
from dt_lens.lens.matrices import Matrix, MatrixFactors, SideName, Snapshot, select_matrices
from dt_lens.lens.protocol import Lens
from dt_lens.svd.decomposition import decompose_matrix
from dt_lens.svd.weighted import decompose_weighted

__all__ = ["make_arms", "parse_value", "resolve_sv", "scales_sigma"]

RANGE = re.compile(r"(-?\d+)-(-?\d+)")


def parse_value(value: Any, embeddings: EmbeddingRegistry | None = None) -> tuple[str, Any]:
    """An edit's value as text, and in the form that a record of ``SingularEdit`` has.

    As text an embedding's direction is ``"replace:action_out:thigh_joint torque"``, by its label or the number of its
    row, and ``"towards:action_out:thigh_joint torque:30"`` turns by 30 degrees.

    Raises:
        DtLensError: if it is not an edit's value, or the embedding has no such label.

    >>> parse_value("scale:0.5"), parse_value(2), parse_value("zero")
    (('scale:0.5', 0.5), ('scale:2', 2.0), ('zero', 'zero'))
    """
    if isinstance(value, str) and value in VALUES:
        return value, value
    if isinstance(value, str) and value.startswith("replace:"):
        value = value.split(":", 2)[1:]
    elif isinstance(value, str) and value.startswith("towards:") and value.count(":") > 2:
        name, _, rest = value.removeprefix("towards:").partition(":")
        label, _, angle = rest.rpartition(":")
        value = [name, label, _number(angle, value)]
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str)):
        return _embedded(value, embeddings)
    number = _number(value.removeprefix("scale:") if isinstance(value, str) else value, value)
    return f"scale:{_digits(number)}", number


def _number(text: Any, given: Any) -> float:
    try:
        number = math.nan if isinstance(text, bool) else float(text)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DtLensError(
            f"edits holds {given!r}; it must be one of {', '.join(VALUES)}, scale: with a number, such as scale:0.5, "
            "replace:EMBEDDING:LABEL, or towards:EMBEDDING:LABEL:DEGREES." + nearest(given, VALUES)
        ) from None
    return number


def _digits(number: float) -> str:
    return f"{number:.17g}" if float(f"{number:g}") != number else f"{number:g}"


def _embedded(value: Any, embeddings: EmbeddingRegistry | None) -> tuple[str, dict[str, Any]]:
    """A direction of an embedding, given in any of its forms."""
    meant = embedded_direction(value)
    if meant is None:
        raise DtLensError(
            f"edits holds {value!r}; for an embedding it must be (name, label) or (name, label, degrees)."
        )
    name, label, angle = meant
    if embeddings is not None:
        # In text a row's number looks like a label.
        if isinstance(label, str) and label.isdecimal() and label not in embeddings[name].labels:
            label = int(label)
        label = find_direction(embeddings, name, label)[2]
    if angle is None:
        return f"replace:{name}:{label}", {"replace": [name, label]}
    return f"towards:{name}:{label}:{_digits(angle)}", {"towards": [name, label], "angle": angle}


def resolve_sv(sv: SV, k: int, name: str) -> list[int]:
    """The indices that ``sv`` selects among the ``k`` directions of matrix ``name``, ascending.

    ``sv`` is an index, ``"all"``, a range with both ends (``"0-9"``), text with several of these and commas, or a
    sequence of them; a negative index counts from the smallest sigma.

    >>> resolve_sv("0,2-4,-1", 10, "M"), resolve_sv(["-2--1"], 10, "M"), resolve_sv("all", 3, "M")
    ([0, 2, 3, 4, 9], [8, 9], [0, 1, 2])

    Raises:
        DtLensError: if the text is malformed, or the index is out of the matrix's range.
    """
    parts = [p.strip() for part in as_list(sv) for p in (part.split(",") if isinstance(part, str) else [str(part)])]
    chosen: set[int] = set()
    for part in parts:
        match = RANGE.fullmatch(part)
        if part == "all":
            chosen.update(range(k))
            continue
        try:
            ends = [int(end) for end in (match.groups() if match else (part, part))]
        except ValueError:
            raise DtLensError(
                f"sv holds {part!r}; it must be an index, a range such as 0-9, 'all', or several with commas."
            ) from None
        for end in ends:
            if not -k <= end < k:
                raise DtLensError(f"sv={end} is out of range: {name} has {k} directions, 0 to {k - 1}.")
        low, high = (end % k for end in ends)
        if low > high:
            raise DtLensError(f"sv holds {part!r}, which is empty: {name} has {k} directions, 0 to {k - 1}.")
        chosen.update(range(low, high + 1))
    if not chosen:
        raise DtLensError("sv names no direction; give an index, a range such as 0-9, or 'all'.")
    return sorted(chosen)


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
