"""``evaluate``: run a decision transformer in an environment, hundreds of paired episodes at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from dt_lens.arguments import whole_number
from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import evaluating
from dt_lens.progress import Count, counting

if TYPE_CHECKING:
    from torch import Tensor

    from dt_lens.behaviour.agents.environment import Task
    from dt_lens.behaviour.agents.evaluation import Evaluation, FailureRule
    from dt_lens.behaviour.agents.rollouts import Conditions, Outcome
    from dt_lens.behaviour.texts.evaluation import TextEvaluation
    from dt_lens.behaviour.texts.windows import Texts
    from dt_lens.behaviour.agents.workers import Job
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

__all__ = ["evaluate", "model_id"]


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
        environment: a Gymnasium id, ``"module:Id"`` to import a package that registers it; the model's own by default.
        episodes: how many.
        seed: of the first episode, not negative.
        target_return: what the agent is asked for, in the environment's units; the model's first one by default.
        environment_kwargs: for ``gymnasium.make``; by default those of the model's facts, with the model's environment.
        max_steps: cut episodes after this many steps, where the environment's time limit does not do so earlier.
        failure: what counts as failing; see ``Evaluation``.
        workers: processes; as many as there are processor cores to use by default; 1 runs in this process.
        lanes: episodes side by side in a process, at least 8; chosen by the number of episodes by default.
        progress: ``True`` for a progress bar on standard error, or a function of (episodes done, episodes), which
            counts running episodes by their share of the time limit.
        texts, context, windows: for a language model only; ``texts`` may also stand in the place of ``environment``.

    Raises:
        DtLensError: when the environment or the target return is neither given nor among the model's facts, when they
            do not fit the model, when the model predicts an action that is not finite, or when a worker dies.
    """
    if getattr(model, "weights_only", False):
        raise DtLensError(
            "This model was opened for its weights only and cannot run; use dt_lens.load for one that can."
        )
    if hasattr(model, "tokenizer"):
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

    from dt_lens.behaviour.agents.lanes import LEAST_LANES
    from dt_lens.behaviour.agents.evaluation import Evaluation, check_rule

    _check_model(model)
    if any(value is not None for value in (texts, context, windows)):
        raise DtLensError(
            "This is an agent, and evaluate runs it in an environment; leave out texts, context and windows."
        )
    whole_number(episodes, "episodes", 1)
    whole_number(seed, "seed", 0)
    for name, value, least in (("max_steps", max_steps, 1), ("workers", workers, 1), ("lanes", lanes, LEAST_LANES)):
        if value is not None:
            whole_number(value, name, least)
    if failure is not None:
        check_rule(failure)
    setting = setting_of(model, environment, environment_kwargs, target_return, max_steps)
    seeds = range(int(seed), int(seed) + int(episodes))
    with counting(progress, len(seeds), "episodes") as count:
        # Episodes that run count by the share of the time limit that they have run.
        report = None if count is None else lambda finished, running: count(finished + running)
        outcomes = _run(model, setting.task, setting.conditions, seeds, workers, lanes, report)
    return Evaluation.from_outcomes(
        outcomes,
        environment=setting.environment,
        environment_kwargs=setting.environment_kwargs,
        target_return=setting.target_return,
        time_limit=setting.task.time_limit,
        model_id=model_id(model),
        edits=tuple(edit.to_dict() for edit in getattr(model, "active_edits", ())),
        failure=failure,
    )


class Setting(NamedTuple):
    """Where a model acts, what it is asked for, and in which units it is told."""

    environment: str
    environment_kwargs: dict[str, Any]
    target_return: float
    task: Task
    conditions: Conditions


def setting_of(
    model: HookedDecisionTransformer,
    environment: Any,
    environment_kwargs: Mapping[str, Any] | None,
    target_return: Any,
    max_steps: int | None,
    caller: str = "evaluate",
) -> Setting:
    """The setting of ``evaluate``'s arguments, with the model's facts for what is ``None``.

    Raises:
        DtLensError: when the environment or the target return is neither given nor among the model's facts, or they do
            not fit the model; the sentence tells what to give ``caller``.
    """
    from dt_lens.behaviour.agents.environment import make_task

    facts = model.facts
    if environment is None:
        environment = facts.environment
        if environment is None:
            raise DtLensError(
                "The model does not say which environment it was trained in; "
                f"give {caller} an environment, such as 'Hopper-v5'."
            )
    if environment_kwargs is None:
        environment_kwargs = facts.environment_kwargs if environment == facts.environment else {}
    if target_return is None:
        if not facts.target_returns:
            raise DtLensError(
                "The model does not say which return to ask for; "
                f"give {caller} a target_return, in the environment's own units."
            )
        target_return = facts.target_returns[0]
    if not isinstance(environment, str):
        raise DtLensError(f"environment is {environment!r}; it must be a Gymnasium id, such as 'Hopper-v5'.")
    if not isinstance(target_return, int | float | np.number) or not math.isfinite(target_return):
        raise DtLensError(f"target_return is {target_return!r}; it must be a finite number.")
    task = make_task(environment, environment_kwargs, model.cfg, max_steps)
    target = float(target_return)
    return Setting(environment, dict(environment_kwargs), target, task, _conditions(model, target))


def portable_job(
    model: HookedDecisionTransformer, task: Task, conditions: Conditions, seeds: range, lanes: int
) -> Job | None:
    """What any process needs to run ``model`` as it is now; ``None`` where only this process can.

    That is so of a model that is not on the CPU, has hooks or a state encoder of its own.
    """
    from safetensors.torch import save

    from dt_lens.behaviour.agents.workers import Job

    used = acting_weights(model)
    if not _is_plain(model) or used["predict.action.W"].device.type != "cpu":
        return None
    packed = save({name: weight.contiguous() for name, weight in used.items()})
    facts = model.facts
    return Job(packed, model.cfg.to_dict(), facts.context, task, conditions, seeds, lanes, facts.padding)


def acting_weights(model: HookedDecisionTransformer) -> dict[str, Tensor]:
    """The live weights that acting takes, by name."""
    from dt_lens.decision_transformer.policy import acting_shapes

    weights = model.weights
    return {name: weights[name] for name in acting_shapes(model.cfg) if name in weights}


def model_id(model: HookedDecisionTransformer) -> str:
    """Sixteen hexadecimal digits that change when any weight, the configuration or the run facts change.

    The first 64 bits of a SHA-256; labels and notes among the facts count like the rest.

    Raises:
        DtLensError: for a model that is no agent.
    """
    import torch

    if not hasattr(model, "facts"):
        raise DtLensError(
            "What was asked for is measured in an agent's episodes, which takes a decision transformer from "
            f"dt_lens.load or dt_lens.wrap, not a {type(model).__name__}; a language model is evaluated on texts."
        )
    digest = hashlib.sha256(
        json.dumps([model.cfg.to_dict(), asdict(model.facts)], sort_keys=True, default=str).encode()
    )
    for name, weight in sorted(model.weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_model(model: Any) -> None:
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

    if not isinstance(model, HookedDecisionTransformer):
        raise DtLensError(
            f"evaluate takes a decision transformer from dt_lens.load or dt_lens.wrap, not a {type(model).__name__}; "
            "wrap it first: dt_lens.wrap(model)."
        )


def _conditions(model: HookedDecisionTransformer, target_return: float) -> Conditions:
    from dt_lens.behaviour.agents.rollouts import Conditions

    facts, size = model.facts, model.cfg.state_dim
    mean = np.zeros(size) if facts.state_mean is None else np.asarray(facts.state_mean, dtype=np.float64)
    std = np.ones(size) if facts.state_std is None else np.asarray(facts.state_std, dtype=np.float64)
    if len(mean) != size:
        raise DtLensError(f"The run facts normalise states of {len(mean)} numbers and this model reads {size}.")
    return Conditions(target_return, facts.return_scale, mean, std, model.cfg.max_ep_len - 1)


def _run(
    model: HookedDecisionTransformer,
    task: Task,
    conditions: Conditions,
    seeds: range,
    workers: int | None,
    lanes: int | None,
    report: Callable[[int, float], None] | None,
) -> list[Outcome]:
    from dt_lens.behaviour.agents import workers as pool
    from dt_lens.behaviour.agents.lanes import CUDA_LANES, LEAST_LANES, arrange, plan_lanes
    from dt_lens.behaviour.agents.rollouts import run_episodes
    from dt_lens.behaviour.agents.windows import SlidingPolicy, WindowPolicy
    from dt_lens.decision_transformer.policy import ActingModel

    wanted = min(workers or _cores(), math.ceil(len(seeds) / LEAST_LANES))
    job = portable_job(model, task, conditions, seeds, lanes or plan_lanes(math.ceil(len(seeds) / wanted)))
    if job is not None:
        return pool.run_job(job, iter(seeds), report) if wanted == 1 else pool.run_in_workers(job, wanted, report)
    context, padding, used = model.facts.context, model.facts.padding, acting_weights(model)
    device = used["predict.action.W"].device
    with pool.one_thread(), evaluating(model):
        # One width for everything: what hooks do to a batch is theirs, and need not be the same at another width.
        lanes = lanes or (LEAST_LANES if device.type == "cpu" else CUDA_LANES)
        policy: Any
        if _is_plain(model):
            acting = ActingModel(used, model.cfg)
            alone = arrange(acting, context, lanes).alone
            policy = SlidingPolicy(acting, context, lanes, alone=alone, padding=padding)
        else:
            policy = WindowPolicy(model, model.cfg, context, lanes, used["predict.action.W"], padding=padding)
        return run_episodes(policy, task, conditions, iter(seeds), report=report)


def _is_plain(model: HookedDecisionTransformer) -> bool:
    """Whether the lean model can act for it: no hooks, no state encoder of its own, tokens that slide unchanged."""
    from dt_lens.decision_transformer.model import Linear

    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    slides = model.cfg.position != "step" and model.cfg.timestep_of == "step"
    return not hooked and slides and type(model.embed["state"]) is Linear


def _cores() -> int:
    """Processor cores that this process may use, container limits included."""
    from loky import cpu_count

    return int(cpu_count())
