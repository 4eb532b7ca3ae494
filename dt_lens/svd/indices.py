"""Which directions a user names: an index, a range such as ``0-9``, or several."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dt_lens.arguments import as_list
from dt_lens.errors import DtLensError

__all__ = ["SV", "resolve_sv"]

SV = int | str | Sequence[int | str]
RANGE = re.compile(r"(-?\d+)-(-?\d+)")


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
