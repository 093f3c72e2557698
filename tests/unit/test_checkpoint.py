"""Open checkpoints: names, weights, bytes, decoded values, and the first broken rule where there is one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qlformat import reference
from qlformat.checkpoint import Checkpoint, cast, open_checkpoint
from qlformat.errors import FormatError, QlfError
from qlformat.layout import Recipe
from tests import builders
from tests.builders import Tensor, build_checkpoint, make_checkpoint

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"

RECIPES = [
    (Recipe(), "bfloat16"),
    (Recipe("fp4", 32, True), "float16"),
    (Recipe("nf4", 128, False), "float32"),
    (Recipe("fp4", 4096, False), "bfloat16"),
]


def decoded(checkpoint: builders.Checkpoint, name: str, dtype: str) -> npt.NDArray[np.generic]:
    """A weight decoded by the reference, flat."""
    tensors, recipe = checkpoint.tensors, checkpoint.recipe
    packed = np.frombuffer(tensors[name].data, dtype=np.uint8)
    n = next(int(np.prod(entry.shape)) for entry in checkpoint.weights if entry.name == name)
    scales = tensors[f"{name}.absmax"].data
    if not recipe.double_quant:
        absmax = np.frombuffer(scales, dtype=np.float32)
    else:
        nested = np.frombuffer(tensors[f"{name}.nested_absmax"].data, dtype=np.float32)
        state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__{recipe.quant_type}"].data)
        codes = np.frombuffer(scales, dtype=np.uint8)
        absmax = reference.double_dequantize(codes, nested, np.float32(state["nested_offset"]))
    values = reference.dequantize(packed, absmax, n, recipe.quant_type, recipe.blocksize)
    return reference.from_float32(values, dtype)


@pytest.mark.parametrize(("recipe", "dtype"), RECIPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_sound_checkpoint(tmp_path: Path, recipe: Recipe, dtype: str, shards: int) -> None:
    built = build_checkpoint(tmp_path, recipe=recipe, dtype=dtype, shards=shards)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(built.tensors)
        assert {name: stored.shard for name, stored in checkpoint.tensors.items()} == built.placement
        for name, tensor in built.tensors.items():
            assert checkpoint.read(name) == tensor.data
            assert checkpoint.tensor_sha256(name) == hashlib.sha256(tensor.data).hexdigest()
        assert checkpoint.manifest is not None
        assert checkpoint.fingerprint() == checkpoint.fingerprint(1) == checkpoint.manifest.fingerprint
        assert set(checkpoint.weights) == {entry.name for entry in built.weights}
        for entry in built.weights:
            weight = checkpoint.weights[entry.name]
            assert (weight.shape, weight.dtype, weight.transposed) == (entry.shape, dtype, False)
            if entry.encoding == "none":
                assert weight.quant_state is None
                assert checkpoint.dequantize(entry.name).tobytes() == built.tensors[entry.name].data
                continue
            assert weight.quant_state is not None
            assert weight.quant_state.quant_type == recipe.quant_type
            for target in (None, "float32", "float16", "bfloat16"):
                found = checkpoint.dequantize(entry.name, target)
                needed = decoded(built, entry.name, target or dtype)
                assert found.shape == entry.shape
                assert found.dtype == needed.dtype
                assert found.tobytes() == needed.tobytes()


@pytest.mark.parametrize(("recipe", "dtype"), RECIPES)
def test_parts_equal_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, dtype: str) -> None:
    shape = (37, 911)  # odd, ragged, and with blocksize 32 more than 256 blocks: three nested ones
    monkeypatch.setattr("qlformat.checkpoint.CHUNK_ELEMENTS", 4096 * 256)
    build_checkpoint(tmp_path, quantized={WEIGHT: shape}, recipe=recipe, dtype=dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        whole = checkpoint.dequantize(WEIGHT)
        for rows in ((0, 0), (0, 1), (5, 6), (17, 37), (36, 37), (0, 37)):
            part = checkpoint.dequantize(WEIGHT, rows=rows)
            assert part.tobytes() == whole[slice(*rows)].tobytes()
            assert part.shape == (rows[1] - rows[0], 911)
        for size in (777, 4096, 8192 * 2 + 3, 10**6):
            chunks = list(checkpoint.iter_dequantized(WEIGHT, chunk_elements=size))
            assert all(chunk.size == size for chunk in chunks[:-1])
            assert np.concatenate(chunks).tobytes() == whole.tobytes()
        norm = checkpoint.dequantize(NORM, rows=(3, 9))
        assert norm.tobytes() == checkpoint.dequantize(NORM)[3:9].tobytes()


def test_threads_share_a_checkpoint(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, shards=2)
    with open_checkpoint(tmp_path) as checkpoint:
        names = list(checkpoint.weights) * 20
        alone = {name: checkpoint.dequantize(name).tobytes() for name in set(names)}
        start = threading.Barrier(4)

        def work(worker: int) -> bool:
            start.wait()
            return all(checkpoint.dequantize(name).tobytes() == alone[name] for name in names[worker::4])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


def test_unquantized_tensors_of_every_plain_dtype(tmp_path: Path) -> None:
    built = make_checkpoint()
    values = {
        "F64": np.array([1.0, -2.5, 1e300]),
        "I64": np.array([1, -2, 3], dtype=np.int64),
        "I8": np.array([1, -2, 3], dtype=np.int8),
        "BOOL": np.array([True, False, True]),
        "F16": np.array([1, np.nan, -np.inf], dtype=np.float16),
    }
    for dtype, array in values.items():
        built.tensors[f"extra.{dtype}"] = Tensor(dtype, (3,), array.tobytes())
        built.placement[f"extra.{dtype}"] = "model.safetensors"
    built.tensors["extra.scalar"] = Tensor("F32", (), np.float32(7).tobytes())
    built.tensors["extra.empty"] = Tensor("F32", (0, 4), b"")
    built.placement |= {"extra.scalar": "model.safetensors", "extra.empty": "model.safetensors"}
    built.write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        for dtype, array in values.items():
            assert checkpoint.dequantize(f"extra.{dtype}").tobytes() == array.tobytes()
        assert checkpoint.dequantize("extra.I64", "float16").dtype == np.int64
        assert checkpoint.dequantize("extra.BOOL", "bfloat16").dtype == np.bool_
        assert checkpoint.dequantize("extra.F64", "float32").tolist() == [1.0, -2.5, np.inf]
        assert checkpoint.dequantize("extra.F16", "bfloat16").tolist() == [0x3F80, 0x7FC0, 0xFF80]
        assert checkpoint.dequantize("extra.scalar").shape == ()
        assert checkpoint.dequantize("extra.empty", "bfloat16").shape == (0, 4)


def test_cast_rounds_to_even_and_keeps_nan() -> None:
    bits = np.array(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000001], dtype=np.uint32
    )
    found = cast(bits.view(np.float32), "float32", "bfloat16")
    assert found.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FC0, 0x7FC0, 0x8000]
    assert cast(np.array([70000.0], dtype=np.float32), "float32", "float16").tolist() == [np.inf]


def test_wrong_questions(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        questions: list[Callable[[], object]] = [
            lambda: checkpoint.dequantize("nothing"),
            lambda: checkpoint.read("nothing"),
            lambda: checkpoint.dequantize(WEIGHT, "int8"),
            lambda: checkpoint.dequantize(WEIGHT, rows=(3, 17)),
            lambda: checkpoint.dequantize(WEIGHT, rows=(-1, 3)),
            lambda: checkpoint.dequantize(WEIGHT, rows=(4, 3)),
            lambda: checkpoint.absmax(checkpoint.weights[NORM], 0, 1),
        ]
        for question in questions:
            with pytest.raises(QlfError):
                question()


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(QlfError, match="needed the directory of a checkpoint"):
            open_checkpoint(path)


def test_a_closed_checkpoint_refuses_to_read(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        pass
    with pytest.raises(QlfError, match="the checkpoint is closed; read inside of its with block"):
        checkpoint.read(NORM)


def test_a_failed_open_leaves_no_file_open(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, shards=2)
    builders.edit_header(tmp_path / builders.shard_name(1, 2), lambda header: header.pop(list(header)[-1]))
    before = set(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else set()
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)
    after = set(Path("/proc/self/fd").iterdir()) if before else set()
    assert len(after) == len(before)


def test_a_plain_repository(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, manifest=False)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.manifest is None
        assert not checkpoint.has_manifest
        assert checkpoint.weights[WEIGHT].quant_state is not None


@pytest.mark.parametrize("other", ["minus one", "last bits"])
def test_a_table_of_another_bitsandbytes_is_used_as_it_is(tmp_path: Path, other: str) -> None:
    built = make_checkpoint(manifest=False, recipe=Recipe("nf4", 32))
    name = f"{WEIGHT}.nested_quant_map"
    table = np.frombuffer(built.tensors[name].data, dtype=np.float32).copy()
    if other == "minus one":
        table[0] = -1.0
    else:
        table[0] = np.nextafter(table[0], np.float32(1))
        table[9] = np.nextafter(np.nextafter(table[9], np.float32(1)), np.float32(1))
    built.tensors[name] = replace(built.tensors[name], data=table.tobytes())
    codes = np.frombuffer(built.tensors[f"{WEIGHT}.absmax"].data, dtype=np.uint8).copy()
    codes[1], codes[2] = 0, 9
    built.tensors[f"{WEIGHT}.absmax"] = replace(built.tensors[f"{WEIGHT}.absmax"], data=codes.tobytes())
    built.write(tmp_path / "plain")
    with open_checkpoint(tmp_path / "plain") as checkpoint:
        weight = checkpoint.weights[WEIGHT]
        assert weight.quant_state is not None
        nested = np.frombuffer(built.tensors[f"{WEIGHT}.nested_absmax"].data, dtype=np.float32)[0]
        needed = table[codes] * nested + np.float32(weight.quant_state.nested_offset)
        assert checkpoint.absmax(weight, 0, 8).tobytes() == needed.tobytes()
        assert checkpoint.absmax(weight, 1, 3).tobytes() == needed[1:3].tobytes()
    built.has_manifest = True
    built.write(tmp_path / "ours")
    with pytest.raises(FormatError, match="8-bit codebook") as caught:
        open_checkpoint(tmp_path / "ours")
    assert caught.value.rule == "D2"


def test_a_table_that_nobody_wrote_is_refused(tmp_path: Path) -> None:
    for position, value in ((0, -0.5), (9, -1.0), (255, np.nan)):
        built = make_checkpoint(manifest=False)
        name = f"{WEIGHT}.nested_quant_map"
        table = np.frombuffer(built.tensors[name].data, dtype=np.float32).copy()
        table[position] = value
        built.tensors[name] = replace(built.tensors[name], data=table.tobytes())
        built.write(tmp_path / str(position))
        with pytest.raises(FormatError) as caught:
            open_checkpoint(tmp_path / str(position))
        assert caught.value.rule == "D2"


def test_transposed_weights_are_named_by_the_manifest_or_by_the_architecture(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    built = make_checkpoint(quantized={name: (48, 16)}, plain={"transformer.wte.weight": (8, 16)})
    built.weights = [replace(entry, transposed=entry.name == name) for entry in built.weights]
    built.config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    built.write(tmp_path / "ours")
    built.has_manifest = False
    built.write(tmp_path / "plain")
    for path in (tmp_path / "ours", tmp_path / "plain"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.weights[name].transposed
            assert not checkpoint.weights["transformer.wte.weight"].transposed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize(("double_quant", "suffix", "rule"), [(False, "absmax", "T4"), (True, "nested_absmax", "D1")])
def test_scales_that_are_no_scales(tmp_path: Path, value: float, double_quant: bool, suffix: str, rule: str) -> None:
    built = make_checkpoint(recipe=Recipe(double_quant=double_quant))
    name = f"{WEIGHT}.{suffix}"
    scales = np.frombuffer(built.tensors[name].data, dtype=np.float32).copy()
    scales[-1] = value
    built.tensors[name] = replace(built.tensors[name], data=scales.tobytes())
    built.write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(FormatError) as caught:
            checkpoint.dequantize(WEIGHT)
        assert (caught.value.rule, caught.value.tensor) == (rule, name)


def drop(suffix: str) -> Callable[[builders.Checkpoint], None]:
    def change(built: builders.Checkpoint) -> None:
        del built.tensors[WEIGHT + suffix], built.placement[WEIGHT + suffix]

    return change


def add(name: str, tensor: Tensor) -> Callable[[builders.Checkpoint], None]:
    def change(built: builders.Checkpoint) -> None:
        built.tensors[name] = tensor
        built.placement[name] = "model.safetensors"

    return change


def alter(suffix: str, **changes: Any) -> Callable[[builders.Checkpoint], None]:
    def change(built: builders.Checkpoint) -> None:
        built.tensors[WEIGHT + suffix] = replace(built.tensors[WEIGHT + suffix], **changes)

    return change


STATE = ".quant_state.bitsandbytes__nf4"
STRUCTURE: list[tuple[str, str, Callable[[builders.Checkpoint], None]]] = [
    ("T1", WEIGHT, drop(".absmax")),
    ("T1", WEIGHT, drop(".quant_map")),
    ("T1", WEIGHT, drop(".nested_absmax")),
    ("T1", WEIGHT, drop(STATE)),
    ("T1", "x.weight", add("x.weight", Tensor("U8", (8, 1), bytes(8)))),
    ("T2", f"{WEIGHT}.absmax", drop("")),
    ("T2", "x.absmax", add("x.absmax", Tensor("F32", (1,), bytes(4)))),
    ("T2", f"{WEIGHT}.absmax.absmax", add(f"{WEIGHT}.absmax.absmax", Tensor("F32", (1,), bytes(4)))),
    ("T2", f"{WEIGHT}.SCB", add(f"{WEIGHT}.SCB", Tensor("F32", (1,), bytes(4)))),
    ("T2", f"{WEIGHT}.a.b", add(f"{WEIGHT}.a.b", Tensor("F32", (1,), bytes(4)))),
    (
        "T2",
        f"{WEIGHT}.quant_state.bitsandbytes__int3",
        add(f"{WEIGHT}.quant_state.bitsandbytes__int3", Tensor("U8", (2,), b"{}")),
    ),
    ("T3", WEIGHT, alter("", dtype="I8")),
    ("T3", WEIGHT, alter("", shape=(1, 128))),
    ("T4", f"{WEIGHT}.absmax", alter(".absmax", shape=(2, 2))),
    ("T5", f"{WEIGHT}.quant_map", alter(".quant_map", shape=(4, 4))),
    ("T5", f"{WEIGHT}.quant_map", alter(".quant_map", data=bytes(64))),
    ("T6", WEIGHT + STATE, alter(STATE, shape=(2,), data=b"[]")),
    ("T6", WEIGHT + STATE, alter(STATE, shape=(1, 2), data=b"{}")),
    ("T7", WEIGHT + STATE, lambda built: set_shape(built, [0, 16])),
    ("T9", "x.weight", add("x.weight", Tensor("F8_E4M3", (8,), bytes(8)))),
    ("T9", "x.weight", add("x.weight", Tensor("C64", (1,), bytes(8)))),
    ("D1", f"{WEIGHT}.nested_absmax", alter(".nested_absmax", dtype="I32")),
    ("D2", f"{WEIGHT}.nested_quant_map", alter(".nested_quant_map", data=bytes(1024))),
]


def set_shape(built: builders.Checkpoint, shape: list[int]) -> None:
    state = json.loads(built.tensors[WEIGHT + STATE].data)
    data = json.dumps({**state, "shape": shape}).encode()
    built.tensors[WEIGHT + STATE] = Tensor("U8", (len(data),), data)


@pytest.mark.parametrize(
    ("rule", "tensor", "change"), STRUCTURE, ids=[f"{r}-{i}" for i, (r, _, _) in enumerate(STRUCTURE)]
)
def test_structure(
    tmp_path: Path,
    rule: str,
    tensor: str,
    change: Callable[[builders.Checkpoint], None],
) -> None:
    built = make_checkpoint()
    change(built)
    built.write(tmp_path)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.rule, caught.value.tensor) == (rule, tensor)
    assert caught.value.file == "model.safetensors"

    problems: list[QlfError] = []
    with Checkpoint(tmp_path, lambda problem, severity="error": problems.append(problem)) as checkpoint:
        assert [(p.rule, p.tensor) for p in problems] == [(rule, tensor)]  # one defect, one finding
        assert NORM in checkpoint.weights
        assert tensor not in checkpoint.weights or rule in ("T5", "D2")


def test_a_broken_shard_does_not_cascade(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, shards=2)
    (tmp_path / builders.shard_name(0, 2)).write_bytes(b"\0")
    problems: list[QlfError] = []
    with Checkpoint(tmp_path, lambda problem, severity="error": problems.append(problem)) as checkpoint:
        assert [(p.rule, p.file) for p in problems] == [("S1", builders.shard_name(0, 2))]
        assert checkpoint.weights


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "not valid JSON"),
        ("[]", "no quantization_config"),
        ("{}", "no quantization_config"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "'gptq'"),
        ('{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": 1}}', "load_in_4bit 1"),
    ],
)
def test_config_rules(tmp_path: Path, text: str, found: str) -> None:
    build_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config\.json") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.rule == "C1"
    assert found in str(caught.value)


def test_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    (tmp_path / "qlf.json").unlink()
    (tmp_path / "qlf.json").symlink_to("/etc/hostname")
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.rule == "M1"
