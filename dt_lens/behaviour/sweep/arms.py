"""From what a sweep is asked for to its arms: which directions of which matrices, which edits, which controls."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from dt_lens.behaviour.sweep.plan import Arm
from dt_lens.directions import decompose_matrix
from dt_lens.edits import VALUES
from dt_lens.errors import DtLensError, nearest
from dt_lens.lens import Lens
from dt_lens.matrices import Matrix, SideName, Snapshot, select_matrices

__all__ = ["SV", "make_arms", "parse_value", "resolve_sv"]

MATCHES = ("frobenius", "output")
RANGE = re.compile(r"(-?\d+)-(-?\d+)")

SV = int | str | Sequence[int | str]


def parse_value(value: Any) -> tuple[str, str | float]:
    """An edit's value as text, and as ``SingularEdit`` takes it.

    >>> parse_value("scale:0.5"), parse_value(2), parse_value("zero")
    (('scale:0.5', 0.5), ('scale:2', 2.0), ('zero', 'zero'))
    """
    if isinstance(value, str) and value in VALUES:
        return value, value
    try:
        number = float(value.removeprefix("scale:") if isinstance(value, str) else value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError):
        raise DtLensError(
            f"edits holds {value!r}; it must be one of {', '.join(VALUES)}, or scale: with a number, such as scale:0.5."
            + (nearest(value, VALUES) if isinstance(value, str) else "")
        ) from None
    return f"scale:{number:.17g}" if float(f"{number:g}") != number else f"scale:{number:g}", number


def resolve_sv(sv: SV, k: int, name: str) -> list[int]:
    """Which of the ``k`` directions of matrix ``name`` are meant, ascending.

    ``sv`` is an index, ``"all"``, a range with both ends (``"0-9"``), text with several of these and commas, or a
    sequence of them; a negative index counts from the smallest sigma.

    >>> resolve_sv("0,2-4,-1", 10, "M"), resolve_sv(["-2--1"], 10, "M"), resolve_sv("all", 3, "M")
    ([0, 2, 3, 4, 9], [8, 9], [0, 1, 2])

    Raises:
        DtLensError: for text that is none of these, or an index that the matrix has not.
    """
    parts: list[Any] = [sv] if isinstance(sv, (int, str)) else list(sv)
    parts = [p.strip() for part in parts for p in (part.split(",") if isinstance(part, str) else [str(part)])]
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
    """The sides of ``matrix`` that are edited: the wanted ones that it has; by default all on the residual stream."""
    if wanted is None:
        return list(matrix.residual_sides)
    both: list[SideName] = [matrix.left, matrix.right]
    found = [side for side in both if side in wanted]
    if not found:
        raise DtLensError(f"{matrix.name} has none of the sides {', '.join(wanted)}; it has {both[0]} and {both[1]}.")
    return found


def _scales_sigma(value: str | float) -> bool:
    """Whether the edit multiplies sigma and leaves both vectors their directions, so that it is one on every side."""
    return not isinstance(value, str) or value in ("zero", "flip")


def make_arms(
    model: Lens,
    matrices: Sequence[str] | str | None,
    sv: SV,
    sides: Sequence[str] | None,
    values: Sequence[Any],
    controls: int,
    seed: int,
    baseline: bool,
    fold_layernorm: bool,
    control_match: str = "frobenius",
) -> list[Arm]:
    """The arms of a sweep: a baseline, then each edit followed by its controls.

    Edits of one matrix come together and with ascending directions, so that they share decompositions.

    Raises:
        DtLensError: for matrices, directions, sides or values that there are not.
    """
    bare = Snapshot.of(model)
    parsed = dict(parse_value(value) for value in values)
    if not parsed:
        raise DtLensError("edits is empty; give at least one value, such as constant.")
    if control_match not in MATCHES:
        raise DtLensError(
            f"control_match is {control_match!r}; it must be frobenius or output."
            + nearest(str(control_match), MATCHES)
        )
    known = {side for matrix in select_matrices(bare) for side in (matrix.left, matrix.right)}
    for side in sides or ():
        if side not in known:
            raise DtLensError(f"The model has no side {side!r}; sides are {', '.join(sorted(known))}.")
    arms = [Arm(0, "baseline")] if baseline else []
    for matrix in select_matrices(bare, matrices):
        k = len(decompose_matrix(bare, matrix, None, fold_layernorm).sigma)
        for index in resolve_sv(sv, k, matrix.name):
            chosen = sides_of(matrix, sides)
            for side in chosen:
                for text, value in parsed.items():
                    if sides is None and side != chosen[0] and _scales_sigma(value):
                        continue
                    record = {
                        "kind": "singular",
                        "matrix": matrix.name,
                        "sv": [index],
                        "side": side,
                        "value": value,
                        "seed": seed,
                        "fold_layernorm": fold_layernorm or not matrix.foldable,
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
                        directions="plain",
                        record=record,
                    )
                    arms.append(edit)
                    for draw in range(seed, seed + controls):
                        of = {"kind": "control", "seed": draw, "of": record}
                        matched = {"number": len(arms), "kind": "control", "of": edit.number, "control": draw}
                        arms.append(edit._replace(**matched, match=control_match, record=of))
    return arms
