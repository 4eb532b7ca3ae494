"""``readout_of``: the readout that the arguments of ``steer`` describe. Like ``task_of`` it asks what a model is."""

from __future__ import annotations

from typing import Any

from dt_lens.arguments import finite_numbers
from dt_lens.behaviour.readout import FRESH, Matching, Readout, of_task
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.tasks import task_of
from dt_lens.errors import DtLensError
from dt_lens.lens.protocol import require_running

__all__ = ["RETURN_TO_GO", "readout_of"]

RETURN_TO_GO = Matching("reward_in", None, "read", ("W_in", "OV"), "matches the return-to-go input")
GUARDED = 32  # windows of other text
NATS = 0.1  # the smallest reach of interest of a log probability
LOSS = 0.05  # nats per token: the largest rise of the loss on other text that is accepted


def readout_of(
    model: Any,
    what: Any = None,
    *,
    task: Task | None = None,
    units: int | None = None,
    choosing: int | None = None,
    seed: int = 0,
    targets: Any = None,
    prompts: Any = None,
    answers: Any = None,
    **options: Any,
) -> Readout:
    """What steering moves in ``model``.

    An agent's return, along its curve of target returns; the log probability of ``answers`` after ``prompts`` in a
    language model, whose loss on other text must not rise; the outcome of any other task.

    Args:
        model: a wrapped model that can run.
        what, task, options: as for ``evaluate``; of a language model they say what the other text is.
        units, choosing: how many units the report has, and the choice; the task's own numbers by default.
        seed: of the first unit while choosing, where units have seeds.
        targets: of an agent's curve, in the environment's units; the model's own by default.
        prompts, answers: of a language model, as for ``PromptTask.of``.

    Raises:
        DtLensError: for arguments that do not fit the model, or one another.
    """
    require_running(model, "steer")
    given = {name: value for name, value in options.items() if value is not None}
    if task is None and not model.can_act and (prompts is not None or answers is not None):
        return _answers(model, what, given, prompts, answers, units, choosing, seed, targets)
    found, _ = task_of(model, what, task=task, seed=seed, caller="steer", use="steer", **given)
    if prompts is not None or answers is not None:
        raise DtLensError("prompts and answers belong to a language model; leave them out.")
    if task is None and not isinstance(what, Task) and not model.can_act:
        raise DtLensError(
            "steer moves the log probability of given answers after given prompts in a language model; give prompts "
            "and answers (--prompts, --answers)."
        )
    if task is not None or isinstance(what, Task):
        if targets is not None:
            raise DtLensError("targets are those of an agent's curve; leave them out with a task.")
        large = found.terms.large
        return of_task(found, units, choosing, seed, least=float("nan") if large is None else large)
    return _returns(model, found, units, choosing, seed, targets)


def _returns(model: Any, task: Any, units: int | None, choosing: int | None, seed: int, targets: Any) -> Readout:
    wanted = sorted(set(finite_numbers(model.facts.target_returns if targets is None else targets, "targets")))
    if len(wanted) < 2:
        raise DtLensError(
            f"There are {len(wanted)} target returns; a curve needs at least two: give targets, in the environment's "
            "units."
        )
    choose = task.units(choosing, seed, "choose")
    if len(choose) > FRESH:
        raise DtLensError(f"choosing is {len(choose)}; it must be at most {FRESH}, where the fresh seeds begin.")
    points = {target: task.at(target) for target in wanted}
    return of_task(task, units, choosing, seed, points=points, point="target", matching=RETURN_TO_GO)


def _answers(
    model: Any,
    what: Any,
    given: dict[str, Any],
    prompts: Any,
    answers: Any,
    units: int | None,
    choosing: int | None,
    seed: int,
    targets: Any,
) -> Readout:
    from dt_lens.behaviour.texts.prompts import PromptTask
    from dt_lens.behaviour.texts.task import LossTask, TextTask

    if prompts is None or answers is None:
        raise DtLensError("Steering text needs both prompts and answers (--prompts, --answers).")
    if targets is not None:
        raise DtLensError("targets are those of an agent's curve; a language model has none: leave them out.")
    task = PromptTask.of(model, prompts, answers)
    guard, _ = task_of(model, what, caller="steer", use="steer", **given)
    if type(guard) is TextTask:
        guard = LossTask.like(guard)
    matching = Matching("token_out", task.first_tokens, "write", ("W_out", "OV"), "writes towards an answer")
    return of_task(
        task,
        units,
        choosing,
        seed,
        least=NATS,
        guard=guard,
        guarded=guard.units(GUARDED),
        guard_name="loss on other text",
        rise=LOSS,
        matching=matching,
        kinds=matching.kinds,
        across=True,
    )
