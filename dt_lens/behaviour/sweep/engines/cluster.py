"""Units on the nodes of a Ray cluster, each on one core. Ray is imported when an engine starts, and not before."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import cloudpickle

from dt_lens.behaviour.agents.rollouts import Outcome
from dt_lens.behaviour.agents.running import Job
from dt_lens.behaviour.sweep.engines.engine import Event, EventBuffer
from dt_lens.behaviour.sweep.engines.node import run_on_node
from dt_lens.behaviour.sweep.proof import prove
from dt_lens.behaviour.sweep.units import Unit
from dt_lens.errors import DtLensError, because

__all__ = ["RayEngine"]

LOOK_SECONDS = 1.0  # between looks at how large the cluster is
KNOCK_SECONDS = 10.0


class RayEngine:
    """Runs units as tasks of a Ray cluster; nodes may come and go while it does.

    A unit whose node or process is lost comes back as dead, and the driver sends it again. Every node first runs a few
    steps of the unedited agent, and must come to the driver's bits: where one with another processor or other libraries
    does not, nothing of it is kept, because its outcomes would not repeat here, and the sweep ends with a sentence that
    names it. Without that node the same command goes on.

    dt-lens has to be installed on every node, in the driver's version, with whatever package registers the environment.

    Args:
        address: of the cluster, ``"10.0.0.5:6379"``, as ``ray start --head`` prints it; ``"auto"`` for the one that
            runs on this machine; ``None`` for that one or, where there is none, a new one of this machine alone.
        workers: units at a time; one a core of the cluster by default.

    Raises:
        DtLensError: from ``start`` and ``wait``, when Ray is not installed, there is no cluster, or nodes cannot run
            the units.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self.address, self.count = address, workers
        self._running: dict[Any, int] = {}  # unit, by reference to its answer
        self._cores = 0
        self._looked = float("-inf")
        self._own = False
        self._ear = EventBuffer()

    def start(self, job: Job) -> None:
        self._ray = ray = _import_ray()
        if not ray.is_initialized():
            try:
                check_reachable(self.address)
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # where Ray is started here, it reports nothing
                ray.init(address=self.address, log_to_driver=False, logging_level="error", include_dashboard=None)
            except (OSError, ValueError, RuntimeError) as error:
                raise DtLensError(
                    f"There is no Ray cluster at {self.address or 'hand'} ({because(error)}); start one with ray start "
                    "--head, and give the address that it prints."
                ) from error
            self._own = True
        self._proof = prove(job)
        packed = cloudpickle.dumps(job)
        self._token = hashlib.sha256(packed).hexdigest()
        self._job = ray.put(packed)
        # The driver counts deaths and sends a unit again; Ray must not do so unseen.
        self._task = ray.remote(num_cpus=1, max_retries=0)(run_on_node)

    @property
    def free(self) -> int:
        if (now := time.monotonic()) >= self._looked + LOOK_SECONDS:
            self._cores, self._looked = int(self._ray.cluster_resources().get("CPU", 0)), now
        return max(0, min(self._cores, self.count or self._cores) - len(self._running))

    def submit(self, unit: Unit) -> None:
        # In a list, so that a process fetches the job once and not with every unit.
        self._running[self._task.remote([self._job], self._token, tuple(unit))] = unit.number

    def wait(self, seconds: float) -> list[Event]:
        if not self._running:
            time.sleep(seconds)  # a cluster without nodes, until one comes
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        if ready:
            ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return self._ear.hear(map(self._heard, ready))

    def _heard(self, reference: Any) -> Event:
        unit, lost = self._running.pop(reference), self._ray.exceptions
        try:
            kind, node, proof, answer = self._ray.get(reference)
        except lost.RayTaskError as error:  # whatever the agent raises comes back as an answer
            raise DtLensError(
                f"A node of the Ray cluster cannot run this agent ({because(error.cause or error)}); install dt-lens "
                f"there, in this version, and what the environment needs."
            ) from error
        except lost.LocalRayletDiedError as error:
            raise DtLensError("Ray has ended on this machine; start it, and the same command goes on.") from error
        except lost.RayError as error:
            return Event("died", unit, "a node", said=type(error).__name__)
        if proof != self._proof:
            why = _apart(proof, self._proof)
            raise DtLensError(
                f"{node.capitalize()} of the Ray cluster comes to other bits than this machine ({why}); take it out of "
                "the cluster, and the same command goes on."
            )
        if kind == "done":
            return Event("done", unit, node, [Outcome(*row) for row in answer])
        return Event("refused", unit, node, said=answer)

    def stop(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._own:
            self._ray.shutdown()
            self._own = False


def check_reachable(address: str | None) -> None:
    """Raise ``OSError`` where nobody listens: Ray itself tries for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise DtLensError("The engine ray needs Ray, which is not installed; pip install 'dt-lens[ray]'.") from error
    return ray


def _apart(theirs: Mapping[str, str | None], mine: Mapping[str, str | None]) -> str:
    """The first thing in which two proofs differ.

    >>> _apart({"version of torch": "2", "steps": "a"}, {"version of torch": "3", "steps": "b"})
    'version of torch 2, here 3'
    """
    name = next(name for name in mine if mine[name] != theirs.get(name))
    return "another processor or library" if name == "steps" else f"{name} {theirs.get(name)}, here {mine[name]}"
