"""What an arm differs in from the unedited agent, as named tensors, in which form a sweep sends it to its workers.

Apart from ``arms``, because a worker needs nothing of edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dt_lens.decision_transformer.changes import Change

__all__ = ["packed", "unpacked"]

OWN, CHANGE = "own", "change"  # what names begin with


def packed(changes: Sequence[Change], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``changes`` and ``own`` weights of an arm as named tensors; empty if there are none."""
    found = {f"{OWN}/{name}": weight.contiguous() for name, weight in own.items()}
    for number, change in enumerate(changes):
        place = f"{CHANGE}/{number}/{change.weight}/{'' if change.head is None else change.head}"
        found |= {f"{place}/left": change.left, f"{place}/right": change.right}
    return found


def unpacked(tensors: Mapping[str, Tensor]) -> tuple[tuple[Change, ...], dict[str, Tensor]]:
    """The ``changes`` and ``own`` weights that ``packed`` was given."""
    changes, own = dict[int, Change](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        kind, *rest = key.split("/")
        if kind == OWN:
            own[rest[0]] = tensor
        elif rest[3] == "left":
            number, weight, head, _ = rest
            right = tensors[key.removesuffix("left") + "right"]
            changes[int(number)] = Change(weight, int(head) if head else None, tensor, right)
    return tuple(changes[number] for number in sorted(changes)), own
