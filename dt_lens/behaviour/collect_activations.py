"""Collect what a model's matrices read while it works: an agent in its own episodes, a language model in text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dt_lens.arguments import as_json
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.tasks import base_identity, task_of
from dt_lens.behaviour.watched import Batches, activations_of_batches
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.protocol import require_running
from dt_lens.progress import ProgressCallback, reporting, silent

if TYPE_CHECKING:
    from dt_lens.lens.protocol import Lens

__all__ = ["collect_activations", "kept_activations"]


def collect_activations(
    model: Lens,
    what: Any = None,
    *,
    task: Task | None = None,
    units: int | None = None,
    seed: int = 0,
    batches: Batches | None = None,
    matrices: Sequence[str] | str | None = None,
    progress: bool | ProgressCallback | None = None,
    **options: Any,
) -> Activations:
    """Collect moments of what every matrix reads, and of the residual stream, while the model runs without its edits.

    An agent runs the episodes that ``evaluate`` runs with the same arguments, to the bit; every step's window, as
    the agent saw it, is then run through the hooked model. The tokens whose value can reach the action count: all of
    the window (padding only where the model sees it, and not the action's own token, which acting leaves out); in the
    last block, after its keys and values, only the last state's token. A token counts once for every window that it was
    in. A language model reads its held-out text in windows of 128 tokens. If ``batches`` are given, all their tokens
    count. Dropout is off. Only sums are kept. torch runs on one thread, so that the numbers repeat exactly.

    Args:
        model: a wrapped model.
        units: how many of the task's units; 10 episodes, or 256 windows, by default. ``episodes`` and ``windows`` are
            other names for it.
        seed: of the first episode.
        task: the task whose units are run; the model's own by default.
        options: what else ``evaluate`` takes to say what is run, such as ``target_return`` or ``texts``.
        batches: run these instead: tokens ``[batch, token]`` for a language model, or a batch of keyword arguments for
            any model (``model.probe()`` is one), with ``attention_mask`` where there is padding.
        matrices: shell patterns of those to watch; all by default. Memory may allow only a few of a wide model's: one
            that reads ``d`` entries takes ``8 d^2`` bytes.
        progress: ``True`` for a bar, ``False`` for none, or a function of (what is being done, share done); by
            default a bar in a notebook and none elsewhere.

    Raises:
        DtLensError: for a model that cannot run, settings that ``evaluate`` would refuse, batches that do not fit, or
            activations that are not finite.
    """
    require_running(model, "collect_activations")
    if batches is not None:
        if (
            what is not None
            or task is not None
            or units is not None
            or seed
            or any(v is not None for v in options.values())
        ):
            raise DtLensError(
                "Activations come from the model's own units or from batches; leave out batches, or everything that "
                "says which units."
            )
        with reporting(progress) as tell:
            return activations_of_batches(
                model, batches, tell, matrices=matrices, record={"model_id": base_identity(model)}
            )
    found, numbers = task_of(
        model, what, task=task, units=units, seed=seed, caller="collect_activations", use="activations", **options
    )
    with reporting(progress) as tell:
        return found.activations(model, count=len(numbers), seed=seed, matrices=matrices, tell=tell)


def kept_activations(model: Any, file: Path, task: Task, seed: int = 0, tell: ProgressCallback = silent) -> Activations:
    """This model's activations in this task: read from ``file`` if they are there, else collected and saved there.

    A file must name its model and something of the task's setting. What an older file lacks is not compared.

    Raises:
        DtLensError: as ``collect_activations`` does, or when the file cannot be written.
    """
    wanted = as_json({**task.usual, **task.terms.setting, "seed": seed})
    if file.is_file():
        with suppress(DtLensError):  # a damaged file: collect again
            kept = Activations.load(file)
            record = {**task.usual, **kept.record}
            said = {name for name in wanted if name in kept.record}
            same = all(record[name] == value for name, value in wanted.items() if name in record)
            if said and same and kept.record.get("model_id") in task.identity(model):
                return kept
    tell("collecting activations", 0.0)
    found = task.activations(model, seed=seed, tell=tell)
    found.save(file)
    return found
