"""The hub's rules, request by request: who may do what, which names are taken, and what is never half done."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest

from qlformat.hub_server import uploads
from qlformat.hub_server.limits import Limits
from tests.local_hub.asgi import Client, large, small
from tests.local_hub_fixture import READ_TOKEN

WEIGHTS = bytes(range(256)) * 20_000


def published(client: Client, name: str = "ann/m", **fields: object) -> None:
    client.create(name, **fields)
    client.upload(name, WEIGHTS)
    assert client.commit(name, small("README.md", b"# hi\n"), large("w.safetensors", WEIGHTS)).status == 200


def test_a_private_repository_looks_like_none(client: Client) -> None:
    published(client, visibility="private")
    for path in (
        "/api/models/ann/m",
        "/api/models/ann/m/tree/main",
        "/ann/m/resolve/main/README.md",
        "/api/models/ann/m/refs",
    ):
        missing = client.ask("GET", path.replace("ann/m", "ann/none"), token=None)
        hidden = client.ask("GET", path, token=None)
        assert (hidden.status, hidden.headers["x-error-code"]) == (404, "RepoNotFound")
        assert (missing.status, missing.headers["x-error-code"]) == (404, "RepoNotFound")
        assert hidden.body.replace(b"ann/m", b"ann/none") == missing.body
        assert client.ask("GET", path, token=READ_TOKEN).status == 200
    assert client.ask("GET", "/api/models", token=None).json == []
    assert [repo["id"] for repo in client.ask("GET", "/api/models").json] == ["ann/m"]
    client.ask("PUT", "/api/models/ann/m/settings", json_body={"visibility": "public"})
    assert client.ask("GET", "/ann/m/resolve/main/README.md", token=None).body == b"# hi\n"


def test_writing_takes_a_token_that_may(client: Client) -> None:
    published(client)
    writes = [
        ("POST", "/api/repos/create", {"name": "n", "organization": "ann"}),
        ("DELETE", "/api/repos/delete", {"name": "m", "organization": "ann"}),
        ("POST", "/api/repos/move", {"fromRepo": "ann/m", "toRepo": "ann/n"}),
        ("PUT", "/api/models/ann/m/settings", {"visibility": "private"}),
        ("POST", "/api/models/ann/m/branch/b", {}),
        ("POST", "/api/models/ann/m/tag/main", {"tag": "t"}),
        ("DELETE", "/api/models/ann/m/tag/t", {}),
        ("POST", "/api/models/ann/m/super-squash/main", {}),
        ("POST", "/api/models/ann/m/preupload/main", {"files": []}),
        ("POST", "/api/models/ann/m/commit/main", {"key": "header", "value": {"summary": "x"}}),
        ("POST", "/api/models/ann/m/discussions", {"title": "t", "pullRequest": True}),
        ("POST", "/ann/m.git/info/lfs/objects/batch", {"operation": "upload", "objects": []}),
        ("GET", "/api/models/ann/m/xet-write-token/main", None),
    ]
    for method, path, body in writes:
        assert client.ask(method, path, json_body=body, token=None).status == 401, path
        assert client.ask(method, path, json_body=body, token=READ_TOKEN).status == 403, path
        wrong = client.ask(method, path, json_body=body, token="hf_wrong_0123456789abcdef")
        assert (wrong.status, wrong.error) == (401, "Invalid credentials in Authorization header"), path
    assert client.ask("GET", "/api/whoami-v2", token=READ_TOKEN).json["auth"]["accessToken"]["role"] == "read"
    assert client.ask("GET", "/api/whoami-v2", token=None).status == 401
    assert client.files("ann/m") == ["README.md", "w.safetensors"]


BAD_PATHS = [
    "../x", "a/../../x", "/etc/passwd", "a//b", "a/", "", ".", "a/./b", "a\\b", "..\\x", "C:/x", "c:x", "a\0b", "a\nb",
    "a\u2028b", ".git/config", "a/.GIT/x", ".cache/x", "con", "a/NUL.txt", "lpt1", "x" * 256,
    "a/" * 70 + "b", "é" * 600, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS)
def test_no_path_leaves_the_repository(client: Client, path: str, tmp_path: Path) -> None:
    published(client)
    before = client.head("ann/m")
    for operation in (
        small(path, b"x"),
        large(path, WEIGHTS),
        ("deletedFolder", {"path": path}),
        ("deletedFile", {"path": path}),
    ):
        answer = client.commit("ann/m", small("fine", b""), operation)
        deleted = operation[0].startswith("deleted") and path == "a/"
        assert answer.status == (404 if deleted else 400), (operation, answer.body)
        assert "\n" not in answer.error
    files = [{"path": path, "size": 1, "sample": ""}]
    assert client.ask("POST", "/api/models/ann/m/preupload/main", json_body={"files": files}).status == 400
    assert client.ask("GET", f"/ann/m/resolve/main/{quote(path, errors='surrogatepass')}").status in (400, 404)
    assert client.head("ann/m") == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hub", "tokens"]
    assert not list((tmp_path / "hub" / "tmp").iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "m",
        "a/b/c",
        "../x",
        "a/..",
        "a/.git",
        "a/b.git",
        "a/-b",
        "a/b--c",
        "api/x",
        "a/b c",
        "a/b\n",
        "a/" + "b" * 96,
        "datasets/x",
    ],
)
def test_names_of_repositories(client: Client, name: str) -> None:
    namespace, _, short = name.rpartition("/")
    body = {"name": short, "organization": namespace} if namespace else {"name": "a/b/c"}
    answer = client.ask("POST", "/api/repos/create", json_body=body)
    assert answer.status == 400
    assert "not allowed as a repository's name" in answer.error


@pytest.mark.parametrize("name", ["refs/heads/x", "a..b", "-x", ".x", "x.lock", "a//b", "x y", "a@{1}", "0" * 40, "x/"])
def test_names_of_branches_and_tags(client: Client, name: str) -> None:
    published(client)
    assert client.ask("POST", f"/api/models/ann/m/branch/{quote(name, safe='')}", json_body={}).status == 400
    assert client.ask("POST", "/api/models/ann/m/tag/main", json_body={"tag": name}).status == 400


def test_a_stale_parent_is_refused_and_a_repeated_commit_is_not_made_twice(client: Client) -> None:
    published(client)
    seen = client.head("ann/m")
    first = client.commit("ann/m", small("a", b"1"), parentCommit=seen)
    again = client.commit("ann/m", small("a", b"1"), parentCommit=seen)
    assert first.json["commitOid"] == again.json["commitOid"] == client.head("ann/m")
    stale = client.commit("ann/m", small("a", b"2"), parentCommit=seen)
    assert stale.status == 412
    assert client.head("ann/m") in stale.error
    assert client.commit("ann/m", ("deletedFile", {"path": "README.md"}), parentCommit=seen).status == 412
    unchanged = client.commit("ann/m", small("a", b"1"))
    assert unchanged.json["commitOid"] == first.json["commitOid"]
    assert len(client.ask("GET", "/api/models/ann/m/commits/main").json) == 3


def test_a_commit_is_all_or_nothing(client: Client) -> None:
    published(client)
    before, files = client.head("ann/m"), client.files("ann/m")
    absent = large("x.bin", b"never uploaded")
    faults = [
        (client.commit("ann/m", small("new", b"x"), absent), 400, "was not uploaded"),
        (client.commit("ann/m", small("new", b"x"), ("deletedFile", {"path": "none"})), 404, "no file 'none'"),
        (client.commit("ann/m", small("new", b"x"), small("README.md/x", b"x")), 400, "a file and a folder"),
        (client.commit("ann/m", small("new", b"x"), ("rename", {"path": "a"})), 400, "not known"),
        (
            client.commit("ann/m", small("new", b"x"), ("file", {"path": "a", "content": "*", "encoding": "base64"})),
            400,
            "base64",
        ),
        (client.commit("ann/m", small("README.md", b"---\na: [\n---\n")), 400, "not YAML: line "),
        (client.commit("ann/m", small("new", b"x"), revision="none"), 404, "'none'"),
        (client.commit("ann/m", small("new", b"x"), revision=before), 400, "not a branch"),
        (client.ask("POST", "/api/models/ann/m/commit/main", body=b'{"key": "file"'), 400, "not JSON"),
    ]
    for answer, status, words in faults:
        assert (answer.status, words in answer.error) == (status, True), answer.body
    assert client.head("ann/m") == before
    assert client.files("ann/m") == files
    assert not list(client.hub.scratch.directory.iterdir())


def test_the_content_must_have_its_sha256(client: Client) -> None:
    client.create("ann/m")
    action = client.href("ann/m", WEIGHTS)
    assert action is not None
    for body, status, words in (
        (WEIGHTS[:-1] + b"x", 422, "has sha256"),
        (WEIGHTS[:-1], 400, "announced were"),
        (WEIGHTS + b"x", 413, "longer"),
    ):
        answer = client.ask("PUT", action["href"], body=body, token=None)
        assert (answer.status, words in answer.error) == (status, True)
    assert client.hub.blobs.size(hashlib.sha256(WEIGHTS).hexdigest()) is None
    assert not list(client.hub.scratch.directory.iterdir())
    pieces = [WEIGHTS[at : at + 70_000] for at in range(0, len(WEIGHTS), 70_000)]
    assert client.ask("PUT", action["href"], body=pieces, token=None).status == 200
    assert client.href("ann/m", WEIGHTS) is None


@pytest.mark.parametrize("change", ["oid", "size", "repo", "expires", "signature", "part"])
def test_an_address_that_is_not_signed_is_refused(client: Client, change: str) -> None:
    client.create("ann/m")
    action = client.href("ann/m", WEIGHTS)
    assert action is not None
    parts = urlsplit(action["href"])
    query, path = dict(parse_qsl(parts.query, keep_blank_values=True)), parts.path
    if change == "oid":
        path = f"/lfs/{'0' * 64}"
    else:
        query[change] = str(int(query[change]) + 1) if query[change].isdigit() else "00"
    answer = client.ask("PUT", f"{path}?{urlencode(query)}", body=WEIGHTS, token=None)
    assert answer.status == 403
    assert client.ask("PUT", "/lfs/x", body=b"", token=None).status == 403


def test_an_address_expires(tmp_path: Path) -> None:
    client = Client(tmp_path / "hub", limits=Limits(href_seconds=-1))
    client.create("ann/m")
    action = client.href("ann/m", WEIGHTS)
    assert action is not None
    answer = client.ask("PUT", action["href"], body=WEIGHTS)
    assert (answer.status, "expired" in answer.error) == (403, True)


def test_parts(tmp_path: Path) -> None:
    client = Client(tmp_path / "hub", limits=Limits(part=2_000_000))
    client.create("ann/m")
    action = client.href("ann/m", WEIGHTS)
    assert action is not None
    header = action["header"]
    size = int(header.pop("chunk_size"))
    assert sorted(header) == ["1", "2", "3"]
    for number, href in reversed(header.items()):
        part = WEIGHTS[(int(number) - 1) * size : int(number) * size]
        answer = client.ask("PUT", href, body=part)
        assert answer.headers["etag"] == f'"{hashlib.sha256(part).hexdigest()}"'
    finish = {"oid": hashlib.sha256(WEIGHTS).hexdigest(), "parts": []}
    assert client.ask("POST", action["href"], json_body=finish).status == 200
    assert client.ask("PUT", header["1"], body=WEIGHTS[:size]).status == 409, "a finished content may not be written to"
    assert client.ask("POST", action["href"], json_body=finish).status == 409
    assert client.commit("ann/m", large("w.bin", WEIGHTS)).status == 200
    assert client.ask("GET", "/ann/m/resolve/main/w.bin").body == WEIGHTS


def test_parts_that_are_not_the_content(tmp_path: Path) -> None:
    client = Client(tmp_path / "hub", limits=Limits(part=2_000_000))
    client.create("ann/m")
    action = client.href("ann/m", WEIGHTS)
    assert action is not None
    assert client.ask("POST", action["href"], json_body={}).status == 400
    for number in ("1", "3"):
        start = (int(number) - 1) * 2_000_000
        client.ask("PUT", action["header"][number], body=WEIGHTS[start : start + 2_000_000])
    answer = client.ask("POST", action["href"], json_body={})
    assert (answer.status, "nothing was kept" in answer.error) == (422, True)
    assert not list(client.hub.scratch.directory.iterdir())


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        (None, 200, slice(None)),
        ("bytes=0-0", 206, slice(0, 1)),
        ("bytes=100-199", 206, slice(100, 200)),
        ("bytes=5119999-", 206, slice(5_119_999, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=-99999999", 206, slice(None)),
        ("bytes=100-99999999", 206, slice(100, None)),
        ("bytes=5120000-", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=0-1,5-6", 200, slice(None)),
        ("bytes=9-3", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
    ],
)
def test_ranges(client: Client, asked: str | None, status: int, part: slice | None) -> None:
    published(client)
    answer = client.ask("GET", "/ann/m/resolve/main/w.safetensors", headers={"range": asked} if asked else {})
    assert answer.status == status
    if part is None:
        assert answer.headers["content-range"] == f"bytes */{len(WEIGHTS)}"
        return
    assert answer.body == WEIGHTS[part]
    assert int(answer.headers["content-length"]) == len(answer.body)
    if status == 206:
        start = len(WEIGHTS[: part.start]) if part.start is not None else 0
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(answer.body) - 1}/{len(WEIGHTS)}"


def test_heads_and_conditions(client: Client) -> None:
    published(client)
    path = "/ann/m/resolve/main/w.safetensors"
    head = client.ask("HEAD", path)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert (head.headers["content-length"], head.headers["x-repo-commit"]) == (str(len(WEIGHTS)), client.head("ann/m"))
    assert client.ask("GET", path, headers={"if-none-match": head.headers["etag"]}).status == 304
    changed = {"range": "bytes=0-9", "if-range": '"another"'}
    assert client.ask("GET", path, headers=changed).status == 200
    missing = client.ask("HEAD", "/ann/m/resolve/main/none")
    assert (missing.status, missing.headers["x-error-code"], missing.headers["x-repo-commit"]) == (
        404,
        "EntryNotFound",
        client.head("ann/m"),
    )
    assert client.ask("HEAD", "/ann/m/resolve/none/x").headers["x-error-code"] == "RevisionNotFound"
    page = client.ask("GET", "/ann/m/resolve/main/README.md")
    assert page.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in page.headers["content-security-policy"]


def test_revisions(client: Client) -> None:
    published(client)
    first = client.head("ann/m")
    assert client.ask("POST", "/api/models/ann/m/branch/dev%2F1", json_body={}).status == 201
    assert client.ask("POST", "/api/models/ann/m/branch/dev%2F1", json_body={}).status == 409
    assert client.ask("POST", "/api/models/ann/m/tag/main", json_body={"tag": "v1"}).status == 201
    second = client.commit("ann/m", small("a", b"1"), revision="dev%2F1").json["commitOid"]
    assert client.head("ann/m") == client.head("ann/m", "v1") == client.head("ann/m", first[:9]) == first
    for revision in ("dev%2F1", "refs%2Fheads%2Fdev%2F1", second, second[:7]):
        assert client.ask("GET", f"/ann/m/resolve/{revision}/a").body == b"1"
    assert client.ask("DELETE", "/api/models/ann/m/branch/main").status == 400
    assert client.ask("DELETE", "/api/models/ann/m/branch/dev%2F1").status == 200
    assert client.ask("DELETE", "/api/models/ann/m/tag/v1").status == 200
    assert client.ask("GET", "/api/models/ann/m/revision/v1").headers["x-error-code"] == "RevisionNotFound"
    assert client.ask("GET", f"/ann/m/resolve/{second}/a").body == b"1", "a commit that was acknowledged stays"


def test_moving_and_deleting(client: Client) -> None:
    published(client)
    published(client, "ann/other")
    assert client.ask("POST", "/api/repos/move", json_body={"fromRepo": "ann/m", "toRepo": "ann/other"}).status == 409
    assert client.ask("POST", "/api/repos/move", json_body={"fromRepo": "ann/m", "toRepo": "ann/../m"}).status == 400
    assert client.ask("POST", "/api/repos/move", json_body={"fromRepo": "ann/m", "toRepo": "ann/n"}).status == 200
    assert client.ask("GET", "/api/models/ann/m").json["id"] == "ann/n"
    published(client)
    assert client.ask("GET", "/api/models/ann/m").json["id"] == "ann/m", "a new repository takes a former name"
    assert client.ask("DELETE", "/api/repos/delete", json_body={"name": "m", "organization": "ann"}).status == 200
    assert client.ask("GET", "/api/models/ann/m").status == 404
    assert client.ask("GET", "/ann/n/resolve/main/w.safetensors").body == WEIGHTS


def test_limits(tmp_path: Path) -> None:
    limits = Limits(commit=100_000, line=20_000, operations=5, files=3, regular=5_000, file=1_000_000, json=10_000)
    client = Client(tmp_path / "hub", limits=limits)
    client.create("ann/m")
    many = [small(f"f{number}", b"x") for number in range(6)]
    batch = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 2_000_000}]}
    files = {"files": [{"path": "a", "size": 2_000_000}]}
    refused = [
        (client.commit("ann/m", *many), 413, "more than 5 operations"),
        (client.commit("ann/m", *many[:4]), 400, "takes 3"),
        (client.commit("ann/m", small("x", b"x" * 6_000)), 413, "use LFS"),
        (client.commit("ann/m", small("x", b"x" * 20_000)), 413, "a line of the commit"),
        (client.ask("POST", "/api/models/ann/m/commit/main", body=[b"x" * 9_000 + b"\n"] * 12), 400, "not JSON"),
        (client.ask("POST", "/api/models/ann/m/commit/main", body=[b"\n" * 9_000] * 12), 413, "longer than the 100000"),
        (client.ask("POST", "/api/repos/create", body=b"x" * 10_001), 413, "longer than the 10000"),
        (client.ask("POST", "/ann/m.git/info/lfs/objects/batch", json_body=batch), 413, "larger than"),
        (client.ask("POST", "/api/models/ann/m/preupload/main", json_body=files), 413, "at most"),
    ]
    for answer, status, words in refused:
        assert (answer.status, words in answer.error) == (status, True), answer.body
    assert client.files("ann/m") == []


def test_a_full_disk(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(client)
    other = b"other" * 1_000_000
    action = client.href("ann/m", other)
    assert action is not None

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(uploads.os, "pwrite", full)
        answer = client.ask("PUT", action["href"], body=other, token=None)
        assert (answer.status, "disk is full and nothing was kept" in answer.error) == (507, True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert client.commit("ann/m", small("new", b"x")).status == 507
    assert not list(client.hub.scratch.directory.iterdir())
    assert client.files("ann/m") == ["README.md", "w.safetensors"]
    crowded = Client(tmp_path / "hub", token_file=tmp_path / "tokens", limits=Limits(free=1 << 62))
    assert crowded.ask("PUT", action["href"], body=other, token=None).status == 507
    assert crowded.commit("ann/m", small("new", b"x")).status == 507
    assert client.commit("ann/m", small("new", b"x")).status == 200


def test_pages_of_trees_and_histories(client: Client) -> None:
    client.create("ann/m")
    client.commit("ann/m", *[small(f"d{n % 3}/f{n:02}", b"%d" % n) for n in range(10)])
    found, path = [], "/api/models/ann/m/tree/main?recursive=true&limit=4"
    while path:
        answer = client.ask("GET", path)
        found += [item["path"] for item in answer.json]
        link = answer.headers.get("link")
        path = link.partition(">")[0].removeprefix("<http://127.0.0.1:80") if link else ""
    assert found == sorted(["d0", "d1", "d2", *(f"d{n % 3}/f{n:02}" for n in range(10))])
    assert [item["path"] for item in client.ask("GET", "/api/models/ann/m/tree/main/d1").json] == [
        "d1/f01",
        "d1/f04",
        "d1/f07",
    ]
    assert client.ask("GET", "/api/models/ann/m/tree/main/none").status == 404
    for number in range(55):
        client.commit("ann/m", small("x", b"%d" % number))
    first = client.ask("GET", "/api/models/ann/m/commits/main")
    assert (len(first.json), "p=1" in first.headers["link"]) == (50, True)
    assert len(client.ask("GET", "/api/models/ann/m/commits/main?p=1").json) == 7


def test_lists_are_filtered_by_what_cards_say(client: Client) -> None:
    for name, relation in (("ann/base", "quantized"), ("bob/adapter", "adapter")):
        client.create(name)
        card = f"---\nbase_model: org/source\nbase_model_relation: {relation}\nlicense: mit\ntags: [qlora]\n---\n"
        client.commit(name, small("README.md", card.encode()))
    for query, names in {
        "filter=base_model:adapter:org/source": ["bob/adapter"],
        "filter=base_model:org/source&filter=license:mit": ["bob/adapter", "ann/base"],
        "author=bob": ["bob/adapter"],
        "author=b_b": [],
        "search=BAS": ["ann/base"],
        "filter=qlora&limit=1": ["bob/adapter"],
    }.items():
        assert [repo["id"] for repo in client.ask("GET", f"/api/models?{query}").json] == names, query
    client.commit("bob/adapter", ("deletedFile", {"path": "README.md"}))
    assert client.ask("GET", "/api/models?filter=base_model:adapter:org/source").json == []


def test_ways_of_sending_files(client: Client) -> None:
    published(client)
    client.commit("ann/m", small(".gitignore", b"*.log\n/build/\n!keep.log\n"))
    files = [
        {"path": "a.txt", "size": 5, "sample": "aGVsbG8="},
        {"path": "w.safetensors", "size": len(WEIGHTS), "sample": ""},
        {"path": "README.md", "size": 5, "sample": "IyBoaQo="},
        {"path": "image.dat", "size": 5, "sample": "AAECAwQ="},
        {"path": "big.txt", "size": 1 << 20, "sample": "aGVsbG8="},
        {"path": "empty.safetensors", "size": 0, "sample": ""},
        {"path": "x/y.log", "size": 1, "sample": "eA=="},
        {"path": "keep.log", "size": 1, "sample": "eA=="},
        {"path": "build/x", "size": 1, "sample": "eA=="},
        {"path": "src/build/x", "size": 1, "sample": "eA=="},
    ]
    ways = client.ask("POST", "/api/models/ann/m/preupload/main", json_body={"files": files}).json["files"]
    assert [way["uploadMode"] for way in ways[:6]] == ["regular", "lfs", "regular", "lfs", "lfs", "regular"]
    assert ways[1]["oid"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert ways[2]["oid"] == hashlib.sha1(b"blob 5\0# hi\n").hexdigest()
    assert "oid" not in ways[0]
    assert [way["shouldIgnore"] for way in ways[6:]] == [True, False, True, False]


def test_what_is_no_address(client: Client) -> None:
    for path in ("/api/models/gpt2", "/gpt2/resolve/main/x", "/datasets/a/b/resolve/main/x", "/api/datasets/a/b"):
        assert client.ask("GET", path).headers["x-error-code"] == "RepoNotFound", path
    for path in (
        "/api/buckets/a/b",
        "/api/nothing",
        "/x/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api/models/%ff/x",
    ):
        assert client.ask("GET", path).status in (400, 404), path
    assert client.ask("POST", "/api/repos/create", body=json.dumps([1]).encode()).status == 400
