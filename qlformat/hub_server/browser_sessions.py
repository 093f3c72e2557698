"""Signing in with a browser, which cannot send a token by itself: a cookie stands for the token.

The cookie works for GET and HEAD alone: what changes anything needs the token itself, so that a page of another site
cannot make a signed-in browser do it. Sessions live in memory and end with the server.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie

from starlette.types import ASGIApp, Receive, Scope, Send

from qlformat.hub_server.refusals import Refused
from qlformat.hub_server.tokens import Identity, Tokens

COOKIE = "qlf_session"
SECONDS = 12 * 3600
_MOST = 1000


class Sessions:
    """Who is signed in.

    Args:
        tokens: knows the tokens.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._open: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def begin(self, token: str) -> str | None:
        """The cookie's value for a token, or None if the hub does not know it."""
        if self.identity(f"Bearer {token}") is None:
            return None
        session = secrets.token_urlsafe(32)
        self._open[session] = token, time.time() + SECONDS
        while len(self._open) > _MOST:
            self._open.popitem(last=False)
        return session

    def end(self, session: str | None) -> None:
        """Forget a session."""
        self._open.pop(session or "", None)

    def token(self, session: str | None) -> str | None:
        """The token of a session that has not ended."""
        token, until = self._open.get(session or "", ("", 0.0))
        return token if until > time.time() else None

    def identity(self, authorization: str) -> Identity | None:
        """Who sends this header, or None."""
        try:
            found = self._tokens.identify(authorization)
        except Refused:
            return None
        return found if found.known else None


class WithSessions:
    """The application, for which a browser's cookie is as good as the token: the same rules decide what is shown.

    Args:
        app: the application.
        sessions: who is signed in.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions) -> None:
        self._app = app
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            headers = dict(scope["headers"])
            token = self._sessions.token(cookie_of(headers.get(b"cookie", b"")))
            if token is not None and b"authorization" not in headers:
                bearer = (b"authorization", f"Bearer {token}".encode())
                scope = {**scope, "headers": [*scope["headers"], bearer]}
        await self._app(scope, receive, send)


def cookie_of(header: bytes) -> str | None:
    """The session in a Cookie header."""
    try:
        found = SimpleCookie(header.decode("latin-1")).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None
