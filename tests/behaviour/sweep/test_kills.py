"""``kill -9`` of the driver or a worker, then the same command: nothing is lost or run twice, the table is the same."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dt_lens.behaviour.sweep import store as stores
from dt_lens.behaviour.sweep.engines.engine import Event
from dt_lens.behaviour.sweep.engines.local import LocalEngine
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import FILE
from dt_lens.decision_transformer.checkpoint import save_pretrained

Make = Callable[..., Any]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, and sends POSIX signals")


def forked(run: Callable[[], object]) -> int:
    """Run in a child, which has everything imported already; its process id."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def query(file: Path, *sql: str) -> list[list[tuple[Any, ...]]]:
    """The rows of each query, all from one moment: a driver may be writing to the file."""
    db = sqlite3.connect(file, isolation_level=None)
    try:
        db.execute("BEGIN")
        return [db.execute(one).fetchall() for one in sql]
    except sqlite3.OperationalError:  # killed before there was a table
        return [[] for _ in sql]
    finally:
        db.close()


def blocks_done(file: Path) -> dict[int, list[tuple[Any, ...]]]:
    """The outcomes of finished blocks, by block."""
    if not file.exists():
        return {}
    blocks, outcomes = query(
        file, "SELECT block FROM blocks WHERE status = 'done'", "SELECT * FROM outcomes ORDER BY block, unit"
    )
    done: dict[int, list[tuple[Any, ...]]] = {block: [] for (block,) in blocks}
    for row in outcomes:
        done[row[0]].append(row)  # a KeyError for an outcome of a block that is not finished
    return done


def check_log(file: Path, blocks: int | None = None) -> None:
    """Every block was finished once, and not begun again afterwards."""
    log, statuses, ((count,),) = query(
        file,
        "SELECT block, result FROM runs ORDER BY run",
        "SELECT DISTINCT status FROM blocks",
        "SELECT count(*) FROM blocks",
    )
    assert statuses == [("done",)]
    blocks = count if blocks is None else blocks
    assert sorted(block for block, result in log if result == "done") == list(range(blocks))
    last = dict(log)
    assert all(result == "done" for result in last.values())


def same(one: SweepResults, other: SweepResults) -> None:
    pd.testing.assert_frame_equal(one.table(), other.table(), check_exact=True)
    pd.testing.assert_frame_equal(one.episodes(), other.episodes(), check_exact=True)


SOME = [6, 21, 50]
MANY = [*range(1, 40, 8), *(random.Random(0).randint(1, 90) for _ in range(5))]

# What the file holds before the first kill, and the sweep that is killed.
KINDS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "grown": ({"matrices": "*.0.mlp.W_in", "controls": 0}, {"episodes": 8}),
    "by halves": (None, {"sv": "0,1", "episodes": 4, "halving": [2, 2]}),
}
slow = pytest.mark.acceptance


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        ("plain", SOME),
        ("grown", [24]),
        ("by halves", [80]),
        pytest.param("plain", MANY, marks=slow),
        pytest.param("grown", [*range(1, 60, 12), 100], marks=slow),
        pytest.param("by halves", [*range(5, 180, 40)], marks=slow),
    ],
)
def test_killed_at_any_statement(
    make_sweep: Make,
    finished: Make,
    remembering: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    moments: list[int],
) -> None:
    """The driver kills itself just before the n-th statement of its run, for many n, in transactions and between."""
    first, options = KINDS[kind]
    whole = finished(tmp_path / "whole", **options)
    connect = sqlite3.connect
    countdown, kills = [0], 0

    def watched(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        db = connect(*args, **kwargs)

        def count(statement: str) -> None:
            countdown[0] -= 1
            if countdown[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        db.set_trace_callback(count)
        return db

    for number, moment in enumerate(moments):
        if first is not None:
            finished(tmp_path / f"killed {number}", **first)
        sweep = make_sweep(tmp_path / f"killed {number}", **options)
        before = blocks_done(sweep.file)
        for attempt in range(60):
            # More statements each time: no unit is finished before the first few dozen.
            def run(sweep: Any = sweep, moment: int = moment + 2 * attempt) -> None:
                countdown[0] = moment
                monkeypatch.setattr(stores.sqlite3, "connect", watched)
                sweep.run(engine=remembering(2))

            status = ended(forked(run))
            after = blocks_done(sweep.file)
            assert before.items() <= after.items()
            before = after
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills += 1
        assert status == 0, "it is killed before it comes to anything"
        check_log(sweep.file, 14 if kind == "plain" else None)
        same(sweep.results, whole.results)
        assert [file.name for file in sweep.file.parent.iterdir()] == [FILE]
    assert kills >= len(moments)


class Killing(LocalEngine):
    """Kills one of its workers or its own process, a moment after some more units have been finished."""

    def __init__(self, workers: int, kills: list[tuple[str, int, float]], log: Path) -> None:
        super().__init__(workers)
        self.kills, self.log = kills, log
        self.done = 0  # since the last kill

    def wait(self, seconds: float) -> list[Event]:
        events = super().wait(seconds)
        self.done += sum(event.kind == "done" for event in events)
        if self.kills and self.done >= self.kills[0][1]:
            self.done = 0
            victim, _, delay = self.kills.pop(0)
            threading.Timer(delay, self._kill, [victim]).start()
        return events

    def _kill(self, victim: str) -> None:
        # A worker's turn may come when the sweep has just ended: then nothing is killed, and the log says so.
        target = os.getpid() if victim == "driver" else next((w.process.pid for w in self._workers), None)
        if target is None:
            victim = "late"
        with self.log.open("a") as log:
            log.write(f"{victim}\n")
        if target is not None:
            os.kill(target, signal.SIGKILL)


def _kill_at_random(
    make_sweep: Make,
    tmp_path: Path,
    kills: int,
    seed: int,
    first: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> Counter[str]:
    """Real worker processes; kills workers and drivers, by turns drawn at random, each time some units are finished."""
    options = {"sv": "0,1", "controls": 1, "episodes": 8, "block_size": 2, "max_steps": 60, "workers": 2} | (more or {})
    whole = make_sweep(tmp_path / "whole", **options).run()
    if first is not None:
        make_sweep(tmp_path / "killed", **options | first).run()
    sweep, log = make_sweep(tmp_path / "killed", **options), tmp_path / "kills.txt"
    draw = random.Random(seed)
    victims = ["driver", "worker"] * (kills // 2) + ["worker"] * (kills % 2)
    draw.shuffle(victims)
    left = [(victim, draw.randint(0, 4), draw.uniform(0, 0.05)) for victim in victims]
    before, status = blocks_done(sweep.file), -signal.SIGKILL
    while status != 0:
        ends = next((number for number, (victim, *_) in enumerate(left) if victim == "driver"), len(left))
        now, left = left[: ends + 1], left[ends + 1 :]
        status = ended(forked(lambda now=now: sweep.run(engine=Killing(2, list(now), log))))
        assert status == (-signal.SIGKILL if now and now[-1][0] == "driver" else 0)
        after = blocks_done(sweep.file)
        assert before.items() <= after.items()
        before = after
    check_log(sweep.file, whole.results.status()["done"] if first is None else None)
    same(sweep.results, whole.results)
    assert [file.name for file in sweep.file.parent.iterdir()] == [FILE]
    return Counter(log.read_text().split())


@pytest.mark.acceptance(minutes=3)
def test_killed_at_twelve_moments(make_sweep: Make, tmp_path: Path) -> None:
    killed = _kill_at_random(make_sweep, tmp_path, 12, seed=7)
    assert killed.total() >= 12 and min(killed["driver"], killed["worker"]) >= 5


@pytest.mark.acceptance(minutes=3)
def test_killed_while_it_grows(make_sweep: Make, tmp_path: Path) -> None:
    first = {"matrices": "*.0.mlp.W_in", "controls": 0, "episodes": 4}
    assert _kill_at_random(make_sweep, tmp_path, 6, 3, first, {"block_size": 3}).total() >= 6


@pytest.mark.acceptance(minutes=3)
def test_killed_rung_by_rung(make_sweep: Make, tmp_path: Path) -> None:
    more = {"sv": "0-3", "edits": "zero,flip", "halving": [2, 4], "episodes": 6}
    assert _kill_at_random(make_sweep, tmp_path, 6, 5, None, more).total() >= 6


@pytest.fixture(scope="module")
def commanded(agent: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A command that sweeps, without its folder; and a folder where it ran to the end undisturbed."""
    folder = tmp_path_factory.mktemp("commanded")
    model = save_pretrained(agent, folder / "model")
    words = ["sweep", str(model), "--matrices", "*.W_in", "--sv", "0-2", "--edits", "zero,flip", "--episodes", "48"]
    words += ["--controls", "1", "--workers", "2", "--seed", "3", "--max-steps", "60", "--out"]
    command = [sys.executable, "-c", "from dt_lens.cli import main; main()", *words]
    subprocess.run([*command, str(folder / "whole")], check=True, timeout=300, capture_output=True)
    return command, folder / "whole"


@pytest.mark.acceptance(minutes=3)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_command_resumes(commanded: tuple[list[str], Path], tmp_path: Path, how: signal.Signals) -> None:
    command, whole = commanded
    driver = subprocess.Popen([*command, str(tmp_path / "stopped")], stderr=subprocess.PIPE, text=True)
    file, end = tmp_path / "stopped" / FILE, time.monotonic() + 120
    while time.monotonic() < end and not (file.exists() and len(blocks_done(file)) >= 5):
        time.sleep(0.02)
    driver.send_signal(how)
    said = driver.communicate(timeout=60)[1]
    half = blocks_done(file)
    if how == signal.SIGINT:
        assert driver.returncode == 130
        assert "blocks done; the same command resumes from there." in said.splitlines()[-1]
        assert [f.name for f in file.parent.iterdir()] == [FILE]
    assert 5 <= len(half) < 3 * 25
    done = subprocess.run([*command, str(tmp_path / "stopped")], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert half.items() <= blocks_done(file).items()
    check_log(file, 3 * 25)
    same(SweepResults(file), SweepResults(whole))
