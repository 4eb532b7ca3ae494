"""An agent in its setting, packed for a sweep's workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from dt_lens.behaviour.agents.fingerprint import registration
from dt_lens.behaviour.agents.lanes import plan_lanes
from dt_lens.behaviour.agents.running import Job, run_job
from dt_lens.behaviour.job import Row, repeated, versions_of

__all__ = ["SOFTWARE", "AgentJob"]

SOFTWARE = ("torch", "gymnasium", "mujoco", "numpy")  # another version of one of these may give other bits
STEPS = 20  # of a sample


@dataclass
class AgentJob:
    """An agent; the weights that acting needs, without the rest of the model."""

    job: Job
    _base: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"job": self.job, "_base": {}}

    def run(self, change: Mapping[str, Tensor], units: Sequence[int]) -> list[Row]:
        if not self._base:
            self._base = load(self.job.weights)
        own = replace(self.job, weights=save({**self._base, **change}), lanes=plan_lanes(len(units)))
        return sorted((outcome.seed, *outcome.measures) for outcome in run_job(own, iter(units)))

    def provenance(self) -> dict[str, Any]:
        return {**versions_of(SOFTWARE), "registration": registration(self.job.made.spec)}

    def sample(self) -> str | None:
        """A hash of the unedited agent's first steps in two episodes."""
        made = replace(self.job.made, time_limit=min(STEPS, self.job.made.time_limit))
        short = AgentJob(replace(self.job, made=made))
        return repeated(lambda: [row[1:3] for row in short.run({}, range(2))])
