"""Writing changed weights, and comparing weights bit for bit, in pieces that fit into the processor's cache.

A large weight is in memory once as it was and once as it is; nothing else of its size is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dt_lens.edits.low_rank import Placed

__all__ = ["add_changes", "overflows", "writable"]

PIECE = 2**16  # entries that are worked on at once


def add_changes(live: Tensor, untouched: Tensor, changes: Sequence[Placed], weights: Mapping[str, Tensor]) -> None:
    """Set ``live`` to ``untouched`` plus the changes of it, summed in float64 and rounded once to its dtype.

    The sum has the same bits whatever the order of ``changes``.
    """
    # Ordered by content, not by arrival.
    changes = changes if len(changes) < 2 else sorted(changes, key=_content)
    factor = changes[0].factor if changes else None
    with writable(live):
        if factor is None:
            live.copy_(untouched)
            return
        name = factor.weight
        part = factor.view({name: live})
        if any(change.factor != factor for change in changes) or not _is_view(part, live):
            live.copy_(sum((change.dense(weights) for change in changes), untouched.double().to(live.device)))
            return
        if part.numel() < live.numel():
            live.copy_(untouched)  # other heads may have been edited before
        kept = factor.view({name: untouched})
        thin = [(change.left.to(live.device), change.right.to(live.device)) for change in changes]
        if part.stride(0) < part.stride(1):  # by rows of what lies together in memory
            part, kept, thin = part.T, kept.T, [(right.T, left.T) for left, right in thin]
        step = max(1, PIECE // max(1, part.shape[1]))
        for first in range(0, len(part), step):
            rows = slice(first, first + step)
            piece = kept[rows].to(live.device, torch.float64, copy=True)
            for left, right in thin:
                piece += left[rows] @ right
            part[rows] = piece


def _content(change: Placed) -> tuple[float, float]:
    """The norm and the sum of a change, without forming it."""
    left, right = change.left, change.right
    return float(((left.T @ left) * (right @ right.T)).sum()), float(left.sum(0) @ right.sum(1))


def _is_view(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def overflows(live: Tensor, earlier: Tensor) -> bool:
    """Whether an entry that was finite is so no longer."""
    if not live.numel() or all(bool(torch.isfinite(end)) for end in live.aminmax()):
        return False
    return bool((earlier.isfinite() & ~live.isfinite()).any())


@contextmanager
def writable(weight: Tensor) -> Iterator[None]:
    """Allow writing to a weight: in inference mode if it was made there, and without autograd."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        yield
