"""Runs blocks on the nodes of a Ray cluster, each on one core. Ray is imported only when an engine starts."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import cloudpickle

from dt_lens.behaviour.job import Job
from dt_lens.behaviour.sweep.blocks import Work
from dt_lens.behaviour.sweep.engines.engine import Event, EventBuffer
from dt_lens.behaviour.sweep.engines.node import run_on_node
from dt_lens.behaviour.sweep.fingerprint import SAMPLE, fingerprint
from dt_lens.behaviour.sweep.plan import differing, short
from dt_lens.errors import DtLensError, because

__all__ = ["RayEngine"]

RESIZE_SECONDS = 1.0  # between queries of the cluster's size
CONNECT_SECONDS = 10.0


class RayEngine:
    """Runs blocks as tasks of a Ray cluster; nodes may join and leave meanwhile.

    A block whose node or process is lost is reported dead, and the driver submits it again. Every node first runs a
    little of what the unedited model does, which must come to the driver's bits. If it does not, because of another
    processor or other libraries, nothing of that node is kept, since its outcomes would not repeat here, and the sweep
    ends with a sentence that names it. Without that node the same command resumes.

    Every node needs dt-lens in the driver's version, and the packages that the task needs, such as the one that
    registers an environment.

    Args:
        address: of the cluster, ``"10.0.0.5:6379"``, as ``ray start --head`` prints it; ``"auto"`` for the one that
            runs on this machine; ``None`` for that one or, if none runs, a new one of this machine alone.
        workers: blocks at a time; as many as the cluster has cores by default.

    Raises:
        DtLensError: from ``start`` and ``wait``, if Ray is not installed, there is no cluster, or nodes cannot run the
            blocks.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self.address, self.count = address, workers
        self._running: dict[Any, int] = {}  # block, by the reference to its answer
        self._cores = 0
        self._resized = float("-inf")
        self._own = False
        self._buffer = EventBuffer()

    def start(self, job: Job) -> None:
        self._ray = ray = _import_ray()
        if not ray.is_initialized():
            try:
                check_reachable(self.address)
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here reports nothing
                ray.init(address=self.address, log_to_driver=False, logging_level="error", include_dashboard=None)
            except (OSError, ValueError, RuntimeError) as error:
                raise DtLensError(
                    f"There is no Ray cluster at {self.address or 'hand'} ({because(error)}); start one with ray start "
                    "--head, and give the address that it prints."
                ) from error
            self._own = True
        self._fingerprint = fingerprint(job)
        packed = cloudpickle.dumps(job)
        self._token = hashlib.sha256(packed).hexdigest()
        self._job = ray.put(packed)
        # The driver counts deaths and submits a block again; Ray must not do so unseen.
        self._task = ray.remote(num_cpus=1, max_retries=0)(run_on_node)

    @property
    def free(self) -> int:
        if (now := time.monotonic()) >= self._resized + RESIZE_SECONDS:
            self._cores, self._resized = int(self._ray.cluster_resources().get("CPU", 0)), now
        return max(0, min(self._cores, self.count or self._cores) - len(self._running))

    def submit(self, work: Work) -> None:
        # In a list, so that a process fetches the job once and not with every block.
        self._running[self._task.remote([self._job], self._token, tuple(work))] = work.number

    def wait(self, seconds: float) -> list[Event]:
        if not self._running:
            time.sleep(seconds)  # a cluster without nodes, until one comes
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        if ready:
            ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return self._buffer.collect(map(self._event_of, ready))

    def _event_of(self, reference: Any) -> Event:
        block, lost = self._running.pop(reference), self._ray.exceptions
        try:
            kind, node, found, answer = self._ray.get(reference)
        except lost.RayTaskError as error:  # an error of the task comes back as an answer
            raise DtLensError(
                f"A node of the Ray cluster cannot run this model ({because(error.cause or error)}); install dt-lens "
                f"there, in this version, and what its task needs."
            ) from error
        except lost.LocalRayletDiedError as error:
            raise DtLensError("Ray has ended on this machine; start it, and the same command resumes.") from error
        except lost.RayError as error:
            return Event("died", block, "a node", message=type(error).__name__)
        if found != self._fingerprint:
            why = _first_difference(found, self._fingerprint)
            raise DtLensError(
                f"{node.capitalize()} of the Ray cluster comes to other bits than this machine ({why}); take it out of "
                "the cluster, and the same command resumes."
            )
        if kind == "done":
            return Event("done", block, node, answer)
        return Event("refused", block, node, message=answer)

    def stop(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._own:
            self._ray.shutdown()
            self._own = False


def check_reachable(address: str | None) -> None:
    """Raise ``OSError`` if nothing listens at ``address``: Ray itself keeps trying for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise DtLensError("The engine ray needs Ray, which is not installed; pip install 'dt-lens[ray]'.") from error
    return ray


def _first_difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """The first entry in which two fingerprints differ, in words.

    >>> _first_difference({"version of torch": "2", "sample": "a"}, {"version of torch": "3", "sample": "b"})
    'version of torch 2, here 3'
    """
    name = next(name for name in mine if mine[name] != theirs.get(name))
    there, here = differing(theirs.get(name), mine[name])
    return "another processor or library" if name == SAMPLE else f"{name} {short(there)}, here {short(here)}"
