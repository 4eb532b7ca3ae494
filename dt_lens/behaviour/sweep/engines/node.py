"""What a node of a cluster runs: one unit per call, in a process that keeps the unedited agent between calls."""

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
    """Run a unit.

    Args:
        packed: a Ray reference to the pickled ``Job``, in a list, so that Ray does not fetch it with every call.
        token: identifies the job.
        unit: the fields of a ``Unit``.

    Returns:
        ``"done"`` or ``"refused"``, the node and process that ran it, its fingerprint, and the outcomes or a sentence.
    """
    import ray
    import torch
    from safetensors.torch import load

    from dt_lens.behaviour.sweep.fingerprint import fingerprint
    from dt_lens.behaviour.sweep.units import Unit, run_unit
    from dt_lens.errors import DtLensError, because

    torch.set_num_threads(1)
    if token not in _kept:
        _kept.clear()
        job = pickle.loads(ray.get(packed[0]))
        _kept[token] = job, load(job.weights), fingerprint(job)
    job, base, found = _kept[token]
    node = f"node {ray.get_runtime_context().get_node_id()[:8]}, process {os.getpid()}"
    try:
        return "done", node, found, [tuple(outcome) for outcome in run_unit(job, base, Unit(*unit))]
    except DtLensError as error:
        return "refused", node, found, str(error)
    except Exception as error:  # an environment may raise anything
        return "refused", node, found, f"The rollout raised {type(error).__name__}: {because(error)}."
