"""``evaluate``: run a decision transformer in an environment, hundreds of paired episodes at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

from dt_lens.arguments import whole_number
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.errors import DtLensError
from dt_lens.lens.assumed import notes
from dt_lens.lens.protocol import require_running
from dt_lens.progress import Count, counting

if TYPE_CHECKING:
    from dt_lens.behaviour.agents.episodes import FailureRule
    from dt_lens.behaviour.agents.evaluation import Evaluation
    from dt_lens.behaviour.texts.evaluation import TextEvaluation
    from dt_lens.behaviour.texts.windows import Texts
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

__all__ = [
    "evaluate",
]


@overload
def evaluate(
    model: HookedDecisionTransformer,
    environment: str | None = None,
    *,
    episodes: int = 100,
    seed: int = 0,
    target_return: float | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    failure: FailureRule | None = None,
    workers: int | None = None,
    lanes: int | None = None,
    progress: bool | Count = False,
) -> Evaluation: ...


@overload
def evaluate(
    model: Any,
    read: Texts | None = None,
    /,
    *,
    texts: Texts | None = None,
    context: int | None = None,
    windows: int | None = None,
    progress: bool | Count = False,
) -> TextEvaluation: ...


def evaluate(
    model: Any,
    environment: Any = None,
    *,
    episodes: int = 100,
    seed: int = 0,
    target_return: float | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    failure: FailureRule | None = None,
    workers: int | None = None,
    lanes: int | None = None,
    texts: Texts | None = None,
    context: int | None = None,
    windows: int | None = None,
    progress: bool | Count = False,
) -> Any:
    """Run ``episodes`` episodes of ``model`` as it is now (edits included) and return how each one went.

    Episode ``i`` starts from ``env.reset(seed=seed + i)``. What happens in it depends on the model, the environment,
    the target return and that seed alone, to the last bit: not on ``episodes``, ``workers``, ``lanes`` (on a CPU) or
    the order. So two evaluations with the same seeds are paired, and ``edited.compare(baseline)`` compares them.

    A model on the CPU runs in worker processes. A model with hooks, with a state encoder of its own, or on another
    device runs in this process, on one torch thread; what its hooks do is part of the behaviour. Dropout is off.

    A language model reads texts instead: ``evaluate(model, texts, context=..., windows=..., progress=...)`` gives a
    ``TextEvaluation`` of loss and KL per window of tokens; see ``dt_lens.behaviour.texts.reading.evaluate_text``.

    Args:
        model: a ``HookedDecisionTransformer``: what ``dt_lens.load`` and ``dt_lens.wrap`` return for one.
        environment: a Gymnasium id, ``"module:Id"`` to import a package that registers it. By default the model's own:
            the evaluation environment of its data, if they have one, else that of the data themselves. The result says
            which.
        episodes: how many.
        seed: of the first episode, not negative.
        target_return: what the agent is asked for, in the environment's units; the model's first one by default.
        environment_kwargs: for ``gymnasium.make``; by default those of the model's facts, with the model's environment.
            ``max_episode_steps`` and ``wrappers`` (see ``RunFacts``) of that environment stay unless they are named:
            ``{"wrappers": []}`` takes it without any.
        max_steps: cut episodes after this many steps, where the environment's time limit does not do so earlier.
        failure: what counts as failing; by default what the model's facts say for their environment, else a guess; see
            ``dt_lens.behaviour.agents.episodes.Episodes``.
        workers: processes; as many as there are processor cores to use by default; 1 runs in this process.
        lanes: episodes side by side in a process, at least 8; chosen by the number of episodes by default.
        progress: ``True`` for a progress bar on standard error, or a function of (episodes done, episodes), which
            counts running episodes by their share of the time limit.
        texts, context, windows: for a language model only; ``texts`` may also stand in the place of ``environment``.

    Raises:
        DtLensError: when the environment or the target return is neither given nor among the model's facts, when they
            do not fit the model, when the model predicts an action that is not finite, or when a worker dies.
    """
    require_running(model, "evaluate")
    if not model.can_act:
        from dt_lens.behaviour.texts.reading import evaluate_text

        of_agents = (target_return, environment_kwargs, max_steps, failure, workers, lanes)
        if (episodes, seed) != (100, 0) or any(value is not None for value in of_agents):
            raise DtLensError(
                "This is a language model, and evaluate reads texts with it; of the options it takes texts, context, "
                "windows and progress."
            )
        if texts is not None and environment is not None:
            raise DtLensError("evaluate was given texts twice; give them once.")
        given = environment if texts is None else texts
        return evaluate_text(model, given, context=context, windows=windows, progress=progress)

    from dt_lens.behaviour.agents.episodes import check_rule, known_rule
    from dt_lens.behaviour.agents.evaluation import Evaluation
    from dt_lens.behaviour.agents.lanes import LEAST_LANES
    from dt_lens.behaviour.agents.running import run, seeds_of, setting_of

    if any(value is not None for value in (texts, context, windows)):
        raise DtLensError(
            "This is an agent, and evaluate runs it in an environment; leave out texts, context and windows."
        )
    seeds = seeds_of(seed, episodes)
    # As many lanes as somebody has memory for; beyond that a number is a mistake.
    limits = (("max_steps", max_steps, 1, None), ("workers", workers, 1, None), ("lanes", lanes, LEAST_LANES, 2**16))
    for name, value, least, most in limits:
        if value is not None:
            whole_number(value, name, least, most)
    if failure is not None:
        check_rule(failure)
    setting = setting_of(model, environment, environment_kwargs, target_return, max_steps)
    with counting(progress, len(seeds), "episodes") as count:
        # Episodes that run count by the share of the time limit that they have run.
        report = None if count is None else lambda finished, running: count(finished + running)
        outcomes = run(model, setting, seeds, workers=workers, lanes=lanes, report=report)
    return Evaluation.from_outcomes(
        outcomes,
        environment=setting.environment,
        environment_kwargs=setting.environment_kwargs,
        environment_role=setting.role,
        target_return=setting.target_return,
        time_limit=setting.task.time_limit,
        model_id=model_id(model),
        edits=tuple(edit.to_dict() for edit in getattr(model, "active_edits", ())),
        failure=known_rule(failure, model.facts, setting.environment),
        notes=notes(model),
    )
