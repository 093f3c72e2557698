"""Contents in a bucket: moto's server speaks S3 over HTTP, the hub runs in a process of its own."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlformat.errors import QlfError
from qlformat.hub_server.refusals import Refused
from qlformat.hub_server.s3_blobs import S3Blobs
from tests.local_hub.page import Page
from tests.local_hub.publishing import ask, push
from tests.local_hub_fixture import LocalHub, serve

BUCKET = "weights"


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The address of an S3 with one bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    variables = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = dict(os.environ)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        os.environ.update(variables, AWS_ENDPOINT_URL=f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield os.environ["AWS_ENDPOINT_URL"]
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def blobs(store: str, request: pytest.FixtureRequest) -> S3Blobs:
    return S3Blobs(f"s3://{BUCKET}/{request.node.name}/")


def keep(blobs: S3Blobs, folder: Path, content: bytes) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    file = folder / sha256
    file.write_bytes(content)
    blobs.put(file, sha256)
    assert not file.exists()
    return sha256


def objects(prefix: str = "") -> dict[str, int]:
    """Keys and sizes in the bucket."""
    import boto3

    found = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return {item["Key"]: item["Size"] for item in found.get("Contents", ())}


def test_a_content_comes_back_in_ranges(blobs: S3Blobs, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    sha256 = keep(blobs, tmp_path, content)
    assert blobs.size(sha256) == len(content) and blobs.url(sha256) is None
    for start, stop in ((0, len(content)), (5, 6), (1 << 20, (2 << 20) + 7), (9, 9)):
        assert b"".join(blobs.chunks(sha256, start, stop)) == content[start:stop]
    assert list(objects(f"{blobs._prefix}blobs/")) == [f"{blobs._prefix}blobs/{sha256[:2]}/{sha256}"]


def test_many_are_put_at_once_and_none_twice(blobs: S3Blobs, tmp_path: Path) -> None:
    files = []
    for number in range(20):
        content = b"%d" % number
        files.append((tmp_path / str(number), hashlib.sha256(content).hexdigest()))
        files[-1][0].write_bytes(content)
    blobs.put_many(files)
    known = {name: size for name, size, _ in blobs.stored()}
    assert known == {sha256: len(b"%d" % number) for number, (_, sha256) in enumerate(files)}
    keep(blobs, tmp_path, b"7")
    assert len(list(blobs.stored())) == 20


def test_a_large_file_goes_in_parts(blobs: S3Blobs, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 20
    sha256 = keep(blobs, tmp_path, content)
    assert hashlib.sha256(b"".join(blobs.chunks(sha256, 0, len(content)))).hexdigest() == sha256


def test_what_is_touched_counts_as_new(blobs: S3Blobs, tmp_path: Path) -> None:
    sha256 = keep(blobs, tmp_path, b"x")
    ((_, _, before),) = blobs.stored()
    time.sleep(1.1)  # S3 has whole seconds
    blobs.touch(sha256)
    ((name, size, after),) = blobs.stored()
    assert (name, size) == (sha256, 1) and after > before


def test_what_is_deleted_is_gone(blobs: S3Blobs, tmp_path: Path) -> None:
    sha256 = keep(blobs, tmp_path, b"x")
    blobs.touch(sha256)
    blobs.delete(sha256)
    blobs.delete(sha256)
    assert blobs.size(sha256) is None and list(blobs.stored()) == [] and objects(blobs._prefix) == {}
    with pytest.raises(OSError, match="cannot be read: NoSuchKey"):
        list(blobs.chunks(sha256, 0, 1))


def test_a_short_content_is_an_error(blobs: S3Blobs, tmp_path: Path) -> None:
    sha256 = keep(blobs, tmp_path, b"abc")
    with pytest.raises(OSError, match="ends at byte 3, needed 9"):
        list(blobs.chunks(sha256, 0, 9))


def test_a_broken_connection_is_made_again(blobs: S3Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ReadTimeoutError

    content = os.urandom(3 << 20)
    sha256 = keep(blobs, tmp_path, content)
    read, starts = blobs._read, []

    def breaking(key: str, start: int, stop: int) -> Iterator[bytes]:
        starts.append(start)
        for number, data in enumerate(read(key, start, stop)):
            if number == 1 and len(starts) < 3:
                raise ReadTimeoutError(endpoint_url="http://store")
            yield data

    monkeypatch.setattr(blobs, "_read", breaking)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert b"".join(blobs.chunks(sha256, 0, len(content))) == content
    assert starts == [0, 1 << 20, 2 << 20]

    def never(key: str, start: int, stop: int) -> Iterator[bytes]:
        raise ReadTimeoutError(endpoint_url="http://store")
        yield b""

    monkeypatch.setattr(blobs, "_read", never)
    with pytest.raises(OSError, match="broke off at byte 0"):
        list(blobs.chunks(sha256, 0, 1))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("weights", "is not the address of a bucket; write s3://BUCKET"),
        ("s3://", "is not the address of a bucket"),
        ("s3://no-such-bucket/x", "there is no such bucket; check the bucket"),
        ("s3://B ad/x", "check"),
    ],
)
def test_a_bucket_that_cannot_be_used(store: str, location: str, message: str) -> None:
    with pytest.raises(QlfError, match=message) as caught:
        S3Blobs(location)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_store_that_does_not_answer(blobs: S3Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = keep(blobs, tmp_path, b"x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(QlfError, match="Could not connect"):
            S3Blobs(f"s3://{BUCKET}")
        gone = object.__new__(S3Blobs)
        gone.__dict__.update(blobs.__dict__)
        import boto3

        gone._client = boto3.client("s3")
        file = tmp_path / "file"
        file.write_bytes(b"y")
        for act in (lambda: gone.size(sha256), lambda: gone.put(file, sha256), lambda: list(gone.stored())):
            with pytest.raises(Refused, match="store does not answer") as caught:
                act()
            assert caught.value.status == 503
        assert file.exists()


@pytest.fixture(params=["through the hub", "redirected"])
def hub(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LocalHub]:
    options = ["--s3-redirect"] if request.param == "redirected" else []
    with serve(tmp_path / "root", "--s3", f"s3://{BUCKET}/{tmp_path.name}", "--no-xet", *options) as running:
        yield running


def test_the_client_pushes_and_pulls(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unmodified huggingface_hub, by LFS; the hub's own disk holds no content."""
    from huggingface_hub import HfApi, close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    source = tmp_path / "model"
    source.mkdir()
    content = os.urandom(5 << 20)
    (source / "model.safetensors").write_bytes(content)
    (source / "config.json").write_text("{}")
    api = HfApi(endpoint=hub.url, token="unused")
    api.create_repo("lab/model")
    api.upload_folder(repo_id="lab/model", folder_path=source)
    target = tmp_path / "back"
    api.snapshot_download("lab/model", local_dir=target, cache_dir=tmp_path / "cache")
    close_session()
    assert (target / "model.safetensors").read_bytes() == content and (target / "config.json").read_text() == "{}"
    sha256 = hashlib.sha256(content).hexdigest()
    assert objects(tmp_path.name)[f"{tmp_path.name}/blobs/{sha256[:2]}/{sha256}"] == len(content)
    assert not [file for file in (tmp_path / "root").rglob("*") if file.is_file() and file.stat().st_size >= 1 << 20]

    hub.kill()
    hub.restart()
    part = ask(hub, "/lab/model/resolve/main/config.json")
    assert part.status in (200, 302)


def test_pages_and_their_pictures_come_from_the_hub(hub: LocalHub) -> None:
    """Where downloads are redirected, too: the policy of the pages allows no other origin."""
    push(hub, "lab/drawn", {"README.md": "# Drawn\n\n![it](a.svg)\n", "a.svg": "<svg/>"})
    assert "Drawn" in Page(ask(hub, "/lab/drawn").text).text
    assert ask(hub, "/lab/drawn/raw/main/a.svg").body == b"<svg/>"


def test_a_redirect_leads_to_a_file_that_is_saved(store: str, tmp_path: Path) -> None:
    with serve(tmp_path / "root", "--s3", f"s3://{BUCKET}/{tmp_path.name}", "--s3-redirect") as running:
        push(running, "lab/model", {"evil.html": "<script>1</script>"})
        answer = ask(running, "/lab/model/resolve/main/evil.html")
        assert answer.status == 302 and answer.headers["Location"].startswith(store)
        assert answer.headers["ETag"] and answer.headers["X-Linked-Size"] == "18"
        import urllib.request

        with urllib.request.urlopen(answer.headers["Location"], timeout=30) as found:
            assert found.read() == b"<script>1</script>"
            assert found.headers["Content-Disposition"] == "attachment"
            assert found.headers["Content-Type"] == "application/octet-stream"
