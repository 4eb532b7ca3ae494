"""Writing changed weights, and comparing weights bit for bit, in pieces that fit into the processor's cache.

A large weight is in memory once as it was and once as it is; nothing else of its size is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dt_lens.edits.low_rank import Placed
from dt_lens.lens.weights import memory_order, same_bits

__all__ = ["Written", "add_changes", "put_back", "writable"]

PIECE = 2**16  # entries that are worked on at once: with their sum in float64 they fit into the second-level cache
LARGE = 2**24  # the same where the memory is not the processor's


class Written(NamedTuple):
    """What writing a weight did to it.

    Attributes:
        changed: a bit of it is another one than before.
        overflowed: an entry that is finite without the changes is not so with them.
    """

    changed: bool
    overflowed: bool


def add_changes(live: Tensor, untouched: Tensor, changes: Sequence[Placed], weights: Mapping[str, Tensor]) -> Written:
    """Set ``live`` to ``untouched`` plus the changes of it, summed in float64 and rounded once to its dtype.

    The sum has the same bits whatever the order of ``changes``.
    """
    if not changes:
        changed = not same_bits(live, untouched)
        put_back(live, untouched)
        return Written(changed, overflowed=False)
    # Ordered by content, not by arrival.
    changes = changes if len(changes) < 2 else sorted(changes, key=_content)
    factor = changes[0].factor
    name = factor.weight
    part = factor.view({name: live})
    with writable(live):
        if any(change.factor != factor for change in changes) or not _is_view(part, live):
            before = live.clone()
            live.copy_(sum((change.dense(weights) for change in changes), untouched.double().to(live.device)))
            return Written(not same_bits(live, before), _overflows(live, untouched))
        kept = factor.view({name: untouched})
        thin = [(change.left.to(live.device), change.right.to(live.device)) for change in changes]
        if part.stride(0) < part.stride(1):  # by rows of what lies together in memory
            part, kept, thin = part.T, kept.T, [(right.T, left.T) for left, right in thin]
        if part.numel() == live.numel():
            return _add(part, kept, thin)
        before = live.clone()
        live.copy_(untouched)  # other heads may have been edited before
        _add(part, kept, thin)
        return Written(not same_bits(live, before), _overflows(live, untouched))


def _add(part: Tensor, kept: Tensor, thin: Sequence[tuple[Tensor, Tensor]]) -> Written:
    """Set ``part`` to ``kept`` plus the products, rows by rows; what there was of it is looked at on the way."""
    changed = overflowed = False
    step = max(1, (PIECE if part.is_cpu else LARGE) // max(1, part.shape[1]))
    wide = torch.empty(min(step, len(part)), part.shape[1], dtype=torch.float64, device=part.device)
    for first in range(0, len(part), step):
        rows = slice(first, first + step)
        live, piece = part[rows], wide[: len(part) - first]
        piece.copy_(kept[rows])
        for left, right in thin:
            piece.addmm_(left[rows], right)
        before = None if changed else live.clone()
        live.copy_(piece)
        changed = changed or (before is not None and not same_bits(live, before))
        overflowed = overflowed or _overflows(live, kept[rows])
    return Written(changed, overflowed)


def put_back(live: Tensor, kept: Tensor) -> bool:
    """Set ``live`` to ``kept``; whether it then is so bit for bit, which a weight that was cast meanwhile is not."""
    with writable(live):
        if not (live.is_cpu and kept.is_cpu and live.ndim and live.shape == kept.shape and len(live)):
            live.copy_(kept)
            return same_bits(live, kept)
        order = memory_order(live)
        there, kept = live.permute(order), kept.permute(order)
        step = max(1, len(there) * 4 * PIECE // max(1, there.numel()))
        same = True
        for to, piece in zip(torch.split(there, step), torch.split(kept, step), strict=True):
            to.copy_(piece)
            same = same and same_bits(to, piece)  # while both are in the cache
        return same


def _content(change: Placed) -> tuple[float, float]:
    """The norm and the sum of a change, without forming it."""
    left, right = change.left, change.right
    return float(((left.T @ left) * (right @ right.T)).sum()), float(left.sum(0) @ right.sum(1))


def _is_view(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _overflows(live: Tensor, untouched: Tensor) -> bool:
    """Whether an entry that is finite without changes is not so with them."""
    if not live.numel() or all(bool(torch.isfinite(end)) for end in live.aminmax()):
        return False
    return bool((untouched.to(live.device).isfinite() & ~live.isfinite()).any())


@contextmanager
def writable(weight: Tensor) -> Iterator[None]:
    """Allow writing to a weight: in inference mode if it was made there, and without autograd."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        yield
