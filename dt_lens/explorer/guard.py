"""Who may talk to the explorer: the browser that was given the token, from this machine, from the app's own pages.

Any page in a browser may send requests to 127.0.0.1, and other users of this machine may open its ports. So every
request needs the cookie that the token in the printed address was exchanged for, and must name this server and no other
page as where it comes from.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

__all__ = ["HEADERS", "Guard", "Refusal"]

# Dash's pages hold scripts and styles inside them, and Plotly.js makes functions from text.
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",  # the first address holds the token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# A page that was reached from another site may not be sent a strict cookie on a redirect: this page asks by itself.
_ENTER = (
    '<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=/">'
    '<title>dt-lens</title><p><a href="/">Open the explorer</a></p>'
)


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    sentence: str


@dataclass(frozen=True)
class Guard:
    """Checks requests to one server.

    Attributes:
        port: the server's; cookies do not know ports, so it is part of the cookie's name.
        token: what the printed address holds.
        session: what the cookie holds.
    """

    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    session: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    @property
    def address(self) -> str:
        """The address to open first."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """The cookie's name."""
        return f"dt_lens_{self.port}"

    @property
    def hosts(self) -> frozenset[str]:
        """The names by which this server may be addressed; another name that leads here is DNS rebinding."""
        usual = ("127.0.0.1", "localhost") if self.port == 80 else ()  # browsers leave HTTP's own port out
        return frozenset((f"127.0.0.1:{self.port}", f"localhost:{self.port}", *usual))

    def enters(self, method: str, path: str, token: str | None) -> bool:
        """Whether a request is the one that exchanges the token for the cookie."""
        return method == "GET" and path == "/" and token is not None and _same(token, self.token)

    def refusal(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        cookies: Mapping[str, str],
        token: str | None = None,
    ) -> Refusal | None:
        """Why a request is refused; ``None`` if it is answered.

        Args:
            method, path: of the request.
            headers: ``Host``, ``Origin`` and ``Sec-Fetch-Site`` are read.
            cookies: by name.
            token: the ``token`` in the address, if any.
        """
        if headers.get("Host") not in self.hosts:
            return Refusal(HTTPStatus.MISDIRECTED_REQUEST, "This server answers as 127.0.0.1 and localhost only.")
        if self.enters(method, path, token):
            return None
        origin = headers.get("Origin")
        if origin is not None and origin != f"http://{headers['Host']}":
            return Refusal(HTTPStatus.FORBIDDEN, "Requests from other pages are refused.")
        if origin is None and method not in ("GET", "HEAD"):
            return Refusal(HTTPStatus.FORBIDDEN, "A request that changes something must say where it comes from.")
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return Refusal(HTTPStatus.FORBIDDEN, "Requests from other sites are refused.")
        if not _same(cookies.get(self.cookie, ""), self.session):
            return Refusal(
                HTTPStatus.FORBIDDEN,
                "Open the address that dt-lens explore printed: it holds the token that lets this browser in.",
            )
        return None

    def install(self, app: Any) -> None:
        """Check every request to a Flask ``app``, whatever it is for, and set the headers of every answer."""
        from flask import make_response, request

        def check() -> Any:
            token = request.args.get("token")
            found = self.refusal(request.method, request.path, dict(request.headers), request.cookies, token)
            if found is not None:
                return make_response(f"{found.sentence}\n", found.status, {"Content-Type": "text/plain; charset=utf-8"})
            if self.enters(request.method, request.path, token):
                answer = make_response(_ENTER)
                answer.set_cookie(self.cookie, self.session, httponly=True, samesite="Strict")
                return answer
            return None

        def finish(answer: Any) -> Any:
            for name, value in HEADERS.items():
                answer.headers[name] = value
            return answer

        app.before_request(check)
        app.after_request(finish)


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), right.encode())
