"""The hub in a browser: what repositories there are, and each one's card, files, history and relatives.

Pages only read, hold no script, and ask the same questions as the API about who may see what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qlformat.hub_server.app import application
from qlformat.hub_server.asking import decoded, guarded, refusal, whole_body
from qlformat.hub_server.browser_sessions import COOKIE, SECONDS, Sessions, WithSessions, cookie_of
from qlformat.hub_server.page_parts import Reader
from qlformat.hub_server.page_templates import HEADERS, asset_response, page
from qlformat.hub_server.page_views import Views
from qlformat.hub_server.refusals import Refused, no_repo
from qlformat.hub_server.service import Hub
from qlformat.hub_server.tokens import ANYBODY

_MAX_FORM = 8 << 10
_REPO = "/{namespace}/{name}"
_HEADINGS = {400: "Not a valid address", 403: "Not allowed", 404: "Not found", 413: "Too long"}


def with_pages(hub: Hub) -> ASGIApp:
    """The hub as an ASGI application: the API, and the pages."""
    sessions = Sessions(hub.tokens)
    return WithSessions(application(hub, Pages(hub, sessions).routes()), sessions)


class Pages:
    """The addresses of the pages.

    Args:
        hub: what is shown.
        sessions: who is signed in.
    """

    def __init__(self, hub: Hub, sessions: Sessions) -> None:
        self._hub = hub
        self._sessions = sessions
        self._views = Views(hub)

    def routes(self) -> list[Route]:
        """To be tried after those of the API."""
        shown: dict[str, Callable[[Reader, Request], Response]] = {"/": self._views.index}
        for base in (_REPO, "/{types:types}" + _REPO):
            shown[base] = self._views.card
            shown[base + "/refs"] = self._views.refs
            shown[base + "/tree/{rest:path}"] = self._views.files
            shown[base + "/blob/{rest:path}"] = self._views.file
            shown[base + "/raw/{rest:path}"] = self._views.picture
            shown[base + "/commits/{rest:path}"] = self._views.commits
            shown[base + "/commit/{rest:path}"] = self._views.commit
        return [
            Route("/-/sign-in", self._sign_in_page, methods=["GET"]),
            Route("/-/sign-in", self._sign_in, methods=["POST"]),
            Route("/-/sign-out", self._sign_out, methods=["POST"]),
            Route("/-/{asset}", _asset, methods=["GET"]),
            *(Route(path, self._endpoint(view), methods=["GET"]) for path, view in shown.items()),
        ]

    def _endpoint(self, view: Callable[[Reader, Request], Response]) -> Callable[[Request], Any]:
        async def run(request: Request) -> Response:
            if request.path_params.get("namespace") == "api":
                return refusal(no_repo(decoded(request.url.path)))
            return await guarded(run_in_threadpool(self._shown, view, request))

        return run

    def _shown(self, view: Callable[[Reader, Request], Response], request: Request) -> Response:
        reader = self._reader(request)
        try:
            return view(reader, request)
        except Refused as refused:
            return self._message(reader, refused)
        except OSError:
            return self._message(reader, _LOST)

    def _reader(self, request: Request) -> Reader:
        """Who reads: the one whose token came, or a stranger where it is not known any more."""
        try:
            identity = self._hub.tokens.identify(request.headers.get("authorization"))
        except Refused:
            identity = ANYBODY
        query = f"?{request.url.query}" if request.url.query else ""
        return Reader(
            identity=identity,
            open=self._hub.tokens.open,
            endpoint=str(request.base_url).rstrip("/"),
            here=request.url.path + query,
        )

    def _message(self, reader: Reader, refused: Refused) -> Response:
        heading = _HEADINGS.get(refused.status, "That did not work")
        message = refused.message[:1].upper() + refused.message[1:]
        values = {"reader": reader, "query": "", "here": reader.here, "heading": heading, "message": message}
        answer = page("message.html", values, refused.status)
        if refused.code:
            answer.headers["X-Error-Code"] = refused.code
        return answer

    async def _sign_in_page(self, request: Request) -> Response:
        return self._form(request, request.query_params.get("next", "/"))

    def _form(self, request: Request, target: str, status: int = 200) -> Response:
        reader = self._reader(request)
        values = {"reader": reader, "query": "", "here": "/", "next": _local(target), "failed": status != 200}
        return page("sign_in.html", values, status)

    async def _sign_in(self, request: Request) -> Response:
        try:
            _require_same_site(request)
            form = parse_qs((await whole_body(request, _MAX_FORM)).decode(errors="replace"), max_num_fields=10)
        except (Refused, ValueError) as error:
            return self._message(self._reader(request), error if isinstance(error, Refused) else _NOT_A_FORM)
        target = form.get("next", ["/"])[0]
        session = self._sessions.begin(form.get("token", [""])[0].strip())
        if session is None or self._hub.tokens.open:
            return self._form(request, target, 403)
        answer = RedirectResponse(_local(target), 303, HEADERS)
        answer.set_cookie(
            COOKIE, session, max_age=SECONDS, httponly=True, samesite="lax", secure=request.url.scheme == "https"
        )
        return answer

    async def _sign_out(self, request: Request) -> Response:
        try:
            _require_same_site(request)
        except Refused as refused:
            return self._message(self._reader(request), refused)
        self._sessions.end(cookie_of(request.headers.get("cookie", "").encode("latin-1", "replace")))
        answer = RedirectResponse("/", 303, HEADERS)
        answer.delete_cookie(COOKIE, httponly=True, samesite="lax")
        return answer


_LOST = Refused(500, "a file that this page shows cannot be read from the hub's store; tell who runs the hub")
_NOT_A_FORM = Refused(400, "the form has more fields than the page has; go back and try again")


async def _asset(request: Request) -> Response:
    found = asset_response(request.path_params["asset"])
    return found or refusal(Refused(404, "the hub has no such file"))


def _require_same_site(request: Request) -> None:
    """A form of another site must not sign anybody in or out; browsers say where it was."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise Refused(403, "this form was sent from another site; open the hub's own page to sign in or out")


def _local(target: str) -> str:
    """An address of this hub to go on to; / for one elsewhere (browsers take a backslash for a slash)."""
    fine = target.startswith("/") and not target.startswith(("//", "/\\", "/-/")) and target.isprintable()
    return target if fine and len(target) <= 2000 else "/"
