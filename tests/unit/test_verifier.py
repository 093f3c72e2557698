"""verify: sound checkpoints have no finding, one defect has its own, and no flipped bit goes unnoticed."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlformat import native, reference
from qlformat.codebook import DYNAMIC8
from qlformat.errors import QlfError
from qlformat.layout import Recipe, parse_quant_state
from qlformat.manifest import FileEntry, Source, WeightEntry
from qlformat.progress import Progress
from qlformat.rules import RULES
from qlformat.shard_hashes import hash_shard
from qlformat.shards import DTYPE_BITS
from qlformat.stored import StoredCheckpoint
from qlformat.verifier import Finding, verify
from qlformat.workers import Stopped
from tests import builders
from tests.builders import Checkpoint, Tensor, build_checkpoint, build_source, edit_json, make_checkpoint, reseal

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
SINGLE = "model.safetensors"
CARRIED = {"tokenizer.json": b'{"model": {}}\n', "chat/template.jinja": b"{{ x }}", "empty.txt": b""}


def errors(found: list[Finding]) -> set[str]:
    return {finding.rule for finding in found if finding.severity == "error"}


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("fp4", 32), Recipe("nf4", 256, False), Recipe("fp4", 4096, False)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_sound_checkpoint_has_no_finding(tmp_path: Path, recipe: Recipe, dtype: str, shards: int) -> None:
    build_checkpoint(tmp_path, recipe=recipe, dtype=dtype, shards=shards, carried=CARRIED)
    assert verify(tmp_path) == []


def test_odd_shapes_are_sound(tmp_path: Path) -> None:
    shapes: Mapping[str, tuple[int, ...]] = {"a.weight": (1,), "b.weight": (3, 7, 5), "c.weight": (33, 517)}
    build_checkpoint(tmp_path, quantized=shapes, recipe=Recipe("nf4", 32))
    assert verify(tmp_path) == []


def test_zeros_are_sound(tmp_path: Path) -> None:
    values = {WEIGHT: np.zeros(256, dtype=np.float32)}
    build_checkpoint(tmp_path, quantized={WEIGHT: (16, 16)}, values=values)
    assert verify(tmp_path) == []


# One defect each; qlf.json is computed after it, so that only the rule itself can notice.


def set_config(**changes: Any) -> Callable[[Checkpoint], None]:
    return lambda built: built.config["quantization_config"].update(changes)


def set_tensor(name: str, edit: Callable[[bytearray], None]) -> Callable[[Checkpoint], None]:
    def change(built: Checkpoint) -> None:
        data = bytearray(built.tensors[name].data)
        edit(data)
        built.tensors[name] = replace(built.tensors[name], data=bytes(data))

    return change


def set_float(value: float) -> Callable[[bytearray], None]:
    return lambda data: data.__setitem__(slice(0, 4), np.float32(value).tobytes())


def set_state(**changes: Any) -> Callable[[Checkpoint], None]:
    def change(built: Checkpoint) -> None:
        name = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
        data = json.dumps({**json.loads(built.tensors[name].data), **changes}).encode()
        built.tensors[name] = Tensor("U8", (len(data),), data)

    return change


def move(name: str, shard: str) -> Callable[[Checkpoint], None]:
    return lambda built: built.placement.update({name: shard})


PLAIN_SCALES = Recipe(double_quant=False)
DEFECTS: list[tuple[str, dict[str, Any], Callable[[Checkpoint], None]]] = [
    ("C1", {}, set_config(load_in_4bit=False)),
    ("C2", {}, set_config(bnb_4bit_quant_type="fp4")),
    ("C2", {}, set_config(bnb_4bit_use_double_quant=False)),
    ("C2", {}, set_config(bnb_4bit_quant_storage="bfloat16")),
    ("C3", {}, set_config(llm_int8_skip_modules=None)),
    ("C3", {}, set_config(llm_int8_skip_modules=[1])),
    ("C3", {}, set_config(_load_in_4bit=True)),
    ("C4", {}, set_config(llm_int8_skip_modules=["lm_head", "q_proj"])),
    ("C4", {}, set_config(llm_int8_skip_modules=["model.layers"])),
    ("C4", {}, set_config(llm_int8_skip_modules=[r"^model\.layers\.0\.self_attn\.q_proj$"])),
    ("C4", {}, set_config(llm_int8_skip_modules=[""])),
    ("T4", {"recipe": PLAIN_SCALES}, set_tensor(f"{WEIGHT}.absmax", set_float(float("nan")))),
    ("T4", {"recipe": PLAIN_SCALES}, set_tensor(f"{WEIGHT}.absmax", set_float(-1))),
    ("T5", {}, set_tensor(f"{WEIGHT}.quant_map", lambda data: data.__setitem__(0, data[0] ^ 1))),
    ("T6", {}, set_state(zero_point=0)),
    ("T7", {}, set_state(shape=[16, 0])),
    ("T8", {"quantized": {WEIGHT: (5, 5)}}, set_tensor(WEIGHT, lambda data: data.__setitem__(-1, data[-1] ^ 1))),
    ("D1", {}, set_tensor(f"{WEIGHT}.nested_absmax", set_float(float("inf")))),
    ("D2", {}, set_tensor(f"{WEIGHT}.nested_quant_map", set_float(-1))),
    ("D3", {}, set_state(nested_offset=0.1)),
    ("M8", {}, lambda built: setattr(built, "recipe", Recipe("nf4", 128))),
    ("M8", {}, set_config(bnb_4bit_compute_dtype="float32")),
    ("P1", {"shards": 2}, move(f"{WEIGHT}.absmax", builders.shard_name(1, 2))),
    ("P1", {"shards": 2}, move(f"{WEIGHT}.quant_state.bitsandbytes__nf4", builders.shard_name(1, 2))),
]


@pytest.mark.parametrize(("rule", "options", "change"), DEFECTS, ids=[f"{d[0]}-{i}" for i, d in enumerate(DEFECTS)])
def test_one_defect_one_rule(
    tmp_path: Path, rule: str, options: dict[str, Any], change: Callable[[Checkpoint], None]
) -> None:
    built = make_checkpoint(**options)
    if options.get("shards"):  # WEIGHT must not be where the test moves its companion to
        assert built.placement[WEIGHT] != builders.shard_name(1, 2)
    change(built)
    built.write(tmp_path)
    found = verify(tmp_path)
    assert errors(found) == {rule}
    assert all("\n" not in str(finding) and finding.rule in RULES for finding in found)


def misalign_data(path: Path) -> None:
    header, data = builders.read_container(path / SINGLE)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # the 8 bytes before the header make it 8 modulo 64
    (path / SINGLE).write_bytes(builders.container_bytes(text, data))


def reorder(first: str) -> Callable[[Path], None]:
    """Put one tensor before all others."""

    def change(path: Path) -> None:
        tensors = builders.read_tensors(path / SINGLE)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name in [first, *(name for name in tensors if name != first)]:
            span = [len(data), len(data) + len(tensors[name].data)]
            header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": span}
            data += tensors[name].data
        (path / SINGLE).write_bytes(builders.container_bytes(header, data))

    return change


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "qlf.json", change)


DISK_DEFECTS: list[tuple[set[str], Callable[[Path], Any], bool]] = [
    ({"P2"}, misalign_data, True),
    ({"P2"}, reorder(NORM), True),
    ({"P3", "P2"}, reorder(f"{WEIGHT}.quant_state.bitsandbytes__nf4"), True),
    ({"M1"}, edit_manifest(lambda root: root.update(extra=1)), False),
    ({"M1"}, edit_manifest(lambda root: root["weights"][0].update(extra=1)), False),
    ({"M1"}, edit_manifest(lambda root: root["files"][0].update(size="1")), False),
    ({"M2"}, edit_manifest(lambda root: root.update(format_version=2)), False),
    ({"M3"}, edit_manifest(lambda root: root.update(must_understand=["x"])), False),
    ({"M4", "M7"}, edit_manifest(lambda root: root["tensors"].pop()), False),
    ({"M4", "M7"}, edit_manifest(lambda root: root["tensors"][0].update(dtype="I8")), False),
    ({"M4"}, edit_manifest(lambda root: root["tensors"][0].update(shard="other.safetensors")), False),
    ({"M4"}, edit_manifest(lambda root: root["weights"].pop()), False),
    ({"M4"}, edit_manifest(lambda root: root["weights"][0].update(dtype="float16")), False),
    ({"M4"}, edit_manifest(lambda root: root["weights"][0].update(shape=[1])), False),
    ({"M4"}, edit_manifest(lambda root: root["weights"][0].update(encoding="fp4")), False),
    ({"M5", "M7"}, edit_manifest(lambda root: root["tensors"][0].update(sha256="0" * 64)), False),
    ({"M6"}, edit_manifest(lambda root: root["files"][0].update(sha256="0" * 64)), False),
    ({"M6"}, edit_manifest(lambda root: root["files"][0].update(size=1)), False),
    ({"M6"}, edit_manifest(lambda root: root.update(files=[])), False),
    ({"M7"}, edit_manifest(lambda root: root.update(fingerprint="0" * 64)), False),
    ({"M8"}, edit_manifest(lambda root: root["recipe"].update(blocksize=128)), False),
    ({"M9"}, edit_manifest(lambda root: root["files"][0].update(name="../x")), False),
    ({"R4"}, lambda path: (path / "tokenizer.json").unlink(), False),
    ({"R6"}, lambda path: (path / "extra.safetensors").touch(), False),
    ({"R1", "M4"}, lambda path: (path / SINGLE).unlink(), True),
    ({"S1", "M6"}, lambda path: (path / SINGLE).write_bytes(b"short"), False),
    ({"S5", "M6"}, lambda path: (path / SINGLE).write_bytes((path / SINGLE).read_bytes()[:-1]), False),
    ({"M6"}, lambda path: (path / "tokenizer.json").write_bytes(b"{}"), False),
]


@pytest.mark.parametrize(
    ("rules", "change", "sealed"),
    DISK_DEFECTS,
    ids=["-".join([*sorted(d[0]), str(i)]) for i, d in enumerate(DISK_DEFECTS)],
)
def test_defects_on_disk(tmp_path: Path, rules: set[str], change: Callable[[Path], None], sealed: bool) -> None:
    build_checkpoint(tmp_path, carried=CARRIED)
    change(tmp_path)
    if sealed and (tmp_path / SINGLE).exists():
        reseal(tmp_path)
    elif sealed:
        reseal(tmp_path, tensors=False)
    found = verify(tmp_path)
    assert errors(found) == rules
    assert all("\n" not in str(finding) for finding in found)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("dtype", "absmax", "beyond"),
    [
        ("float16", 65519.0, False),
        ("float16", 65520.0, True),
        ("bfloat16", float.fromhex("0x1.fefffep127"), False),
        ("bfloat16", float.fromhex("0x1.ffp127"), True),
    ],
)
def test_values_beyond_the_range_of_the_dtype(
    tmp_path: Path, dtype: str, absmax: float, beyond: bool, decode: bool
) -> None:
    """Found by decoding, and just as well by the scales alone."""
    built = make_checkpoint(recipe=Recipe("nf4", 64, False, "float32"), dtype=dtype)
    set_tensor(f"{WEIGHT}.absmax", set_float(absmax))(built)
    built.write(tmp_path)
    found = verify(tmp_path, decode=decode)
    assert [(finding.rule, finding.severity) for finding in found] == [("T4", "note")] * beyond


def test_links_out_of_the_repository(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "repo", carried=CARRIED)
    for name in ("tokenizer.json", SINGLE):
        (tmp_path / "repo" / name).rename(tmp_path / name)
        (tmp_path / "repo" / name).symlink_to(tmp_path / name)
    found = verify(tmp_path / "repo")
    assert {(f.rule, f.file) for f in found if f.severity == "error"} == {("R4", SINGLE), ("R4", "tokenizer.json")}


def test_unlisted_files_are_a_note(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    (tmp_path / "README.md").write_text("# model")
    (tmp_path / ".gitattributes").write_text("x")
    (finding,) = verify(tmp_path)
    assert (finding.rule, finding.severity) == ("M6", "note")
    assert "README.md" in finding.message
    assert "gitattributes" not in finding.message


def test_a_broken_shard_hides_no_other_defect(tmp_path: Path) -> None:
    """Findings of the other shard are there, and the broken one has its own only."""
    build_checkpoint(tmp_path, shards=2)
    first, second = builders.shard_name(0, 2), builders.shard_name(1, 2)
    (tmp_path / first).write_bytes(b"\0" * 100)
    builders.flip_bit(tmp_path / second, (tmp_path / second).stat().st_size - 400)
    found = verify(tmp_path)
    assert {finding.rule for finding in found if finding.file == first} == {"S2", "M6"}
    assert {"M5", "M6"} <= {finding.rule for finding in found if finding.file == second}
    assert not {"T1", "T2", "M4", "R5"} & errors(found)


@pytest.mark.parametrize("entry", ["(a+)+$", r"^(a+)+$", r"^a\w+$", "^a.*b$", "a|b"])
def test_expressions_in_skip_modules_are_not_run(tmp_path: Path, entry: str) -> None:
    built = make_checkpoint(quantized={"a" * 40 + "b.weight": (16, 16)})
    built.config["quantization_config"]["llm_int8_skip_modules"] = [entry]
    built.write(tmp_path)
    (finding,) = verify(tmp_path)  # exponential time if it were tried
    assert (finding.rule, finding.severity) == ("C4", "note")


def test_findings_do_not_depend_on_threads(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, shards=2)
    generator = random.Random(0)
    for path in tmp_path.iterdir():
        if path.name != "qlf.json":
            builders.flip_bit(path, path.stat().st_size - 2 - generator.randrange(40))
    alone = verify(tmp_path, threads=1)
    assert len(alone) > 4
    for threads in (2, 5):
        assert verify(tmp_path, threads=threads) == alone
    assert [f.severity for f in alone] == sorted((f.severity for f in alone), key=lambda s: s != "error")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    seen: list[Progress] = []
    verify(tmp_path, progress=seen.append)
    last = seen[-1]
    assert last.phase == "verifying"
    assert (last.tensors_done, last.bytes_done) == (last.tensors_total, last.bytes_total)


def test_what_is_hashed_already_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, shape = "big.weight", (2048, 2049)
    build_checkpoint(tmp_path, quantized={name: shape}, values={name: np.zeros(2048 * 2049, np.float32)})
    hashes = hash_shard(tmp_path / builders.SINGLE, threading.Event()).tensors
    known = {builders.SINGLE: hashes, "another.safetensors": {name: "2" * 64}}
    read: list[int] = []
    original = StoredCheckpoint.read_part

    def counted(self: StoredCheckpoint, name: str, offset: int, size: int) -> Any:
        read.append(size)
        return original(self, name, offset, size)

    monkeypatch.setattr(StoredCheckpoint, "read_part", counted)
    seen: list[Progress] = []
    assert verify(tmp_path, decode=False, on_structure=lambda _: known, progress=seen.append) == []
    assert 0 < sum(read) < 2048 * 2049 // 2 // 4
    assert seen[-1].bytes_done == seen[-1].bytes_total
    wrong = {builders.SINGLE: {**hashes, name: "0" * 64, "no such tensor": "1" * 64}}
    assert errors(verify(tmp_path, decode=False, on_structure=lambda _: wrong)) == {"M5", "M7"}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_giving_up_is_never_taken_for_a_result(tmp_path: Path, threads: int, begun: bool) -> None:
    build_checkpoint(tmp_path)
    stop = threading.Event()
    if not begun:
        stop.set()
    with pytest.raises(Stopped):
        verify(tmp_path, threads=threads, progress=lambda _: stop.set(), stop=stop)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "no" / "such" / "path"):
        with pytest.raises(QlfError):
            verify(path)


def zeros_checkpoint(path: Path, shape: tuple[int, int]) -> None:
    """One quantized weight of zeros and a plain one of 128 MB, without running an encoder."""
    built = make_checkpoint(quantized={"x.weight": (16, 16)}, plain={}, dtype="float16")
    state = replace(
        parse_quant_state(built.tensors["x.weight.quant_state.bitsandbytes__nf4"].data, "x.weight", "nf4"), shape=shape
    )
    for name, (dtype, stored) in state.tensor_specs("x.weight").items():
        fixed = built.tensors[name].data if name.endswith("quant_map") else None
        size = math.prod(stored) * DTYPE_BITS[dtype] // 8
        built.tensors[name] = Tensor(dtype, stored, fixed or bytes(size))
    text = state.to_json()
    built.tensors["x.weight.quant_state.bitsandbytes__nf4"] = Tensor("U8", (len(text),), text)
    plain = (8192, 8192)
    built.tensors["y.weight"] = Tensor("F16", plain, bytes(2 * math.prod(plain)))
    built.placement["y.weight"] = SINGLE
    entry = built.weights[0]
    built.weights = [replace(entry, shape=shape), WeightEntry("y.weight", "none", "float16", plain, "linear")]
    built.write(path)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A file of 128 MB is verified in less than that; natively in a fraction, whatever the sizes."""
    shape = (8192, 4096) if native.available() else (1024, 1024)
    zeros_checkpoint(tmp_path, shape)
    code = f"""if True:
        import resource, sys
        from pathlib import Path
        from qlformat.verifier import verify
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = verify(Path({str(tmp_path)!r}), threads=2)
        print(len(found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    findings, kilobytes = map(int, done.stdout.split())
    assert findings == 0
    assert kilobytes < (40 << 10 if native.available() else 120 << 10)


# Flipped bits.


def flip_and_verify(path: Path, position: int, bit: int) -> list[Finding]:
    builders.flip_bit(path, position, bit)
    try:
        return verify(path.parent, threads=1)
    finally:
        builders.flip_bit(path, position, bit)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, shards: int) -> None:
    source = Source("org/model", "0" * 40, (FileEntry(SINGLE, 1234, "ab" * 32),))
    built = make_checkpoint(quantized={WEIGHT: (16, 16)}, shards=shards, carried={"tokenizer.json": b'{"model": {}}\n'})
    built.source, built.skip = source, ("*.gate",)
    built.write(tmp_path)
    assert verify(tmp_path) == []
    generator = random.Random(shards)
    missed = []
    for path in sorted(tmp_path.iterdir()):
        size = path.stat().st_size
        positions = [generator.randrange(size) for _ in range(300)] if size > 300 else list(range(size))
        if path.suffix == ".safetensors":  # and the length and the header from end to end, padding included
            positions += range(8)
            positions += range(8, 8 + int.from_bytes(path.read_bytes()[:8], "little"), 3)
        for position in positions:
            bit = generator.randrange(8)
            if not errors(flip_and_verify(path, position, bit)):
                missed.append((path.name, position, bit))
    assert missed == []
    assert verify(tmp_path) == []


# With the source.


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and its source, whose hash the checkpoint records."""
    source = build_source(tmp_path / "source")
    built = make_checkpoint(quantized=builders.LLAMA_QUANTIZED, plain=builders.LLAMA_PLAIN)
    built.source = Source(files=tuple(e for e in builders.file_entries(source) if e.name == SINGLE))
    built.write(tmp_path / "repo")
    return tmp_path / "repo", source


def test_the_source_gives_the_same_bytes(pair: tuple[Path, Path]) -> None:
    assert verify(*pair) == []


@pytest.mark.parametrize("recipe", [Recipe("fp4", 32), Recipe("nf4", 128, False)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_recipes_and_dtypes_with_a_source(tmp_path: Path, recipe: Recipe, dtype: str) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (37, 911)}
    source = build_source(tmp_path / "source", weights={**shapes, NORM: (16,)}, dtype=dtype)
    build_checkpoint(tmp_path / "repo", quantized=shapes, plain={NORM: (16,)}, recipe=recipe, dtype=dtype)
    assert verify(tmp_path / "repo", source) == []


def test_conv1d_is_transposed_before_it_is_compared(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    built = make_checkpoint(quantized={name: (48, 16)}, plain={})
    built.weights = [replace(entry, transposed=True) for entry in built.weights]
    built.write(tmp_path / "repo")
    values = builders.example_values(name, (48, 16)).reshape(48, 16)
    turned = {name: np.ascontiguousarray(values.T).reshape(-1)}
    right = build_source(tmp_path / "right", weights={name: (16, 48)}, values=turned)
    wrong = build_source(tmp_path / "wrong", weights={name: (16, 48)}, values={name: values.reshape(-1)})
    assert errors(verify(tmp_path / "repo", right)) == set()
    assert errors(verify(tmp_path / "repo", wrong)) == {"E5"}


def change_tensor(repo: Path, name: str, edit: Callable[[bytearray], None]) -> None:
    """Change a tensor and make every hash agree again: only the source can tell."""
    tensors = builders.read_tensors(repo / SINGLE)
    data = bytearray(tensors[name].data)
    edit(data)
    tensors[name] = replace(tensors[name], data=bytes(data))
    (repo / SINGLE).write_bytes(builders.shard_bytes(tensors))
    reseal(repo)


@pytest.mark.parametrize("suffix", ["", ".absmax", ".nested_absmax"])
def test_one_changed_bit_differs_from_the_source(pair: tuple[Path, Path], suffix: str) -> None:
    change_tensor(pair[0], WEIGHT + suffix, lambda data: data.__setitem__(1, data[1] ^ 1))
    assert verify(pair[0]) == []
    found = verify(*pair)
    assert errors(found) == {"E5"}
    assert {finding.tensor for finding in found} >= {WEIGHT + suffix}


def test_a_changed_unquantized_tensor_differs_from_the_source(pair: tuple[Path, Path]) -> None:
    change_tensor(pair[0], NORM, lambda data: data.__setitem__(0, data[0] ^ 1))
    (finding,) = verify(*pair)
    assert (finding.rule, finding.tensor) == ("E5", NORM)


@pytest.mark.parametrize("figure", ["rms_error", "relative_error"])
def test_a_wrong_error_figure_is_found_with_the_source(pair: tuple[Path, Path], figure: str) -> None:
    def change(root: dict[str, Any]) -> None:
        entry = next(weight for weight in root["weights"] if weight["encoding"] != "none")
        entry[figure] *= 1.001

    edit_json(pair[0] / "qlf.json", change)
    assert verify(pair[0]) == []
    (finding,) = verify(*pair)
    assert finding.rule == "E5"
    assert figure in finding.message


def test_another_source(pair: tuple[Path, Path], tmp_path: Path) -> None:
    values = {WEIGHT: builders.example_values("other", (16, 16))}
    other = build_source(tmp_path / "other", values=values)
    found = verify(pair[0], other)
    assert errors(found) == {"E5", "E6"}
    assert {finding.tensor for finding in found if finding.rule == "E5"} == {
        WEIGHT,
        f"{WEIGHT}.absmax",
        f"{WEIGHT}.nested_absmax",
        f"{WEIGHT}.quant_state.bitsandbytes__nf4",
    }


def test_a_source_of_other_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shapes = {**builders.LLAMA_QUANTIZED, **builders.LLAMA_PLAIN, "extra.weight": (4, 4), NORM: (8,)}
    del shapes[WEIGHT]
    other = build_source(tmp_path / "other", weights=shapes)
    found = {f.tensor: f.message for f in verify(pair[0], other) if f.rule == "E5"}
    assert "the source has no such tensor" in found[WEIGHT]
    assert "the checkpoint lacks it" in found["extra.weight"]
    assert "shape" in found[NORM]


def test_nan_in_the_source_has_its_own_rule(pair: tuple[Path, Path], tmp_path: Path) -> None:
    values = builders.example_values(WEIGHT, (16, 16))
    values[70] = np.nan
    other = build_source(tmp_path / "other", values={WEIGHT: values})
    found = verify(pair[0], other)
    assert {finding.rule for finding in found if finding.tensor == WEIGHT} == {"E1"}


# Plain repositories.


def test_a_plain_repository_has_notes_only(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, manifest=False)
    (finding,) = verify(tmp_path)
    assert (finding.rule, finding.severity) == ("M1", "note")
    assert "could not be checked" in finding.message


def test_what_older_writers_did_is_a_note(tmp_path: Path) -> None:
    built = make_checkpoint(manifest=False)
    set_config(llm_int8_skip_modules=None, _load_in_4bit=True)(built)
    set_tensor(f"{WEIGHT}.nested_quant_map", set_float(-1))(built)
    built.write(tmp_path)
    misalign_data(tmp_path)
    found = verify(tmp_path)
    assert errors(found) == set()
    assert {finding.rule for finding in found} == {"M1", "C3", "D2"}


@pytest.mark.parametrize(("rule", "options", "change"), DEFECTS, ids=[f"{d[0]}-{i}" for i, d in enumerate(DEFECTS)])
def test_defects_of_plain_repositories(
    tmp_path: Path, rule: str, options: dict[str, Any], change: Callable[[Checkpoint], None]
) -> None:
    """The rules of the tensors hold there too; those of qlf.json and placement do not."""
    built = make_checkpoint(manifest=False, **options)
    change(built)
    built.write(tmp_path)
    lenient = rule in ("C3", "T8") or rule[0] in "MP"
    only_older = rule == "D2"  # -1.0 in entry 0
    assert errors(verify(tmp_path)) == (set() if lenient or only_older else {rule})


def test_codes_of_an_encoder_that_rounds_to_the_midpoints_are_a_note(tmp_path: Path) -> None:
    """As bitsandbytes' CUDA encoder does; what is farther off than its rounding is an error."""
    shapes = {"model.layers.0.mlp.up_proj.weight": (256, 2048)}
    (name,) = shapes
    source = build_source(tmp_path / "source", weights=shapes)
    built = make_checkpoint(manifest=False, quantized=shapes, plain={})
    values = np.frombuffer((source / "model.safetensors").read_bytes()[-256 * 2048 * 2 :], dtype=np.uint16)
    absmax = reference.quantize(reference.to_float32(values, "bfloat16"), "nf4", 64)[1]
    ours, nested, offset = reference.double_quantize(absmax)
    assert built.tensors[f"{name}.absmax"].data == ours.tobytes()
    scaled = (absmax - offset) / np.repeat(nested, 256)
    nearest = np.abs(scaled[:, None] - DYNAMIC8).argmin(axis=1).astype(np.uint8)
    differing = int((nearest != ours).sum())
    assert differing > 3
    set_tensor(f"{name}.absmax", lambda data: data.__setitem__(slice(None), nearest.tobytes()))(built)
    built.write(tmp_path / "near")
    found = verify(tmp_path / "near", source)
    assert errors(found) == set()
    assert any(f.rule == "E5" and f"{differing} of 8192 codes differ from ours" in f.message for f in found)
    set_tensor(f"{name}.absmax", lambda data: data.__setitem__(9, data[9] ^ 1))(built)
    built.write(tmp_path / "far")
    assert errors(verify(tmp_path / "far", source)) == {"E5"}
    set_tensor(f"{name}.nested_absmax", set_float(1))(built)
    built.write(tmp_path / "scale")
    assert errors(verify(tmp_path / "scale", source)) == {"E5"}


def test_packed_codes_of_a_plain_repository_must_equal_the_source(tmp_path: Path) -> None:
    shapes = {WEIGHT: (16, 16)}
    source = build_source(tmp_path / "source", weights=shapes)
    built = make_checkpoint(manifest=False, quantized=shapes, plain={})
    set_tensor(WEIGHT, lambda data: data.__setitem__(3, data[3] ^ 0x10))(built)
    built.write(tmp_path / "repo")
    (finding,) = [f for f in verify(tmp_path / "repo", source) if f.severity == "error"]
    assert finding.rule == "E5"
    assert "1 of 128 packed bytes" in finding.message
    assert "element 6" in finding.message
