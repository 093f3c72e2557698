"""`qlformat.convert("ORG/MODEL", ...)`: download by the real huggingface_hub client, then convert."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlformat.converter import convert
from qlformat.errors import SourceError
from tests.hub_server import COMMIT, Hub, use_endpoint
from tests.sources import file_bytes, write_source


def weights(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in file_bytes(out).items() if name != "qlf.json"}


@pytest.mark.parametrize("name", ["org/model", "org/model@v1"])
def test_a_repository_id_gives_the_same_bytes_as_its_files(hub: Hub, tmp_path: Path, name: str) -> None:
    local = write_source(hub.root / "org" / "model", shards=2)
    (local / "README.md").write_text("a card")
    report = convert(name, tmp_path / "out")
    convert(local, tmp_path / "from_local")
    assert weights(tmp_path / "out") == weights(tmp_path / "from_local")
    assert (report.manifest.source.repo_id, report.manifest.source.revision) == ("org/model", COMMIT)
    assert {file.name for file in report.manifest.source.files} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_only_what_is_needed_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    local = write_source(hub.root / "org" / "model")
    for unwanted in ("pytorch_model.bin", "model.gguf", "flax_model.msgpack", "picture.png"):
        (local / unwanted).write_bytes(bytes(1000))
    convert("org/model", tmp_path / "out")
    assert {name for name, _ in hub.requests} == {"model.safetensors", "config.json", "tokenizer.json"}


def test_a_snapshot_in_the_cache_is_known_by_its_repository(hub: Hub, tmp_path: Path) -> None:
    write_source(hub.root / "org" / "model")
    convert("org/model", tmp_path / "out")
    snapshot = next((tmp_path / "cache").glob("models--org--model/snapshots/*"))
    assert any(path.is_symlink() for path in snapshot.iterdir())
    report = convert(snapshot, tmp_path / "again")
    assert (report.manifest.source.repo_id, report.manifest.source.revision) == ("org/model", COMMIT)
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "out")


def refused(name: str, out: Path) -> str:
    with pytest.raises(SourceError) as caught:
        convert(name, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    write_source(hub.root / "org" / "model")
    hub.gated.add("org/gated")
    (hub.root / "org" / "empty").mkdir()
    assert "no such repository" in refused("org/nothing", tmp_path / "out")
    assert "no revision 'v9'" in refused("org/model@v9", tmp_path / "out")
    assert "gated" in refused("org/gated", tmp_path / "out")
    assert "no safetensors or .bin weights" in refused("org/empty", tmp_path / "out")


def test_a_hub_that_does_not_answer(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    message = refused("org/model", tmp_path / "out")
    assert "did not deliver" in message or "cannot be reached" in message
