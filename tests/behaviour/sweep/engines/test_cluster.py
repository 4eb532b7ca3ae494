"""Blocks on a real Ray cluster of two nodes, one of which is killed in the middle of the sweep."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dt_lens.behaviour.sweep.engines import cluster as clusters
from dt_lens.behaviour.sweep.engines.cluster import RayEngine
from dt_lens.behaviour.sweep.engines.engine import Event
from dt_lens.errors import DtLensError

Make = Callable[..., Any]

OPTIONS = {"sv": "0,1", "controls": 1, "episodes": 16, "block_size": 4, "max_steps": 100}
LONG = 300  # seconds; no unit waits longer, whatever goes wrong


def log_of(file: Path) -> list[tuple[int, str, str]]:
    with closing(sqlite3.connect(file)) as db:
        return db.execute("SELECT block, worker, result FROM runs ORDER BY run").fetchall()


def test_without_ray_there_is_one_sentence(make_sweep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DtLensError, match=r"needs Ray, which is not installed; pip install 'dt-lens\[ray\]'\.$"):
        make_sweep().run(engine=RayEngine())


def test_an_address_where_nothing_listens(make_sweep: Make) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    with pytest.raises(
        DtLensError, match=r"^There is no Ray cluster at 127.0.0.1:1 \(.*refused\); start one"
    ) as caught:
        make_sweep().run(engine=RayEngine("127.0.0.1:1"))
    assert "\n" not in str(caught.value)


def test_ray_is_imported_when_it_is_needed() -> None:
    code = "import sys, dt_lens.behaviour.sweep.engines.cluster; raise SystemExit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with two cores each, on this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.acceptance(minutes=2)
def test_a_node_is_killed_in_the_middle(
    make_sweep: Make, inline: Make, tmp_path: Path, two_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = pd.testing.assert_frame_equal
    whole = make_sweep(tmp_path / "whole", **OPTIONS, workers=2).run()

    class Interrupted(RayEngine):
        done = 0

        def wait(self, seconds: float) -> list[Event]:
            events = super().wait(seconds)
            self.done += len(events)
            if self.done >= 5:
                raise KeyboardInterrupt
            return events

    sweep = make_sweep(tmp_path / "ray", **OPTIONS)
    with pytest.raises(KeyboardInterrupt, match=r"Stopped with \d of 52 blocks done; the same command resumes"):
        sweep.run(engine=Interrupted(two_nodes.address))
    first = [run for run in log_of(sweep.file) if run[2] == "done"]
    assert len(first) < 12

    # Whatever the machine's load, the second node has finished a unit when it dies, and is running another: until its
    # first unit is reported, the other node's units wait, and from then on the second node's do.
    lost, mine = two_nodes.list_all_nodes()[1], clusters.run_on_node
    lost_id, armed, caught = lost.node_id, tmp_path / "armed", tmp_path / "caught"

    def held(*arguments: Any) -> Any:
        import ray

        until = time.monotonic() + LONG
        if ray.get_runtime_context().get_node_id() != lost_id:
            while not armed.exists() and time.monotonic() < until:
                time.sleep(0.02)
        elif armed.exists():
            caught.touch()
            time.sleep(LONG)
        return mine(*arguments)

    class Deadly(RayEngine):
        """Kills the second node, its processes with it, while it runs a unit."""

        def wait(self, seconds: float) -> list[Event]:
            events = super().wait(seconds)
            if any(lost_id[:8] in event.worker for event in events):
                armed.touch()
            if caught.exists() and lost in two_nodes.list_all_nodes():
                raylet = str(lost.all_processes["raylet"][0].process.pid)
                listed = subprocess.run(["ps", "-o", "pid=", "--ppid", raylet], capture_output=True, text=True).stdout
                for process in listed.split():
                    os.kill(int(process), signal.SIGKILL)
                two_nodes.remove_node(lost, allow_graceful=False)
            return events

    monkeypatch.setattr(clusters, "run_on_node", held)
    sweep.run(engine=Deadly(two_nodes.address))
    same(sweep.table(), whole.table(), check_exact=True)
    same(sweep.episodes(), whole.episodes(), check_exact=True)
    log = log_of(sweep.file)
    assert sorted(unit for unit, _, result in log if result == "done") == list(range(52))
    assert all(result == "done" for result in {unit: result for unit, _, result in log}.values())
    assert any(result == "died" for _, _, result in log)  # what the lost node was running
    assert len({worker.partition(",")[0] for _, worker, result in log if result == "done"}) == 2

    # A node that would come to other bits is refused before anything of it is kept.
    monkeypatch.setattr(clusters, "run_on_node", mine)
    fingerprint = clusters.fingerprint
    monkeypatch.setattr(clusters, "fingerprint", lambda job: {**fingerprint(job), "version of torch": "1.0"})
    with pytest.raises(
        DtLensError, match=r"comes to other bits than this machine \(version of torch 2\S+, here 1\.0\)"
    ):
        make_sweep(tmp_path / "other").run(engine=RayEngine(two_nodes.address))

    def nothing(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'dt_lens'")

    monkeypatch.setattr(clusters, "run_on_node", nothing)
    with pytest.raises(
        DtLensError, match=r"cannot run this model \(No module named 'dt_lens'\); install dt-lens there"
    ):
        make_sweep(tmp_path / "bare").run(engine=RayEngine(two_nodes.address))
