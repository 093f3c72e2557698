"""The pipeline that loads to a GPU, run through lanes of host memory whose copies happen late and on another thread.

So a buffer that is filled again too early, or a weight decoded before it has arrived, gives wrong bits here as well.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import qlformat
from qlformat.checkpoint import Checkpoint, open_checkpoint
from qlformat.device_loader import STAGING_BYTES, Pipeline
from qlformat.errors import FormatError, QlfError
from qlformat.layout import Recipe
from tests import builders
from tests.builders import build_checkpoint, make_checkpoint

QUANTIZED = {"model.a.weight": (70, 301), "model.b.weight": (131, 151), "model.c.weight": (7,)}
PLAIN = {"model.embed.weight": (40, 24), "model.norm.weight": (24,), "model.scale": (), "model.none": (0, 3)}
RECIPES = [(Recipe(), "bfloat16"), (Recipe("fp4", 32, True), "float16"), (Recipe("nf4", 128, False), "float32")]


class LateCopy:
    """A copy that has been asked for."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.target, self.source = target, source
        self.done = threading.Event()

    def synchronize(self) -> None:
        assert self.done.wait(30)


class LateLanes:
    """Copies in order, on a thread that takes its time; decoding waits for them in `join` only."""

    device = torch.device("cpu")

    def __init__(self, delay: float = 0.002, room: int | None = None) -> None:
        self.copies: queue.Queue[LateCopy | None] = queue.Queue()
        self.last: LateCopy | None = None
        self.staged: list[int] = []
        self.allocated: list[weakref.ref[torch.Tensor]] = []
        self.finished = False
        self._delay = delay
        self._room = room
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()

    def _copy(self) -> None:
        while (copy := self.copies.get()) is not None:
            time.sleep(self._delay)
            copy.target.copy_(copy.source)
            copy.done.set()
            del copy

    def close(self) -> None:
        self.copies.put(None)
        self._thread.join()
        self.last = None

    def staging(self, size: int) -> torch.Tensor:
        self.staged.append(size)
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def allocate(self, size: int) -> torch.Tensor:
        if self._room is not None and len(self.allocated) == self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        memory = torch.full((size,), 0xDD, dtype=torch.uint8)
        self.allocated.append(weakref.ref(memory))
        return memory

    def send(self, target: torch.Tensor, source: torch.Tensor) -> LateCopy:
        self.last = LateCopy(target, source)
        self.copies.put(self.last)
        return self.last

    def join(self, arrived: torch.Tensor) -> None:
        if self.last is not None:
            self.last.synchronize()

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def lanes() -> Iterator[LateLanes]:
    made = LateLanes()
    yield made
    made.close()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("recipe", "source"), RECIPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("staging", [1024, STAGING_BYTES])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_the_bits_are_those_of_the_cpu_path(
    tmp_path: Path, lanes: LateLanes, recipe: Recipe, source: str, threads: int, staging: int, dtype: str | None
) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN, recipe=recipe, dtype=source, shards=2, manifest=False)
    needed = qlformat.load_state_dict(tmp_path, dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        found = Pipeline(checkpoint, lanes, dtype, threads, staging).load(list(checkpoint.weights.values()))
    assert lanes.finished
    assert lanes.staged == [staging] * (2 * threads)
    assert found.keys() == needed.keys()
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (needed[name].shape, needed[name].dtype)
        assert tensor.is_contiguous()
        assert bits(tensor) == bits(needed[name]), name
    lanes.close()
    assert all(memory() is None for memory in lanes.allocated)  # images are let go of


def test_a_conv1d_and_the_table_of_an_older_bitsandbytes(tmp_path: Path, lanes: LateLanes) -> None:
    name = next(iter(builders.DEFAULT_QUANTIZED))
    built = make_checkpoint(manifest=False)
    table = np.frombuffer(built.tensors[f"{name}.nested_quant_map"].data, dtype=np.float32).copy()
    table[0] = -1.0
    built.tensors[f"{name}.nested_quant_map"] = builders.Tensor("F32", (256,), table.tobytes())
    codes = np.frombuffer(built.tensors[f"{name}.absmax"].data, dtype=np.uint8).copy()
    codes[2] = 0
    built.tensors[f"{name}.absmax"] = builders.Tensor("U8", codes.shape, codes.tobytes())
    built.config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    built.write(tmp_path)
    needed = qlformat.load_state_dict(tmp_path, "float32")
    with open_checkpoint(tmp_path) as checkpoint:
        assert name in checkpoint.nested_maps
        weights = list(checkpoint.weights.values())
        found = Pipeline(checkpoint, lanes, "float32").load(weights)
        assert np.array_equal(found[name].numpy(), checkpoint.dequantize(name, "float32"))
    assert all(torch.equal(found[weight.name], needed[weight.name]) for weight in weights)


def test_out_of_memory_half_way(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    lanes = LateLanes(room=2)
    with open_checkpoint(tmp_path) as checkpoint:
        weights = list(checkpoint.weights.values())
        pipeline = Pipeline(checkpoint, lanes, "float32", staging_bytes=1024)
        with pytest.raises(QlfError) as caught:
            pipeline.load(weights)
    lanes.close()
    total = 4 * sum(weight.elements for weight in weights)
    assert caught.value.tensor == weights[2].name
    assert f"out of memory on cpu: {4 * weights[2].elements} bytes" in str(caught.value)
    assert f"all of them need {total}" in str(caught.value)
    # The error is still held here, and must hold no memory.
    assert not pipeline._loaded
    assert len(lanes.allocated) == 2 and all(memory() is None for memory in lanes.allocated)


@pytest.mark.parametrize(("recipe", "suffix", "rule"), [
    (Recipe(), ".nested_absmax", "D1"), (Recipe(double_quant=False), ".absmax", "T4"),
])  # fmt: skip
def test_scales_that_no_encoder_writes(
    tmp_path: Path, lanes: LateLanes, recipe: Recipe, suffix: str, rule: str
) -> None:
    name = next(iter(builders.DEFAULT_QUANTIZED))
    built = make_checkpoint(recipe=recipe)
    values = np.frombuffer(built.tensors[name + suffix].data, dtype=np.float32).copy()
    values[-1] = -0.5
    built.tensors[name + suffix] = builders.Tensor("F32", values.shape, values.tobytes())
    built.write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(FormatError) as caught:
        Pipeline(checkpoint, lanes).load(list(checkpoint.weights.values()))
    assert (caught.value.rule, caught.value.tensor) == (rule, name + suffix)


def test_a_shard_that_is_cut_short_meanwhile(tmp_path: Path, lanes: LateLanes, monkeypatch: pytest.MonkeyPatch) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    read = Checkpoint.read_into

    def cut(self: Checkpoint, name: str, offset: int, buffer: memoryview) -> None:
        if name == "model.b.weight":
            with (tmp_path / builders.SINGLE).open("r+b") as file:
                file.truncate(300)
        read(self, name, offset, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", cut)
    with open_checkpoint(tmp_path) as checkpoint:
        pipeline = Pipeline(checkpoint, lanes, staging_bytes=1024)
        with pytest.raises(FormatError, match="shorter") as caught:
            pipeline.load(list(checkpoint.weights.values()))
    assert caught.value.rule == "S5" and not pipeline._loaded


def test_nothing_to_load(tmp_path: Path, lanes: LateLanes) -> None:
    build_checkpoint(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert Pipeline(checkpoint, lanes).load([]) == {}
    assert lanes.staged == []


@pytest.mark.gpu
def test_a_real_device(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN, shards=2)
    for dtype in (None, "bfloat16", "float16", "float32"):
        needed = qlformat.load_state_dict(tmp_path, dtype)
        found = qlformat.load_state_dict(tmp_path, dtype, device="cuda:0")
        assert found.keys() == needed.keys()
        for name, tensor in found.items():
            assert tensor.device == torch.device("cuda:0")
            assert torch.equal(tensor.cpu(), needed[name])
