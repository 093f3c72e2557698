"""qlformat.load_state_dict on the CPU: the reference's bits for every recipe, and one line for whatever goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qlformat
import qlformat.numpy
from qlformat import decoder, reference
from qlformat.checkpoint import NUMPY_DTYPES, Checkpoint, cast, open_checkpoint
from qlformat.errors import FormatError, QlfError
from qlformat.free_memory import FreeMemory
from qlformat.layout import Recipe
from tests import builders
from tests.builders import Tensor, build_checkpoint, make_checkpoint
from tests.hub_server import Hub
from tests.unit.test_written_meanwhile import write_to

RAGGED, ODD, ROW = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.odd.weight"
QUANTIZED = {RAGGED: (70, 301), ODD: (131, 151), ROW: (7,)}
PLAIN = {"model.embed_tokens.weight": (40, 24), "model.norm.weight": (24,), "model.scale": ()}
RECIPES = [
    (Recipe(), "bfloat16"),
    (Recipe(), "float16"),
    (Recipe("fp4", 32, True), "float16"),
    (Recipe("nf4", 128, False), "float32"),
    (Recipe("fp4", 64, False), "bfloat16"),
]
WEIGHT = next(iter(builders.DEFAULT_QUANTIZED))


def needed_values(built: builders.Checkpoint, name: str, dtype: str) -> Any:
    """A weight by the reference alone, flat, from the tensors that the builder made."""
    entry = next(entry for entry in built.weights if entry.name == name)
    stored = built.tensors[name]
    if entry.encoding == "none":
        values = np.frombuffer(stored.data, dtype=NUMPY_DTYPES[entry.dtype])
        return cast(values, entry.dtype, dtype)
    recipe, scales = built.recipe, built.tensors[f"{name}.absmax"].data
    absmax = np.frombuffer(scales, dtype=np.float32) if not recipe.double_quant else None
    if absmax is None:
        state = json.loads(built.tensors[f"{name}.quant_state.bitsandbytes__{recipe.quant_type}"].data)
        nested = np.frombuffer(built.tensors[f"{name}.nested_absmax"].data, dtype=np.float32)
        codes = np.frombuffer(scales, dtype=np.uint8)
        absmax = reference.double_dequantize(codes, nested, np.float32(state["nested_offset"]))
    packed = np.frombuffer(stored.data, dtype=np.uint8)
    count = int(np.prod(entry.shape))
    values = reference.dequantize(packed, absmax, count, recipe.quant_type, recipe.blocksize)
    return reference.from_float32(values, dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("recipe", "source"), RECIPES, ids=str)
@pytest.mark.parametrize(("shards", "threads"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_the_bits_are_those_of_the_reference(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
    source: str,
    shards: int,
    threads: int,
    dtype: str | None,
) -> None:
    monkeypatch.setattr(decoder, "PIECE_ELEMENTS", recipe.blocksize * 256)  # several pieces for one weight
    built = build_checkpoint(
        tmp_path, quantized=QUANTIZED, plain=PLAIN, recipe=recipe, dtype=source, shards=shards, manifest=False
    )
    wanted = None if dtype is None else getattr(torch, dtype)
    found = qlformat.load_state_dict(tmp_path, dtype=wanted, threads=threads)
    assert set(found) == {*QUANTIZED, *PLAIN}
    with open_checkpoint(tmp_path) as checkpoint:
        for name, tensor in found.items():
            assert tuple(tensor.shape) == {**QUANTIZED, **PLAIN}[name]
            assert tensor.dtype == getattr(torch, dtype or source)
            assert tensor.is_contiguous() and tensor.device.type == "cpu"
            assert raw(tensor) == needed_values(built, name, dtype or source).tobytes(), name
            assert raw(tensor) == checkpoint.dequantize(name, dtype).tobytes(), name


def test_a_weight_of_several_whole_pieces(tmp_path: Path) -> None:
    """Nothing is made smaller here: two pieces of the real size and a rest, decoded by several threads."""
    shape = (decoder.PIECE_ELEMENTS // 512 + 1, 1027)
    count = shape[0] * shape[1]
    values = np.tile(builders.example_values("pattern", (4099,)), -(-count // 4099))[:count]
    build_checkpoint(tmp_path, quantized={WEIGHT: shape}, plain={}, values={WEIGHT: values}, dtype="bfloat16")
    found = qlformat.load_state_dict(tmp_path, dtype="float16", threads=3)[WEIGHT]
    with open_checkpoint(tmp_path) as checkpoint:
        assert found.numel() > 2 * decoder.PIECE_ELEMENTS
        assert np.array_equal(found.numpy(), checkpoint.dequantize(WEIGHT, "float16"))


def test_without_the_native_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    monkeypatch.setattr("qlformat.native.available", lambda: False)
    for name, tensor in qlformat.load_state_dict(tmp_path, dtype="float16").items():
        assert raw(tensor) == needed_values(built, name, "float16").tobytes()


def test_integers_keep_their_dtype_and_empty_weights_are_there(tmp_path: Path) -> None:
    built = make_checkpoint(manifest=False)
    extra = {
        "model.ids": Tensor("I64", (2, 3), np.arange(6, dtype=np.int64).tobytes()),
        "model.mask": Tensor("BOOL", (4,), bytes([0, 1, 1, 0])),
        "model.wide": Tensor("F64", (2,), np.array([0.1, 1e300]).tobytes()),
        "model.empty": Tensor("BF16", (0, 5), b""),
    }
    built.tensors |= extra
    built.placement |= dict.fromkeys(extra, builders.SINGLE)
    built.write(tmp_path)
    found = qlformat.load_state_dict(tmp_path, dtype=torch.bfloat16)
    assert found["model.ids"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["model.ids"].dtype == torch.int64
    assert found["model.mask"].tolist() == [False, True, True, False]
    assert found["model.wide"].tolist() == [torch.tensor(0.1).bfloat16().item(), float("inf")]
    assert found["model.empty"].shape == (0, 5) and found["model.empty"].dtype == torch.bfloat16


def test_each_tensor_owns_its_memory(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    found = qlformat.load_state_dict(tmp_path)
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert len(storages) == len(found)
    for tensor in found.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensor.zero_()  # writable
    assert not torch.equal(qlformat.load_state_dict(tmp_path)[ODD], found[ODD])


def test_a_conv1d_has_the_shape_of_the_model(tmp_path: Path) -> None:
    built = make_checkpoint()
    built.weights = [type(entry)(**{**vars_of(entry), "transposed": entry.name == WEIGHT}) for entry in built.weights]
    built.write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint[WEIGHT].transposed and checkpoint[WEIGHT].shape == builders.DEFAULT_QUANTIZED[WEIGHT]
        needed = checkpoint.dequantize(WEIGHT, "float32").T
    found = qlformat.load_state_dict(tmp_path, dtype=torch.float32)[WEIGHT]
    assert found.is_contiguous() and np.array_equal(found.numpy(), needed)


def vars_of(entry: Any) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in entry.__dataclass_fields__}


def test_chosen_names(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    assert set(qlformat.load_state_dict(tmp_path, names=[ODD, "model.scale"])) == {ODD, "model.scale"}
    assert set(qlformat.load_state_dict(tmp_path, names=ODD)) == {ODD}
    assert qlformat.load_state_dict(tmp_path, names=[]) == {}
    with pytest.raises(QlfError, match=r"no weight named 'model.layers.0.mlp.up.weight'.*mlp\.up_proj\.weight"):
        qlformat.load_state_dict(tmp_path, names=["model.layers.0.mlp.up.weight"])
    with pytest.raises(QlfError, match=r"and 1 more names\); there are 6 others"):
        qlformat.load_state_dict(tmp_path, names=["?", "!", ODD])
    with pytest.raises(QlfError, match=r"absmax"):  # companions are no weights
        qlformat.load_state_dict(tmp_path, names=[f"{ODD}.absmax"])


def test_the_name_of_a_tied_output_embedding(tmp_path: Path) -> None:
    built = make_checkpoint(manifest=False)
    for tied, text in ((True, "the input embedding is stored for both"), (False, "others|did you mean")):
        built.config["tie_word_embeddings"] = tied
        built.write(tmp_path / str(tied))
        with pytest.raises(QlfError, match=text):
            qlformat.load_state_dict(tmp_path / str(tied), names=["lm_head.weight"])


def test_a_repository_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    build_checkpoint(hub.root / "org" / "model", shards=2)
    found = qlformat.load_state_dict("org/model@v1")
    needed = qlformat.load_state_dict(hub.root / "org" / "model")
    assert found.keys() == needed.keys()
    assert all(torch.equal(found[name], needed[name]) for name in needed)


def edited(path: Path, suffix: str, change: Callable[[Any], None], **options: Any) -> Path:
    """A checkpoint with the values of one float32 companion changed."""
    built = make_checkpoint(**options)
    name = WEIGHT + suffix
    values = np.frombuffer(built.tensors[name].data, dtype=np.float32).copy()
    change(values)
    built.tensors[name] = Tensor("F32", built.tensors[name].shape, values.tobytes())
    return built.write(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales_that_no_encoder_writes(tmp_path: Path, value: float) -> None:
    def spoil(scales: Any) -> None:
        scales[-1] = value

    edited(tmp_path / "nested", ".nested_absmax", spoil)
    edited(tmp_path / "plain", ".absmax", spoil, recipe=Recipe(double_quant=False))
    for name, rule, suffix in (("nested", "D1", ".nested_absmax"), ("plain", "T4", ".absmax")):
        with pytest.raises(FormatError) as caught:
            qlformat.load_state_dict(tmp_path / name)
        assert (caught.value.rule, caught.value.tensor) == (rule, WEIGHT + suffix)


def test_tables_that_are_not_the_specified_ones(tmp_path: Path) -> None:
    def spoil(table: Any) -> None:
        table[3] += 0.5

    for rule, suffix in (("D2", ".nested_quant_map"), ("T5", ".quant_map")):
        with pytest.raises(FormatError) as caught:
            qlformat.load_state_dict(edited(tmp_path / rule, suffix, spoil))
        assert caught.value.rule == rule


def test_the_table_of_an_older_bitsandbytes_is_used(tmp_path: Path) -> None:
    def older(table: Any) -> None:
        table[0] = -1.0

    edited(tmp_path, ".nested_quant_map", older, manifest=False)
    with open_checkpoint(tmp_path) as checkpoint:
        assert WEIGHT in checkpoint.nested_maps
        needed = checkpoint.dequantize(WEIGHT, "float32")
    assert np.array_equal(qlformat.load_state_dict(tmp_path, dtype="float32")[WEIGHT].numpy(), needed)


def spoil_while_reading(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]) -> None:
    """Run `spoil` on the shard just before the first bytes of a weight are read."""
    read, done = Checkpoint.read_into, []

    def first_spoiled(self: Checkpoint, name: str, offset: int, buffer: memoryview) -> None:
        if not done:
            done.append(name)
            spoil(self.shards[self.tensors[name].shard].path)
        read(self, name, offset, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", first_spoiled)


def test_a_shard_that_is_cut_short_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    spoil_while_reading(monkeypatch, lambda path: os.truncate(path, 200))
    with pytest.raises(FormatError) as caught:
        qlformat.load_state_dict(tmp_path)
    assert (caught.value.rule, caught.value.file) == ("S5", builders.SINGLE)
    assert "shorter" in str(caught.value)


def test_a_shard_that_is_written_to_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    spoil_while_reading(monkeypatch, write_to)
    with pytest.raises(FormatError, match="changed while it was read") as caught:
        qlformat.load_state_dict(tmp_path)
    assert (caught.value.rule, caught.value.file) == ("S5", builders.SINGLE)


def test_a_shard_that_is_replaced_by_renaming_is_read_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    needed = qlformat.load_state_dict(tmp_path)

    def replace(path: Path) -> None:
        beside = path.with_name("new")
        beside.write_bytes(bytes(10))
        beside.replace(path)

    spoil_while_reading(monkeypatch, replace)
    found = qlformat.load_state_dict(tmp_path)
    assert all(torch.equal(found[name], needed[name]) for name in needed)


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    devices = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
    for device in ("gpu", "cuda:999", "meta", "", 3.5):
        with pytest.raises(QlfError, match=f"{devices}"):
            qlformat.load_state_dict(tmp_path, device=device)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(QlfError, match="found only cpu; use one of them"):
            qlformat.load_state_dict(tmp_path, device="cuda")


def test_other_mistakes(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "out")
    with pytest.raises(QlfError, match="'int8' is not supported; use one of float32, float16, bfloat16"):
        qlformat.load_state_dict(tmp_path / "out", dtype="int8")
    with pytest.raises(QlfError, match=r"torch\.float64 is not supported"):
        qlformat.load_state_dict(tmp_path / "out", dtype=torch.float64)
    for threads in (0, -1, 1.5):
        with pytest.raises(QlfError, match=f"found threads={threads}, needed a whole number of at least 1"):
            qlformat.load_state_dict(tmp_path / "out", threads=threads)  # type: ignore[arg-type]
    with pytest.raises(QlfError, match="needed the directory of a checkpoint"):
        qlformat.load_state_dict(tmp_path / "out" / "config.json")
    with pytest.raises(QlfError, match="found no directory"):
        qlformat.load_state_dict(tmp_path / "nothing" / "at" / "all")


def test_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    allocate = torch.empty
    kept: list[torch.Tensor] = []

    def too_much(shape: Any, **options: Any) -> torch.Tensor:
        if tuple(shape) == QUANTIZED[ODD]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        kept.append(allocate(shape, **options))
        return kept[-1]

    monkeypatch.setattr(torch, "empty", too_much)
    with pytest.raises(QlfError) as caught:
        qlformat.load_state_dict(tmp_path, dtype="float32")
    total = 4 * (70 * 301 + 131 * 151 + 7 + 40 * 24 + 24 + 1)
    assert caught.value.tensor == ODD
    assert f"out of memory on cpu: {4 * 131 * 151} bytes" in str(caught.value)
    assert f"all of them need {total}" in str(caught.value)


def test_more_than_the_machine_has_left_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system that overcommits would hand out the memory and end the process when it is used."""
    build_checkpoint(tmp_path, quantized=QUANTIZED, plain=PLAIN)
    total = 4 * (70 * 301 + 131 * 151 + 7 + 40 * 24 + 24 + 1)
    left = FreeMemory(total - 1, "this machine")
    monkeypatch.setattr("qlformat.free_memory.on_host", lambda: left)
    monkeypatch.setattr("qlformat.free_memory.swap", lambda: 0)
    for load in (qlformat.load_state_dict, qlformat.numpy.load_state_dict):
        with pytest.raises(QlfError, match=f"need {total} bytes, this machine has {total - 1} left"):
            load(tmp_path, dtype="float32")
    monkeypatch.setattr("qlformat.free_memory.swap", lambda: 1)
    assert set(qlformat.load_state_dict(tmp_path, dtype="float32")) == {*QUANTIZED, *PLAIN}


SHORT_OF_MEMORY = """
import gc, resource, sys
from pathlib import Path
import torch, qlformat, qlformat.loader, qlformat.numpy
path, load = sys.argv[1], {"torch": qlformat.load_state_dict, "numpy": qlformat.numpy.load_state_dict}[sys.argv[2]]
mapped = lambda: int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
load(path, names=["model.small.weight"])
before = mapped()
resource.setrlimit(resource.RLIMIT_AS, (before + (200 << 20),) * 2)
try:
    load(path, dtype="float32")
except qlformat.QlfError as error:
    held = error
print(held)
print(mapped() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux'")
@pytest.mark.parametrize("path", ["torch", "numpy"])
def test_a_process_that_really_runs_out_of_memory(tmp_path: Path, path: str) -> None:
    """Half way: several weights fit, not all. The error is held while the memory is counted."""
    built = make_checkpoint(quantized={WEIGHT: (4096, 64)}, plain={"model.small.weight": (8,)}, manifest=False)
    large = [f"model.large.{number}.weight" for number in range(8)]
    built.tensors |= dict.fromkeys(large, Tensor("BF16", (4096, 2048), bytes(4096 * 2048 * 2)))
    built.placement |= dict.fromkeys(large, builders.SINGLE)
    built.write(tmp_path)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path), path],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    message, growth = done.stdout.splitlines()
    assert "out of memory on cpu: 33554432 bytes for this weight" in message
    assert f"all of them need {8 * 33554432 + 4 * (4096 * 64 + 8)}" in message
    assert int(growth) < 16 << 20
