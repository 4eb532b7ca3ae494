"""Ctrl-C at any moment of any command: exit status 130, and one sentence that says what is kept and how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import dt_lens as package
from dt_lens.cli import app

Run = Callable[..., Any]
INSIDE = str(Path(package.__file__).parent)
FRAME = {"main", "_leave"}  # around every command


@contextmanager
def interrupted(at: int | None) -> Iterator[list[int]]:
    """Raise ``KeyboardInterrupt`` at the ``at``-th call of or return from a function of the package; count them."""
    count = [0]

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(INSIDE):
            if frame.f_code.co_name in FRAME:
                return
            count[0] += 1
            if count[0] == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        yield count
    finally:
        sys.setprofile(None)


@pytest.fixture(scope="module", autouse=True)
def _imported(cartpole: Path) -> None:
    """What commands import is imported before anything is counted: watched, that takes minutes."""
    package.load(cartpole)


COMMANDS: dict[str, tuple[str, ...]] = {
    "certify": ("certify", "{model}"),
    "scan": ("scan", "{model}", "--out", "{out}/scan.csv"),
    "scan --resume": ("scan", "{model}", "--resume", "{out}/kept"),
    "top": ("top", "{model}", "*.W_in", "--out", "{out}/top.csv"),
    "compare": ("compare", "{model}", "{model}", "--out", "{out}"),
    "evaluate": ("evaluate", "{model}", "--episodes", "2", "--workers", "1", "--edit", "blocks.0.mlp.W_in"),
    "activations": ("activations", "{model}", "--episodes", "1", "--out", "{out}/a.safetensors"),
    "study": ("study", "{model}", "--episodes", "2", "--edits", "1", "--workers", "1", "--no-video", "--out", "{out}"),
}


def stopped(dt_lens: Run, command: str, model: Path, out: Path, at: int) -> bool:
    """Stop a command at this moment; whether it came so far: progress goes by the clock, and calls with it."""
    words = [word.format(model=model, out=out) for word in COMMANDS[command]]
    with interrupted(at) as count:
        result = dt_lens(*words)
    if count[0] < at:
        return False
    assert result.returncode == 130, (command, at, result)
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("dt-lens: Stopped") and sentence.endswith("."), (command, at, result.stderr)
    assert "again" in sentence or "resumes" in sentence
    assert "Traceback" not in result.stderr and "Abort" not in result.stderr
    assert not list(out.rglob(".part-*")), (command, at)
    resumes = command in ("study", "scan --resume")
    assert ("resumes" in sentence) == resumes
    return True


@pytest.mark.parametrize(
    ("command", "at"),
    [("certify", 1), ("certify", 900), ("scan --resume", 2), ("scan --resume", 665), ("top", 300), ("evaluate", 80)],
)
def test_ctrl_c_at_a_drawn_moment(dt_lens: Run, cartpole: Path, tmp_path: Path, command: str, at: int) -> None:
    assert stopped(dt_lens, command, cartpole, tmp_path, at)


class Late:
    """Its finalizer is where Ctrl-C arrives: Python reports what is raised there, and drops it."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("ends", [False, True])
def test_ctrl_c_inside_a_finalizer_is_not_lost(ends: bool) -> None:
    """It comes again, in the middle of the command or at its end."""
    late, end = Late(), time.monotonic() + 20
    with pytest.raises(KeyboardInterrupt), app._no_interrupt_lost():
        del late
        if ends:
            raise SystemExit(0)
        while time.monotonic() < end:
            time.sleep(0.01)


@pytest.mark.acceptance(minutes=3)
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_at_many_moments(dt_lens: Run, cartpole: Path, tmp_path: Path, command: str) -> None:
    words = [word.format(model=cartpole, out=tmp_path / "whole") for word in COMMANDS[command]]
    with interrupted(None) as count:
        assert dt_lens(*words).returncode == 0
    rng = np.random.default_rng(0)
    moments = (*range(1, 9), *rng.integers(1, count[0], 14))
    assert sum(stopped(dt_lens, command, cartpole, tmp_path / f"at-{at}", int(at)) for at in moments) >= 20


def test_training_says_which_step_is_kept(dt_lens: Run, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("\n\n".join(f"The dog number {i} ran to the tree and back again." for i in range(200)))
    sizes = ("--d-model", "8", "--layers", "1", "--heads", "1", "--context", "4", "--batch-size", "2")
    words = ("train-text", text, "--out", tmp_path / "out", "--vocabulary", "258", *sizes, "--steps", "130")
    from dt_lens.training.run import TrainingRun

    learn, at = TrainingRun.learn, 105

    def stop(run: Any) -> None:
        if run.step == at:
            raise KeyboardInterrupt
        learn(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "learn", stop)
        for at, kept in ((20, "before the first checkpoint; nothing is kept"), (105, "checkpoint.pt keeps step 100")):
            result = dt_lens(*words)
            assert result.returncode == 130
            assert f"dt-lens: Stopped at step {at} of 130" in result.stderr and kept in result.stderr


@pytest.mark.parametrize(
    ("command", "reads"),
    [("train", "dt_lens.training.agent.read"), ("train-text", "dt_lens.training.text.read_corpus")],
)
def test_training_that_has_not_begun_says_what_is_there(
    dt_lens: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, reads: str
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reads, stop)
    result = dt_lens(command, "a/b-v0", "--out", tmp_path)
    assert result.returncode == 130
    assert result.stderr.endswith(
        "dt-lens: Stopped before the first step; nothing is kept, and the same command starts again.\n"
    )
    (tmp_path / "checkpoint.pt").write_bytes(b"of an earlier run")
    assert (
        "checkpoint.pt is kept, and the same command, without --fresh, res"
        in dt_lens(command, "a/b-v0", "--out", tmp_path).stderr
    )


@pytest.mark.parametrize("seen", ["lazy_loader", "typer"])
def test_ctrl_c_while_the_command_line_is_imported(seen: str) -> None:
    """One real process, stopped at the first moment that can be seen from outside: a module has just been imported."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "dt_lens", "certify", "hopper"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        if line.startswith("import time:"):
            if line.split("|")[-1].strip() == seen:
                process.send_signal(signal.SIGINT)
        else:
            lines.append(line.strip())
    assert process.wait(timeout=60) == 130
    (sentence,) = [line for line in lines if line]
    assert sentence.startswith("dt-lens: Stopped") and "give it again" in sentence


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
@pytest.mark.acceptance(minutes=2)
@pytest.mark.parametrize(
    ("words", "resumes", "after"),  # seconds: 0.1 is when the workers start, 2.0 when they run episodes
    [
        (("evaluate", "{model}", "--episodes", "200000"), False, 0.1),
        (("evaluate", "{model}", "--episodes", "200000"), False, 2.0),
        (("study", "{model}", "--episodes", "20000", "--edits", "1", "--no-video", "--out", "{out}"), True, 2.0),
        (("sweep", "{model}", "--matrices", "*.W_in", "--episodes", "2000", "--out", "{out}"), True, 0.1),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_ctrl_c_reaches_the_workers_too(
    cartpole: Path, tmp_path: Path, words: tuple[str, ...], resumes: bool, after: float
) -> None:
    """A terminal sends it to every process of the command: still one sentence, and nothing goes on running."""
    command = [word.format(model=cartpole, out=tmp_path / "out") for word in words]
    process = subprocess.Popen(
        [sys.executable, "-m", "dt_lens", *command, "--workers", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while len(workers := children(process.pid)) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(after)
        workers |= children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "Traceback" not in said and "KeyboardInterrupt" not in said, said
        sentence = said.strip().splitlines()[-1]
        assert sentence.startswith("dt-lens: Stopped") and ("resumes" in sentence) == resumes, said
        while any(Path("/proc", pid).exists() for pid in workers):
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def children(process: int) -> set[str]:
    """The processes that a process has started, by their numbers."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            _, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == process:
                found.add(stat.parent.name)
    return found
