"""Several edits at once: in force, from files, and as a command line writes them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dt_lens.edits.edit import Edit
from dt_lens.edits.files import read_records, save_records
from dt_lens.edits.singular import SingularEdit, load_edit
from dt_lens.errors import DtLensError, a_type
from dt_lens.lens.activations import Activations
from dt_lens.lens.protocol import Lens

__all__ = ["in_force", "load_edits", "save_edits", "written_edits"]


def in_force(edits: Sequence[Edit]) -> ExitStack:
    """All of ``edits`` in force inside ``with``, made in their order and undone in the reverse one."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit)
        return stack.pop_all()


def save_edits(edits: Sequence[Edit], file: str | Path) -> Path:
    """Write edits to a JSON file; see ``load_edits``.

    Raises:
        DtLensError: for what are no edits, or a file that cannot be written.
    """
    if not isinstance(edits, Sequence) or not edits or not all(isinstance(edit, Edit) for edit in edits):
        raise DtLensError(f"edits is {a_type(edits)}; it must be a list of edits, such as SingularEdit makes.")
    return save_records(file, [edit.to_dict() for edit in edits])


def load_edits(model: Lens, file: str | Path, activations: Activations | None = None) -> list[Edit]:
    """The edits in a file that ``edit.save`` or ``save_edits`` wrote, on ``model``; they are not in force.

    Args:
        model: a wrapped model.
        file: the file.
        activations: those that the edits were made with, if any.

    Raises:
        DtLensError: if the file cannot be read, or an edit does not fit the model.
    """
    return [load_edit(model, record, activations) for record in read_records(file)]


def written_edits(
    model: Lens,
    matrices: Sequence[str],
    sv: Sequence[str] = ("0",),
    sides: Sequence[Any] = (),
    values: Sequence[str] = ("constant",),
    *,
    raw: bool = False,
    seed: int = 0,
) -> list[Edit]:
    """One edit for each of ``matrices``, from text, as a command line gives it.

    Args:
        model: a wrapped model.
        matrices: their names.
        sv, sides, values: one of each for every matrix, in their order, or one for all of them.
        raw: whether directions are those of the weights as stored.
        seed: of random values.

    Raises:
        DtLensError: for lists of other lengths, or an edit that cannot be made.
    """
    n = len(matrices)
    given = {"sv": list(sv), "side": list(sides), "value": list(values)}
    for name, parts in given.items():
        if len(parts) not in (0, 1, n):
            raise DtLensError(
                f"There are {n} edits and {len(parts)} of --{name}; give one for each edit, or one for all of them."
            )
        given[name] = (parts or [{"sv": "0", "side": None, "value": "constant"}[name]]) * (n if len(parts) <= 1 else 1)
    return [
        SingularEdit(model, matrix, chosen, side=side, value=value, seed=seed, fold_layernorm=not raw)
        for matrix, chosen, side, value in zip(matrices, given["sv"], given["side"], given["value"], strict=True)
    ]
