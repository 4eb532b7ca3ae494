"""Run batches through a model and keep the moments of what its matrices read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dt_lens.edits.edit import suspended
from dt_lens.errors import DtLensError, because
from dt_lens.lens.activations import Activations
from dt_lens.lens.forward_mode import measuring
from dt_lens.lens.watching import Watch
from dt_lens.progress import ProgressCallback, silent

__all__ = ["Batches", "activations_of_batches", "finished", "watching"]

Batches = Iterable[Tensor | Mapping[str, Any]]


@contextmanager
def watching(model: Any) -> Iterator[None]:
    """Without the model's edits, dropout and gradients, and on one thread, so that the numbers repeat exactly."""
    with suspended(model), measuring(model):
        yield


def finished(watch: Watch, **record: Any) -> Activations:
    """What was watched, with its record."""
    points, stream = watch.moments()
    return Activations(points, watch.reads, stream, {**record, "tokens": watch.tokens}, watch.made_of)


def activations_of_batches(
    model: Any,
    batches: Batches,
    tell: ProgressCallback = silent,
    *,
    total: int | None = None,
    matrices: Sequence[str] | str | None = None,
    record: Mapping[str, Any] | None = None,
) -> Activations:
    """The moments of what every matrix reads in ``batches``, all of whose tokens count.

    Args:
        model: a wrapped model, which runs without its edits.
        batches: tokens ``[batch, token]``, or keyword arguments of the model, with ``attention_mask`` where there is
            padding.
        tell: receives the progress.
        total: how many batches there are, for the progress.
        matrices: shell patterns of those to watch; all by default.
        record: what the activations say of where they come from; with ``model_id``.

    Raises:
        DtLensError: for a batch that the model cannot run on, or activations that are not finite.
    """
    with watching(model):
        watch = Watch(model, matrices)
        number = _watch_batches(model, watch, batches, tell, total)
    return finished(watch, **{"batches": number, **(record or {})})


def _watch_batches(model: Any, watch: Watch, batches: Batches, tell: ProgressCallback, total: int | None = None) -> int:
    batches = [batches] if isinstance(batches, Tensor | Mapping) else batches
    total = len(batches) if total is None and isinstance(batches, Sequence) else total
    number = 0
    for number, batch in enumerate(batches, 1):
        named = dict(batch) if isinstance(batch, Mapping) else {"tokens": batch}
        device = next(iter(model.weights.values())).device
        named = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}
        try:
            _, cache = model.run_with_cache(**named, names_filter=watch.hooks.__contains__)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise DtLensError(f"The model cannot run on batch {number - 1}: {because(error)}.") from error
        watch.add(cache, _real(cache, named.get("attention_mask")))
        tell("running batches", number / total if total else 0.0)
    return number


def _real(cache: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
    """Which tokens of a batch are not padding, ``[batch, token]``."""
    shape = cache["blocks.0.hook_resid_pre"].shape[:2]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=cache["blocks.0.hook_resid_pre"].device)
    per_step = -(-shape[1] // mask.shape[1])  # an agent's step is three tokens, of which the last action's may lack
    return mask.bool().repeat_interleave(per_step, 1)[:, : shape[1]]
