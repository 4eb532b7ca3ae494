"""Ctrl-C at every point of entering and leaving: nothing stays in force, and the interrupt arrives."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from dt_lens import DtLensError, SingularEdit
from dt_lens.edits import edit as edits
from dt_lens.edits import reversible
from dt_lens.edits.edit import Edit, suspended
from dt_lens.edits.reversible import Reversible
from dt_lens.lens.weights import weight_bytes

W_IN = "blocks.0.mlp.W_in"


class Switch(Reversible):
    def __init__(self, fails: bool = False) -> None:
        self.on, self.fails = False, fails
        self.reached: list[bool] = []

    def _change(self) -> None:
        self._writer = threading.get_ident()
        self.on = True
        if self.fails:
            raise ValueError("on purpose")

    def _restore(self) -> None:
        self.on = False

    def body(self) -> None:
        self.reached.append(self.on)


class Injector:
    """A trace function that sends SIGINT at some of the points that it sees in some files, counted from 1."""

    def __init__(self, *points: int, files: tuple[Any, ...] = (reversible,), opcodes: bool = True) -> None:
        self.points, self.opcodes = points, opcodes
        self.files = {module.__file__ for module in files}
        self.seen = 0
        self.on = True

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Injector | None:
        if not self.on or frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes = self.opcodes
        self.seen += 1
        if self.seen in self.points:
            signal.raise_signal(signal.SIGINT)
        return self


def interrupted(injector: Injector, body: Callable[[], Any], *held: Reversible) -> bool:
    """Whether a KeyboardInterrupt left the ``with`` statements."""
    before = signal.getsignal(signal.SIGINT)
    tracing = sys.gettrace()
    sys.settrace(injector)
    try:
        nested(list(held), body)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracing)
        assert signal.getsignal(signal.SIGINT) is before
    return False


def nested(held: list[Reversible], body: Callable[[], Any]) -> None:
    if not held:
        body()
        return
    with held[0]:
        nested(held[1:], body)


def points(body: Callable[[], Any] = lambda: None, **options: Any) -> int:
    injector = Injector(**options)
    interrupted(injector, body, Switch())
    return injector.seen


def test_one_signal_at_each_bytecode() -> None:
    total = points()
    assert total > 150
    for point in range(1, total + 1):
        switch = Switch()
        assert interrupted(Injector(point), switch.body, switch), point
        assert not switch.on and not switch._in_force, point
        assert switch.reached in ([], [True]), point
        with switch:  # and it still works
            assert switch.on
        assert not switch.on


def test_two_signals_in_a_row() -> None:
    for point in range(1, points() + 1):
        switch = Switch()
        assert interrupted(Injector(point, point + 1), lambda: None, switch), point
        assert not switch.on and not switch._in_force, point


def test_a_second_signal_while_the_first_is_cleaned_up() -> None:
    """The first comes in the body; what follows is the way out."""

    def run(*chosen: int) -> tuple[Switch, Injector]:
        switch, injector = Switch(), Injector(*chosen)
        injector.on = False

        def body() -> None:
            injector.on = True
            raise KeyboardInterrupt

        assert interrupted(injector, body, switch)
        return switch, injector

    total = run()[1].seen
    assert total > 50
    for point in range(1, total + 1):
        for chosen in ((point,), (point, point + 1)):
            switch = run(*chosen)[0]
            assert not switch.on and not switch._in_force, chosen


def test_nested_ones() -> None:
    total = Injector()
    interrupted(total, lambda: None, Switch(), Switch())
    for point in range(1, total.seen + 1, 3):
        outer, inner = Switch(), Switch()
        assert interrupted(Injector(point), lambda: None, outer, inner), point
        assert not (outer.on or inner.on or outer._in_force or inner._in_force), point


def test_one_that_fails() -> None:
    injector = Injector()
    with pytest.raises(ValueError, match="on purpose"):
        interrupted(injector, lambda: None, Switch(fails=True))
    for point in range(1, injector.seen + 1):
        switch = Switch(fails=True)
        assert interrupted(Injector(point), lambda: None, switch), point
        assert not switch.on and not switch._in_force, point


@pytest.mark.parametrize("way", ["edit", "suspended"])
def test_an_edit_at_each_line(way: str, make_dt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_dt()
    untouched = weight_bytes(model.weights[W_IN])
    # What a forward pass shows is not the subject here; any function of the weight will do.
    monkeypatch.setattr(Edit, "_activation", lambda self, tokens: self.model.weights[self._weight].clone())
    files = {"files": (reversible, edits), "opcodes": False}
    outer = SingularEdit(model, W_IN, 1)
    with outer:
        edited = weight_bytes(model.weights[W_IN])
        edit = SingularEdit(model, W_IN)

        def made() -> Reversible:
            return edit if way == "edit" else suspended(model)

        count = Injector(**files)
        assert not interrupted(count, lambda: None, made())
        assert count.seen > 60
        for point in range(1, count.seen + 1):
            assert interrupted(Injector(point, point + 1, **files), lambda: None, made()), point
            assert weight_bytes(model.weights[W_IN]) == edited, point
            assert model.active_edits == [outer], point
    assert weight_bytes(model.weights[W_IN]) == untouched


def test_a_handler_that_does_not_raise_lets_the_edit_go_ahead() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda *_: received.append(1))
    try:
        for point in range(1, points() + 1):
            received.clear()
            switch = Switch()
            assert not interrupted(Injector(point), switch.body, switch)
            assert switch.reached == [True] and not switch.on and received == [1], point
    finally:
        signal.signal(signal.SIGINT, before)


def test_several_threads_do_not_mix_their_edits(make_dt: Any) -> None:
    """An edit runs alone, or is refused; the weights are its own while it runs, and untouched in the end."""
    model = make_dt()
    untouched, alone = weight_bytes(model.weights[W_IN]), []
    for sv in range(3):
        with SingularEdit(model, W_IN, sv):
            alone.append(weight_bytes(model.weights[W_IN]))
    done, refused, wrong = [], [], []

    def work(sv: int) -> None:
        for _ in range(8):
            try:
                with SingularEdit(model, W_IN, sv):
                    if weight_bytes(model.weights[W_IN]) != alone[sv]:
                        wrong.append(sv)
                    done.append(sv)
            except DtLensError as error:
                refused.append(str(error))

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(sv,)) for sv in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switching)
    assert not wrong and done
    assert all("another thread made is in force" in said for said in refused)
    assert weight_bytes(model.weights[W_IN]) == untouched and not model.active_edits


def test_an_edit_of_another_thread_is_refused_and_stays(make_dt: Any) -> None:
    model, said = make_dt(), []
    edit = SingularEdit(model, W_IN)

    def other() -> None:
        for second in (SingularEdit(model, W_IN, 1), suspended(model), SingularEdit(model, "blocks.1.mlp.W_in")):
            with pytest.raises(DtLensError, match="another thread made is in force, and all threads see it"):
                second.apply()
            said.append(second._in_force)

    with edit:
        edited = model.weights[W_IN].clone()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.equal(model.weights[W_IN], edited)
        assert model.active_edits == [edit]
    assert said == [False] * 3
