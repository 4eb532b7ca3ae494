"""An edit as it is written: the same on the command line, in files and in Python."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dt_lens.arguments import as_list
from dt_lens.edits.replacements import VALUES, embedded_direction, find_direction
from dt_lens.errors import DtLensError, nearest
from dt_lens.lens.embeddings import EmbeddingRegistry

__all__ = ["SV", "highest_sv", "parse_value", "resolve_sv", "split_values"]

SV = int | str | Sequence[int | str]
RANGE = re.compile(r"(-?\d+)-(-?\d+)")


def split_values(text: str) -> list[str]:
    """Values separated by commas; a text that starts with ``{`` is one value, the JSON of a record.

    >>> split_values("zero, 0.5"), split_values('{"replace": ["action_out", "a,b"]}')
    (['zero', '0.5'], ['{"replace": ["action_out", "a,b"]}'])
    """
    if text.lstrip().startswith("{"):
        return [text.strip()]
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_value(value: Any, embeddings: EmbeddingRegistry | None = None) -> tuple[str, Any]:
    """An edit's value as text, and in the form that a record of ``SingularEdit`` has.

    As text an embedding's direction is ``"replace:action_out:thigh_joint torque"``, by its label or the number of its
    row, and ``"towards:action_out:thigh_joint torque:30"`` turns by 30 degrees. A text that starts with ``{`` is the
    JSON of such a value, ``{"replace": ["action_out", "thigh_joint torque"]}``, in which a label may hold anything. A
    number may have ``scale:`` in front of it.

    Raises:
        DtLensError: if it is not an edit's value, or the embedding has no such label.

    >>> parse_value("scale:0.5"), parse_value(2), parse_value("zero")
    (('scale:0.5', 0.5), ('scale:2', 2.0), ('zero', 'zero'))
    """
    if isinstance(value, str):
        value = value.strip()
        if value in VALUES:
            return value, value
        if value.startswith("{"):
            value = _json(value)
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


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DtLensError(
            f"value is {text[:80]!r}; what starts with a brace must be JSON, such as "
            '{"replace": ["action_out", "LABEL"]} or {"towards": ["action_out", "LABEL"], "angle": 30}.'
        ) from None


def _number(text: Any, given: Any) -> float:
    try:
        number = math.nan if isinstance(text, bool) else float(text)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DtLensError(
            f"value is {given!r}; it must be one of {', '.join(VALUES)}, a number that sigma is multiplied by, "
            "replace:EMBEDDING:LABEL, towards:EMBEDDING:LABEL:DEGREES, or the JSON of a record's value."
            + nearest(given, VALUES)
        ) from None
    return number


def _digits(number: float) -> str:
    return f"{number:.17g}" if float(f"{number:g}") != number else f"{number:g}"


def _embedded(value: Any, embeddings: EmbeddingRegistry | None) -> tuple[str, dict[str, Any]]:
    """A direction of an embedding, given in any of its forms."""
    meant = embedded_direction(value)
    if meant is None:
        raise DtLensError(f"value is {value!r}; for an embedding it must be (name, label) or (name, label, degrees).")
    name, label, angle = meant
    if embeddings is not None:
        # In text a row's number looks like a label.
        if isinstance(label, str) and label.isdecimal() and label not in embeddings[name].labels:
            label = int(label)
        label = find_direction(embeddings, name, label)[2]
    if angle is None:
        return f"replace:{name}:{label}", {"replace": [name, label]}
    return f"towards:{name}:{label}:{_digits(angle)}", {"towards": [name, label], "angle": angle}


def highest_sv(sv: str) -> int:
    """The largest index that a text names, or -1 where that depends on how many directions there are.

    >>> highest_sv("0,2-4"), highest_sv("0-3,-1"), highest_sv("all")
    (4, -1, -1)
    """
    parts = [part.strip() for part in sv.split(",")]
    if any(part.startswith("-") or "--" in part or not part[:1].isdecimal() for part in parts):
        return -1
    return max(int(number) for number in re.findall(r"\d+", sv))


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
