"""What a node of a cluster runs: one unit, in a process that keeps the unedited agent between units."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dt_lens.behaviour.workers import Job

__all__ = ["prove", "run_on_node"]

STEPS = 20

_kept: dict[str, tuple[Job, Mapping[str, Tensor], dict[str, str]]] = {}


def prove(job: Job) -> dict[str, str]:
    """What tells whether this machine comes to another one's bits: versions, and a few steps of the unedited agent."""
    from safetensors.torch import load

    from dt_lens.behaviour.sweep.plan import software
    from dt_lens.behaviour.sweep.units import Unit, run_unit
    from dt_lens.errors import DtLensError
    from dt_lens.version import __version__

    short = replace(job, task=replace(job.task, time_limit=min(STEPS, job.task.time_limit)))
    try:
        outcomes = repr([(o.total.hex(), o.length) for o in run_unit(short, load(job.weights), Unit(0, b"", 0, 2))])
    except DtLensError as error:
        outcomes = str(error)
    steps = hashlib.sha256(outcomes.encode()).hexdigest()
    return {"version of dt-lens": __version__, **software(), "steps": steps}


def run_on_node(packed: Sequence[Any], token: str, unit: tuple[Any, ...]) -> tuple[str, str, dict[str, str], Any]:
    """Run a unit: ``"done"`` with its outcomes or ``"refused"`` with a sentence, and who did it with which proof.

    Args:
        packed: a reference to the pickled ``Job``.
        token: which job it is.
        unit: the fields of a ``Unit``.
    """
    import ray
    import torch
    from safetensors.torch import load

    from dt_lens.behaviour.sweep.units import Unit, run_unit
    from dt_lens.errors import DtLensError, because

    torch.set_num_threads(1)
    if token not in _kept:
        _kept.clear()
        job = pickle.loads(ray.get(packed[0]))
        _kept[token] = job, load(job.weights), prove(job)
    job, base, proof = _kept[token]
    node = f"node {ray.get_runtime_context().get_node_id()[:8]}, process {os.getpid()}"
    try:
        return "done", node, proof, [tuple(outcome) for outcome in run_unit(job, base, Unit(*unit))]
    except DtLensError as error:
        return "refused", node, proof, str(error)
    except Exception as error:  # somebody's environment may raise anything
        return "refused", node, proof, f"The rollout raised {type(error).__name__}: {because(error)}."
