"""`qlformat.hub.pull` and reading headers over ranges, from a real hub that fails where a proxy before it says so."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from qlformat import summarize
from qlformat.errors import FormatError, QlfError, TargetError
from qlformat.hub import transfer
from qlformat.hub.headers import verify_headers
from qlformat.hub.pull import MARK, pull
from tests.builders import build_checkpoint, edit_header, edit_json, flip_bit, reseal
from tests.faulty_hub import Answer, FaultyHub, Lost, Request
from tests.sources import file_bytes

_NUMBERS = itertools.count()
BIG = {"model.embed_tokens.weight": (20_000, 64), "model.norm.weight": (64,)}


@pytest.fixture
def published(base: Path, api: HfApi) -> str:
    """The base in a repository of its own."""
    return publish(api, base, f"lab/published-{next(_NUMBERS)}")


def publish(api: HfApi, path: Path, repo: str) -> str:
    """Upload a directory as any client would, sound or not."""
    api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=path)
    return repo


def staging(out: Path) -> Path:
    return out.parent / f".{out.name}.qlf-partial"


def refusal(repo: str, out: Path, **options: Any) -> str:
    """The one line with which a pull ends; nothing is there under the final name."""
    with pytest.raises(QlfError) as caught:
        pull(repo, out, **options)
    text = str(caught.value)
    assert "\n" not in text and "hf_" not in text
    assert not out.exists()
    return text


def listing(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Request, Answer], Answer]:
    """Change what the hub says that a repository holds."""

    def after(request: Request, answer: Answer) -> Answer:
        if "/tree/" not in request.path:
            return answer
        files = json.loads(answer.body)
        change(files)
        return replace(answer, body=json.dumps(files).encode())

    return after


def test_by_branch_tag_and_commit(proxy: FaultyHub, published: str, api: HfApi, tmp_path: Path, base: Path) -> None:
    first = str(api.model_info(published).sha)
    api.create_tag(published, tag="v1")
    before = file_bytes(base)
    (base / "README.md").write_text("new\n")
    publish(api, base, published)
    for number, revision in enumerate(("v1", first, first[:40])):
        report = pull(published, tmp_path / str(number), revision=revision)
        assert (file_bytes(tmp_path / str(number)), report.commit) == (before, first)
    pull(f"{published}@main", tmp_path / "new")
    assert file_bytes(tmp_path / "new") == file_bytes(base)
    assert not list(tmp_path.glob(".*"))
    assert "no such branch, tag or commit" in refusal(published, tmp_path / "x", revision="gone")
    assert "found two revisions" in refusal(f"{published}@v1", tmp_path / "x", revision="main")
    assert "found no such repository" in refusal("lab/nothing-here", tmp_path / "x")


def test_an_interrupted_pull_goes_on(
    proxy: FaultyHub, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1 << 16)  # what is kept, is kept in whole chunks
    build_checkpoint(tmp_path / "big", shards=2, plain=BIG)
    repo = publish(api, tmp_path / "big", "lab/resume")
    (large,) = (name for name, data in file_bytes(tmp_path / "big").items() if len(data) > 1_000_000)
    size = (tmp_path / "big" / large).stat().st_size

    def break_off(request: Request) -> Answer | None:
        if large in request.path and request.method == "GET":
            begin = int(request.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
            if begin:
                raise Lost
            body = (tmp_path / "big" / large).read_bytes()[: size // 2]
            return Answer(200, body, {"Content-Length": str(size)})
        return None

    proxy.before = break_off
    assert "cannot be reached" in refusal(repo, tmp_path / "out")
    left = {path.name for path in staging(tmp_path / "out").rglob("*") if path.is_file()}
    assert MARK in left and any(name.endswith(".incomplete") for name in left)
    proxy.before = lambda request: None
    proxy.clear()
    report = pull(repo, tmp_path / "out")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "big")
    assert report.kept > 0.45 * size and proxy.sent < 0.6 * size
    assert not staging(tmp_path / "out").exists() and not list((tmp_path / "out").glob(".*"))


def test_what_was_left_of_another_time_is_not_trusted(
    proxy: FaultyHub, published: str, base: Path, api: HfApi, tmp_path: Path
) -> None:
    proxy.before = lambda request: Answer(404) if "safetensors" in request.path and request.method == "GET" else None
    refusal(published, tmp_path / "out")
    left = staging(tmp_path / "out")
    assert (left / "config.json").exists()
    flip_bit(left / "config.json", 10)
    (left / "stray.json").write_text("{}")
    proxy.before = lambda request: None
    report = pull(published, tmp_path / "out")
    assert file_bytes(tmp_path / "out") == file_bytes(base)
    assert 0 < report.kept < sum(map(len, file_bytes(base).values()))


def test_files_of_another_repository_are_cleared(proxy: FaultyHub, published: str, base: Path, tmp_path: Path) -> None:
    left = staging(tmp_path / "out")
    left.mkdir()
    (left / "other.safetensors").write_bytes(b"work of another command")
    (left / MARK).write_text('{"host": "https://elsewhere", "repo_id": "lab/other"}')
    assert pull(published, tmp_path / "out").kept == 0
    assert file_bytes(tmp_path / "out") == file_bytes(base)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:evil", "a//b", "./evil", "e\nvil", ""]
)
def test_names_that_leave_the_directory(proxy: FaultyHub, published: str, tmp_path: Path, name: str) -> None:
    def change(files: list[dict[str, Any]]) -> None:
        files[0]["path"] = name

    proxy.after = listing(change)
    assert "leaves the directory; this repository is not fetched" in refusal(published, tmp_path / "out")
    assert not staging(tmp_path / "out").exists()
    assert not [path for _, path in proxy.requests if "/resolve/" in path]


def test_a_listing_that_is_none(proxy: FaultyHub, published: str, tmp_path: Path) -> None:
    def above(files: list[dict[str, Any]]) -> None:
        files.append({**files[-1], "path": "config.json/inside"})

    def huge(files: list[dict[str, Any]]) -> None:
        next(file for file in files if file["path"] == "qlf.json")["size"] = 10 << 30

    def nameless(files: list[dict[str, Any]]) -> None:
        del files[0]["path"]

    def numbered(files: list[dict[str, Any]]) -> None:
        files[0]["size"] = -1

    for change, text in (
        (above, "is a file and a folder"),
        (huge, "qlf.json has 10737418240 bytes, which is not plausible"),
        (nameless, "did not do as the Hub does"),
        (numbered, "lists a file without a plain name, size and hash"),
    ):
        proxy.after = listing(change)
        assert text in refusal(published, tmp_path / "out")
    proxy.after = lambda request, answer: replace(answer, body=b"<html>") if "/tree/" in request.path else answer
    assert "did not do as the Hub does" in refusal(published, tmp_path / "out")
    proxy.after = listing(lambda files: files.clear())
    assert "holds no file of a model" in refusal(published, tmp_path / "out")


def test_bytes_that_differ_from_the_listed_hash(proxy: FaultyHub, published: str, tmp_path: Path) -> None:
    def damage(request: Request, answer: Answer) -> Answer:
        if "model-00001" in request.path and request.method == "GET" and len(answer.body) > 100:
            return replace(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1]))
        return answer

    proxy.after = damage
    text = refusal(published, tmp_path / "out")
    assert "model-00001-of-00002.safetensors: found bytes with hash" in text and "also when fetched again" in text


def test_once_damaged_on_the_way_is_fetched_again(proxy: FaultyHub, published: str, base: Path, tmp_path: Path) -> None:
    damaged = []

    def damage(request: Request, answer: Answer) -> Answer:
        if "model-00001" in request.path and request.method == "GET" and not damaged:
            damaged.append(request.path)
            return replace(answer, body=bytes(len(answer.body)))
        return answer

    proxy.after = damage
    pull(published, tmp_path / "out")
    assert damaged and file_bytes(tmp_path / "out") == file_bytes(base)


def test_a_manifest_that_does_not_fit_its_files(proxy: FaultyHub, base: Path, api: HfApi, tmp_path: Path) -> None:
    flip_bit(
        base / "model-00001-of-00002.safetensors", (base / "model-00001-of-00002.safetensors").stat().st_size - 400
    )
    repo = publish(api, base, "lab/altered")
    text = refusal(repo, tmp_path / "out")
    assert text.startswith("lab/altered is not sound: [") and str(tmp_path) not in text
    assert not staging(tmp_path / "out").exists()


def test_a_hostile_manifest_is_refused_before_the_weights(
    proxy: FaultyHub, base: Path, api: HfApi, tmp_path: Path
) -> None:
    def outside(root: dict[str, Any]) -> None:
        root["files"][0]["name"] = "../../evil"

    def larger(root: dict[str, Any]) -> None:
        root["files"][0]["size"] += 1

    for number, (change, rule) in enumerate(((outside, "M9"), (larger, "M6"))):
        build_checkpoint(tmp_path / str(number), shards=2)
        edit_json(tmp_path / str(number) / "qlf.json", change)
        repo = publish(api, tmp_path / str(number), f"lab/hostile-{number}")
        proxy.clear()
        assert f"[{rule}]" in refusal(repo, tmp_path / "out")
        assert not [path for method, path in proxy.requests if method == "GET" and path.endswith(".safetensors")]


def test_a_header_of_10_gb(proxy: FaultyHub, base: Path, api: HfApi, tmp_path: Path) -> None:
    shard = base / "model-00001-of-00002.safetensors"
    shard.write_bytes((10 << 30).to_bytes(8, "little") + bytes(1000))
    repo = publish(api, base, "lab/header")
    assert "[" in refusal(repo, tmp_path / "out")
    with pytest.raises(FormatError) as caught:
        summarize(repo)
    assert caught.value.rule == "S1" and "\n" not in str(caught.value)
    checked = verify_headers(repo)
    assert "S1" in {finding.rule for finding in checked.findings}
    assert checked.fetched is not None and checked.fetched < 200_000


def test_the_disk_is_full(proxy: FaultyHub, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlformat.staging.free_bytes", lambda directory: 1000)
    with pytest.raises(TargetError, match=r"found 1\.00 kB free, needed [\d.]+ kB; free some space"):
        pull(published, tmp_path / "out")
    monkeypatch.undo()


def test_the_disk_becomes_full(
    proxy: FaultyHub, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(handle: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer, "_write", write)
    with pytest.raises(TargetError, match="the disk is full"):
        pull(published, tmp_path / "out")
    assert staging(tmp_path / "out").exists() and not (tmp_path / "out").exists()


def test_an_existing_directory_is_not_overwritten(proxy: FaultyHub, published: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(TargetError, match="holds no model"):
        pull(published, tmp_path / "mine", overwrite=True)
    build_checkpoint(tmp_path / "old")
    with pytest.raises(TargetError, match="--overwrite"):
        pull(published, tmp_path / "old")
    pull(published, tmp_path / "old", overwrite=True)
    assert file_bytes(tmp_path / "old") == file_bytes(base)


def test_an_adapter_and_what_is_left_out(proxy: FaultyHub, adapter: Path, api: HfApi, tmp_path: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"pickled")
    repo = publish(api, adapter, "lab/adapter-pull")
    report = pull(repo, tmp_path / "out")
    assert report.kind == "adapter" and any("not pinned" in note for note in report.notes)
    assert not [note for note in report.notes if "partial" in note]
    assert set(report.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert set(report.left_out) == {".gitattributes", "adapter_model.bin"} & {*report.left_out, "adapter_model.bin"}


def test_progress_is_told(proxy: FaultyHub, published: str, tmp_path: Path) -> None:
    seen = []
    pull(published, tmp_path / "out", progress=seen.append)
    fetching = [now for now in seen if now.phase == "fetching"]
    assert fetching and {now.bytes_total for now in fetching} == {fetching[0].bytes_total}
    assert all(0 <= now.bytes_done <= now.bytes_total for now in fetching)
    assert any(now.phase == "verifying" for now in seen)


def test_headers_of_a_remote_checkpoint_without_its_weights(proxy: FaultyHub, api: HfApi, tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "big", shards=2, plain=BIG)
    repo = publish(api, tmp_path / "big", "lab/headers")
    size = sum(map(len, file_bytes(tmp_path / "big").values()))
    checked = verify_headers(repo)
    assert checked.findings == verify_headers(tmp_path / "big").findings == ()
    assert checked.fetched is not None and checked.fetched < 0.25 * size
    summary = summarize(repo)
    assert summary.fetched_bytes is not None and summary.fetched_bytes < 0.15 * size
    assert summarize(tmp_path / "big").fetched_bytes is None


@pytest.mark.parametrize("rule", ["M4", "M6", "M7", "P1", "R6", "T5"])
def test_what_headers_show_is_found_as_by_a_whole_verification(
    proxy: FaultyHub, base: Path, api: HfApi, tmp_path: Path, rule: str
) -> None:
    first, second = (base / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    if rule == "M4":
        edit_json(base / "qlf.json", lambda root: root["tensors"][0].update(dtype="F64"))
    elif rule == "M6":
        (base / "config.json").write_bytes((base / "config.json").read_bytes() + b"\n")
    elif rule == "M7":
        edit_json(base / "qlf.json", lambda root: root.update(fingerprint="0" * 64))
    elif rule == "P1":
        data, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(data)
    elif rule == "R6":
        (base / "stray.safetensors").write_bytes(first.read_bytes())
    else:
        name = "model.layers.0.mlp.down_proj.weight.quant_map"
        edit_header(first, lambda header: header)
        shard = next(path for path in (first, second) if name.encode() in path.read_bytes())
        data = bytearray(shard.read_bytes())
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        data[8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]] ^= 1
        shard.write_bytes(data)
        reseal(base)
    repo = publish(api, base, f"lab/found-{rule.lower()}")
    found = verify_headers(repo).findings
    assert [f for f in found if f.severity == "error"]
    assert found == verify_headers(base).findings
    if rule != "P1":
        assert rule in {finding.rule for finding in found}
