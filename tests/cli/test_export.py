"""`qlf export`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.builders import DEFAULT_PLAIN, DEFAULT_QUANTIZED, read_tensors
from tests.cli.conftest import Run

PARAMS = sum(math.prod(shape) for shape in {**DEFAULT_QUANTIZED, **DEFAULT_PLAIN}.values())
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_export(qlf: Run, checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    result = qlf("export", checkpoint, out, "--dtype", dtype)
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == f"Wrote {out}" and dtype in result.out
    assert lines[-1] == f"Next: AutoModelForCausalLM.from_pretrained({str(out)!r})"
    tensors = read_tensors(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[dtype]}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_json(qlf: Run, checkpoint: Path, tmp_path: Path) -> None:
    report = qlf("export", checkpoint, tmp_path / "out", "--dtype", "float32", "--json").json
    assert report["params"] == PARAMS and report["dtype"] == "float32" and report["files"] == ["model.safetensors"]


def test_options_reach_the_library(qlf: Run, checkpoint: Path, tmp_path: Path) -> None:
    args = ["export", checkpoint, tmp_path / "out", "--dtype", "float32", "--shard-size", "1KB", "--threads", "1"]
    assert len(qlf(*args, "--json").json["files"]) > 1
    result = qlf(*args)
    assert result.code == 1 and "--overwrite" in result.error
    assert qlf(*args, "--overwrite").code == 0


def test_exporting_a_16_bit_model_is_refused(qlf: Run, source: Path, tmp_path: Path) -> None:
    result = qlf("export", source, tmp_path / "out", "--dtype", "float32")
    assert result.code == 1 and "[C1]" in result.error
    assert not (tmp_path / "out").exists()
