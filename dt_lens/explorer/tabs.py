"""Tabs of the browser: each has a process that runs models, and one stream through which it hears what happens.

A tab that is closed stops asking for its stream, and its process ends a few seconds later; so do all of them when the
server ends. Dash's callbacks never wait for a run.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from dt_lens.explorer import worker

__all__ = ["MOST", "Tab", "Tabs"]

MOST = 4  # tabs with a stream: a browser opens six connections to one server, and pages need some
GRACE = 10.0  # seconds that a process outlives the stream of its tab, so that a hiccup ends nothing
BEAT = 2.0  # seconds between signs of life on a stream: writing to a closed tab fails
WAITING = 400  # events that may wait for a tab; when it is slower, pictures are dropped


class Tab:
    """One tab: its process, and the events that wait for its stream."""

    def __init__(self, start: Callable[[], tuple[Any, Connection]]) -> None:
        self._start = start
        self.events: queue.Queue[str | None] = queue.Queue()
        self.process: Any = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()
        self.streams = 0
        self.left = time.monotonic()  # when its last stream ended
        self._closed = False

    @property
    def abandoned(self) -> bool:
        """Whether nobody has listened for a while."""
        return self.streams == 0 and time.monotonic() - self.left > GRACE

    def open(self) -> None:
        """Start the tab's process, unless it runs."""
        with self._lock:
            if self._closed or (self.process is not None and self.process.is_alive()):
                return  # a process of a closed tab would be nobody's to end
            self.process, self._pipe = self._start()
            threading.Thread(target=self._listen, args=(self._pipe,), daemon=True).start()

    def send(self, *message: Any) -> None:
        """Tell the process something; starts it for a run."""
        if message[0] == "run":
            self.open()
        with self._lock:
            if self._pipe is not None:
                try:
                    self._pipe.send(message)
                except (BrokenPipeError, OSError):
                    self.put({"kind": "ended", "why": "error", "sentence": "The process of this tab has ended."})

    def put(self, event: Mapping[str, Any]) -> None:
        """Queue an event for the stream."""
        if event["kind"] == "frame" and self.events.qsize() > WAITING:
            return
        self.events.put(json.dumps(_finite(event), ensure_ascii=False, allow_nan=False))

    def stream(self) -> Iterator[str]:
        """The events as Server-Sent Events, until the tab stops reading."""
        self.streams += 1
        try:
            yield ": open\n\n"
            while True:
                try:
                    event = self.events.get(timeout=BEAT)
                except queue.Empty:
                    yield ": alive\n\n"
                    continue
                if event is None:
                    return
                yield f"data: {event}\n\n"
        finally:
            self.streams -= 1
            self.left = time.monotonic()

    def close(self) -> None:
        """End the process and the stream."""
        with self._lock:
            self._closed = True
            process, pipe = self.process, self._pipe
            self.process = self._pipe = None
        if pipe is not None:
            with suppress(OSError):  # it has ended already
                pipe.send(("quit",))
        if process is not None:
            for end, patience in ((None, 2.0), (process.terminate, 2.0), (process.kill, 2.0)):
                if end is not None:
                    end()
                process.join(patience)
                if process.exitcode is not None:
                    break
        self.events.put(None)

    def _listen(self, pipe: Connection) -> None:
        try:
            while True:
                self.put(pipe.recv())
        except (EOFError, OSError):
            pipe.close()  # here, and not by whoever ends the process: a thread that reads it would fail
            if self._pipe is pipe:  # nobody has ended it
                self._pipe = None
                self.put({"kind": "ended", "why": "error", "sentence": "The process of this tab ended unexpectedly."})


def _finite(value: Any) -> Any:
    """A value with ``None`` for NaN and infinity, which JSON does not have and a browser refuses to read."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tabs:
    """All tabs of a server.

    Args:
        source, given, fold_layernorm: what their processes load, and how they edit it.
    """

    def __init__(self, source: str, given: Mapping[str, Any], fold_layernorm: bool) -> None:
        self._what = (source, dict(given), fold_layernorm)
        self._tabs: dict[str, Tab] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, daemon=True)
        self._sweeper.start()

    def open(self, name: str) -> Tab | None:
        """The tab called ``name``, with its process started; ``None`` where there are too many, or none any more."""
        with self._lock:
            if self._ended.is_set():
                return None
            if name not in self._tabs:
                if len(self._tabs) >= MOST:
                    return None
                self._tabs[name] = Tab(self._start)
            tab = self._tabs[name]
        tab.open()
        return tab

    def get(self, name: str) -> Tab | None:
        """The tab called ``name``, if it is open."""
        return self._tabs.get(name)

    def close(self, name: str) -> None:
        """End a tab and its process."""
        with self._lock:
            tab = self._tabs.pop(name, None)
        if tab is not None:
            tab.close()

    def close_all(self) -> None:
        """End all of them; none opens afterwards."""
        self._ended.set()
        for name in list(self._tabs):
            self.close(name)

    @property
    def processes(self) -> list[Any]:
        """The processes that run now."""
        return [tab.process for tab in self._tabs.values() if tab.process is not None and tab.process.is_alive()]

    def _start(self) -> tuple[Any, Connection]:
        # Spawned: a copy of this process would hold its threads' locks.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=worker.main, args=(theirs, *self._what), daemon=True, name="dt-lens explore")
        process.start()
        theirs.close()
        return process, ours

    def _sweep(self) -> None:
        while not self._ended.wait(1.0):
            for name, tab in list(self._tabs.items()):
                if tab.abandoned:
                    self.close(name)


def install(app: Any, tabs: Tabs) -> None:
    """The routes by which a page talks to its process: open, start, stop, close, and the stream."""
    from flask import Response, jsonify, request

    def answer(sentence: str = "", status: int = 200) -> Any:
        return jsonify({"sentence": sentence}), status

    def opened(name: str) -> Any:
        if tabs.open(name[:64]) is None:
            # With status 200, since the browser would print an error of its own for another one.
            return answer(f"Runs are possible in {MOST} tabs at once; close one of them, or wait until it has ended.")
        return answer()

    def stream(name: str) -> Any:
        tab = tabs.get(name[:64])
        if tab is None:
            return Response(status=204)  # tells an EventSource not to come again
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return Response(tab.stream(), mimetype="text/event-stream", headers=headers)

    def told(name: str, what: str) -> Any:
        tab = tabs.get(name[:64])
        if tab is None:
            return answer("This tab has no process; load the page again.")
        if what == "stop":
            tab.send("stop")
            return answer()
        wanted = request.get_json(silent=True)
        if not isinstance(wanted, dict) or not isinstance(wanted.get("run"), int):
            return answer("The page sent what is no run; load it again.")
        tab.send("run", wanted)
        return answer()

    def closed(name: str) -> Any:
        threading.Thread(target=tabs.close, args=(name[:64],), daemon=True).start()
        return answer()

    app.add_url_rule("/run/<name>/open", "run_open", opened, methods=["POST"])
    app.add_url_rule("/run/<name>/stream", "run_stream", stream, methods=["GET"])
    app.add_url_rule("/run/<name>/close", "run_close", closed, methods=["POST"])
    app.add_url_rule("/run/<name>/<any(start, stop):what>", "run_told", told, methods=["POST"])
