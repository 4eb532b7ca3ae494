"""Something that is put in force and taken back; Ctrl-C, wherever it falls, leaves it wholly in force or wholly undone.

Python runs a signal's handler between two bytecodes of the main thread. A ``KeyboardInterrupt`` can so be raised before
the first line of ``__exit__``, where no ``try`` is in force yet, or inside the clean-up that an earlier one started.
Therefore a handler of our own is installed while anything is in force. It looks at which functions are running, as
Trio's does (trio.readthedocs.io, "Ctrl+C handling"): while weights are being written or about to be taken back, the
signal is kept until that is done; at any other moment it goes to the handler that was there before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any, Literal, Self, TypeVar

from dt_lens.errors import DtLensError

__all__ = ["Reversible", "entering", "leaving"]

F = TypeVar("F", bound=Callable[..., Any])
Kind = Literal["entering", "leaving"]
_KINDS: dict[CodeType, Kind] = {}  # the functions that the handler looks for


def entering(function: F) -> F:
    """Mark a method that puts its object in force: interrupted, it leaves the object out of force."""
    _KINDS[function.__code__] = "entering"
    return function


def leaving(function: F) -> F:
    """Mark a method that takes its object back: Ctrl-C waits until that is done."""
    _KINDS[function.__code__] = "leaving"
    return function


class Reversible:
    """Something to be put in force inside ``with``, and taken back whatever happens.

    A subclass has ``_change``, which puts it in force, and ``_restore``, which takes it back, or what there is of it
    when ``_change`` fails. Ctrl-C interrupts neither. ``_change`` sets ``_writer`` to the current thread before it
    changes anything.
    """

    _in_force = False
    _writer = 0
    _handler: _Handler | None = None

    def _change(self) -> None:
        raise NotImplementedError

    def _restore(self) -> None:
        raise NotImplementedError

    @entering
    def apply(self) -> None:
        """Put it in force until ``undo``.

        Raises:
            DtLensError: if it is in force already.
        """
        if self._in_force:
            raise DtLensError(f"This {type(self).__name__} is already in force; undo it, or make another one.")
        try:
            _hold(self)
            self._change()
            self._in_force = True
        except BaseException:
            # What another thread has put in force meanwhile stays.
            self._take_back(restore=self._writer == threading.get_ident())
            raise
        if self._handler is not None:
            self._handler.deliver(self)

    @leaving
    def undo(self) -> None:
        """Take it back; nothing happens if it is not in force."""
        if self._in_force:
            self._take_back()

    @leaving
    def _take_back(self, restore: bool = True) -> None:
        _hold(self)
        try:
            if restore:
                self._restore()
        finally:
            if restore:
                self._in_force, self._writer = False, 0
            handler = _release(self)
            if handler is not None:
                handler.deliver(None)

    @entering
    def __enter__(self) -> Self:
        self.apply()
        return self

    @leaving
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in force by itself; the handler waits for the original.
        return {name: value for name, value in vars(self).items() if name != "_handler"}


class _Handler:
    """The handler of Ctrl-C while anything is in force.

    Attributes:
        previous: the handler that was there before.
        holders: what is in force, being put in force, or being taken back.
        pending: Ctrl-C came at a moment when it had to wait.
    """

    def __init__(self, previous: Callable[[int, FrameType | None], Any]) -> None:
        self.previous = previous
        self.holders: list[Reversible] = []
        self.pending = False

    @property
    def installed(self) -> bool:
        """Whether Ctrl-C calls this handler now."""
        return signal.getsignal(signal.SIGINT) is self

    def __call__(self, number: int, frame: FrameType | None) -> None:
        kind, who = _running(frame)
        if who is not None:
            held = who in self.holders
            if (held and not who._in_force) if kind == "entering" else (held or who._in_force):
                self.pending = True
                return
        if not self.holders and self.installed:
            signal.signal(signal.SIGINT, self.previous)  # an interrupted release left it behind
        self.pending = False
        self.interrupt(who if kind == "entering" else None, number, frame)

    def deliver(self, who: Reversible | None) -> None:
        """Let a Ctrl-C that had to wait interrupt now; ``who`` has just been put in force, and is then taken back."""
        if self.pending:
            self.pending = False
            self.interrupt(who, signal.SIGINT, None)

    def interrupt(self, who: Reversible | None, number: int, frame: FrameType | None) -> None:
        """Call the previous handler. If that raises, ``who`` does not stay in force."""
        try:
            self.previous(number, frame)
        except BaseException:
            if who is not None:
                who.undo()
            raise


def _running(frame: FrameType | None) -> tuple[Kind | None, Reversible | None]:
    """The innermost marked method that is running, and its object."""
    while frame is not None:
        kind = _KINDS.get(frame.f_code)
        if kind is not None:
            return kind, frame.f_locals["self"]
        frame = frame.f_back
    return None, None


def _hold(who: Reversible) -> None:
    """Install the handler, or join the one that is installed."""
    # Signals reach the main thread only, and only there can a handler be installed.
    if threading.current_thread() is not threading.main_thread():
        return
    current = signal.getsignal(signal.SIGINT)
    if current is who._handler and who._handler is not None and who in who._handler.holders:
        return
    if not callable(current):
        return  # ignored, the end of the process, or a handler of C code (None), which could not be put back
    handler = current if isinstance(current, _Handler) else _Handler(current)
    who._handler = handler
    handler.holders.append(who)
    if handler is not current:
        signal.signal(signal.SIGINT, handler)


def _release(who: Reversible) -> _Handler | None:
    """Leave the handler, and put the previous one back after the last; the handler, if there was one."""
    handler = who._handler
    if handler is None:
        return None
    handler.holders = [one for one in handler.holders if one is not who]
    main = threading.current_thread() is threading.main_thread()
    if not handler.holders and main and handler.installed:
        signal.signal(signal.SIGINT, handler.previous)
    who._handler = None
    return handler
