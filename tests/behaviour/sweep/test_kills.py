"""``kill -9`` of the driver or of a worker, then the same command: nothing lost, nothing twice, the same table."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dt_lens.behaviour.sweep import store as stores
from dt_lens.behaviour.sweep.results import SweepResults
from dt_lens.behaviour.sweep.store import FILE
from dt_lens.decision_transformer.checkpoint import save_pretrained

Make = Callable[..., Any]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, and sends POSIX signals")


def forked(run: Callable[[], object]) -> int:
    """``run`` in a child that has imported everything already; its process id."""
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
    """What each question is answered, all at one moment: a driver may be at work on the file."""
    db = sqlite3.connect(file, isolation_level=None)
    try:
        db.execute("BEGIN")
        return [db.execute(one).fetchall() for one in sql]
    except sqlite3.OperationalError:  # killed before there was a table
        return [[] for _ in sql]
    finally:
        db.close()


def finished(file: Path) -> dict[int, list[tuple[Any, ...]]]:
    """The episodes of finished units, by unit."""
    if not file.exists():
        return {}
    units, episodes = query(
        file, "SELECT unit FROM units WHERE status = 'done'", "SELECT * FROM episodes ORDER BY unit, seed"
    )
    done: dict[int, list[tuple[Any, ...]]] = {unit: [] for (unit,) in units}
    for row in episodes:
        done[row[0]].append(row)  # a KeyError for an episode of a unit that is not finished
    return done


def check_log(file: Path, units: int | None = None) -> None:
    """Every unit was finished once, and not begun again after that."""
    log, statuses, ((count,),) = query(
        file,
        "SELECT unit, result FROM runs ORDER BY run",
        "SELECT DISTINCT status FROM units",
        "SELECT count(*) FROM units",
    )
    assert statuses == [("done",)]
    units = count if units is None else units
    assert sorted(unit for unit, result in log if result == "done") == list(range(units))
    last = dict(log)
    assert all(result == "done" for result in last.values())


def same(one: SweepResults, other: SweepResults) -> None:
    pd.testing.assert_frame_equal(one.table(), other.table(), check_exact=True)
    pd.testing.assert_frame_equal(one.episodes(), other.episodes(), check_exact=True)


SOME = [6, 21, 50]
MANY = [*range(1, 40, 3), *(random.Random(0).randint(1, 90) for _ in range(17))]

# What is there before the killing begins, and what the sweep is that is killed.
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
        pytest.param("grown", [*range(1, 60, 8), 100], marks=slow),
        pytest.param("by halves", [*range(5, 180, 25)], marks=slow),
    ],
)
def test_killed_at_any_statement(
    make_sweep: Make, inline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, moments: list[int]
) -> None:
    """The driver kills itself just before the n-th statement of its run, for many n, in transactions and between."""
    first, options = KINDS[kind]
    whole = make_sweep(tmp_path / "whole", **options).run(engine=inline(2))
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
            make_sweep(tmp_path / f"killed {number}", **first).run(engine=inline(2))
        sweep = make_sweep(tmp_path / f"killed {number}", **options)
        before = finished(sweep.file)
        for attempt in range(60):

            def run(sweep: Any = sweep, moment: int = moment + attempt) -> None:
                countdown[0] = moment
                monkeypatch.setattr(stores.sqlite3, "connect", watched)
                sweep.run(engine=inline(2))

            status = ended(forked(run))
            after = finished(sweep.file)
            assert before.items() <= after.items()
            before = after
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills += 1
        check_log(sweep.file, 14 if kind == "plain" else None)
        same(sweep.results, whole.results)
        assert [file.name for file in sweep.file.parent.iterdir()] == [FILE]
    assert kills >= len(moments)


def _children(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def _kill_at_random(
    make_sweep: Make,
    tmp_path: Path,
    moments: int,
    seed: int,
    first: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> Counter[str]:
    """Real worker processes; kills the driver or one of its workers until there were ``moments`` kills."""
    options = {"sv": "0,1", "controls": 1, "episodes": 8, "block_size": 2, "max_steps": 60, "workers": 2} | (more or {})
    units = 4 * 13 if more is None else None
    whole = make_sweep(tmp_path / "whole", **options).run()
    draw, killed, round_ = random.Random(seed), Counter[str](), 0
    while killed.total() < moments:
        round_ += 1
        if first is not None:
            make_sweep(tmp_path / f"round {round_}", **options | first).run()
        sweep = make_sweep(tmp_path / f"round {round_}", **options)
        before = finished(sweep.file)
        while True:
            driver = forked(sweep.run)
            if killed.total() >= moments:
                assert ended(driver) == 0
                break
            victim, workers = draw.choice(["driver", "worker"]), list[int]()
            end = time.monotonic() + 60
            while victim == "worker" and not workers and time.monotonic() < end:
                workers = _children(driver)
            time.sleep(draw.uniform(0, 6))
            done = os.waitpid(driver, os.WNOHANG)
            if done[0]:
                assert done[1] == 0
                break
            workers = _children(driver)
            target = driver if victim == "driver" or not workers else draw.choice(workers)
            os.kill(target, signal.SIGKILL)
            status = ended(driver)
            if target == driver and status == 0:
                break  # it came to its end between the last look and the kill
            assert status == (-signal.SIGKILL if target == driver else 0)
            killed["driver" if target == driver else "worker"] += 1
            after = finished(sweep.file)
            assert before.items() <= after.items()
            before = after
            if target != driver:
                break
        check_log(sweep.file, units)
        same(sweep.results, whole.results)
        assert [file.name for file in sweep.file.parent.iterdir()] == [FILE]
    return killed


def test_killed_now_and_then(make_sweep: Make, tmp_path: Path) -> None:
    assert _kill_at_random(make_sweep, tmp_path, 3, seed=1).total() >= 3


@pytest.mark.acceptance
def test_killed_at_thirty_moments(make_sweep: Make, tmp_path: Path) -> None:
    killed = _kill_at_random(make_sweep, tmp_path, 30, seed=7)
    assert killed.total() >= 30 and min(killed["driver"], killed["worker"]) >= 5


@pytest.mark.acceptance
def test_killed_while_it_grows(make_sweep: Make, tmp_path: Path) -> None:
    first = {"matrices": "*.0.mlp.W_in", "controls": 0, "episodes": 4}
    assert _kill_at_random(make_sweep, tmp_path, 6, 3, first, {"block_size": 3}).total() >= 6


@pytest.mark.acceptance
def test_killed_rung_by_rung(make_sweep: Make, tmp_path: Path) -> None:
    more = {"sv": "0-3", "edits": "zero,flip", "halving": [2, 4], "episodes": 6}
    assert _kill_at_random(make_sweep, tmp_path, 6, 5, None, more).total() >= 6


@pytest.fixture(scope="module")
def commanded(agent: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A command that sweeps, but for its folder; and a folder where it came to its end undisturbed."""
    folder = tmp_path_factory.mktemp("commanded")
    model = save_pretrained(agent, folder / "model")
    words = ["sweep", str(model), "--matrices", "*.W_in", "--sv", "0-2", "--edits", "zero,flip", "--episodes", "48"]
    words += ["--controls", "1", "--workers", "2", "--seed", "3", "--out"]
    command = [sys.executable, "-c", "from dt_lens.cli import main; main()", *words]
    subprocess.run([*command, str(folder / "whole")], check=True, timeout=300, capture_output=True)
    return command, folder / "whole"


@pytest.mark.acceptance
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_command_goes_on_where_it_was_stopped(
    commanded: tuple[list[str], Path], tmp_path: Path, how: signal.Signals
) -> None:
    command, whole = commanded
    driver = subprocess.Popen([*command, str(tmp_path / "stopped")], stderr=subprocess.PIPE, text=True)
    file, end = tmp_path / "stopped" / FILE, time.monotonic() + 120
    while time.monotonic() < end and not (file.exists() and len(finished(file)) >= 5):
        time.sleep(0.1)
    driver.send_signal(how)
    said = driver.communicate(timeout=60)[1]
    half = finished(file)
    if how == signal.SIGINT:
        assert driver.returncode == 130
        assert "units done; the same command goes on from there." in said.splitlines()[-1]
        assert [f.name for f in file.parent.iterdir()] == [FILE]
    assert 5 <= len(half) < 3 * 25
    done = subprocess.run([*command, str(tmp_path / "stopped")], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert half.items() <= finished(file).items()
    check_log(file, 3 * 25)
    same(SweepResults(file), SweepResults(whole))
