"""`qlf inspect`."""

from __future__ import annotations

import math
from pathlib import Path

from qlf import output

from qlformat.plan import natural_key
from tests.builders import DEFAULT_PLAIN, DEFAULT_QUANTIZED, build_checkpoint
from tests.cli.conftest import Run

QUANTIZED = sum(math.prod(shape) for shape in DEFAULT_QUANTIZED.values())
PLAIN = sum(math.prod(shape) for shape in DEFAULT_PLAIN.values())


def test_summary(qlf: Run, checkpoint: Path) -> None:
    result = qlf("inspect", checkpoint)
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == str(checkpoint)
    facts = dict(line.strip().split("  ", 1) for line in lines[1:])
    assert "LlamaForCausalLM" in facts["model"] and "qlf 1" in facts["format"]
    assert "nf4, blocksize 64, double quantization" in facts["recipe"]
    assert (
        f"{100 * QUANTIZED / (QUANTIZED + PLAIN):.1f} % of the {output.number(QUANTIZED + PLAIN)} weights"
        in facts["4 bit"]
    )
    embedding = math.prod(DEFAULT_PLAIN["model.embed_tokens.weight"])
    assert f"embeddings {100 * embedding / (QUANTIZED + PLAIN):.1f} %" in facts["as is"]
    assert "in 1 file" in facts["size"]


def test_json_and_tensors(qlf: Run, checkpoint: Path) -> None:
    plain = qlf("inspect", checkpoint, "--json").json
    assert "tensors" not in plain and plain["format"] == "qlf 1" and plain["total_params"] == QUANTIZED + PLAIN
    full = qlf("inspect", checkpoint, "--json", "--tensors").json
    assert {row["name"] for row in full["tensors"]} == {*DEFAULT_QUANTIZED, *DEFAULT_PLAIN}


def test_tensors(qlf: Run, checkpoint: Path) -> None:
    result = qlf("inspect", checkpoint, "--tensors")
    rows = [line.split() for line in result.out.partition("weight  ")[2].splitlines()[1:]]
    assert {row[0]: row[1] for row in rows} == {
        **dict.fromkeys(DEFAULT_QUANTIZED, "nf4"),
        **dict.fromkeys(DEFAULT_PLAIN, "bfloat16"),
    }
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), key=natural_key)


def test_plain_repository(qlf: Run, tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "plain", manifest=False)
    result = qlf("inspect", tmp_path / "plain")
    assert result.code == 0
    assert "bitsandbytes 4-bit" in result.out and "note: no qlf.json" in result.out


def test_source_says_what_a_conversion_would_do(qlf: Run, source: Path, tmp_path: Path) -> None:
    result = qlf("inspect", source)
    assert result.code == 0 and "not quantized yet" in result.out and "after qlf convert" in result.out
    summary = qlf("inspect", source, "--json").json
    report = qlf("convert", source, tmp_path / "out", "--json").json
    for key in ("total_params", "quantized_params", "bits_per_weight"):
        assert abs(summary[key] - report[key]) < 1e-4


def test_broken_header_is_one_line(qlf: Run, checkpoint: Path) -> None:
    shard = checkpoint / "model.safetensors"
    shard.write_bytes((2 << 30).to_bytes(8, "little") + b"{}")
    result = qlf("inspect", checkpoint, "--json")
    assert result.code == 1 and result.json["error"]["rule"] == "S1" and "[S1]" in result.error
