"""Invalid manifests (M), pairs of checkpoint and source (E5, E6), invalid sources (E1 to E4), and future versions."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from case import EMBEDDING, NORM, SINGLE, WEIGHT, Case, json_file, on_disk, raw_file, small

from qlformat.manifest import FileEntry, Source
from tests import builders

MANIFEST = "qlf.json"


def _manifest(name: str, change: Callable[[dict[str, Any]], object], **where: Any) -> Case:
    if "tensor" not in where:
        where.setdefault("file", MANIFEST)
    edit = json_file(MANIFEST, lambda root: _void(change(root)))
    return Case(name, on_disk(edit, reseal="nothing"), **where)


def _void(_: object) -> None:
    """Lets an expression with a value stand where none is wanted."""


def _entry(root: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in root[key] if entry["name"] == name)
    return found


def _without(key: str, name: str) -> Callable[[dict[str, Any]], None]:
    def change(root: dict[str, Any]) -> None:
        root[key] = [entry for entry in root[key] if entry["name"] != name]

    return change


def _repeated(root: dict[str, Any]) -> None:
    root["tensors"].append(root["tensors"][0])


def _invented(root: dict[str, Any]) -> None:
    root["tensors"].append({**root["tensors"][0], "name": "model.extra.weight"})


def _flip_data(repo: Path) -> None:
    builders.flip_bit(repo / SINGLE, (repo / SINGLE).stat().st_size - 400)


def _outside(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda root: root["files"].append({"name": name, "size": 0, "sha256": hashlib.sha256(b"").hexdigest()})


def _flipped_digest(entry: dict[str, Any], key: str = "sha256") -> None:
    entry[key] = hashlib.sha256(entry[key].encode()).hexdigest()


def _header_hashed(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A builder of a checkpoint whose shard is listed with header_sha256, and altered after that."""

    def build(path: Path) -> None:
        checkpoint = small()
        checkpoint.header_hashed = (SINGLE,)
        checkpoint.write(path / "repo")
        change(path / "repo")

    return build


def _reword_header(repo: Path) -> None:
    data = (repo / SINGLE).read_bytes()
    (repo / SINGLE).write_bytes(data.replace(b'"format":"pt"', b'"format":"np"', 1))


def _other_header_digest(repo: Path) -> None:
    json_file(MANIFEST, lambda root: _flipped_digest(_entry(root, "files", SINGLE), "header_sha256"))(repo)


def _header_hash_of_config(root: dict[str, Any]) -> None:
    entry = _entry(root, "files", "config.json")
    entry["header_sha256"] = entry.pop("sha256")


MANIFESTS = [
    Case("M1-not-json", on_disk(raw_file(lambda d: d[:-3], MANIFEST), reseal="nothing"), file=MANIFEST),
    Case(
        "M1-repeated-key",
        on_disk(raw_file(lambda d: d.replace(b"{", b'{"kind": "base",', 1), MANIFEST), reseal="nothing"),
        file=MANIFEST,
    ),
    _manifest("M1-no-fingerprint", lambda root: root.pop("fingerprint")),
    _manifest("M1-size-is-a-string", lambda root: _entry(root, "files", SINGLE).update(size="1")),
    _manifest("M1-uppercase-digest", lambda root: root.update(fingerprint=root["fingerprint"].upper())),
    _manifest("M1-tensor-twice", _repeated),
    _manifest("M1-unknown-kind", lambda root: root.update(kind="adapter")),
    _manifest("M1-blocksize-48", lambda root: root["recipe"].update(blocksize=48)),
    _manifest("M1-error-is-negative", lambda root: _entry(root, "weights", WEIGHT).update(rms_error=-1.0)),
    _manifest("M1-unknown-key", lambda root: root.update(fingerprimt=root["fingerprint"])),
    _manifest("M4-weight-not-listed", _without("weights", NORM), tensor=NORM),
    _manifest(
        "M4-weight-with-other-dtype", lambda r: _entry(r, "weights", WEIGHT).update(dtype="float16"), tensor=WEIGHT
    ),
    _manifest("M4-tensor-not-listed", _without("tensors", NORM), tensor=NORM, also=("M7",)),
    _manifest("M4-tensor-not-stored", _invented, tensor="model.extra.weight", also=("M7",)),
    _manifest(
        "M4-other-dtype", lambda root: _entry(root, "tensors", NORM).update(dtype="F16"), tensor=NORM, also=("M7",)
    ),
    _manifest(
        "M4-other-shape",
        lambda r: _entry(r, "tensors", EMBEDDING).update(shape=[16, 8]),
        tensor=EMBEDDING,
        also=("M7",),
    ),
    _manifest(
        "M4-other-shard", lambda root: _entry(root, "tensors", NORM).update(shard="model-2.safetensors"), tensor=NORM
    ),
    _manifest(
        "M5-other-digest", lambda root: _flipped_digest(_entry(root, "tensors", NORM)), tensor=NORM, also=("M7",)
    ),
    Case("M5-flipped-bit", on_disk(_flip_data, reseal="nothing"), file=SINGLE, also=("M6", "M7")),
    Case(
        "M6-changed-file", on_disk(raw_file(lambda d: d + b"\n", "config.json"), reseal="nothing"), file="config.json"
    ),
    _manifest("M6-other-size", lambda root: _entry(root, "files", SINGLE).update(size=1), file=SINGLE),
    _manifest("M6-other-digest", lambda root: _flipped_digest(_entry(root, "files", SINGLE)), file=SINGLE),
    Case("M6-changed-header", _header_hashed(_reword_header), file=SINGLE),
    Case("M6-other-header-digest", _header_hashed(_other_header_digest), file=SINGLE),
    _manifest("M1-header-hash-of-another-file", _header_hash_of_config),
    _manifest("M1-two-hashes", lambda root: _entry(root, "files", SINGLE).update(header_sha256="0" * 64)),
    _manifest("M6-shard-not-listed", _without("files", SINGLE), file=SINGLE),
    Case(
        "M6-changed-manifest",
        on_disk(raw_file(lambda d: d.replace(b"qlformat-tests", b"qlformat-testz"), MANIFEST), reseal="nothing"),
        file=MANIFEST,
    ),
    _manifest("M1-no-hash-of-itself", lambda root: root.pop("self_sha256")),
    _manifest("M7-other-fingerprint", lambda root: _flipped_digest(root, "fingerprint")),
    _manifest("M8-other-blocksize", lambda root: root["recipe"].update(blocksize=128), tensor=WEIGHT),
    _manifest("M8-other-quant-type", lambda root: root["recipe"].update(quant_type="fp4"), tensor=WEIGHT),
    _manifest(
        "M8-no-double-quant",
        lambda root: root["recipe"].update(double_quant=False, nested_blocksize=None),
        tensor=WEIGHT,
    ),
    _manifest("M8-other-compute-dtype", lambda root: root["recipe"].update(compute_dtype="float32")),
    _manifest("M9-parent-directory", _outside("../secret.txt")),
    _manifest("M9-absolute-path", _outside("/etc/hostname")),
    _manifest("M9-backslash", _outside("..\\secret.txt")),
    _manifest(
        "M9-shard-in-a-directory", lambda root: _entry(root, "tensors", NORM).update(shard="weights/a.safetensors")
    ),
]


def _version_2(root: dict[str, Any]) -> None:
    """A plausible next version: tensors became an object, so that a reader of version 1 must stop at the number."""
    root["format_version"] = 2
    root["tensors"] = {entry.pop("name"): entry for entry in root["tensors"]}
    root["kind"] = "expert-stack"


FUTURE = [
    _manifest("M2-format-version-2", _version_2),
    _manifest("M2-format-version-0", lambda root: root.update(format_version=0)),
    _manifest("M3-stacked-experts", lambda root: root.update(must_understand=["stacked_experts"])),
    _manifest("M3-unknown-key", lambda root: root.update(must_understand=["telepathy"], telepathy={"range": 1})),
]


def paired(
    change_repo: Callable[[Path], None] | None = None, change_source: Callable[[Path], None] | None = None
) -> Any:
    """A builder of a checkpoint and the source it was made from."""

    def build(path: Path) -> None:
        shapes = {WEIGHT: (16, 16), EMBEDDING: (8, 16), NORM: (16,)}
        builders.build_source(path / "source", weights=shapes)
        data = (path / "source" / SINGLE).read_bytes()
        checkpoint = small()
        digest = hashlib.sha256(data).hexdigest()
        checkpoint.source = Source(files=(FileEntry(SINGLE, len(data), digest),))
        checkpoint.write(path / "repo")
        if change_repo:
            change_repo(path / "repo")
            builders.reseal(path / "repo")
        if change_source:
            change_source(path / "source")

    return build


def _next_code(repo: Path) -> None:
    entries, _ = builders.read_container(repo / SINGLE)
    start = 8 + struct.unpack("<Q", (repo / SINGLE).read_bytes()[:8])[0]
    builders.flip_bit(repo / SINGLE, start + entries[WEIGHT]["data_offsets"][0] + 5, 0)


def _other_metadata(source: Path) -> None:
    builders.edit_header(source / SINGLE, lambda entries: entries.update(__metadata__={"format": "pt", "note": "new"}))


PAIRS = [
    Case("E5-one-code-differs", paired(change_repo=_next_code), tensor=WEIGHT),
    Case("E6-source-was-written-again", paired(change_source=_other_metadata), file=SINGLE),
]


def _source(name: str, change: Callable[[Path], object], **where: Any) -> Case:
    def build(path: Path) -> None:
        builders.build_source(path / "source")
        change(path / "source")

    return Case(name, build, **where)


def _patched_weight(name: str, pattern: bytes) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        tensors = builders.read_tensors(source / SINGLE)
        old = tensors[name]
        data = old.data[:34] + pattern + old.data[34 + len(pattern) :]
        tensors[name] = builders.Tensor(old.dtype, old.shape, data)
        (source / SINGLE).write_bytes(builders.shard_bytes(tensors))

    return change


def _with_dtype(name: str, dtype: str, item: int) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        tensors = builders.read_tensors(source / SINGLE)
        old = tensors[name]
        tensors[name] = builders.Tensor(dtype, old.shape, bytes(item * len(old.data) // 2))
        (source / SINGLE).write_bytes(builders.shard_bytes(tensors))

    return change


def _declared(**fields: Any) -> Callable[[Path], None]:
    return lambda source: builders.edit_json(
        source / "config.json", lambda config: config.update(quantization_config=fields)
    )


def _gptq_tensors(source: Path) -> None:
    tensors = builders.read_tensors(source / SINGLE)
    tensors[WEIGHT.removesuffix("weight") + "qweight"] = builders.Tensor("I32", (2, 16), bytes(128))
    del tensors[WEIGHT]
    (source / SINGLE).write_bytes(builders.shard_bytes(tensors))


def _quantized_tensors(source: Path) -> None:
    checkpoint = builders.make_checkpoint(quantized=builders.LLAMA_QUANTIZED, plain=builders.LLAMA_PLAIN)
    (source / SINGLE).write_bytes(builders.shard_bytes(checkpoint.tensors))


def _gguf(source: Path) -> None:
    (source / SINGLE).unlink()
    (source / "config.json").unlink()
    (source / "model-f16.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))


def _pickle_with_code(source: Path) -> None:
    """A pickle that calls a function. The function is harmless: a reader that runs it prints one word."""
    (source / SINGLE).unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02cbuiltins\nprint\nX\x08\x00\x00\x00EXECUTED\x85R.")


def _not_torch(source: Path) -> None:
    (source / SINGLE).unlink()
    (source / "pytorch_model.bin").write_bytes(json.dumps({"weights": []}).encode())


SOURCES = [
    _source("E1-nan", _patched_weight(WEIGHT, b"\xc0\x7f"), tensor=WEIGHT),
    _source("E1-infinity", _patched_weight(WEIGHT, b"\x80\xff"), tensor=WEIGHT),
    _source("E2-bitsandbytes", _declared(quant_method="bitsandbytes", load_in_4bit=True), file="config.json"),
    _source("E2-gptq", _declared(quant_method="gptq", bits=4), file="config.json"),
    _source("E2-awq", _declared(quant_method="awq", bits=4), file="config.json"),
    _source("E2-gptq-tensors", _gptq_tensors, tensor=WEIGHT.removesuffix("weight") + "qweight"),
    _source("E2-bitsandbytes-tensors", _quantized_tensors),
    _source("E3-int8", _with_dtype(WEIGHT, "I8", 1), tensor=WEIGHT),
    _source("E3-float8", _with_dtype(WEIGHT, "F8_E4M3", 1), tensor=WEIGHT),
    _source("E3-float64", _with_dtype(WEIGHT, "F64", 8), tensor=WEIGHT),
    _source("E4-gguf", _gguf, file="model-f16.gguf"),
    _source("E4-pickle-with-code", _pickle_with_code, file="pytorch_model.bin"),
    _source("E4-no-torch-file", _not_torch, file="pytorch_model.bin"),
]
