"""The explorer's server: bound to this machine in so many words, guarded, and gone with its processes when it ends."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from dt_lens.errors import DtLensError, because
from dt_lens.explorer.guard import Guard
from dt_lens.explorer.tabs import Tabs, install

if TYPE_CHECKING:
    from dt_lens.explorer.explored import Explored

__all__ = ["Explorer", "require_dash", "require_port"]

log = logging.getLogger(__name__)
HOST = "127.0.0.1"  # never from the environment: Dash's own run() reads HOST, and would open all interfaces


def require_dash() -> None:
    """Raise ``DtLensError`` unless Dash is installed."""
    try:
        import dash  # noqa: F401
    except ImportError:
        raise DtLensError('The explorer needs Dash, which is not installed: pip install "dt-lens[explore]".') from None


def require_port(port: int) -> None:
    """Raise ``DtLensError`` unless this machine's port is free; 0 always is."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise DtLensError(
                f"The explorer cannot listen on port {port}: {because(error)}; give another --port, or none for a free "
                "one."
            ) from None


class Explorer:
    """A running explorer. ``serve`` answers until it is interrupted; ``close`` ends every process.

    Args:
        explored: what it shows.
        port: 0 for a free one.

    Attributes:
        address: what to open: it holds the token.

    Raises:
        DtLensError: if Dash is not installed, or the port is taken.
    """

    def __init__(self, explored: Explored, port: int = 0) -> None:
        require_dash()
        from flask import Flask
        from werkzeug.serving import make_server

        from dt_lens.explorer.app import make_app

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request, with addresses
        flask = Flask("dt_lens.explorer")
        require_port(port)  # werkzeug prints and exits
        self._server = make_server(HOST, port, flask, threaded=True)
        self.guard = Guard(self._server.server_port)
        self.guard.install(flask)  # before anything else has a route
        self.tabs = Tabs(explored.source, explored.given, explored.svd.fold_layernorm)
        install(flask, self.tabs)
        self.app = make_app(explored, flask)
        _refuse_nonsense(flask, self.app)
        self.address = self.guard.address
        self._serving: threading.Thread | None = None

    def serve(self) -> None:
        """Answer until Ctrl-C or SIGTERM, then end every process."""
        before: Any = None
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, _leave)
        try:
            self._server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
            self.close()

    def start(self) -> None:
        """Answer in a thread of this process, until ``close``."""
        self._serving = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._serving.start()

    def close(self) -> None:
        """Stop answering, and end every process."""
        self.tabs.close_all()
        if self._serving is not None:
            self._server.shutdown()
            self._serving.join()
        self._server.server_close()


def _refuse_nonsense(flask: Any, app: Any) -> None:
    """Answer a request to a callback that no page sends with status 400 and a sentence, and log nothing of it.

    A callback that fails on what a page may send is a mistake of ours: it is answered alike, and logged in one line.
    """
    from dash.exceptions import DashException
    from flask import make_response, request
    from werkzeug.exceptions import HTTPException

    wrong = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, DashException)
    place = "/_dash-update-component"
    plain = {"Content-Type": "text/plain; charset=utf-8"}

    def refused() -> Any:
        return make_response("The page sent values that no page here sends; load it again.\n", 400, plain)

    def check() -> Any:
        if request.path != place or request.method != "POST":
            return None
        sent = request.get_json(silent=True)
        if not isinstance(sent, dict) or sent.get("output") not in known():
            return refused()
        lists = [sent.get(name, []) for name in ("inputs", "state", "changedPropIds")]
        holds = [isinstance(one, list) for one in lists]
        fits = all(holds) and all(isinstance(one, dict | list) for one in [*lists[0], *lists[1]])
        return None if fits else refused()

    def known() -> set[str]:
        return set(app.callback_map)

    def failed(error: Exception) -> Any:
        if isinstance(error, HTTPException):
            return error
        if request.path == place and isinstance(error, wrong):
            where = _our_line(error)
            if where is not None:
                asked = (request.get_json(silent=True) or {}).get("output")
                words = " ".join(f"{type(error).__name__}: {error}".split())
                log.error("A page of the explorer failed at %s (%s): %s", where, str(asked)[:100], words[:500])
            return refused()
        raise error

    flask.before_request(check)
    flask.register_error_handler(Exception, failed)


def _our_line(error: BaseException) -> str | None:
    """The innermost line of dt-lens that led to an error, of the callbacks on: ``matrix.py:120``.

    ``None`` where no callback of ours had begun: then Dash has refused the request itself.
    """
    here = Path(__file__)
    ours = [
        (Path(frame.filename), frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if here.parents[1] in Path(frame.filename).parents and Path(frame.filename) != here
    ]
    return f"{ours[-1][0].relative_to(here.parents[1]).as_posix()}:{ours[-1][1]}" if ours else None


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
