"""The server: where it listens, what it refuses, and that no process outlives its tab."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from dt_lens.errors import DtLensError
from dt_lens.explorer import tabs
from dt_lens.explorer.explored import Explored
from dt_lens.explorer.server import Explorer


class _Process:
    """Stands for a worker: it is alive until it is told to quit."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.exitcode, self.stubborn = pipe, None, False

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, patience: float) -> None:
        while self.exitcode is None and self.pipe.poll():
            if self.pipe.recv()[0] == "quit" and not self.stubborn:
                self._end()

    def terminate(self) -> None:
        if not self.stubborn:
            self._end()

    def kill(self) -> None:
        self._end()

    def _end(self) -> None:
        self.exitcode = 0  # type: ignore[assignment]
        self.pipe.close()


@pytest.fixture
def explorer(explored: Explored, monkeypatch: pytest.MonkeyPatch) -> Iterator[Explorer]:
    """A server with stand-ins for processes."""
    import multiprocessing

    def start() -> tuple[Any, Connection]:
        ours, theirs = multiprocessing.Pipe()
        return _Process(theirs), ours

    monkeypatch.setenv("HOST", "0.0.0.0")
    monkeypatch.setenv("DASH_DEBUG", "1")
    made = Explorer(explored)
    monkeypatch.setattr(made.tabs, "_start", start)
    made.start()
    yield made
    made.close()


def ask(explorer: Explorer, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """The status and text of a request with the cookie, as the explorer's own page sends it."""
    guard = explorer.guard
    home = f"http://127.0.0.1:{guard.port}"
    usual = {"Cookie": f"{guard.cookie}={guard.session}", "Origin": home, "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(home + path, data=data, headers={**usual, **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_listens_on_this_machine_alone_whatever_the_environment_says(explorer: Explorer) -> None:
    assert explorer._server.server_address[0] == "127.0.0.1"
    assert not explorer.app._dev_tools.ui
    assert ask(explorer, "/")[0] == 200
    assert ask(explorer, "/", Cookie="")[0] == 403
    assert ask(explorer, "/_mcp", {"jsonrpc": "2.0"})[0] in (404, 405)


def test_every_page_and_file_comes_from_this_server(explorer: Explorer) -> None:
    page = ask(explorer, "/")[1]
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert sources and all(source.startswith("/") and not source.startswith("//") for source in sources)
    for source in sources:
        assert ask(explorer, source)[0] == 200


def test_a_tab_has_one_process_and_takes_it_along(explorer: Explorer) -> None:
    assert json.loads(ask(explorer, "/run/a/open", {})[1]) == {"sentence": ""}
    ask(explorer, "/run/a/open", {})
    (process,) = explorer.tabs.processes
    ask(explorer, "/run/a/start", {"run": 1, "kind": "live"})
    assert process.pipe.recv() == ("run", {"run": 1, "kind": "live"})
    ask(explorer, "/run/a/stop", {})
    assert process.pipe.recv() == ("stop",)
    ask(explorer, "/run/a/close", {})
    deadline = time.monotonic() + 20
    while explorer.tabs.get("a") is not None or process.exitcode is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert explorer.tabs.processes == []


@pytest.mark.parametrize("wrong", [None, [], "x", {"run": "1"}, {}])
def test_a_run_that_is_none_is_not_passed_on(explorer: Explorer, wrong: Any) -> None:
    ask(explorer, "/run/a/open", {})
    (process,) = explorer.tabs.processes
    assert "load it again" in ask(explorer, "/run/a/start", wrong if wrong is not None else "null")[1]
    assert not process.pipe.poll()
    assert "load the page again" in ask(explorer, "/run/nobody/start", {"run": 1})[1]


def test_too_many_tabs_are_told_so(explorer: Explorer) -> None:
    for number in range(tabs.MOST):
        assert json.loads(ask(explorer, f"/run/{number}/open", {})[1])["sentence"] == ""
    assert "at once" in ask(explorer, "/run/more/open", {})[1]
    assert len(explorer.tabs.processes) == tabs.MOST


def test_a_process_that_does_not_quit_is_killed_and_an_abandoned_one_ended(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tabs, "GRACE", 0.2)
    ask(explorer, "/run/a/open", {})
    (process,) = explorer.tabs.processes
    process.stubborn = True
    deadline = time.monotonic() + 20
    while process.exitcode is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert explorer.tabs.get("a") is None


def test_events_come_through_the_stream_and_pictures_wait_for_nobody(explorer: Explorer) -> None:
    ask(explorer, "/run/a/open", {})
    tab = explorer.tabs.get("a")
    assert tab is not None
    (process,) = explorer.tabs.processes
    process.pipe.send({"kind": "state", "state": "ready", "run": 0})
    stream = tab.stream()
    assert next(stream) == ": open\n\n"
    assert json.loads(next(stream).removeprefix("data: ")) == {"kind": "state", "state": "ready", "run": 0}
    for number in range(3 * tabs.WAITING):
        tab.put({"kind": "frame", "run": number})
    assert tab.events.qsize() <= tabs.WAITING + 1
    tab.put({"kind": "ended", "why": "finished"})  # never dropped
    assert tab.events.qsize() <= tabs.WAITING + 2
    assert tab.streams == 1 and not tab.abandoned
    stream.close()
    assert tab.streams == 0


def test_a_process_that_dies_is_told_to_the_page(explorer: Explorer) -> None:
    ask(explorer, "/run/a/open", {})
    tab = explorer.tabs.get("a")
    (process,) = explorer.tabs.processes
    process.kill()
    assert tab is not None
    event = json.loads(tab.events.get(timeout=20) or "")
    assert event["why"] == "error" and "unexpectedly" in event["sentence"]


def test_a_port_that_is_taken_is_a_sentence(explorer: Explorer, explored: Explored) -> None:
    with pytest.raises(DtLensError, match=rf"port {explorer.guard.port}: .*--port"):
        Explorer(explored, explorer.guard.port)


def test_without_dash_it_is_a_sentence(explored: Explored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dash", None)
    with pytest.raises(DtLensError, match=r'pip install "dt-lens\[explore\]"'):
        Explorer(explored)


def test_a_closed_tab_starts_no_process() -> None:
    """A request that comes while its tab is closed: the process would outlive it."""

    def start() -> tuple[Any, Connection]:
        raise AssertionError("a process was started")

    tab = tabs.Tab(start)
    tab.close()
    tab.open()
    tab.send("run", {"run": 1})
    assert tab.process is None


PLACE = "/_dash-update-component"
PLACES = (("url", "pathname"), ("url", "search"), ("dark", "data"))


def page_request(**changes: Any) -> dict[str, Any]:
    """What the app's own page sends to be shown the overview."""
    values = ("/", "", False)
    inputs = [{"id": one, "property": of, "value": v} for (one, of), v in zip(PLACES, values, strict=True)]
    right = {
        "output": "page.children", "outputs": {"id": "page", "property": "children"}, "inputs": inputs, "state": [],
        "changedPropIds": ["url.pathname"],
    }  # fmt: skip
    return right | changes


@pytest.mark.parametrize(
    "wrong",
    [
        [], {}, "x", 7, page_request(output="no.such"), page_request(output=["page.children"]), page_request(inputs=5),
        page_request(inputs=[1, 2, 3]), page_request(inputs=[]), page_request(inputs=[{}] * 3),
        page_request(outputs=None), page_request(changedPropIds=5), page_request(state={"a": 1}),
    ],
)  # fmt: skip
def test_a_request_made_by_hand_is_refused_in_a_sentence(explorer: Explorer, wrong: Any, caplog: Any) -> None:
    status, said = ask(explorer, PLACE, wrong)
    assert status == 400 and "load it again" in said and "Traceback" not in said
    assert not [record for record in caplog.records if record.exc_info or record.name.startswith("dt_lens")]


@pytest.mark.parametrize("mistake", [TypeError("no such\nthing"), KeyError("column")])
def test_a_mistake_of_ours_is_logged_in_one_line(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch, caplog: Any, mistake: Exception
) -> None:
    from dt_lens.explorer import overview

    def fail(*_: Any) -> Any:
        raise mistake

    monkeypatch.setattr(overview, "strongest_rows", fail)
    status, said = ask(explorer, PLACE, page_request())
    assert status == 400 and "load it again" in said
    (record,) = [one for one in caplog.records if one.name == "dt_lens.explorer.server"]
    line = record.getMessage()
    assert type(mistake).__name__ in line and "page.children" in line and "explorer/overview.py:" in line
    assert "\n" not in line and record.exc_info is None


def test_what_a_page_sends_is_answered(explorer: Explorer) -> None:
    status, said = ask(explorer, PLACE, page_request())
    assert status == 200 and "What a random agent reads" in said


def test_numbers_that_json_does_not_have_are_null(explorer: Explorer) -> None:
    tab = tabs.Tab(lambda: (None, None))  # type: ignore[arg-type,return-value]
    tab.put({"kind": "means", "values": [float("nan"), 1.5, (float("inf"), 2)], "more": {"p": float("nan")}})
    event = tab.events.get_nowait()
    assert event is not None
    found = json.loads(event, parse_constant=lambda name: pytest.fail(name))
    assert found == {"kind": "means", "values": [None, 1.5, [None, 2]], "more": {"p": None}}
