"""The process of one browser tab: it loads the model for itself, edits that copy, runs it and sends what happens.

The server's model is never edited. A worker is told to stop through its pipe, and ends when the pipe closes, so that
none outlives the server. Plotly and Dash are not imported here.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Stopped", "main"]


class Stopped(Exception):
    """The tab has asked for the run to stop."""


def main(pipe: Connection, source: str, given: Mapping[str, Any], fold_layernorm: bool) -> None:
    """Load the model, then do what comes through ``pipe`` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's; it closes the pipe
    os.environ["MUJOCO_GL"] = "disable"  # bodies are drawn by the browser; must be set before MuJoCo is imported
    worker = _Worker(pipe, fold_layernorm)
    try:
        worker.say("state", state="loading")
        worker.load(source, given)
        worker.say("state", state="ready")
        while True:
            message = pipe.recv()
            if message[0] == "quit":
                return
            if message[0] == "run":
                worker.run(message[1])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the server has ended, or the tab is closed


class _Worker:
    def __init__(self, pipe: Connection, fold_layernorm: bool) -> None:
        self.pipe, self.fold = pipe, fold_layernorm
        self.number = 0  # of the run
        self.model: Any = None
        self.failed = ""

    def say(self, kind: str, **values: Any) -> None:
        self.pipe.send({"kind": kind, "run": self.number, **values})

    def load(self, source: str, given: Mapping[str, Any]) -> None:
        from dt_lens.errors import DtLensError
        from dt_lens.lens.loading import load

        try:
            import torch

            torch.set_num_threads(1)
            self.model = load(source, check=False, progress=False, **given)  # the server has checked it
        except DtLensError as error:
            self.failed = str(error)

    def check(self) -> None:
        """Raise ``Stopped`` if the tab has asked for that; also ends a run whose server is gone."""
        while self.pipe.poll():
            told = self.pipe.recv()[0]
            if told == "quit":
                raise EOFError
            if told == "stop":
                raise Stopped

    def run(self, wanted: Mapping[str, Any]) -> None:
        """Do one run; an error becomes an event."""
        from dt_lens.errors import DtLensError

        self.number = int(wanted["run"])
        begin = time.monotonic()
        try:
            if self.failed:
                raise DtLensError(self.failed)
            if wanted["kind"] == "text":
                from dt_lens.explorer.text_run import read

                read(self.model, wanted, self.fold, self.say, self.check)
            else:
                from dt_lens.explorer.live_run import play

                play(self.model, wanted, self.fold, self.say, self.check)
            self.say("ended", why="finished", seconds=time.monotonic() - begin)
        except Stopped:
            self.say("ended", why="stopped", seconds=time.monotonic() - begin)
        except DtLensError as error:
            self.say("ended", why="error", sentence=str(error))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            self.say("ended", why="error", sentence=f"The run failed: {type(error).__name__}: {error}")
