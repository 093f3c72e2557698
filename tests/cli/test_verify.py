"""`qlf verify`."""

from __future__ import annotations

from pathlib import Path

from tests.builders import build_checkpoint, flip_bit
from tests.cli.conftest import Run


def test_sound(qlf: Run, checkpoint: Path) -> None:
    result = qlf("verify", checkpoint)
    assert result.code == 0 and result.err == ""
    assert result.out.startswith(f"{checkpoint}: sound (") and result.out.count("\n") == 1


def test_sound_json(qlf: Run, checkpoint: Path) -> None:
    report = qlf("verify", checkpoint, "--json").json
    assert report["path"] == str(checkpoint) and report["sound"] is True and report["findings"] == []


def test_source_is_compared(qlf: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert qlf("convert", source, out, "--hash-source").code == 0
    assert qlf("verify", out, "--source", source).code == 0
    (source / "model.safetensors").write_bytes(_changed(source / "model.safetensors"))
    result = qlf("verify", out, "--source", source)
    assert result.code == 1
    assert {line.split()[0] for line in result.out.splitlines()[:-1]} >= {"E5", "E6"}


def _changed(path: Path) -> bytes:
    """The file with another sign for the values in its last quarter."""
    data = bytearray(path.read_bytes())
    for position in range(len(data) * 3 // 4 | 1, len(data), 2):
        data[position] ^= 0x80
    return bytes(data)


def test_flipped_bit_is_found(qlf: Run, checkpoint: Path) -> None:
    shard = checkpoint / "model.safetensors"
    flip_bit(shard, shard.stat().st_size // 2)
    result = qlf("verify", checkpoint)
    assert result.code == 1 and result.err == ""
    *rows, last = result.out.splitlines()
    assert [row.split("  ")[0] for row in rows].count("M6") == 1
    assert all(len(row.split("  ")) >= 3 for row in rows)
    assert last.startswith(f"{checkpoint}: {len(rows)} finding")
    report = qlf("verify", checkpoint, "--json")
    assert report.code == 1 and report.json["sound"] is False
    assert len(report.json["findings"]) == len(rows)
    assert set(report.json["findings"][0]) == {"rule", "severity", "message", "tensor", "file"}


def test_plain_repository_is_sound_with_notes(qlf: Run, tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "plain", manifest=False)
    result = qlf("verify", tmp_path / "plain")
    assert result.code == 0
    assert any(line.startswith("note: qlf.json") for line in result.out.splitlines())
    report = qlf("verify", tmp_path / "plain", "--json").json
    assert report["sound"] is True and report["findings"] == [] and report["notes"][0]["severity"] == "note"


def test_threads_and_quiet(qlf: Run, checkpoint: Path) -> None:
    assert qlf("verify", checkpoint, "--threads", "1", "-q").code == 0
