"""An edit as it is written: the same on the command line, in files and in Python."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor

from dt_lens.arguments import is_finite_number
from dt_lens.edits.replacements import VALUES, embedded_direction, find_direction
from dt_lens.errors import DtLensError, as_written, nearest
from dt_lens.lens.embeddings import EmbeddingRegistry
from dt_lens.svd.indices import SV, resolve_sv

__all__ = ["SV", "highest_sv", "parse_value", "resolve_sv", "split_values", "today", "values_of", "written_sv"]

DIRECTIONS = ("replace:", "towards:")


def split_values(text: str, embeddings: EmbeddingRegistry | None = None) -> list[str]:
    """The values in a text, separated by commas.

    A direction of an embedding takes the commas of its label, and a record's value in JSON its own: of the possible
    ends the last one is taken at which the label exists, or the JSON is whole.

    >>> split_values("zero, 0.5"), split_values('{"replace": ["action_out", "a,b"]},flip')
    (['zero', '0.5'], ['{"replace": ["action_out", "a,b"]}', 'flip'])
    """
    found, parts = [], text.split(",")
    while parts:
        ends = (end for end in range(len(parts), 1, -1) if _is_whole(",".join(parts[:end]).strip(), embeddings))
        end = next(ends, 1)
        found.append(",".join(parts[:end]).strip())
        parts = parts[end:]
    return [value for value in found if value]


def _is_whole(text: str, embeddings: EmbeddingRegistry | None) -> bool:
    """Whether a text with commas is one value: JSON, or a direction whose label exists."""
    if text.startswith("{"):
        with suppress(ValueError, RecursionError):
            json.loads(text)
            return True
    if not text.startswith(DIRECTIONS) or embeddings is None:
        return False
    name, _, label = text.partition(":")[2].partition(":")
    if text.startswith("towards:"):
        label = label.rpartition(":")[0]
    return name in embeddings and label in embeddings[name].labels


def values_of(value: Any, embeddings: EmbeddingRegistry | None = None) -> list[Any]:
    """The values in what is given where several may be: a value of ``SingularEdit``, a list of them, or text.

    A tuple whose first entry is no value itself is one direction, ``("action_out", "thigh")``; a tensor or an array is
    one vector.

    >>> values_of(["zero", 0.5]), values_of("zero,flip"), values_of(("action_out", "thigh", 30))
    (['zero', 0.5], ['zero', 'flip'], [('action_out', 'thigh', 30)])
    """
    if isinstance(value, str):
        return list(split_values(value, embeddings))
    direction = isinstance(value, tuple) and len(value) > 1 and isinstance(value[0], str) and not _is_text(value[0])
    if direction or isinstance(value, Mapping | Tensor | np.ndarray) or not isinstance(value, Iterable):
        return [value]
    return [one for given in value for one in (split_values(given, embeddings) if isinstance(given, str) else [given])]


def _is_text(text: str) -> bool:
    """Whether a text is a value by itself, or a list of them."""
    text = text.strip()
    if text in VALUES or text.startswith((*DIRECTIONS, "{", "scale:")) or "," in text:
        return True
    with suppress(ValueError):
        float(text)
        return True
    return False


def parse_value(value: Any, embeddings: EmbeddingRegistry | None = None) -> tuple[str, Any]:
    """An edit's value as text, and in the form that a record of ``SingularEdit`` has.

    As text an embedding's direction is ``"replace:action_out:thigh_joint torque"``, by its label or the number of its
    row, and ``"towards:action_out:thigh_joint torque:30"`` turns by 30 degrees. A text that starts with ``{`` is the
    JSON of such a value, ``{"replace": ["action_out", "thigh_joint torque"]}``, in which a label may hold anything. A
    number may have ``scale:`` in front of it, as older versions wrote it. The text can be read again, except that of a
    vector, which only names it.

    Raises:
        DtLensError: if it is not an edit's value, or the embedding has no such label.

    >>> parse_value("0.5"), parse_value(2), parse_value("zero"), parse_value("scale:0.5")
    (('0.5', 0.5), ('2', 2.0), ('zero', 'zero'), ('0.5', 0.5))
    """
    meant = _meaning(value, embeddings)
    if isinstance(meant, list):
        return f"vector {hashlib.blake2b(repr(meant).encode(), digest_size=4).hexdigest()}", meant
    if not isinstance(meant, Mapping):
        return (_digits(meant) if isinstance(meant, float) else str(meant)), meant
    if "replace" in meant:
        text = "replace:{}:{}".format(*meant["replace"])
    else:
        text = "towards:{}:{}:{}".format(*meant["towards"], _digits(meant["angle"]))
    with suppress(DtLensError):
        if _meaning(text, embeddings) == meant:
            return text, meant
    return json.dumps(meant, ensure_ascii=False), meant


def today(text: str | None) -> str | None:
    """A value as it is written now, from how a table of an older version has it.

    >>> today("scale:0.5"), today("zero"), today(None)
    ('0.5', 'zero', None)
    """
    return text.removeprefix("scale:") if isinstance(text, str) else text


def _meaning(value: Any, embeddings: EmbeddingRegistry | None) -> Any:
    if isinstance(value, str):
        value = value.strip()
        if value in VALUES:
            return value
        if value.startswith("{"):
            value = _json(value)
    if isinstance(value, str) and value.startswith("replace:"):
        value = value.split(":", 2)[1:]
    elif isinstance(value, str) and value.startswith("towards:") and value.count(":") > 2:
        name, _, rest = value.removeprefix("towards:").partition(":")
        label, _, angle = rest.rpartition(":")
        value = [name, label, _number(angle, value)]
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_finite_number, value)) and value:
        return [float(entry) for entry in value]
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str)):
        return _embedded(value, embeddings)
    return _number(value.removeprefix("scale:") if isinstance(value, str) else value, value)


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
            f"value is {as_written(given)}; it must be one of {', '.join(VALUES)}, a number that sigma is multiplied "
            "by, replace:EMBEDDING:LABEL, towards:EMBEDDING:LABEL:DEGREES, or the JSON of a record's value."
            + nearest(given, VALUES)
        ) from None
    return number


def _digits(number: float) -> str:
    return f"{number:.17g}" if float(f"{number:g}") != number else f"{number:g}"


def _embedded(value: Any, embeddings: EmbeddingRegistry | None) -> dict[str, Any]:
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
        return {"replace": [name, label]}
    return {"towards": [name, label], "angle": angle}


def highest_sv(sv: str) -> int:
    """The largest index that a text names, or -1 where that depends on how many directions there are.

    >>> highest_sv("0,2-4"), highest_sv("0-3,-1"), highest_sv("all")
    (4, -1, -1)
    """
    parts = [part.strip() for part in sv.split(",")]
    if any(part.startswith("-") or "--" in part or not part[:1].isdecimal() for part in parts):
        return -1
    # Python turns no more than 4,300 digits into a number; nine are more than any matrix has directions.
    return max(int(number) if len(number) < 10 else 10**9 for number in re.findall(r"\d+", sv))


def written_sv(sv: Sequence[int]) -> str:
    """Indices as text, with ranges.

    >>> written_sv([0, 1, 2, 3]), written_sv([0, 2, 3]), written_sv([5])
    ('0-3', '0,2-3', '5')
    """
    runs: list[list[int]] = []
    for index in sorted(sv):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)
