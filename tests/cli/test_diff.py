"""`qlf diff`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import DEFAULT_PLAIN, DEFAULT_QUANTIZED, build_checkpoint, build_source
from tests.cli.conftest import Run


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The 16-bit model that `checkpoint` was made from."""
    return build_source(tmp_path / "plain", weights={**DEFAULT_QUANTIZED, **DEFAULT_PLAIN})


def test_equal_is_exit_0(qlf: Run, checkpoint: Path, tmp_path: Path) -> None:
    other = build_checkpoint(tmp_path / "other", shards=2).path
    result = qlf("diff", checkpoint, other)
    assert result.code == 0 and result.err == ""
    (line,) = result.out.splitlines()
    assert line.startswith(f"{checkpoint} and {other}: 4 weights, all equal; equal codes 100 % (")


def test_different_is_exit_1(qlf: Run, checkpoint: Path, plain: Path) -> None:
    result = qlf("diff", plain, checkpoint)
    assert result.code == 1 and result.err == ""
    header, *rows, verdict = result.out.splitlines()
    assert header.split() == ["weight", "A", "B", "shape", "rel.", "error", "max", "error", "equal", "values"]
    assert [row.split()[0] for row in rows] == sorted(DEFAULT_QUANTIZED, key=lambda name: -float(
        next(row for row in rows if row.startswith(name)).split()[4]))  # fmt: skip
    assert rows[0].split()[1:3] == ["bfloat16", "nf4"]
    assert f"{plain} and {checkpoint}: 2 of 4 weights differ; relative error 0." in verdict
    assert len(qlf("diff", plain, checkpoint, "--tensors").out.splitlines()) == 6


def test_the_tolerance(qlf: Run, checkpoint: Path, plain: Path) -> None:
    result = qlf("diff", plain, checkpoint, "--tolerance", 0.3)
    assert result.code == 0 and "all equal within the tolerance 0.3" in result.out
    assert qlf("diff", plain, checkpoint, "--tolerance", 0.001).code == 1
    assert "is not in the range" in qlf("diff", plain, checkpoint, "--tolerance", -1).error


def test_json(qlf: Run, checkpoint: Path, plain: Path) -> None:
    result = qlf("diff", plain, checkpoint, "--json")
    found = result.json
    assert result.code == 1
    assert (found["equal"], found["different"], found["only_a"], found["only_b"]) == (False, 2, [], [])
    assert {tensor["name"] for tensor in found["tensors"]} == {*DEFAULT_QUANTIZED, *DEFAULT_PLAIN}
    worst = max(found["tensors"], key=lambda tensor: tensor["relative_error"])
    assert worst["encoding_b"] == "nf4" and 0.03 < worst["relative_error"] < 0.2 and worst["equal_codes"] is None
    assert qlf("diff", checkpoint, checkpoint, "--json").json["equal_codes"] == 1.0


def test_missing_weights_and_other_shapes(qlf: Run, tmp_path: Path) -> None:
    a = build_source(tmp_path / "a", weights={"x.weight": (4, 4), "y.weight": (4, 4), "z.weight": (2, 3)})
    b = build_source(tmp_path / "b", weights={"y.weight": (4, 4), "z.weight": (3, 2)})
    result = qlf("diff", a, b)
    assert result.code == 1
    assert "2x3 and 3x2" in result.out and f"only in {a}: x.weight" in result.out
    assert "1 of 2 weights differ; 1 are in one of them alone" in result.out
    c = build_source(tmp_path / "c", weights={"w.weight": (1,)})
    assert "have no weight of the same name" in qlf("diff", a, c).out


def test_the_picture(qlf: Run, tmp_path: Path) -> None:
    a, b = build_source(tmp_path / "a"), build_source(tmp_path / "b", dtype="float32")
    assert qlf("diff", a, b, "--picture", tmp_path / "layers.png").code == 1
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(qlf: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = qlf("diff", checkpoint, tmp_path / "missing")
    assert result.code == 1 and "found no directory" in result.error and result.out == ""
    assert "it is empty" in qlf("diff", checkpoint, "").error
    assert "missing argument 'B'" in qlf("diff", checkpoint).error
    (checkpoint / "model.safetensors").write_bytes(b"cut")
    assert "model.safetensors" in qlf("diff", checkpoint, checkpoint).error
