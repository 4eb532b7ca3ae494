"""The task of agents: a unit is an episode, which is numbered by its seed; more return is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dt_lens.arguments import whole_number
from dt_lens.behaviour.agents.arms import Arm, acting_weights, arm_of, packed_arm
from dt_lens.behaviour.agents.environment import Env, Named
from dt_lens.behaviour.agents.evaluation import AgentEvaluation, terms_of_episodes
from dt_lens.behaviour.agents.failure import known_rule
from dt_lens.behaviour.agents.identity import model_id
from dt_lens.behaviour.agents.job import SOFTWARE, AgentJob
from dt_lens.behaviour.agents.lanes import LEAST_LANES
from dt_lens.behaviour.agents.recording import actions_of_episode
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.agents.running import Setting, acts_without_hooks, portable_job, run, setting_of
from dt_lens.behaviour.agents.situations import action_chances, situations_of
from dt_lens.behaviour.agents.watched import activations_of_episodes
from dt_lens.behaviour.arms import Arms
from dt_lens.behaviour.evaluation import Evaluation
from dt_lens.behaviour.job import Job
from dt_lens.behaviour.situations import Situations
from dt_lens.behaviour.task import Columns, Task
from dt_lens.behaviour.terms import FailureRule, Measure, Terms
from dt_lens.edits.edit import Edit
from dt_lens.errors import DtLensError
from dt_lens.lens.activations import Activations
from dt_lens.lens.forward_mode import measuring
from dt_lens.lens.protocol import require_agent
from dt_lens.progress import Count, ProgressCallback, silent

if TYPE_CHECKING:
    from dt_lens.report.page import Section

__all__ = ["AgentTask"]

COUNTED = 10  # episodes in which actions are counted


@dataclass(frozen=True)
class AgentTask(Task):
    """Episodes of a decision transformer in an environment. Make one with ``AgentTask.of``.

    A subclass may measure more of an episode: it names the measures in ``measures``, gives them in ``measure``, and
    may compare one of them instead of the return: ``outcome`` and ``better``.

    Attributes:
        setting: the environment, the target return, and how states and returns are scaled.
        failure: what counts as failing; ``None`` for a guess by the environment's name.
        lanes: episodes side by side in a process; ``None`` for as many as fit the number of episodes.
        video: whether reports draw the worst edit beside the unedited agent.
    """

    software: ClassVar[tuple[str, ...]] = SOFTWARE
    evaluation: ClassVar[type[Evaluation]] = AgentEvaluation
    outcome: ClassVar[str] = "return"
    better: ClassVar[Any] = "more"
    measures: ClassVar[Mapping[str, Measure]] = {}
    usual: ClassVar[Mapping[str, Any]] = {"actions": "largest"}

    setting: Setting
    failure: FailureRule | None = None
    lanes: int | None = None
    video: bool = True

    @classmethod
    def of(
        cls,
        model: Any,
        environment: Named | None = None,
        *,
        environment_kwargs: Mapping[str, Any] | None = None,
        target_return: float | None = None,
        max_steps: int | None = None,
        failure: FailureRule | None = None,
        deterministic: bool | None = None,
        lanes: int | None = None,
        video: bool = True,
        caller: str = "evaluate",
    ) -> Self:
        """The task of ``model`` in an environment, with the model's facts for what is ``None``.

        Args:
            model: a wrapped decision transformer.
            environment: a Gymnasium id, ``"module:Id"`` to import a package that registers it, an ``EnvSpec``, or a
                function that makes an environment.
            environment_kwargs, target_return, max_steps, failure, deterministic, lanes: as for ``evaluate``.
            video: whether reports draw the worst edit beside the unedited agent.
            caller: who asks, for messages.

        Raises:
            DtLensError: when the environment or the target return is neither given nor among the model's facts, or they
                do not fit the model.
        """
        require_agent(model, caller)
        # As many lanes as somebody has memory for; beyond that a number is a mistake.
        for name, value, least, most in (("max_steps", max_steps, 1, None), ("lanes", lanes, LEAST_LANES, 2**16)):
            if value is not None:
                whole_number(value, name, least, most)
        setting = setting_of(model, environment, environment_kwargs, target_return, max_steps, caller, deterministic)
        task = cls(setting, known_rule(failure, model.facts, setting.environment), lanes, video)
        if type(task).measure is not AgentTask.measure:
            made = replace(setting.made, measure=task.measure, measures=tuple(cls.measures))
            task = replace(task, setting=setting._replace(made=made))
        return task

    def measure(self, env: Env) -> Callable[[], Mapping[str, float]]:
        """Called after each reset; returns a function that gives the values of ``measures`` when the episode ends."""
        return dict

    @property
    def terms(self) -> Terms:
        s = self.setting
        return terms_of_episodes(
            s.environment,
            s.target_return,
            s.made.time_limit,
            s.environment_kwargs,
            self.failure,
            deterministic=s.conditions.deterministic,
            measures=self.measures,
            outcome=self.outcome,
            better=self.better,
            task="episodes" if type(self) is AgentTask else type(self).__name__,
        )

    def at(self, target_return: float) -> Self:
        """The same task at another target return."""
        conditions = self.setting.conditions._replace(target_return=float(target_return))
        return replace(self, setting=self.setting._replace(target_return=float(target_return), conditions=conditions))

    def with_failure(self, failure: Any) -> Self:
        return self if failure is None else replace(self, failure=self.terms.rule(failure))

    def identity(self, model: Any) -> tuple[str, str]:
        # Agents of one environment may be compared, whichever weights they have: no identity without the edits.
        return "", model_id(model)

    def run(
        self, model: Any, units: Sequence[int], *, workers: int | None = None, progress: Count | None = None
    ) -> Columns:
        # Episodes that run count by the share of the time limit that they have run.
        report = None if progress is None else lambda finished, running: progress(finished + running, len(units))
        return self._columns(units, run(model, self.setting, units, workers=workers, lanes=self.lanes, report=report))

    def _columns(self, units: Sequence[int], outcomes: Sequence[Outcome]) -> Columns:
        by_seed = {outcome.seed: outcome.measures for outcome in outcomes}
        columns = zip(*(by_seed[seed] for seed in units), strict=True)
        return dict(zip(self.terms.measures, map(list, columns), strict=True))

    def evaluate_each(
        self,
        model: Any,
        edits: Sequence[Edit | None],
        units: Sequence[int],
        *,
        workers: int | None = None,
        progress: Count | None = None,
    ) -> list[Evaluation]:
        if type(self).run is not AgentTask.run or not acts_without_hooks(model):
            return super().evaluate_each(model, edits, units, workers=workers, progress=progress)
        abouts, arms = [], list[Arm]()
        for edit in edits:
            with edit or nullcontext():
                abouts.append(self.about(model))
                arms.append(arm_of(model))
        total = len(units) * len(edits)
        report = None if progress is None else lambda finished, running: progress(finished + running, total)
        with measuring(model):
            outcomes = run(model, self.setting, units, arms=arms, workers=workers, lanes=self.lanes, report=report)
        by_arm: list[list[Outcome]] = [[] for _ in edits]
        for outcome in outcomes:
            by_arm[outcome.arm].append(outcome)
        return [
            self.result(units, self._columns(units, found), **about)
            for found, about in zip(by_arm, abouts, strict=True)
        ]

    @property
    def details(self) -> dict[str, Any]:
        return {"environment_role": self.setting.role}

    def common_outputs(self, model: Any, tell: ProgressCallback = silent) -> NDArray[np.float64]:
        """Discrete actions: how often each was taken in ten episodes. Continuous: the sum of each coordinate's size."""
        sizes = np.zeros(model.cfg.act_dim)
        for seed in range(COUNTED):
            tell(f"counting actions  episode {seed + 1} of {COUNTED}", seed / COUNTED)
            actions = actions_of_episode(model, self.setting, seed)
            if model.cfg.discrete_actions:
                sizes += self.setting.made.one_hot(actions).sum(0)
            else:
                sizes += np.abs(actions).sum(0)
        return sizes

    def situations(self, model: Any, seed: int = 0, tell: ProgressCallback = silent) -> Sequence[Situations] | None:
        """Every state alone, and windows that the agent meets; in a MiniGrid the windows; see ``Task.situations``.

        ``None`` unless actions are discrete, and the dynamics a table or the environment a MiniGrid.

        Raises:
            DtLensError: where the facts name no factors, and for a MiniGrid that no planner knows.
        """
        if not model.cfg.discrete_actions:
            return None
        factors = (model.facts.factors or {}).get("state_in")
        if not factors:
            raise DtLensError(
                "The model's facts do not say what the labels of state_in consist of (factors, in dt_lens.json)."
            )
        return situations_of(model, self.setting, factors, seed, tell)

    def choices(self, model: Any, situations: Situations) -> Float[Tensor, "n outputs"]:
        """The probability of each action; see ``Task.choices``."""
        return action_chances(model, situations)

    def sections(self, arms: Arms, folder: Path) -> list[Section]:
        from dt_lens.behaviour.agents.report import video_section

        return [video_section(arms, self.setting, folder, self.video)]

    def pack(self, model: Any) -> Job:
        job = portable_job(model, self.setting, LEAST_LANES)
        if job is None:
            raise DtLensError(
                "This agent cannot run in other processes, because it is not on the CPU, has hooks or a state encoder "
                "of its own; move it, take its hooks off, or use evaluate."
            )
        return AgentJob(job)

    def weights(self, model: Any) -> Mapping[str, Tensor]:
        return acting_weights(model)

    def change(self, model: Any, base: Mapping[str, bytes]) -> Mapping[str, Tensor]:
        if type(self).pack is not AgentTask.pack:
            return super().change(model, base)
        return packed_arm(arm_of(model))

    def activations(
        self,
        model: Any,
        *,
        count: int | None = None,
        seed: int = 0,
        matrices: Sequence[str] | str | None = None,
        tell: ProgressCallback = silent,
    ) -> Activations:
        seeds = self.units(self.counts["activations"] if count is None else count, seed)
        return activations_of_episodes(model, self.setting, seeds, tell, matrices=matrices)
