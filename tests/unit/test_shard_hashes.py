"""The hashes of a shard and of its tensors in one pass, against hashlib."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlformat import native_sha256
from qlformat.errors import FormatError, NativeError
from qlformat.shard_hashes import hash_shard
from qlformat.workers import Stopped
from tests.shard_files import Tensor, shard_bytes

SIZES = (0, 1, 31, 55, 56, 63, 64, 65, 119, 128, 1000, 70_001, 300_000, 1 << 20)


@pytest.fixture(params=["native", "portable"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "portable":
        monkeypatch.setattr(native_sha256, "supported", lambda: False)
    elif not native_sha256.supported():
        pytest.skip("this processor has no SHA-NI")
    return str(request.param)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    numbers = random.Random(0)
    data = {f"t{size}": numbers.randbytes(size) for size in SIZES}
    path = tmp_path / "model.safetensors"
    path.write_bytes(shard_bytes({name: Tensor("U8", (len(value),), value) for name, value in data.items()}))
    return path, data


@pytest.mark.parametrize("call", [64 << 20, 100_003, 64])
def test_the_hashes_are_those_of_hashlib(
    way: str, shard: tuple[Path, dict[str, bytes]], call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_sha256, "_CALL_BYTES", call)
    path, data = shard
    found = hash_shard(path, threading.Event())
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.tensors == {name: hashlib.sha256(value).hexdigest() for name, value in data.items()}


def test_giving_up(way: str, shard: tuple[Path, dict[str, bytes]]) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        hash_shard(shard[0], stop)


def test_a_file_that_is_cut_short_meanwhile(
    way: str, shard: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = shard

    class Cutting(threading.Event):
        def is_set(self) -> bool:
            os.truncate(path, 100_000)
            return False

    with pytest.raises(FormatError, match="became shorter") as caught:
        hash_shard(path, Cutting())
    assert (caught.value.rule, caught.value.file) == ("S5", path.name)


native = pytest.mark.skipif(not native_sha256.supported(), reason="this processor has no SHA-NI")


@native
def test_parts_anywhere() -> None:
    numbers = random.Random(1)
    for _ in range(300):
        data = numbers.randbytes(numbers.choice((0, 1, 64, 500, 3000)))
        ends = [*sorted(numbers.randrange(len(data) + 1) for _ in range(numbers.randrange(8))), len(data)]
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(data)
            found = native_sha256.hash_parts(file.fileno(), ends, threading.Event())
        parts = [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
        assert found == (hashlib.sha256(data).hexdigest(), [hashlib.sha256(part).hexdigest() for part in parts])


@native
def test_ends_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    with path.open("rb") as file:
        with pytest.raises(NativeError):
            native_sha256.hash_parts(file.fileno(), [5, 3], threading.Event())
        assert native_sha256.hash_parts(file.fileno(), [5, 11], threading.Event()) is None


@native
@pytest.mark.parametrize(
    "opened", [lambda path: os.open(path, os.O_RDONLY), lambda path: os.open("/dev/null", os.O_WRONLY)]
)
def test_what_cannot_be_read_says_the_systems_words(tmp_path: Path, opened: Callable[[Path], int]) -> None:
    descriptor = opened(tmp_path)  # a directory, and a file that is open for writing alone
    try:
        with pytest.raises(OSError, match=r"directory|descriptor"):
            native_sha256.hash_parts(descriptor, [10], threading.Event())
    finally:
        os.close(descriptor)
