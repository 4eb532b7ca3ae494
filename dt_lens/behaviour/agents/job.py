"""An agent in its setting, packed for a sweep's workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from dt_lens.behaviour.agents.fingerprint import registration
from dt_lens.behaviour.agents.lanes import plan_lanes
from dt_lens.behaviour.agents.packed_arms import unpacked
from dt_lens.behaviour.agents.rollouts import Outcome, Start
from dt_lens.behaviour.agents.running import Job, acting_model, run_model
from dt_lens.behaviour.job import Part, Row, repeated, versions_of
from dt_lens.decision_transformer.policy import ActingModel
from dt_lens.errors import DtLensError
from dt_lens.lens.forward_mode import one_thread

__all__ = ["SOFTWARE", "AgentJob"]

SOFTWARE = ("torch", "gymnasium", "mujoco", "numpy")  # another version of one of these may give other bits
# How the policy computes: another one gives other bits from the same weights. 2: edits as low-rank changes beside the
# unedited weights, and products of weights made beforehand. 3: the neurons of an MLP some at a time.
ARITHMETIC = "3"
STEPS = 20  # of a sample


@dataclass
class AgentJob:
    """An agent; the weights that acting needs, without the rest of the model."""

    job: Job
    _model: ActingModel | None = field(default=None, repr=False)  # made once in a process

    def __getstate__(self) -> dict[str, Any]:
        return {"job": self.job, "_model": None}

    def run(self, change: Mapping[str, Tensor], units: Sequence[int]) -> list[Row]:
        """Run ``units``; ``change`` is what ``dt_lens.behaviour.agents.packed_arms.packed`` gives."""
        changes, own = unpacked(change)
        job = replace(self.job, lanes=plan_lanes(len(units)), arms=(self.job.arms[0] + changes,))
        with one_thread():
            if own:
                job = replace(job, weights=save({**load(job.weights), **own}))
            model = acting_model(job) if own else self._own_model()
            return sorted((outcome.seed, *outcome.measures) for outcome in run_model(model, job, iter(units)))

    def run_together(self, parts: Sequence[Part], done: Callable[[int, list[Row]], None]) -> None:
        """Run the units of several arms in one batch, each as ``run`` gives it; see ``run_works``."""
        found = [unpacked(change) for change, _ in parts]
        if any(own for _, own in found):
            raise DtLensError("An arm that has weights of its own runs alone.")
        starts = [Start(unit, place) for place, (_, units) in enumerate(parts) for unit in units]
        arms = tuple(self.job.arms[0] + changes for changes, _ in found)
        rows: list[list[Row]] = [[] for _ in parts]

        def ended(outcome: Outcome) -> None:
            of_it = rows[outcome.arm]
            of_it.append((outcome.seed, *outcome.measures))
            if len(of_it) == len(parts[outcome.arm][1]):
                done(outcome.arm, sorted(of_it))

        job = replace(self.job, lanes=plan_lanes(len(starts)), arms=arms)
        with one_thread():
            run_model(self._own_model(), job, iter(starts), ended=ended)

    def _own_model(self) -> ActingModel:
        if self._model is None:
            self._model = acting_model(self.job)
        return self._model

    def provenance(self) -> dict[str, Any]:
        computes = {"version of the policy's arithmetic": ARITHMETIC}
        return {**versions_of(SOFTWARE), **computes, "registration": registration(self.job.made.spec)}

    def sample(self) -> str | None:
        """A hash of the unedited agent's first steps in two episodes."""
        made = replace(self.job.made, time_limit=min(STEPS, self.job.made.time_limit))
        short = AgentJob(replace(self.job, made=made))
        return repeated(lambda: [row[1:3] for row in short.run({}, range(2))])
