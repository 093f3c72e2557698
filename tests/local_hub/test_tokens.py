"""The file of tokens: what it may hold, and that no token is ever shown."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from qlformat.errors import QlfError
from qlformat.hub_server.tokens import Tokens
from tests.local_hub.asgi import Client, small

TOKEN = "hf_secret_0123456789"


def file_of(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    file = tmp_path / "tokens"
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file


def test_plain_and_hashed_tokens(tmp_path: Path) -> None:
    hashed = hashlib.sha256(b"another_token_of_bob").hexdigest()
    tokens = Tokens(file_of(tmp_path, f"# people\n\nwrite ann {TOKEN}\nread bob sha256:{hashed}\n"))
    ann, bob = tokens.identify(f"Bearer {TOKEN}"), tokens.identify("bearer another_token_of_bob")
    assert (ann.name, ann.write, bob.name, bob.write) == ("ann", True, "bob", False)
    assert not tokens.identify(None).known


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (f"write ann {TOKEN}\n", 0o644, "chmod 600"),
        ("write ann short\n", 0o600, "shorter than 16"),
        (f"admin ann {TOKEN}\n", 0o600, "not a token"),
        (f"write {TOKEN}\n", 0o600, "not a token"),
        (f"write ann {TOKEN} a b\n", 0o600, "not a token"),
        ("write ann sha256:12\n", 0o644, "not a sha256"),
        ("# none\n", 0o600, "no tokens"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, mode: int, words: str) -> None:
    with pytest.raises(QlfError) as caught:
        Tokens(file_of(tmp_path, text, mode))
    assert words in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_file_of_hashes_may_be_read_by_others(tmp_path: Path) -> None:
    hashed = hashlib.sha256(TOKEN.encode()).hexdigest()
    assert Tokens(file_of(tmp_path, f"read ann sha256:{hashed}\n", 0o644)).identify(f"Bearer {TOKEN}").name == "ann"
    with pytest.raises(QlfError, match="cannot be read"):
        Tokens(tmp_path / "none")


def test_a_token_of_some_namespaces(tmp_path: Path) -> None:
    other = "hf_other_0123456789ab"
    client = Client(tmp_path / "hub", token_file=file_of(tmp_path, f"write ann {TOKEN}\nwrite lab {other} lab,Team\n"))
    client.token = TOKEN
    client.create("ann/m", visibility="private")
    client.create("ann/open")
    client.token = other
    client.create("team/x", visibility="private")
    assert client.ask("GET", "/api/models/ann/m").status == 404
    assert client.ask("GET", "/api/models/ann/open").status == 200
    assert client.commit("ann/open", small("a", b"")).status == 403
    assert client.commit("ann/m", small("a", b"")).status == 404
    assert client.commit("team/x", small("a", b"")).status == 200
    assert client.ask("POST", "/api/repos/create", json_body={"name": "y", "organization": "ann"}).status == 403
    assert client.ask("POST", "/api/repos/move", json_body={"fromRepo": "team/x", "toRepo": "ann/x"}).status == 403
    assert [repo["id"] for repo in client.ask("GET", "/api/models").json] == ["team/x", "ann/open"]


def test_tokens_are_not_stored(tmp_path: Path) -> None:
    client = Client(tmp_path / "hub", token_file=file_of(tmp_path, f"write ann {TOKEN}\n"))
    client.token = TOKEN
    client.create("ann/m")
    client.commit("ann/m", small("a", b"x"))
    files = [file for file in (tmp_path / "hub").rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert (tmp_path / "hub").stat().st_mode & 0o077 == 0
    assert (tmp_path / "hub" / "key").stat().st_mode & 0o077 == 0


def test_pages_of_other_sites_cannot_use_a_hub_without_tokens(tmp_path: Path) -> None:
    client = Client(tmp_path / "hub")
    client.create("ann/m")
    delete = ("DELETE", "/api/repos/delete")
    body = {"name": "m", "organization": "ann"}
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"host": "evil.example:80"}):
        answer = client.ask(*delete, json_body=body, headers=headers)
        assert (answer.status, "--token-file" in answer.error) == (403, True), headers
    assert client.ask("GET", "/api/models", headers={"host": "evil.example"}).status == 403
    assert client.ask("GET", "/api/models", headers={"host": "[::1]:80"}).status == 200
    own = {"origin": "http://localhost:80", "host": "localhost:80"}
    assert client.ask(*delete, json_body=body, headers=own).status == 200
