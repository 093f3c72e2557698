"""qlformat.numpy: the same bits without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import qlformat
import qlformat.numpy as plain
from qlformat.checkpoint import open_checkpoint
from qlformat.errors import QlfError
from qlformat.layout import Recipe
from tests.builders import DEFAULT_PLAIN, DEFAULT_QUANTIZED, build_checkpoint

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("fp4", 128, False)])
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_arrays_have_the_bits_of_the_tensors(tmp_path: Path, recipe: Recipe, dtype: str | None) -> None:
    build_checkpoint(tmp_path, recipe=recipe, dtype="float16", shards=2)
    found = plain.load_state_dict(tmp_path, dtype, threads=2)
    tensors = qlformat.load_state_dict(tmp_path, dtype)
    assert {name: array.shape for name, array in found.items()} == {**DEFAULT_QUANTIZED, **DEFAULT_PLAIN}
    for name, array in found.items():
        kind = {None: np.float16, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
        assert array.dtype == kind and array.flags.owndata and array.flags.c_contiguous
        assert array.tobytes() == tensors[name].view(-1).view(torch.uint8).numpy().tobytes()


def test_bfloat16_bits_are_the_upper_half_of_a_float32(tmp_path: Path) -> None:
    """The recipe of the module's text."""
    build_checkpoint(tmp_path, dtype="bfloat16")
    bits = plain.load_state_dict(tmp_path, names=[NAME])[NAME]
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    exact = plain.load_state_dict(tmp_path, "float32", names=[NAME])[NAME]
    assert np.abs(values - exact).max() <= np.abs(exact).max() / 256
    with plain.open(tmp_path) as checkpoint:
        assert np.array_equal(checkpoint[NAME][2:5], bits[2:5])


def test_numpys_own_dtypes(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    needed = plain.load_state_dict(tmp_path, "float16", names=[NAME])[NAME]
    for dtype in (np.float16, np.dtype("float16"), torch.float16):
        assert np.array_equal(plain.load_state_dict(tmp_path, dtype, names=[NAME])[NAME], needed)  # type: ignore[arg-type]
    with pytest.raises(QlfError, match="float64'> is not supported"):
        plain.load_state_dict(tmp_path, np.float64)


def test_mistakes(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    with pytest.raises(QlfError, match="'float64' is not supported"):
        plain.load_state_dict(tmp_path, "float64")
    with pytest.raises(QlfError, match="did you mean"):
        plain.load_state_dict(tmp_path, names=["q_proj.weight", f"{NAME}s"])


def test_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_checkpoint(tmp_path)

    def nothing_left(shape: object, dtype: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", nothing_left)
    with open_checkpoint(tmp_path) as checkpoint:
        total = sum(2 * weight.elements for weight in checkpoint.weights.values())
    with pytest.raises(QlfError, match=f"out of memory on cpu: .* all of them need {total}"):
        plain.load_state_dict(tmp_path)


def test_torch_is_never_imported(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, shards=2)
    script = """
import sys
sys.modules["torch"] = None  # an import of it would raise
sys.path[:0] = [sys.argv[2]]
import qlformat.numpy
state = qlformat.numpy.load_state_dict(sys.argv[1], dtype="float32")
with qlformat.numpy.open(sys.argv[1]) as checkpoint:
    rows = checkpoint["model.norm.weight"].astype("float32")[0:4]
print(len(state), rows.size, *(name for name in ("torch", "transformers", "bitsandbytes") if sys.modules.get(name)))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "4"]
