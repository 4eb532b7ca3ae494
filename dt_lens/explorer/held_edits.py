"""The edits that a tab holds: from what its page says of them to edits of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dt_lens.edits.singular import SingularEdit
from dt_lens.errors import DtLensError

__all__ = ["Say", "make_edits"]

Say = Callable[..., None]  # say(kind, **values): an event for the tab


def make_edits(model: Any, written: Sequence[Mapping[str, Any]], fold_layernorm: bool) -> list[SingularEdit]:
    """The edits that a tab holds, on ``model``; none of them in force.

    Args:
        model: a wrapped model.
        written: of each ``matrix``, ``sv``, ``side``, ``value`` and ``seed``, as ``SingularEdit`` takes them.
        fold_layernorm: as for ``SingularEdit``.

    Raises:
        DtLensError: for edits that cannot be made, or what is no list of them.
    """
    names = ("matrix", "sv", "side", "value", "seed")
    if not isinstance(written, Sequence) or not all(isinstance(one, Mapping) for one in written):
        raise DtLensError("The edits of this tab cannot be read; remove them and add them again.")
    found = []
    for one in written:
        known: dict[str, Any] = {name: one[name] for name in names if one.get(name) is not None}
        if not isinstance(known.get("matrix"), str):
            raise DtLensError("An edit names no matrix; choose one.")
        found.append(SingularEdit(model, **known, fold_layernorm=fold_layernorm))
    return found
