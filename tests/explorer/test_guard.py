"""Who is answered: the browser with the cookie, from this server's own pages, and nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from dt_lens.explorer.guard import HEADERS, Guard

GUARD = Guard(8050, token="right", session="known")
HOST = {"Host": "127.0.0.1:8050"}
COOKIE = {"dt_lens_8050": "known"}
OWN = "http://127.0.0.1:8050"


def status(method: str = "GET", path: str = "/", token: str | None = None, cookies: Any = None, **headers: str) -> int:
    """The status of a refusal; 0 for none. Headers with ``_`` for ``-``."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    found = GUARD.refusal(method, path, {**HOST, **named}, COOKIE if cookies is None else cookies, token)
    return 0 if found is None else int(found.status)


def test_the_token_lets_in_and_the_cookie_keeps_in() -> None:
    assert status(token="right", cookies={}) == 0
    assert status(token="right", cookies={}, Sec_Fetch_Site="cross-site") == 0  # a link in another program's window
    assert status() == 0
    assert status(Host="localhost:8050") == 0
    assert status("POST", "/_dash-update-component", Origin=OWN, Sec_Fetch_Site="same-origin") == 0
    assert GUARD.address == f"{OWN}/?token=right"


@pytest.mark.parametrize("path", ["/", "/_dash-update-component", "/assets/runs.js", "/run/a/open", "/nowhere"])
@pytest.mark.parametrize("cookies", [{}, {"dt_lens_8050": "wrong"}, {"dt_lens_8051": "known"}, {"dt_lens_8050": ""}])
def test_without_the_cookie_nothing_is_answered(path: str, cookies: dict[str, str]) -> None:
    assert status("GET", path, cookies=cookies) == 403
    assert status("POST", path, cookies=cookies, Origin=OWN) == 403


def test_the_token_is_only_good_for_the_first_page() -> None:
    assert status("GET", "/assets/runs.js", token="right", cookies={}) == 403
    assert status("POST", "/", token="right", cookies={}, Origin=OWN) == 403
    assert status("GET", "/", token="wrong", cookies={}) == 403
    assert status("GET", "/", token="", cookies={}) == 403
    assert status("GET", "/", token="righté", cookies={}) == 403


@pytest.mark.parametrize("host", ["evil.example:8050", "127.0.0.1", "127.0.0.1:8051", "localhost", "0.0.0.0:8050", ""])
def test_another_host_is_refused_even_with_token_and_cookie(host: str) -> None:
    """A name of somebody else's that leads to this machine: DNS rebinding."""
    assert status(Host=host) == 421
    assert status(Host=host, token="right") == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:8050", "http://127.0.0.1:8051", ""]
)
def test_another_origin_is_refused(origin: str) -> None:
    assert status("POST", "/run/a/open", Origin=origin) == 403
    assert status("GET", "/run/a/stream", Origin=origin) == 403


def test_what_changes_something_must_say_where_it_comes_from() -> None:
    assert status("POST", "/run/a/open") == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_is_refused(site: str) -> None:
    """Another port of this machine is the same site, and its pages are sent this server's cookies."""
    assert status(Sec_Fetch_Site=site) == 403


def test_two_guards_share_nothing() -> None:
    one, other = Guard(1), Guard(1)
    assert len({one.token, other.token, one.session, other.session}) == 4
    assert len(one.token) >= 32 and len(one.session) >= 32


@pytest.fixture
def client() -> Any:
    from flask import Flask

    app = Flask("guarded")
    GUARD.install(app)
    app.add_url_rule("/page", "page", lambda: "secret")
    return app.test_client()


def test_an_app_is_guarded_whatever_is_asked_for(client: Any) -> None:
    for path in ("/page", "/static/x", "/nowhere"):
        answer = client.get(path, base_url=OWN)
        assert answer.status_code == 403 and b"secret" not in answer.data
    entered = client.get("/?token=right", base_url=OWN)
    cookie = entered.headers["Set-Cookie"]
    assert entered.status_code == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert cookie.startswith("dt_lens_8050=known;")
    page = client.get("/page", base_url=OWN)
    assert page.data == b"secret"
    assert {name: page.headers[name] for name in HEADERS} == HEADERS
    assert client.get("/page", base_url="http://evil.example:8050").status_code == 421


def test_on_port_80_browsers_leave_the_port_out() -> None:
    bare = {"Host": "127.0.0.1"}
    assert Guard(80, session="known").refusal("GET", "/", bare, {"dt_lens_80": "known"}) is None
    assert GUARD.refusal("GET", "/", bare, COOKIE) is not None
