"""The unit of work: one arm of a sweep with one block of seeds. Its outcomes depend on nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from dt_lens.behaviour.agents.lanes import plan_lanes
from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.agents.running import Job, run_job

__all__ = ["Unit", "run_unit"]


class Unit(NamedTuple):
    """An arm with a block of seeds, in the form that is sent to a worker."""

    number: int
    change: bytes  # the weights in which the arm differs from the base, as safetensors; empty if none
    seed: int  # of the first episode
    episodes: int


def run_unit(job: Job, base: Mapping[str, Tensor], unit: Unit) -> list[Outcome]:
    """Run ``unit``; its outcomes by seed are the same bits in every process, whatever else runs.

    Args:
        job: what all units share; its weights and lanes are not used.
        base: the unedited weights that acting needs, by name.
        unit: the unit to run.

    Raises:
        DtLensError: if an action is not finite.
    """
    weights = save({**base, **(load(unit.change) if unit.change else {})})
    seeds = range(unit.seed, unit.seed + unit.episodes)
    own = replace(job, weights=weights, lanes=plan_lanes(unit.episodes))
    return sorted(run_job(own, iter(seeds)))
