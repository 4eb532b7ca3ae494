"""``task_of``: the task that a caller's arguments describe. Only here does it matter what kind of model it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.identity import base_and_model_id
from dt_lens.behaviour.task import Task
from dt_lens.behaviour.terms import Terms
from dt_lens.decision_transformer.facts import from_file
from dt_lens.edits.edit import suspended
from dt_lens.errors import DtLensError, a_type, nearest
from dt_lens.lens.protocol import require_running

__all__ = ["COUNTS", "KNOWN", "base_identity", "evaluation_class", "identity_of", "task_of", "terms_in"]

OF_AGENTS = ("environment_kwargs", "target_return", "max_steps", "failure", "deterministic", "lanes", "video")
OF_TEXTS = ("texts", "context")
COUNTS = ("episodes", "windows")  # other names for the number of units
KNOWN = (*OF_AGENTS, *OF_TEXTS, *COUNTS, "environment")


def task_of(
    model: Any,
    what: Any = None,
    *,
    task: Task | None = None,
    units: int | None = None,
    seed: int = 0,
    caller: str = "evaluate",
    use: str = "evaluate",
    **options: Any,
) -> tuple[Task, range]:
    """The task of ``model``, and the numbers of its units.

    Args:
        model: a wrapped model that can run.
        what: a ``Task``; of an agent an environment (its id, an ``EnvSpec``, or a function that makes it); of a
            language model texts. By default the model's own.
        task: a ``Task``, in place of ``what``.
        units: how many units; ``episodes`` and ``windows`` among the options are other names for it.
        seed: of the first unit, where units have seeds.
        caller: who asks, for messages.
        use: what the number of units is for, if it is not given: a key of ``Task.counts``.
        options: of ``AgentTask.of`` or ``TextTask.of``; ``None`` counts as not given.

    Raises:
        DtLensError: for options that do not fit the model, or one another.
    """
    require_running(model, caller)
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in KNOWN:
            raise DtLensError(f"{caller} has no option {name!r}." + nearest(name, KNOWN))
    counted = [name for name in COUNTS if name in given]
    if task is not None and not isinstance(task, Task):
        raise DtLensError(f"task is {a_type(task)}; it must be a Task, as dt_lens.behaviour.task defines it.")
    if isinstance(what, Task):
        if task is not None:
            raise DtLensError(f"{caller} was given a task twice; give it once.")
        task, what = what, None
    if task is not None:
        failure = given.pop("failure", None)
        count = _count(units, given, counted)
        if given or what is not None:
            wrong = ", ".join(given) or "what"
            raise DtLensError(f"The task says what is run; leave out {wrong}, or give {caller} no task.")
        task = task.with_failure(failure)
        return task, task.units(count, seed, use)
    kind = _of_agent if model.can_act else _of_reader
    make, what = kind(what, given, caller)
    count = _count(units, given, counted)
    found = make(model, what, **given, caller=caller)
    return found, found.units(count, seed, use)


def _count(units: int | None, given: dict[str, Any], counted: list[str]) -> int | None:
    found = [units] if units is not None else []
    found += [given.pop(name) for name in counted]
    if len(found) > 1:
        raise DtLensError(f"The number of units was given twice: {', '.join(map(str, found))}; give it once.")
    return found[0] if found else None


def _of_agent(what: Any, given: dict[str, Any], caller: str) -> tuple[Callable[..., Task], Any]:
    """What makes an agent's task, and its environment, taken from either of its names."""
    from dt_lens.behaviour.agents.task import AgentTask

    if any(name in given for name in (*OF_TEXTS, "windows")):
        raise DtLensError(
            f"This is an agent, and {caller} runs it in an environment; leave out texts, context and windows."
        )
    if "environment" in given and what is not None:
        raise DtLensError(f"{caller} was given an environment twice; give it once.")
    return AgentTask.of, given.pop("environment", what)


def _of_reader(what: Any, given: dict[str, Any], caller: str) -> tuple[Callable[..., Task], Any]:
    """What makes a language model's task, and its texts, taken from either of their names."""
    from dt_lens.behaviour.texts.task import TextTask

    wrong = [name for name in (*OF_AGENTS, "episodes", "environment") if name in given]
    if wrong:
        raise DtLensError(
            f"This is a language model, and {caller} reads texts with it; leave out {', '.join(wrong)}: of the options "
            "it takes texts, context and windows."
        )
    if "texts" in given and what is not None:
        raise DtLensError(f"{caller} was given texts twice; give them once.")
    return TextTask.of, given.pop("texts", what)


def base_identity(model: Any) -> str:
    """The hash of a model as its own task identifies it, without its edits."""
    from dt_lens.behaviour.agents.identity import model_id

    with suspended(model):
        return model_id(model) if model.can_act else base_and_model_id(model)[0]


def identity_of(model: Any, terms: Terms) -> str:
    """The hash of a model as it is now, as the task of these terms identifies it.

    A file keeps terms and no task; a task with an ``identity`` of its own must be asked itself.
    """
    from dt_lens.behaviour.agents.evaluation import AgentEvaluation
    from dt_lens.behaviour.agents.identity import model_id

    if issubclass(evaluation_class(terms), AgentEvaluation):
        return model_id(model)
    return base_and_model_id(model)[1]


def terms_in(options: Mapping[str, Any]) -> Terms:
    """The terms that a file's options hold under ``"task"``; files from before there were tasks are agents'.

    Raises:
        DtLensError: for options that hold none.
    """
    if "task" in options:
        terms = Terms.from_dict(options["task"])
        return replace(terms, setting=from_file(terms.setting))
    from dt_lens.behaviour.agents.evaluation import terms_of_episodes

    names = ("environment", "target_return", "time_limit", "environment_kwargs")
    environment, target_return, limit, kwargs = (from_file(options)[name] for name in names)
    return terms_of_episodes(environment, target_return, limit, kwargs, options.get("failure"))


def evaluation_class(terms: Terms) -> type[Evaluation]:
    """The class of results under these terms: an agent's, a language model's, or ``Evaluation`` itself."""
    from dt_lens.behaviour.agents.evaluation import AgentEvaluation
    from dt_lens.behaviour.texts.evaluation import TextEvaluation

    if all(name in terms.setting for name in ("environment", "target_return")):
        return AgentEvaluation
    if all(name in terms.setting for name in ("text_id", "context")) and "kl" in terms.measures:
        return TextEvaluation
    return Evaluation
