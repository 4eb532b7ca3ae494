"""What a node of a cluster runs: one block per call, in a process that keeps the unedited model between calls."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dt_lens.behaviour.job import Job

__all__ = ["run_on_node"]

_kept: dict[str, tuple[Job, Mapping[str, Any]]] = {}


def run_on_node(packed: Sequence[Any], token: str, work: tuple[Any, ...]) -> tuple[str, str, Mapping[str, Any], Any]:
    """Run a block.

    Args:
        packed: a Ray reference to the pickled ``Job``, in a list, so that Ray does not fetch it with every call.
        token: identifies the job.
        work: the fields of a ``Work``.

    Returns:
        ``"done"`` or ``"refused"``, the node and process that ran it, its fingerprint, and the rows or a sentence.
    """
    import ray
    import torch

    from dt_lens.behaviour.sweep.blocks import Work, run_work
    from dt_lens.behaviour.sweep.fingerprint import fingerprint
    from dt_lens.errors import DtLensError, because

    torch.set_num_threads(1)
    if token not in _kept:
        _kept.clear()
        job = pickle.loads(ray.get(packed[0]))
        _kept[token] = job, fingerprint(job)
    job, found = _kept[token]
    node = f"node {ray.get_runtime_context().get_node_id()[:8]}, process {os.getpid()}"
    try:
        return "done", node, found, [tuple(row) for row in run_work(job, Work(*work))]
    except DtLensError as error:
        return "refused", node, found, str(error)
    except Exception as error:  # a task, and the environment of one, may raise anything
        return "refused", node, found, f"The task raised {type(error).__name__}: {because(error)}."
