"""The pages' templates, their style and picture, and the headers that every page has."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

ASSETS = {"style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}

HEADERS = {
    # No script at all, nothing of another site, no frame; the style is a file of this server.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with "no-referrer" browsers send the sign-in form from "null"
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
}
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def page(template: str, values: dict[str, Any], status: int = 200) -> HTMLResponse:
    """A page from its template."""
    return HTMLResponse(_environment().get_template(template).render(values), status, HEADERS)


def asset_response(name: str) -> Response | None:
    """The style or the picture, by the name that `asset` gave it; None for other names."""
    for known, media_type in ASSETS.items():
        if name == _hashed_name(known):
            headers = HEADERS | {"Cache-Control": "public, max-age=31536000, immutable"}
            return Response(_asset(known), 200, headers, media_type)
    return None


def asset(name: str) -> str:
    """The address of the style or picture; another version has another one."""
    return f"/-/{_hashed_name(name)}"


@cache
def _asset(name: str) -> bytes:
    return resources.files("qlformat.hub_server").joinpath("templates", name).read_bytes()


@cache
def _hashed_name(name: str) -> str:
    return f"{hashlib.sha256(_asset(name)).hexdigest()[:12]}-{name}"


@cache
def _environment() -> Environment:
    loader = PackageLoader("qlformat.hub_server")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["asset"] = asset
    environment.filters.update(
        bytes=shown_size,
        iso=lambda seconds: _moment(seconds).strftime("%Y-%m-%dT%H:%M:%SZ"),
        day=lambda seconds: f"{_moment(seconds).day} {_moment(seconds):%b %Y}",
        base_name=lambda path: PurePosixPath(path).name,
        part=lambda text: quote(text, safe=""),
        segments=lambda path: quote(path, safe="/"),
        short=lambda revision: revision[:12] if len(revision) == 40 else revision,
    )
    return environment


def shown_size(size: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    unit = 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    if unit == 0:
        return f"{size:.0f} {'byte' if size == 1 else 'bytes'}"
    return f"{size:.3g} {_UNITS[unit]}"


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
