"""What a node of a cluster runs: one unit, in a process that keeps the unedited agent between units."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dt_lens.behaviour.agents.running import Job

__all__ = ["run_on_node"]

_kept: dict[str, tuple[Job, Mapping[str, Tensor], Mapping[str, str | None]]] = {}


def run_on_node(
    packed: Sequence[Any], token: str, unit: tuple[Any, ...]
) -> tuple[str, str, Mapping[str, str | None], Any]:
    """Run a unit: ``"done"`` with its outcomes or ``"refused"`` with a sentence, and who did it with which proof.

    Args:
        packed: a reference to the pickled ``Job``.
        token: which job it is.
        unit: the fields of a ``Unit``.
    """
    import ray
    import torch
    from safetensors.torch import load

    from dt_lens.behaviour.sweep.proof import prove
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
