"""Progress: silent in a script unless asked; in a notebook one bar for a call, whatever it calls itself."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest

import dt_lens
from dt_lens import progress
from dt_lens.errors import DtLensError


class Notebook:
    """A stand-in for IPython in a kernel: what is displayed, and how each output is updated."""

    def __init__(self) -> None:
        self.outputs: list[list[dict[str, str]]] = []

    def display(self, made: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw and display_id
        states = [made]
        self.outputs.append(states)
        return types.SimpleNamespace(update=lambda other, raw: states.append(other))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    found = Notebook()
    ipython, shown = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    vars(ipython)["get_ipython"] = lambda: types.SimpleNamespace(kernel=object())
    vars(shown)["display"] = found.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return found


def test_a_terminal_of_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not progress.in_notebook()
    ipython = types.ModuleType("IPython")
    vars(ipython)["get_ipython"] = lambda: types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert not progress.in_notebook()
    vars(ipython)["get_ipython"] = lambda: None
    assert not progress.in_notebook()


def test_a_notebook_shows_one_bar_that_moves_and_disappears(notebook: Notebook) -> None:
    with progress.reporting(None) as tell:
        tell("scanning <it>", 0.25)
        with progress.reporting(None) as inner, progress.counting(None, 5, "episodes") as count:
            inner("inside", 0.9)
            assert inner is progress.silent and count is None
        tell("scanning", 1.5)
    (states,) = notebook.outputs
    assert 'value="0.250"' in states[0]["text/html"] and "scanning &lt;it&gt;" in states[0]["text/html"]
    assert " 25%  scanning <it>" in states[0]["text/plain"] and 'value="1.000"' in states[1]["text/html"]
    assert states[-1] == {"text/plain": "", "text/html": ""} and len(states) == 3
    with progress.counting(None, 8, "episodes") as count:
        assert count is not None
        count(2.0)
    assert "episodes  2 of 8" in notebook.outputs[1][0]["text/plain"] and 'value="0.250"' in str(notebook.outputs[1][0])


def test_a_bar_that_is_stopped_disappears_too_and_the_next_call_has_its_own(notebook: Notebook) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), progress.reporting(True) as tell:
            tell("x", 0.5)
            raise KeyboardInterrupt
    assert [states[-1]["text/html"] for states in notebook.outputs] == ["", ""]


def test_what_was_silenced_is_silent_inside_too(notebook: Notebook) -> None:
    with progress.reporting(False), progress.reporting(None) as inner:
        inner("x", 0.5)
    heard: list[Any] = []
    with progress.reporting(lambda *said: heard.append(said)) as tell, progress.reporting(None) as inner:
        tell("outer", 0.5)
        inner("inner", 0.7)
    assert heard == [("outer", 0.5)] and not notebook.outputs


def test_short_work_shows_no_bar(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 60.0)
    with progress.reporting(None) as tell:
        tell("x", 0.5)
    assert not notebook.outputs


def test_calls_show_one_bar_each_in_a_notebook_and_nothing_in_a_script(
    make_dt: Callable[..., Any], notebook: Notebook, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_dt(0, n_layers=1)
    svd = dt_lens.WeightSVD(model)
    calls: list[Callable[[], Any]] = [
        lambda: dt_lens.certify(model),
        lambda: dt_lens.load("hopper"),
        lambda: svd.scan("*.W_in"),
        lambda: dt_lens.compare(model, model, "*.W_in"),
    ]
    for number, call in enumerate(calls, 1):
        call()
        assert len(notebook.outputs) == number, "one bar"
        assert len(notebook.outputs[-1]) >= 2 and notebook.outputs[-1][-1]["text/html"] == ""
    assert "certifying blocks.2." in str(notebook.outputs[1]), "loading certifies in the same bar"
    assert capfd.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    for call in calls:
        call()
    assert len(notebook.outputs) == len(calls) and capfd.readouterr() == ("", "")


def test_certify_and_load_report_to_a_function(make_dt: Callable[..., Any]) -> None:
    heard: list[tuple[str, float]] = []
    dt_lens.certify(make_dt(0), progress=lambda *said: heard.append(said))
    shares = [share for _, share in heard]
    assert shares == sorted(shares) and any("blocks.1." in what for what, _ in heard)
    with pytest.raises(DtLensError):
        dt_lens.load("no such model", progress=lambda *said: heard.append(said))
    assert heard[-1] == ("reading no such model", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets; the thread that prints by itself waits for ever."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress._Log, "_watch", lambda self: self._end.wait() and None)
    return now


def test_a_log_has_a_line_for_another_kind_of_work_a_tenth_and_half_a_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.progress() as tell:
        tell("step 1 of 900  loss 4.2", 0.0)
        for step in range(2, 31):  # a step a second: the clock alone prints the last of these
            clock[0] += 1
            tell(f"step {step} of 900  loss 4.1", step / 900)
        clock[0] += 1
        tell("step 31 of 900  loss 4.0", 31 / 900)
        clock[0] += 1
        tell("step 200 of 900  loss 3.9", 200 / 900)
        tell("measuring", 0.23)  # at once: too soon
        clock[0] += 1
        tell("measuring it", 0.1)  # another kind; the share does not fall
        tell("measuring it  3 of 3", 0.24)
    assert capsys.readouterr().err.splitlines() == [
        "[  0%] step 1 of 900  loss 4.2",
        "[  3%] step 31 of 900  loss 4.0  (0:30)",
        "[ 22%] step 200 of 900  loss 3.9  (0:31)",
        "[ 23%] measuring it  (0:32)",
        "[ 24%] measuring it  3 of 3  (0:32)",  # how it ended
    ]


def test_a_log_goes_on_in_a_stage_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LEAST", 0.005)
    monkeypatch.setattr(progress, "MOST", 0.01)
    lines = ""
    with pytest.raises(KeyError), progress.progress() as tell:
        tell("decomposing", 0.4)
        while lines.count("[ 40%] decomposing") < 3:  # or the test is stopped
            lines += capsys.readouterr().err
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name == "dt-lens-progress"]


def test_what_fails_has_no_last_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DtLensError), progress.progress() as tell:
        tell("reading", 0.0)
        tell("writing", 0.5)
        raise DtLensError("It cannot be written.")
    assert capsys.readouterr().err == "[  0%] reading\n"
