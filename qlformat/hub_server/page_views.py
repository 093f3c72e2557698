"""What each page shows: from the index to a template."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from qlformat.hub_server import browsing, card, names
from qlformat.hub_server.asking import decoded
from qlformat.hub_server.card import Addresses
from qlformat.hub_server.descent import Descents
from qlformat.hub_server.index import HEADS, PULLS, TAGS, Commit, File, Repo
from qlformat.hub_server.lineage import Family
from qlformat.hub_server.page_parts import (
    Crumb,
    Reader,
    Row,
    address_of,
    facts_of,
    first_text,
    page_number,
    part,
    picture_type,
    problem_of,
    text_of,
)
from qlformat.hub_server.page_templates import HEADERS, page
from qlformat.hub_server.refusals import Refused, no_entry, no_repo, no_revision
from qlformat.hub_server.service import Hub

PER_PAGE = 50
MAX_ROWS = 1000
"""Files or changes listed on one page."""
MAX_TEXT = 512 << 10
"""Bytes of a text file that is shown."""
MAX_PICTURE = 32 << 20
_CHUNK = 500

# A picture is only ever drawn; opened by itself it is a page that may do nothing.
_PICTURE_HEADERS = HEADERS | {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox"}


class Views:
    """The pages of a hub. Each method answers one kind of address; a Refused becomes a page of its own.

    Args:
        hub: what is shown.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._index = hub.index
        self._descents = Descents(hub.index, hub.blobs)
        self._rendered = lru_cache(maxsize=128)(self._render)
        self._totals = lru_cache(maxsize=10_000)(self._count)

    def index(self, reader: Reader, request: Request) -> Response:
        """The repositories that the reader may see, those with a text in their name."""
        query = request.query_params.get("q", "").strip()[:200]
        type_ = request.query_params.get("type", "")
        type_ = type_ if type_ in names.TYPES else ""
        number = page_number(request)
        found = self._visible(reader, names.TYPES.get(type_), query)
        repos = list(islice(found, (number - 1) * PER_PAGE, number * PER_PAGE + 1))
        rows = [self._row(repo) for repo in repos[:PER_PAGE]]
        more = len(repos) > PER_PAGE
        values = {
            "query": query,
            "type": type_,
            "rows": rows,
            "page": number,
            "more": more,
            "endpoint": reader.endpoint,
        }
        return page("index.html", {"reader": reader, "here": reader.here, **values})

    def card(self, reader: Reader, request: Request) -> Response:
        """The repository's first page."""
        repo = self._repo(reader, request)
        commit = self._index.commit(repo, repo.head) if repo.head else None
        values = self._common(reader, repo, "card", commit, "main")
        readme = self._file(commit, "README.md") if commit else None
        content = self._content(readme, card.MAX_BYTES) if readme else b""
        files, size = self._totals(commit.tree) if commit else (0, 0)
        values |= {
            "card": self._card_html(repo, "main", readme) if readme else "",
            "problem": problem_of(readme, content),
            "files": files,
            "size": size,
            "meta": facts_of(repo.card, lambda type_, name: self._address(reader, type_, name)),
            "lineage": self._family(reader).of(repo) if repo.type == "model" else None,
            "endpoint": reader.endpoint,
        }
        return page("card.html", values)

    def files(self, reader: Reader, request: Request) -> Response:
        """A folder of a revision."""
        repo, commit, revision, path = self._place(reader, request)
        below = self._index.files(commit, under=path)
        if path and not below:
            if self._file(commit, path):
                return RedirectResponse(f"{address_of(repo)}/blob/{part(revision)}/{quote(path)}", 302, HEADERS)
            raise no_entry(path)
        folders, files = browsing.folder_of(below, path)
        hidden = max(0, len(folders) + len(files) - MAX_ROWS)
        folders = folders[:MAX_ROWS]
        values = self._common(reader, repo, "files", commit, revision) | self._paths(repo, revision, path)
        values |= {
            "folders": folders,
            "files": files[: MAX_ROWS - len(folders)],
            "hidden": hidden,
            "total_files": len(below),
            "total_size": sum(file.size for file in below),
        }
        return page("files.html", values)

    def file(self, reader: Reader, request: Request) -> Response:
        """One file: what it is, and what is in it where that can be shown."""
        repo, commit, revision, path = self._place(reader, request)
        file = self._index.file(commit, path)
        values = self._common(reader, repo, "files", commit, revision) | self._paths(repo, revision, path)
        values |= {"file": file, "picture": None, "card": None, "text": None}
        if picture_type(path) and file.size <= MAX_PICTURE:
            values["picture"] = f"{address_of(repo)}/raw/{part(revision)}/{quote(path)}"
        elif path.lower().endswith(".md") and file.size <= card.MAX_BYTES:
            values["card"] = self._card_html(repo, revision, file)
        else:
            values["text"] = text_of(self._content(file, MAX_TEXT))
        return page("file.html", values)

    def picture(self, reader: Reader, request: Request) -> Response:
        """The bytes of a picture, for the pages: they show nothing from elsewhere, so it never comes by a redirect."""
        _, commit, _, path = self._place(reader, request)
        file = self._index.file(commit, path)
        kind = picture_type(path)
        if kind is None or file.size > MAX_PICTURE:
            raise no_entry(path)
        headers = _PICTURE_HEADERS | {"Content-Length": str(file.size), "ETag": f'"{file.sha256}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=_PICTURE_HEADERS | {"ETag": headers["ETag"]})
        return StreamingResponse(self._hub.blobs.chunks(file.sha256, 0, file.size), 200, headers, kind)

    def commits(self, reader: Reader, request: Request) -> Response:
        """The history of a revision."""
        repo, commit, revision, path = self._place(reader, request)
        if path:
            raise no_revision(f"{revision}/{path}")
        number = page_number(request)
        found = self._index.history(repo, commit.id, offset=(number - 1) * PER_PAGE, limit=PER_PAGE + 1)
        values = self._common(reader, repo, "commits", commit, revision)
        values |= {"commits": found[:PER_PAGE], "page": number, "more": len(found) > PER_PAGE}
        return page("commits.html", values)

    def commit(self, reader: Reader, request: Request) -> Response:
        """What a commit changed."""
        repo, commit, revision, path = self._place(reader, request)
        if path:
            raise no_revision(f"{revision}/{path}")
        before = self._index.files(self._index.commit(repo, commit.parent)) if commit.parent else []
        found = browsing.changes(before, self._index.files(commit))
        values = self._common(reader, repo, "commit", commit, commit.id)
        values |= {"changes": found[:MAX_ROWS], "hidden": max(0, len(found) - MAX_ROWS)}
        return page("commit.html", values)

    def refs(self, reader: Reader, request: Request) -> Response:
        """Branches, tags and pull requests."""
        repo = self._repo(reader, request)
        commit = self._index.commit(repo, repo.head) if repo.head else None
        values = self._common(reader, repo, "refs", commit, "main")
        kinds = (("Branches", HEADS), ("Tags", TAGS), ("Pull requests", PULLS))
        values["groups"] = [
            (label, [ref for ref in values["refs"] if ref.name.startswith(prefix)]) for label, prefix in kinds
        ]
        return page("refs.html", values)

    def _visible(self, reader: Reader, type_: str | None, search: str = "") -> Iterator[Repo]:
        """What the reader may see, the last updated first."""
        offset = 0
        while True:
            found = self._index.repos(type_, search=search, offset=offset, limit=_CHUNK)
            yield from (repo for repo in found if reader.identity.may_see(repo))
            if len(found) < _CHUNK:
                return
            offset += _CHUNK

    def _family(self, reader: Reader) -> Family:
        return Family(self._index, self._descents, self._visible(reader, "model"))

    def _repo(self, reader: Reader, request: Request) -> Repo:
        """The repository in the address; one that may not be seen is none.

        Raises:
            Refused: 404.
        """
        params = request.path_params
        name = f"{decoded(params['namespace'])}/{decoded(params['name'])}"
        try:
            found = self._index.repo(names.TYPES[params.get("types", "models")], name)
        except Refused:
            raise no_repo(name) from None
        if not reader.identity.may_see(found):
            raise no_repo(name)
        return found

    def _address(self, reader: Reader, type_: str, name: str) -> str | None:
        """Of a repository's page, if the reader may see it."""
        try:
            found = self._index.repo(type_, name)
        except Refused:
            return None
        return address_of(found) if reader.identity.may_see(found) else None

    def _place(self, reader: Reader, request: Request) -> tuple[Repo, Commit, str, str]:
        """The repository, the commit, the revision that names it, and the path after it in the address.

        A revision with slashes may be written with them: the shortest that exists is taken.

        Raises:
            Refused: 404.
        """
        repo = self._repo(reader, request)
        parts = [decoded(part) for part in request.path_params["rest"].strip("/").split("/")]
        for length in range(1, min(len(parts), 8) + 1):
            revision = "/".join(parts[:length])
            try:
                return repo, self._index.commit(repo, revision), revision, "/".join(parts[length:])
            except Refused:
                continue
        raise no_revision(parts[0])

    def _common(self, reader: Reader, repo: Repo, view: str, commit: Commit | None, revision: str) -> dict[str, Any]:
        """What every page of a repository shows."""
        namespace, _, short = repo.name.partition("/")
        return {
            "reader": reader,
            "here": reader.here,
            "query": "",
            "repo": repo,
            "namespace": namespace,
            "short": short,
            "address": address_of(repo),
            "view": view,
            "commit": commit,
            "revision": revision,
            "refs": self._index.refs(repo),
            "facts": self._descents.of(repo),
        }

    def _paths(self, repo: Repo, revision: str, path: str) -> dict[str, Any]:
        parts = path.split("/") if path else []
        address, at = address_of(repo), part(revision)
        return {
            "path": path,
            "crumbs": [Crumb(name, "/".join(parts[: n + 1])) for n, name in enumerate(parts)],
            "here_tree": f"{address}/tree/{at}",
            "here_blob": f"{address}/blob/{at}",
            "here_resolve": f"{address}/resolve/{at}",
        }

    def _row(self, repo: Repo) -> Row:
        files, size = self._totals(self._index.commit(repo, repo.head).tree) if repo.head else (0, 0)
        base, terms = (first_text(repo.card.get(key)) for key in ("base_model", "license"))
        return Row(repo, self._descents.of(repo).kind, base, terms, files, size)

    def _count(self, tree: int) -> tuple[int, int]:
        """Files and bytes of a state."""
        files = self._index.files(Commit("", None, "", "", "", 0.0, tree))
        return len(files), sum(file.size for file in files)

    def _file(self, commit: Commit, path: str) -> File | None:
        try:
            return self._index.file(commit, path)
        except Refused:
            return None

    def _content(self, file: File, most: int) -> bytes | None:
        """All of a file, or None of one with more than so many bytes."""
        if file.size > most:
            return None
        return b"".join(self._hub.blobs.chunks(file.sha256, 0, file.size))

    def _card_html(self, repo: Repo, revision: str, file: File) -> str:
        folder = posixpath.dirname(file.path)
        return self._rendered(file.sha256, file.size, address_of(repo), part(revision), folder)

    def _render(self, sha256: str, size: int, address: str, revision: str, folder: str) -> str:
        content = b"".join(self._hub.blobs.chunks(sha256, 0, min(size, card.MAX_BYTES + 1)))
        return card.render(
            card.body(content), Addresses(f"{address}/blob/{revision}", f"{address}/raw/{revision}", folder)
        )
