"""The addresses of the hub, and what answers each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qlformat.hub_server import api, committing, downloads, names, preupload, pull_requests, uploads, xet_access
from qlformat.hub_server.asking import Ask, endpoint, is_loopback, refusal
from qlformat.hub_server.refusals import Refused, shown
from qlformat.hub_server.service import Hub

_REPO = "/{namespace}/{name}"
_API = "/api/{types:types}" + _REPO


class _Types(Convertor[str]):
    """models, datasets or spaces."""

    regex = "|".join(names.TYPES)

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


register_url_convertor("types", _Types())


def application(hub: Hub, pages: Sequence[BaseRoute] = ()) -> Starlette:
    """The hub as an ASGI application.

    Args:
        hub: what it serves.
        pages: routes of pages for browsers, tried after all others.
    """
    app = Starlette(routes=[*_routes(), *pages, Route("/{path:path}", _unknown, methods=list(_METHODS))])
    app.state.hub = hub
    app.add_middleware(EncodedPaths)
    app.add_middleware(OwnSite, unguarded=hub.tokens.open)
    return app


_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")


class EncodedPaths:
    """Routes by the address as it was sent: a revision such as refs%2Fpr%2F1 is one part of it.

    Args:
        app: what is called.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replace the decoded path."""
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("latin-1")}
        await self._app(scope, receive, send)


class OwnSite:
    """Refuses what a page of another site makes a browser on this machine ask for.

    A hub without tokens trusts everyone who reaches it, and every page that a browser shows can reach the loopback
    interface. Such a request has an Origin that is not this hub's or, if the page's name was made to lead here (DNS
    rebinding), a Host that is not this machine's.

    Args:
        app: what is called.
        unguarded: whether the hub has no tokens.
    """

    def __init__(self, app: ASGIApp, unguarded: bool) -> None:
        self._app = app
        self._unguarded = unguarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and self._unguarded and (fault := _foreign(scope)):
            await refusal(Refused(403, f"{fault}; start the hub with --token-file if this is meant to work"))(
                scope, receive, send
            )
            return
        await self._app(scope, receive, send)


def _foreign(scope: Scope) -> str | None:
    """What about a request says that another site is behind it, or None."""
    headers = Headers(scope=scope)
    host, origin = headers.get("host", ""), headers.get("origin")
    if scope["method"] not in ("GET", "HEAD") and origin is not None and origin.partition("://")[2] != host:
        return f"a page of {shown(origin)} asked for this"
    listening = (scope.get("server") or ("",))[0]
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if is_loopback(listening) and not is_loopback(name.strip("[]")):
        return f"the request is for {shown(host)}, which is not this machine"
    return None


def _routes() -> list[Route]:
    def on(method: str, path: str, handler: Callable[[Ask], Response]) -> Route:
        return Route(path, endpoint(handler), methods=[method])

    resolve = "/resolve/{revision}/{path:path}"
    prefixed = "/{types:types}" + _REPO
    return [
        on("GET", "/api/whoami-v2", api.whoami),
        on("POST", "/api/validate-yaml", api.validate_yaml),
        on("POST", "/api/repos/create", api.create_repo),
        on("DELETE", "/api/repos/delete", api.delete_repo),
        on("POST", "/api/repos/move", api.move_repo),
        on("GET", "/api/{types:types}", api.list_repos),
        *_repo_routes(on),
        Route(_API + "/commit/{revision}", committing.commit, methods=["POST"]),
        Route("/lfs/{oid}", uploads.put, methods=["PUT"]),
        Route("/lfs/{oid}", uploads.complete, methods=["POST"]),
        on("POST", _REPO + ".git/info/lfs/objects/batch", uploads.batch),
        on("POST", prefixed + ".git/info/lfs/objects/batch", uploads.batch),
        Route(_REPO + resolve, downloads.resolve, methods=["GET"]),
        Route(prefixed + resolve, downloads.resolve, methods=["GET"]),
    ]


def _repo_routes(on: Callable[[str, str, Callable[[Ask], Response]], Route]) -> list[Route]:
    """What is below /api/models/NAMESPACE/NAME."""
    table: list[tuple[str, str, Callable[[Ask], Response]]] = [
        ("GET", "", api.repo_info),
        ("GET", "/revision/{revision}", api.repo_info),
        ("GET", "/tree/{revision}", api.tree),
        ("GET", "/tree/{revision}/{path:path}", api.tree),
        ("POST", "/paths-info/{revision}", api.paths_info),
        ("GET", "/refs", api.refs),
        ("GET", "/commits/{revision}", api.commits),
        ("POST", "/branch/{revision}", api.create_branch),
        ("DELETE", "/branch/{revision}", api.delete_branch),
        ("POST", "/tag/{revision}", api.create_tag),
        ("DELETE", "/tag/{revision}", api.delete_tag),
        ("POST", "/super-squash/{revision}", api.squash),
        ("PUT", "/settings", api.settings),
        ("GET", "/auth-check", api.auth_check),
        ("GET", "/auth-check/write", api.auth_check_write),
        ("POST", "/preupload/{revision}", preupload.preupload),
        ("GET", "/xet-write-token/{revision}", xet_access.write_token),
        ("GET", "/discussions", pull_requests.listed),
        ("POST", "/discussions", pull_requests.opened),
        ("GET", "/discussions/{number}", pull_requests.shown),
        ("POST", "/discussions/{number}/merge", pull_requests.merged),
        ("POST", "/discussions/{number}/status", pull_requests.status),
    ]
    return [on(method, _API + path, handler) for method, path, handler in table]


async def _unknown(request: Request) -> Response:
    """404. A repository's name without a namespace, and types that are not kept here, are no repositories."""
    parts = request.url.path.strip("/").split("/")
    is_repo = (parts[0] == "api" and len(parts) == 3) or "resolve" in parts
    message = (
        f"{request.method} {request.url.path[:200]} is nothing that this hub answers; repositories are NAMESPACE/NAME"
    )
    return refusal(Refused(404, message, code="RepoNotFound" if is_repo else None))
