"""What the loaders are made of: casts, fresh memory, and single weights decoded in rows."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlformat import first_touch
from qlformat.casting import BLOCK_ELEMENTS, cast_into
from qlformat.checkpoint import NUMPY_DTYPES, cast, open_checkpoint
from qlformat.errors import FormatError, QlfError
from qlformat.first_touch import FirstTouch
from qlformat.layout import Recipe
from qlformat.shards import ShardReader
from tests import builders
from tests.builders import build_checkpoint, make_checkpoint

PAIRS = [(a, b) for a in ("float32", "float16", "bfloat16", "float64") for b in ("float32", "float16", "bfloat16")]
NAME = "model.layers.0.self_attn.q_proj.weight"


def awkward(dtype: str) -> Any:
    """Every 16-bit pattern, or float patterns of every exponent; more than one block of them."""
    if NUMPY_DTYPES[dtype].itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPES[dtype])
    bits = np.random.default_rng(1).integers(0, 1 << 32, 3 * BLOCK_ELEMENTS + 5, dtype=np.uint64).astype(np.uint32)
    ties = np.arange(1 << 12, dtype=np.uint32) << np.uint32(15)
    special = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0x7F7FFFFF, 1, 0x33000000, 0x477FF000]
    single = np.concatenate([bits, ties, np.array(special, dtype=np.uint32)]).view(np.float32)
    with np.errstate(invalid="ignore"):
        return single.astype(NUMPY_DTYPES[dtype])


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_casts_equal_the_plain_ones(source: str, target: str) -> None:
    values = awkward(source)
    out = np.zeros(values.size, dtype=NUMPY_DTYPES[target])
    cast_into(values, source, out, target)
    needed = cast(values, source, target)
    assert out.dtype == needed.dtype
    same = out.view(np.uint8).reshape(values.size, -1) == needed.view(np.uint8).reshape(values.size, -1)
    assert same.all()


def recorded(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[tuple[int, int, int]]:
    """Replace madvise by a list of its calls, each of which takes `seconds` of an imaginary clock."""
    calls: list[tuple[int, int, int]] = []
    clock = [0.0]

    def advise(address: int, size: int, advice: int) -> int:
        calls.append((address, size, advice))
        clock[0] += seconds
        return 0

    monkeypatch.setattr(first_touch, "_madvise", lambda: advise)
    monkeypatch.setattr(first_touch.time, "perf_counter", lambda: clock[0])
    return calls


def test_only_whole_pages_of_the_output_are_populated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    page = mmap.PAGESIZE
    output = FirstTouch().output(10 * page + 1, 5 * page)  # whole pages: 11 to 14
    output.populate(10 * page + 1, page)
    output.populate(12 * page + 5, 3 * page - 4)
    output.populate(20 * page, page)  # outside
    assert [(begin // page, size // page, advice) for begin, size, advice in calls] == [
        (11, 4, 14),
        (11, 1, 23),
        (12, 3, 23),
    ]
    FirstTouch().output(page + 1, page).populate(page + 1, page)  # no whole page
    assert len(calls) == 3


def test_slow_huge_pages_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, seconds=0.01)
    touch, size = FirstTouch(), 1 << 21
    first, second = touch.output(0, 2 * size), touch.output(1 << 30, size)
    first.populate(0, size)
    assert not touch.huge
    first.populate(size, size)
    second.populate(1 << 30, size)
    assert [advice for _, _, advice in calls] == [14, 23, 15, 23, 15, 23]


def test_fast_huge_pages_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, seconds=0.0003)
    touch, size = FirstTouch(), 1 << 21
    output = touch.output(0, 2 * size)
    output.populate(0, size)
    output.populate(size, size)
    assert touch.huge
    assert [advice for _, _, advice in calls] == [14, 23, 23]


@pytest.mark.skipif(sys.platform != "linux", reason="madvise(2) is Linux'")
def test_populated_memory_is_present_and_keeps_its_content() -> None:
    memory = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, dtype=np.uint8)
    array[5] = 77

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    output = FirstTouch().output(array.ctypes.data, array.nbytes)
    output.populate(array.ctypes.data, array.nbytes)
    assert resident() - before > 24 << 20
    assert array[5] == 77 and array.sum() == 77


RECIPES = [(Recipe(), "bfloat16"), (Recipe("fp4", 32, False), "float16"), (Recipe("nf4", 128, True), "float32")]


@pytest.mark.parametrize(("recipe", "dtype"), RECIPES)
def test_rows_of_a_weight(tmp_path: Path, recipe: Recipe, dtype: str) -> None:
    build_checkpoint(tmp_path, quantized={NAME: (61, 37)}, recipe=recipe, dtype=dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        for asked in (None, "float32", "bfloat16"):
            whole = checkpoint.dequantize(NAME, asked)
            weight = checkpoint[NAME].astype(asked)
            assert (weight.name, weight.shape, weight.dtype, len(weight)) == (NAME, (61, 37), asked or dtype, 61)
            assert weight.quantized and not weight.transposed
            for rows in (slice(0, 3), slice(7, 8), slice(60, 99), slice(-5, None), slice(9, 4), slice(None), 0, 17, -1):
                found, needed = weight[rows], whole[rows]
                assert found.shape == needed.shape and found.dtype == needed.dtype
                assert found.tobytes() == needed.tobytes()
                tensor = weight.tensor(rows)
                assert tensor.dtype == getattr(torch, asked or dtype)
                assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == needed.tobytes()
            assert weight[...].tobytes() == whole.tobytes() == np.array(list(weight)).tobytes()
            assert weight.tensor().shape == (61, 37)


def test_plain_weights_and_ones_without_dimensions(tmp_path: Path) -> None:
    built = make_checkpoint(plain={"model.norm.weight": (16,), "model.scale": ()}, manifest=False)
    built.tensors["model.ids"] = builders.Tensor("I64", (3,), np.arange(3).tobytes())
    built.placement["model.ids"] = builders.SINGLE
    built.write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        norm = checkpoint["model.norm.weight"]
        assert not norm.quantized and norm[3:5].tobytes() == checkpoint.dequantize("model.norm.weight")[3:5].tobytes()
        assert norm[4].shape == () and norm.tensor(4).dtype == torch.bfloat16
        scale = checkpoint["model.scale"]
        assert scale[...].shape == () and scale.tensor().shape == ()
        with pytest.raises(TypeError):
            len(scale)
        assert checkpoint["model.ids"][1:].tolist() == [1, 2]
        assert checkpoint["model.ids"].tensor().tolist() == [0, 1, 2]
        assert repr(norm) == "LazyWeight('model.norm.weight', shape=(16,), dtype=bfloat16)"


def test_rows_that_cannot_be_had(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        weight = checkpoint[NAME]
        for row in (16, -17):
            with pytest.raises(IndexError, match=f"row {row} was asked for"):
                weight[row]
        with pytest.raises(QlfError, match="steps of 2"):
            weight[::2]
        with pytest.raises(QlfError, match="needed a row or a slice of rows"):
            weight["a"]  # type: ignore[index]
        with pytest.raises(QlfError, match="no such weight"):
            checkpoint["nothing"]
        with pytest.raises(QlfError, match="'int8' is not supported"):
            weight.astype("int8")


def test_a_checkpoint_is_a_collection_of_its_weights(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert NAME in checkpoint and f"{NAME}.absmax" not in checkpoint
        assert list(checkpoint) == list(checkpoint.weights) and len(checkpoint) == len(checkpoint.weights)
        weight = checkpoint[NAME]
        assert weight.astype(torch.float32)[0].tobytes() == weight.astype("float32")[0].tobytes()
    with pytest.raises(QlfError, match="the checkpoint is closed"):
        weight[0]


def test_rows_read_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage and reads elsewhere do not matter: 64 rows of 4,096 read 2 % of the packed bytes, not all."""
    shape = (4096, 64)
    values = np.tile(builders.example_values("pattern", (1024,)), 256)
    built = make_checkpoint(quantized={NAME: shape}, plain={}, values={NAME: values}, manifest=False)
    scales = np.frombuffer(built.tensors[f"{NAME}.nested_absmax"].data, dtype=np.float32).copy()
    scales[-1] = np.nan
    built.tensors[f"{NAME}.nested_absmax"] = builders.Tensor("F32", (16,), scales.tobytes())
    built.write(tmp_path)
    read, sizes = ShardReader.read_at, []

    def counted(self: ShardReader, position: int, buffer: memoryview) -> None:
        sizes.append(buffer.nbytes)
        read(self, position, buffer)

    with open_checkpoint(tmp_path) as checkpoint:
        monkeypatch.setattr(ShardReader, "read_at", counted)
        checkpoint[NAME][128:192]
        assert sum(sizes) < 64 * 64 // 2 + 4096
        with pytest.raises(FormatError) as caught:
            checkpoint[NAME][-1]
        assert caught.value.rule == "D1"
