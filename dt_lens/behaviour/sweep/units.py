"""The unit of work: one arm of a sweep with one block of seeds. A pure function of what it is given."""

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
    """An arm with a block of seeds, as it travels to a worker."""

    number: int
    change: bytes  # the weights in which the arm differs from the base, as safetensors; empty where in none
    seed: int  # of the first episode
    episodes: int


def run_unit(job: Job, base: Mapping[str, Tensor], unit: Unit) -> list[Outcome]:
    """The outcomes of ``unit``, by seed: the same bits in every process, in any order, beside any others.

    Args:
        job: what all units share; its weights and lanes are not used.
        base: the unedited weights that acting takes, by name.
        unit: which one.

    Raises:
        DtLensError: for an action that is not finite.
    """
    weights = save({**base, **(load(unit.change) if unit.change else {})})
    seeds = range(unit.seed, unit.seed + unit.episodes)
    own = replace(job, weights=weights, lanes=plan_lanes(unit.episodes))
    return sorted(run_job(own, iter(seeds)))
