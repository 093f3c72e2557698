"""The endpoints below /api/ that read or change the index. Each is a function of a request, run in a thread."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from starlette.responses import JSONResponse, Response

from qlformat.hub_server import card_metadata, describing, names
from qlformat.hub_server.asking import Ask
from qlformat.hub_server.index import Commit, Repo
from qlformat.hub_server.refusals import Refused, no_entry, shown

_PAGE = 1000
_COMMITS = 50


def whoami(ask: Ask) -> Response:
    """GET whoami-v2."""
    who = ask.identity
    if not who.known:
        raise Refused(401, "no token was sent; set HF_TOKEN or run `hf auth login`")
    role = "write" if who.write else "read"
    token = {"displayName": who.name, "role": role}
    orgs = [
        {"type": "org", "name": name, "fullname": name} for name in sorted(who.namespaces or ()) if name != who.name
    ]
    return JSONResponse(
        {
            "type": "user",
            "id": who.name,
            "name": who.name,
            "fullname": who.name,
            "orgs": orgs,
            "auth": {"accessToken": token},
        }
    )


def validate_yaml(ask: Ask) -> Response:
    """POST validate-yaml: the metadata of a card."""
    try:
        card_metadata.parse(ask.text(ask.json().get("content"), "the card", ask.hub.limits.json).encode())
    except (card_metadata.BrokenCard, UnicodeEncodeError) as error:
        answer = {"error": str(error), "errors": [{"message": str(error)}], "warnings": []}
        return JSONResponse(answer, 400)
    return JSONResponse({"errors": [], "warnings": []})


def _named(ask: Ask, body: dict[str, Any]) -> tuple[str, str]:
    """The type and NAMESPACE/NAME in the body of a request about a repository."""
    type_, name = body.get("type") or "model", str(body.get("name"))
    if type_ not in names.TYPES.values():
        raise Refused(400, f"{shown(str(type_))} is no type of repository; use model, dataset or space")
    if "/" not in name:
        name = f"{body.get('organization') or ask.identity.name}/{name}"
    return type_, name


def _page(ask: Ask, type_: str, name: str) -> str:
    return f"{ask.base}/{'' if type_ == 'model' else type_ + 's/'}{name}"


def create_repo(ask: Ask) -> Response:
    """POST repos/create."""
    body = ask.json()
    type_, name = _named(ask, body)
    ask.identity.require_write(name)
    names.check_repo(name)
    private = body.get("visibility") == "private" or body.get("private") is True
    url = _page(ask, type_, name)
    try:
        ask.hub.changes.create_repo(type_, name, private=private, author=ask.identity.name)
    except Refused as refused:
        raise Refused(refused.status, refused.message, url=url) from None
    return JSONResponse({"url": url, "name": name, "id": name, "private": private})


def _changed(ask: Ask, type_: str, name: str) -> Repo:
    """A repository that is about to be changed as a whole."""
    types = {single: plural for plural, single in names.TYPES.items()}
    namespace, _, rest = name.partition("/")
    params = {"types": types[type_], "namespace": namespace, "name": rest}
    return Ask(ask.hub, ask.identity, params, ask.query, ask.base, ask.local).repo(write=True)


def delete_repo(ask: Ask) -> Response:
    """DELETE repos/delete."""
    ask.hub.changes.delete_repo(_changed(ask, *_named(ask, ask.json())))
    return JSONResponse({"success": True})


def move_repo(ask: Ask) -> Response:
    """POST repos/move."""
    body = ask.json()
    type_, name = _named(ask, {"name": body.get("fromRepo"), "type": body.get("type")})
    target = str(body.get("toRepo"))
    repo = _changed(ask, type_, name)
    ask.identity.require_write(target)
    ask.hub.changes.move_repo(repo, names.check_repo(target))
    return JSONResponse({"success": True, "url": _page(ask, type_, target)})


def settings(ask: Ask) -> Response:
    """PUT settings: whether the repository is private."""
    repo, body = ask.repo(write=True), ask.json()
    if body.get("gated"):
        raise Refused(400, "this hub has no gated repositories; make it private instead")
    private = body.get("private")
    if "visibility" in body:
        private = {"private": True, "public": False}.get(str(body["visibility"]))
    if type(private) is not bool:
        raise Refused(400, "needed visibility: private or public")
    ask.hub.changes.set_private(repo, private)
    return JSONResponse({"private": private})


def list_repos(ask: Ask) -> Response:
    """GET models, datasets or spaces."""
    query = ask.query
    tags = [tag for value in query.getlist("filter") for tag in value.split(",") if tag]
    tags += [query[key] for key in ("pipeline_tag", "library") if key in query]
    limit = min(_number(query.get("limit"), _PAGE), _PAGE)
    offset = _number(query.get("cursor"), 0)
    found = ask.hub.index.repos(
        ask.type,
        search=query.get("search", ""),
        author=query.get("author"),
        tags=tuple(tags),
        offset=offset,
        limit=limit + 1,
    )
    headers = {}
    if len(found) > limit:
        kept = [(key, value) for key, value in query.multi_items() if key != "cursor"]
        headers["Link"] = _next(ask, f"/api/{ask.params['types']}", [*kept, ("cursor", str(offset + limit))])
    full = any(key in query for key in ("full", "cardData"))
    described = [
        describing.repo(repo) | ({"cardData": dict(repo.card)} if full else {})
        for repo in found[:limit]
        if ask.identity.may_see(repo)
    ]
    return JSONResponse(described, headers=headers)


def _number(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or len(text) > 12:
        raise Refused(400, f"{shown(text)} is not a number")
    return int(text)


def _next(ask: Ask, path: str, query: list[tuple[str, str]]) -> str:
    return f'<{ask.base}{path}?{urlencode(query)}>; rel="next"'


def repo_info(ask: Ask) -> Response:
    """GET REPO or REPO/revision/REVISION."""
    repo = ask.repo()
    commit = ask.hub.index.commit(repo, ask.revision)
    blobs = ask.query.get("blobs", "").lower() in ("true", "1")
    return JSONResponse(describing.whole(repo, commit, ask.hub.index.files(commit), blobs=blobs))


def tree(ask: Ask) -> Response:
    """GET tree/REVISION[/FOLDER]."""
    repo = ask.repo()
    commit = ask.hub.index.commit(repo, ask.revision)
    folder = ask.params.get("path", "").strip("/")
    recursive = ask.query.get("recursive", "").lower() in ("true", "1")
    items = describing.listing(ask.hub.index.files(commit, under=folder), folder, recursive=recursive)
    if folder and not items:
        raise no_entry(folder)
    after = ask.query.get("cursor", "")
    items = [item for item in items if item["path"] > after] if after else items
    limit = min(_number(ask.query.get("limit"), _PAGE), _PAGE) or 1
    headers = {}
    if len(items) > limit:
        query = [(key, value) for key, value in ask.query.multi_items() if key != "cursor"]
        cursor = ("cursor", items[limit - 1]["path"])
        # By its id, so that the pages are of one commit though the branch moves on.
        path = f"/api/{ask.params['types']}/{repo.name}/tree/{commit.id}"
        headers["Link"] = _next(ask, path + (f"/{_quoted(folder)}" if folder else ""), [*query, cursor])
    return JSONResponse(_expanded(ask, commit, items[:limit]), headers=headers)


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _expanded(
    ask: Ask, commit: Commit, items: list[dict[str, Any]], *, wanted: bool | None = None
) -> list[dict[str, Any]]:
    """With the commit that is shown, if the client asks for more: not each file's last one, which is not kept."""
    if wanted or (wanted is None and ask.query.get("expand", "").lower() in ("true", "1")):
        last = {"id": commit.id, "title": commit.title, "date": describing.time(commit.created)}
        return [item | {"lastCommit": last} for item in items]
    return items


def paths_info(ask: Ask) -> Response:
    """POST paths-info/REVISION: files and folders by name; what is not there is left out."""
    repo = ask.repo()
    form = ask.form()
    commit = ask.hub.index.commit(repo, ask.revision)
    files = ask.hub.index.files(commit)
    known = {item["path"]: item for item in describing.listing(files, "", recursive=True)}
    items = [known[path] for path in dict.fromkeys(form.get("paths", [])) if path in known]
    return JSONResponse(_expanded(ask, commit, items, wanted=form.get("expand", [""])[0].lower() in ("true", "1")))


def refs(ask: Ask) -> Response:
    """GET refs."""
    return JSONResponse(describing.refs(ask.hub.index, ask.repo()))


def commits(ask: Ask) -> Response:
    """GET commits/REVISION, the last first."""
    repo = ask.repo()
    page = _number(ask.query.get("p"), 0)
    found = ask.hub.index.history(repo, ask.revision, offset=page * _COMMITS, limit=_COMMITS + 1)
    headers = {}
    if len(found) > _COMMITS:
        path = f"/api/{ask.params['types']}/{repo.name}/commits/{_quoted(ask.revision)}"
        headers["Link"] = _next(ask, path, [("p", str(page + 1))])
    formatted = "formatted" in ask.query.getlist("expand[]")
    described = [describing.commit(each) for each in found[:_COMMITS]]
    if formatted:
        from html import escape

        described = [
            each | {"formatted": {"title": escape(each["title"]), "message": escape(each["message"])}}
            for each in described
        ]
    return JSONResponse(described, headers=headers)


def create_branch(ask: Ask) -> Response:
    """POST branch/BRANCH."""
    start = ask.json().get("startingPoint")
    repo = ask.repo(write=True)
    ask.hub.changes.create_branch(repo, ask.revision, ask.text(start, "the starting point", 300) if start else "main")
    return JSONResponse({"success": True}, 201)


def delete_branch(ask: Ask) -> Response:
    """DELETE branch/BRANCH."""
    ask.hub.changes.delete_branch(ask.repo(write=True), ask.revision)
    return JSONResponse({"success": True})


def create_tag(ask: Ask) -> Response:
    """POST tag/REVISION."""
    repo, body = ask.repo(write=True), ask.json()
    message = body.get("message")
    tag = ask.text(body.get("tag"), "the tag", 300)
    ask.hub.changes.create_tag(repo, tag, ask.revision, ask.text(message, "the message") if message else None)
    return JSONResponse({"success": True}, 201)


def delete_tag(ask: Ask) -> Response:
    """DELETE tag/TAG."""
    ask.hub.changes.delete_tag(ask.repo(write=True), ask.revision)
    return JSONResponse({"success": True})


def squash(ask: Ask) -> Response:
    """POST super-squash/BRANCH."""
    title = ask.text(ask.json().get("message") or "squashed", "the message", 1000)
    commit = ask.hub.changes.squash(ask.repo(write=True), ask.revision, title, ask.identity.name)
    return JSONResponse({"commitOid": commit})


def auth_check(ask: Ask) -> Response:
    """GET auth-check."""
    ask.repo()
    return JSONResponse({"success": True})


def auth_check_write(ask: Ask) -> Response:
    """GET auth-check/write."""
    ask.repo(write=True)
    return JSONResponse({"success": True})
