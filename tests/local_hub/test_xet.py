"""The local xet store: who gets it, and what happens when it is broken."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from tests.local_hub.asgi import Client, large, small


def uploaded(client: Client, content: bytes, address: str) -> None:
    """Put a content into a view of the store as the client does."""
    import hf_xet

    with hf_xet.XetSession().new_upload_commit(endpoint=address) as commit:
        commit.start_upload_bytes(content, sha256=hashlib.sha256(content).hexdigest())


def test_only_clients_on_this_machine_get_the_store(tmp_path: Path) -> None:
    client = Client(tmp_path / "hub", xet=True)
    client.create("ann/m")
    path = "/api/models/ann/m/xet-write-token/main"
    first, second = client.ask("GET", path).json["casUrl"], client.ask("GET", path).json["casUrl"]
    assert first.startswith(f"local://{tmp_path}/hub/xet/views/")
    assert first != second, "one process at a time can have a view open"
    assert client.ask("GET", path, headers={"x-forwarded-for": "192.0.2.1"}).status == 404
    client.address = "192.0.2.1"
    answer = client.ask("GET", path)
    assert (answer.status, "HF_HUB_DISABLE_XET=1" in answer.error) == (404, True)


def test_what_is_committed_is_taken_out_and_checked(tmp_path: Path) -> None:
    client = Client(tmp_path / "hub", xet=True)
    client.create("ann/m")
    good, bad = random.Random(1).randbytes(3_000_000), random.Random(2).randbytes(3_000_000)
    assert client.hub.xet is not None
    uploaded(client, good, client.hub.xet.new_view())
    assert client.commit("ann/m", large("good.bin", good)).status == 200
    before = set((tmp_path / "hub" / "xet" / "xorbs").iterdir())
    uploaded(client, bad, client.hub.xet.new_view())
    for xorb in set((tmp_path / "hub" / "xet" / "xorbs").iterdir()) - before:
        if xorb.suffix != ".tagset":
            content = bytearray(xorb.read_bytes())
            content[1_000_000:1_000_100] = bytes(100)
            xorb.chmod(0o600)
            xorb.write_bytes(content)
    answer = client.commit("ann/m", small("new", b"x"), large("bad.bin", bad))
    assert (answer.status, "upload it again" in answer.error) == (503, True)
    assert client.files("ann/m") == ["good.bin"]
    assert client.ask("GET", "/ann/m/resolve/main/good.bin").body == good
    uploaded(client, bad, client.hub.xet.new_view())
    assert client.commit("ann/m", small("new", b"x"), large("bad.bin", bad)).status == 200
    assert client.ask("GET", "/ann/m/resolve/main/bad.bin").body == bad
