"""The endpoints of pull requests: branches refs/pr/N that become main by being merged."""

from __future__ import annotations

import time

from starlette.responses import JSONResponse, Response

from qlformat.hub_server import describing
from qlformat.hub_server.asking import Ask
from qlformat.hub_server.index import Pull, Repo
from qlformat.hub_server.refusals import Refused


def opened(ask: Ask) -> Response:
    """POST discussions."""
    repo, body = ask.repo(write=True), ask.json()
    if not body.get("pullRequest"):
        raise Refused(400, "this hub has pull requests but no discussions")
    title = ask.text(body.get("title"), "the title", 1000)
    text = ask.text(body.get("description") or "", "the description", 100_000)
    number = ask.hub.changes.open_pull(repo, title, text, ask.identity.name, draft=True)
    return JSONResponse(describing.pull(_found(ask, repo, number), repo))


def listed(ask: Ask) -> Response:
    """GET discussions."""
    repo = ask.repo()
    pulls = (
        [describing.pull(pull, repo) for pull in ask.hub.index.pulls(repo)] if ask.query.get("p", "0") == "0" else []
    )
    return JSONResponse({"discussions": pulls, "count": len(pulls), "start": 0})


def shown(ask: Ask) -> Response:
    """GET discussions/N."""
    repo = ask.repo()
    return JSONResponse(describing.pull(_found(ask, repo, _number(ask)), repo))


def merged(ask: Ask) -> Response:
    """POST discussions/N/merge."""
    return JSONResponse({"commitOid": ask.hub.changes.merge_pull(ask.repo(write=True), _number(ask))})


def status(ask: Ask) -> Response:
    """POST discussions/N/status."""
    repo, wanted = ask.repo(write=True), ask.json().get("status")
    if wanted not in ("open", "closed"):
        raise Refused(400, "needed status: open or closed")
    number = _number(ask)
    ask.hub.changes.set_pull_status(repo, number, str(wanted))
    event = {"id": f"{number}-{wanted}", "type": "status-change", "author": {"name": ask.identity.name}}
    event |= {"createdAt": describing.time(time.time()), "data": {"status": wanted}}
    return JSONResponse({"newStatus": event})


def _number(ask: Ask) -> int:
    text = ask.params["number"]
    if not text.isdecimal() or len(text) > 9:
        raise Refused(404, "no such pull request", code="EntryNotFound")
    return int(text)


def _found(ask: Ask, repo: Repo, number: int) -> Pull:
    for pull in ask.hub.index.pulls(repo):
        if pull.number == number:
            return pull
    raise Refused(404, f"no pull request {number} in this repository", code="EntryNotFound")
