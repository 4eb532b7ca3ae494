"""Set up an agent in its environment and run its episodes. Every caller that runs an agent does it through this file.

``setting_of`` makes a ``Setting`` from the arguments of ``evaluate``. ``run`` runs episodes of a live model,
in worker processes or in this one. ``portable_job`` packs an agent for another process; ``run_job`` runs it there.
Edits act as low-rank changes beside the unedited weights, one edit or many; see ``dt_lens.behaviour.agents.arms``.

The hooked model is imported only inside functions that take one, so that a worker process starts in the time that torch
and Gymnasium take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors.torch import load, save

from dt_lens.arguments import is_finite_number
from dt_lens.behaviour.agents.environment import Environment, Named, make_environment, specification_of
from dt_lens.behaviour.agents.lanes import CUDA_LANES, LEAST_LANES, arrange, plan_lanes
from dt_lens.behaviour.agents.rollouts import Conditions, EpisodeCount, Outcome, Policy, Start, run_episodes
from dt_lens.behaviour.agents.windows import SlidingPolicy, WindowPolicy
from dt_lens.behaviour.agents.workers import run_in_workers
from dt_lens.decision_transformer.changes import Change
from dt_lens.decision_transformer.config import HookedDecisionTransformerConfig
from dt_lens.decision_transformer.facts import Padding
from dt_lens.decision_transformer.policy import ActingModel
from dt_lens.errors import DtLensError, as_written
from dt_lens.lens.environment_names import import_module_of
from dt_lens.lens.forward_mode import evaluating, one_thread, usable_cores

if TYPE_CHECKING:
    from dt_lens.behaviour.agents.arms import Arm
    from dt_lens.decision_transformer.model import HookedDecisionTransformer

__all__ = [
    "Job",
    "Setting",
    "acts_without_hooks",
    "known_setting",
    "portable_job",
    "acting_model",
    "run",
    "run_job",
    "run_model",
    "setting_of",
]

Watch = Callable[[Policy], Policy]  # wraps a policy, to see what it is given; it must answer as the policy does


class Setting(NamedTuple):
    """The environment a model acts in, the return it is asked for, and how states and returns are scaled for it."""

    environment: str
    environment_kwargs: dict[str, Any]
    target_return: float
    made: Environment
    conditions: Conditions
    role: str = ""  # "training" or "evaluation", where the model's facts know both


def setting_of(
    model: HookedDecisionTransformer,
    environment: Any,
    environment_kwargs: Mapping[str, Any] | None,
    target_return: Any,
    max_steps: int | None,
    caller: str = "evaluate",
    deterministic: Any = None,
) -> Setting:
    """The setting of ``evaluate``'s arguments, with the model's facts for what is ``None``.

    Raises:
        DtLensError: when the environment or the target return is neither given nor among the model's facts, or they do
            not fit the model; the sentence says what to give ``caller``.
    """
    facts = model.facts
    if environment is not None and not isinstance(environment, str):
        given, environment = environment, specification_of(environment).id
    else:
        given = None
    if environment_kwargs is not None and not isinstance(environment_kwargs, Mapping):
        raise DtLensError(
            f"environment_kwargs is {as_written(environment_kwargs)}; it must be a dictionary of keywords."
        )
    import_module_of(environment)
    environment, environment_kwargs, role = facts.environment_for(environment, environment_kwargs)
    if environment is None:
        raise DtLensError(
            "The model does not say which environment it was trained in; "
            f"give {caller} an environment, such as 'Hopper-v5'."
        )
    if target_return is None:
        if not facts.target_returns:
            raise DtLensError(
                "The model does not say which return to ask for; "
                f"give {caller} a target_return, in the environment's own units."
            )
        target_return = facts.target_returns[0]
    if not is_finite_number(target_return):
        raise DtLensError(f"target_return is {as_written(target_return)}; it must be a finite number.")
    of_the_facts = deterministic is None
    deterministic = facts.deterministic if deterministic is None else deterministic
    if not isinstance(deterministic, bool | np.bool_):
        raise DtLensError(f"deterministic is {as_written(deterministic)}; it must be True or False.")
    if not deterministic and not model.cfg.discrete_actions:
        remedy = "leave out deterministic=False (--stochastic)"
        if of_the_facts:
            remedy = "pass deterministic=True (--deterministic) against its facts"
        raise DtLensError(
            f"This model predicts continuous actions, and not how likely each of them is; {remedy}: nothing can be "
            "sampled."
        )
    setting = known_setting(
        model, given or environment, environment_kwargs, float(target_return), max_steps, bool(deterministic)
    )
    return setting._replace(role=role)


def known_setting(
    model: HookedDecisionTransformer,
    environment: Named,
    environment_kwargs: Mapping[str, Any],
    target_return: float,
    max_steps: int | None,
    deterministic: bool = True,
) -> Setting:
    """The setting of these very values; no module is imported."""
    facts, encoder = model.facts, model.embed["state"]
    made = make_environment(
        environment,
        environment_kwargs,
        model.cfg,
        max_steps,
        ignores=facts.ignores,
        texts=facts.texts,
        image=getattr(encoder, "image", None),
        # Whoever gives a mean and a scale of pixels has said how they are scaled.
        pixels=getattr(encoder, "pixels", 1.0) if facts.state_mean is None else 1.0,
    )
    if model.cfg.discrete_actions:
        facts.require_choices(np.ravel(getattr(made.action_space, "nvec", made.act_dim)).tolist(), made.environment)
    conditions = _conditions(model, target_return)._replace(deterministic=deterministic)
    return Setting(made.environment, dict(environment_kwargs), target_return, made, conditions)


def _conditions(model: HookedDecisionTransformer, target_return: float) -> Conditions:
    facts, size = model.facts, model.cfg.state_dim
    mean = np.zeros(size) if facts.state_mean is None else np.asarray(facts.state_mean, dtype=np.float64)
    std = np.ones(size) if facts.state_std is None else np.asarray(facts.state_std, dtype=np.float64)
    if len(mean) != size:
        raise DtLensError(f"The run facts normalise states of {len(mean)} numbers and this model reads {size}.")
    return Conditions(target_return, facts.return_scale, mean, std, model.cfg.max_ep_len - 1)


@dataclass(frozen=True)
class Job:
    """An agent in its setting, packed for any process."""

    weights: bytes  # safetensors, without the arms' changes
    cfg: dict[str, Any]
    context: int
    made: Environment
    conditions: Conditions
    lanes: int
    padding: Padding = "mask"
    arms: tuple[tuple[Change, ...], ...] = ((),)  # what changes in each arm; by default there is one, without a change


def portable_job(
    model: HookedDecisionTransformer, setting: Setting, lanes: int, arms: Sequence[Arm] | None = None
) -> Job | None:
    """Pack ``model`` for another process, as it is now or in other arms; ``None`` where only this process can run it.

    That is so for a model that is not on the CPU, has hooks, or has a state encoder of its own. All ``arms`` have the
    same weights and the same ``own`` ones.
    """
    from dt_lens.behaviour.agents.arms import arm_of

    arms = [arm_of(model)] if arms is None else arms
    used = {**arms[0].weights, **arms[0].own}
    if not acts_without_hooks(model) or used["predict.action.W"].device.type != "cpu":
        return None
    weights = save({name: weight.contiguous() for name, weight in used.items()})
    facts, changes = model.facts, tuple(arm.changes for arm in arms)
    cfg = model.cfg.to_dict()
    return Job(weights, cfg, facts.context, setting.made, setting.conditions, lanes, facts.padding, changes)


def run(
    model: HookedDecisionTransformer,
    setting: Setting,
    seeds: Sequence[int],
    *,
    arms: Sequence[Arm] | None = None,
    workers: int | None = None,
    lanes: int | None = None,
    report: EpisodeCount | None = None,
    watch: Watch | None = None,
) -> list[Outcome]:
    """Run an episode for each of ``seeds`` with ``model`` as it is now, edits and hooks included.

    What happens in an episode depends on the model, the setting and the seed alone, to the last bit; see ``evaluate``.
    A model that ``portable_job`` cannot pack runs in this process.

    Args:
        model: a wrapped decision transformer.
        setting: from ``setting_of``.
        seeds: one for each episode.
        arms: run all seeds in each of these instead, side by side, as if each was run alone. Not for a model with hooks
            or a state encoder of its own.
        workers: processes; as many as there are cores to use by default; 1 runs in this process.
        lanes: episodes side by side in a process; chosen by the number of episodes by default.
        report: called after every step in this process, at most every 0.2 s from a worker.
        watch: wraps the policy before the first step; all episodes then run in this process.

    Returns:
        an outcome for every seed and arm, in no particular order.

    Raises:
        DtLensError: when the model predicts an action that is not finite, or when a worker dies.
    """
    from dt_lens.behaviour.agents.arms import arm_of

    arms = [arm_of(model)] if arms is None else arms
    outcomes: list[Outcome] = []
    for numbers in _together(arms):
        chosen, done = [arms[number] for number in numbers], len(outcomes)
        starts = [Start(seed, place) for place in range(len(chosen)) for seed in seeds]
        wanted = min(workers or usable_cores(), math.ceil(len(starts) / LEAST_LANES)) if watch is None else 1
        tell = None if report is None else lambda finished, running, done=done: report(done + finished, running)
        job = portable_job(model, setting, lanes or plan_lanes(math.ceil(len(starts) / wanted)), chosen)
        if job is None:
            found = _run_here(model, setting, iter(starts), chosen, lanes, tell, watch)
        elif wanted == 1:
            found = run_job(job, iter(starts), tell, watch)
        else:
            found = run_in_workers(partial(run_job, job), starts, wanted, tell)
        outcomes += [outcome._replace(arm=numbers[outcome.arm]) for outcome in found]
    return outcomes


def _together(arms: Sequence[Arm]) -> Iterable[list[int]]:
    """The numbers of arms that share their weights; one that has some of its own runs alone."""
    shared = [number for number, arm in enumerate(arms) if not arm.own]
    if shared:
        yield shared
    yield from ([number] for number, arm in enumerate(arms) if arm.own)


def run_job(
    job: Job, seeds: Iterator[int | Start], report: EpisodeCount | None = None, watch: Watch | None = None
) -> list[Outcome]:
    """Run ``seeds`` of ``job`` in this process; arguments as for ``run``."""
    with one_thread():
        return run_model(acting_model(job), job, seeds, report, watch)


def acting_model(job: Job) -> ActingModel:
    """The model of a job, without its arms' changes."""
    return ActingModel(load(job.weights), HookedDecisionTransformerConfig.from_dict(job.cfg))


def run_model(
    model: ActingModel,
    job: Job,
    seeds: Iterator[int | Start],
    report: EpisodeCount | None = None,
    watch: Watch | None = None,
    ended: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run ``seeds`` of ``job``, whose model has been made; on one torch thread."""
    policy, least_width = _lean_policy(model, job.context, job.lanes, job.padding, job.arms)
    policy = policy if watch is None else watch(policy)
    return run_episodes(policy, job.made, job.conditions, seeds, least_width=least_width, report=report, ended=ended)


def _run_here(
    model: HookedDecisionTransformer,
    setting: Setting,
    seeds: Iterator[Start],
    arms: Sequence[Arm],
    lanes: int | None,
    report: EpisodeCount | None,
    watch: Watch | None,
) -> list[Outcome]:
    """Run a model that only this process can run, in batches of one width.

    What hooks do to a batch is theirs, and need not be the same at another width.
    """
    context, padding, used = model.facts.context, model.facts.padding, {**arms[0].weights, **arms[0].own}
    like = used["predict.action.W"]
    with one_thread(), evaluating(model):
        lanes = lanes or (LEAST_LANES if like.device.type == "cpu" else CUDA_LANES)
        policy: Policy
        if acts_without_hooks(model):
            changes = [arm.changes for arm in arms]
            policy, _ = _lean_policy(ActingModel(used, model.cfg), context, lanes, padding, changes)
        elif len(arms) == 1:
            policy = WindowPolicy(model, model.cfg, context, lanes, like, padding=padding)
        else:
            raise DtLensError("A model with hooks cannot act with several edits in one batch; run one after another.")
        policy = policy if watch is None else watch(policy)
        return run_episodes(policy, setting.made, setting.conditions, seeds, report=report)


def _lean_policy(
    model: ActingModel, context: int, lanes: int, padding: Padding, arms: Sequence[Sequence[Change]]
) -> tuple[Policy, int | None]:
    """A policy of at most ``lanes`` rows, and how narrow its batch may become."""
    width, least_width, alone = arrange(model, context, lanes)
    numbered = dict(enumerate(arms))
    return SlidingPolicy(model, context, width, alone=alone, padding=padding, arms=numbered), least_width


def acts_without_hooks(model: HookedDecisionTransformer) -> bool:
    """Whether ``ActingModel`` acts as ``model`` does: no hooks, a linear state encoder, tokens that slide unchanged."""
    from dt_lens.decision_transformer.model import Embed

    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    slides = model.cfg.position != "step" and model.cfg.timestep_of == "step"
    return not hooked and slides and type(model.embed["state"]) is Embed
