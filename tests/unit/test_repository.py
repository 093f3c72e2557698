"""Which files of a repository hold the weights, and which files may be opened (rules R1 to R4, R6)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qlformat.errors import FormatError
from qlformat.repository import read_file, resolve_file, stray_weights, weight_files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def rule_of(directory: Path, **options: str) -> str | None:
    with pytest.raises(FormatError) as caught:
        weight_files(directory, **options)
    return caught.value.rule


def test_a_single_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE).touch()
    found = weight_files(tmp_path)
    assert (found.index, found.names) == (None, [SINGLE])


def test_an_index(tmp_path: Path) -> None:
    weight_map = {"b": "x-2.safetensors", "a": "x-1.safetensors", "c": "x-1.safetensors"}
    write_index(tmp_path, weight_map)
    found = weight_files(tmp_path)
    assert found.index == weight_map
    assert found.names == ["x-1.safetensors", "x-2.safetensors"]


def test_torch_files_by_stem_and_suffix(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    assert weight_files(tmp_path, stem="pytorch_model", suffix=".bin").names == ["pytorch_model.bin"]
    assert rule_of(tmp_path) == "R1"


def test_both_or_neither_is_refused(tmp_path: Path) -> None:
    assert rule_of(tmp_path) == "R1"
    (tmp_path / SINGLE).touch()
    write_index(tmp_path, {"a": SINGLE})
    assert rule_of(tmp_path) == "R1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        '{"weight_map": NaN}',
        "\xff",
        "[" * 100_000,
    ],
)
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    assert rule_of(tmp_path) == "R2"


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/x.safetensors",
        "a\\x.safetensors",
        "c:x.safetensors",
        "x.bin",
        "x.safetensors\n",
        "x\x00.safetensors",
        "\ud800.safetensors",
        ".safetensors",
        "",
    ],
)
def test_shard_names_that_are_no_plain_file_names(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    assert rule_of(tmp_path) == "R3"


def rule_of_file(directory: Path, name: str) -> str | None:
    with pytest.raises(FormatError) as caught:
        resolve_file(directory, name)
    assert "\n" not in str(caught.value)
    return caught.value.rule


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    directory = tmp_path / "repo"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.json").write_text("{}")
    (directory / "sub" / "b.json").write_text("{}")
    return directory


def test_files_inside(repo: Path) -> None:
    assert resolve_file(repo, "a.json") == (repo / "a.json").resolve()
    assert resolve_file(repo, "sub/b.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["none", "a.json/x", "../secret", "/etc/hostname", "sub", "sub/../a.json", "x" * 300])
def test_names_that_are_refused(repo: Path, name: str) -> None:
    assert rule_of_file(repo, name) == "R4"


def test_links_may_lead_inside_only(repo: Path) -> None:
    (repo / "good").symlink_to("sub/b.json")
    (repo / "sub" / "up").symlink_to("../a.json")
    (repo / "out").symlink_to("../secret")
    (repo / "away").symlink_to("..")
    (repo / "broken").symlink_to("nothing")
    (repo / "loop").symlink_to("loop")
    (repo / "device").symlink_to("/dev/zero")
    assert resolve_file(repo, "good") == (repo / "sub/b.json").resolve()
    assert resolve_file(repo, "sub/up") == (repo / "a.json").resolve()
    for name in ("out", "away/secret", "broken", "loop", "device"):
        assert rule_of_file(repo, name) == "R4", name


def test_a_sibling_that_begins_with_the_same_letters_is_outside(repo: Path) -> None:
    sibling = repo.with_name("repository")
    sibling.mkdir()
    (sibling / "x").touch()
    (repo / "x").symlink_to("../repository/x")
    assert rule_of_file(repo, "x") == "R4"


def test_a_fifo_is_refused_and_not_waited_for(repo: Path) -> None:
    os.mkfifo(repo / "pipe")
    assert rule_of_file(repo, "pipe") == "R4"


def test_a_link_to_the_repository_itself_is_fine(repo: Path) -> None:
    link = repo.with_name("link")
    link.symlink_to("repo")
    assert resolve_file(link, "a.json") == (repo / "a.json").resolve()


def test_the_hub_cache_links_to_its_own_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "123").write_text("blob")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    (snapshot / "good").symlink_to("../../blobs/123")
    (snapshot / "bad").symlink_to("../../refs/main")
    assert resolve_file(snapshot, "good").read_text() == "blob"
    assert rule_of_file(snapshot, "bad") == "R4"


def test_blobs_elsewhere_are_no_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "123").touch()
    directory = tmp_path / "snapshots" / "abc"
    directory.mkdir(parents=True)
    (directory / "x").symlink_to("../../blobs/123")
    assert rule_of_file(directory, "x") == "R4"


def test_small_files_have_a_limit(repo: Path) -> None:
    (repo / "big").write_bytes(b"x" * 11)
    assert read_file(repo, "big", 11) == b"x" * 11
    with pytest.raises(FormatError, match="more than 10 bytes"):
        read_file(repo, "big", 10)


def test_stray_weights(repo: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "c.safetensors", "d.bin"):
        (repo / name).touch()
    assert stray_weights(repo, ["a.safetensors"]) == ["b.safetensors", "c.safetensors"]
