"""TODO docstring."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import evaluating, one_thread

if TYPE_CHECKING:
    from torch import Tensor

    from dt_lens.behaviour.agents.environment import Task
    from dt_lens.behaviour.agents.rollouts import Conditions, Outcome
    from dt_lens.behaviour.agents.workers import Job
    from dt_lens.decision_transformer.model import HookedDecisionTransformer


__all__ = [
    "Setting",
    "setting_of",
    "portable_job",
    "acting_weights",
]


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
    with one_thread(), evaluating(model):
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
