"""qlf.json, the manifest of a checkpoint, and the fingerprint (spec/format.md, "Manifest", rules M1 to M9)."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field
from typing import Any

from qlformat.errors import FormatError, QlfError, shown
from qlformat.layout import NESTED_BLOCKSIZE, Recipe, strict_json

FILE_NAME = "qlf.json"
FORMAT_VERSION = 1
UNDERSTOOD: frozenset[str] = frozenset()
"""must_understand keys that this version implements. None yet; "stacked_experts" is reserved."""

_HEX64 = re.compile(r"[0-9a-f]{64}")
_SELF = re.compile(rb'("self_sha256"\s*:\s*")([0-9a-f]{64})(")')
_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: safetensors dtype, shape, shard and sha256 of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    sha256: str


@dataclass(frozen=True)
class WeightEntry:
    """One weight of the model as the source had it.

    Attributes:
        encoding: quant_type, or "none" for a weight stored as it was.
        dtype: source dtype, a torch name.
        shape: logical shape, [out, in] for a linear layer.
        transposed: the source stored [in, out] (Conv1D of GPT-2).
        reason: why it was or was not quantized, a key of selection.py.
        rms_error: root mean square of (decoded - source) before the cast to dtype; None when not quantized.
        relative_error: rms_error divided by the root mean square of the source; None when not quantized.
    """

    name: str
    encoding: str
    dtype: str
    shape: tuple[int, ...]
    reason: str
    transposed: bool = False
    rms_error: float | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class FileEntry:
    """A file by its path relative to the repository ("/" separated), size in bytes and one hash (rule M6).

    Attributes:
        sha256: of the whole file, or None for a shard whose tensors' hashes cover the rest.
        header_sha256: of a shard's bytes before its data (`ShardReader.header_bytes`), or None.
    """

    name: str
    size: int
    sha256: str | None
    header_sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """Where the weights came from: a Hub repository at a commit, or local files, which are named by hash only."""

    repo_id: str | None = None
    revision: str | None = None
    files: tuple[FileEntry, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Content of qlf.json for a base checkpoint; `calibration` is how codes were chosen, None for plain rounding."""

    writer: str
    source: Source
    recipe: Recipe
    skip: tuple[str, ...]
    tensors: tuple[TensorEntry, ...]
    weights: tuple[WeightEntry, ...]
    files: tuple[FileEntry, ...]
    fingerprint: str
    format_version: int = FORMAT_VERSION
    must_understand: tuple[str, ...] = field(default=())
    calibration: dict[str, Any] | None = None

    def to_json(self) -> bytes:
        """The bytes of qlf.json: deterministic, no timestamps, one entry a line."""
        recipe = asdict(self.recipe)
        recipe["nested_blocksize"] = NESTED_BLOCKSIZE if self.recipe.double_quant else None
        recipe["skip"] = list(self.skip)
        if self.calibration is not None:
            recipe["calibration"] = self.calibration
        head = {
            "format_version": self.format_version,
            "kind": "base",
            "must_understand": list(self.must_understand),
            "writer": self.writer,
            "fingerprint": self.fingerprint,
            "recipe": recipe,
            "source": {**asdict(self.source), "files": [_without_none(vars(entry)) for entry in self.source.files]},
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for key, entries in (("weights", self.weights), ("tensors", self.tensors), ("files", self.files)):
            rows = ",\n".join(f"    {json.dumps(_without_none(vars(entry)))}" for entry in entries)
            lines.append(f'  "{key}": [\n{rows}\n  ]' if rows else f'  "{key}": []')
        lines.append(f'  "self_sha256": "{_NO_DIGEST}"')
        return seal(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _without_none(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}


def fingerprint(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """Identity of a checkpoint's content, the same for every sharding.

    Args:
        tensors: (name, safetensors dtype, shape, sha256 of the bytes) of every stored tensor, in any order.

    Returns:
        Lower-case hexadecimal sha256 over the JSON (no spaces, ASCII) of the list sorted by name.
    """
    rows = [[name, dtype, list(shape), digest] for name, dtype, shape, digest in sorted(tensors)]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode("ascii")).hexdigest()


def self_sha256(data: bytes) -> str:
    """sha256 of a manifest with the 64 digits of its self_sha256 replaced by zeros: a hash of all its other bytes."""
    return hashlib.sha256(_SELF.sub(rb"\g<1>" + _NO_DIGEST.encode() + rb"\g<3>", data)).hexdigest()


def seal(data: bytes) -> bytes:
    """The manifest with its self_sha256 set to the right value."""
    digest = self_sha256(data).encode()
    return _SELF.sub(rb"\g<1>" + digest + rb"\g<3>", data)


def parse(data: bytes) -> Manifest:
    """Read qlf.json.

    Raises:
        FormatError: M1 (structure), M2 (version), M3 (must_understand) or M9 (a file name that leaves the repository).
    """
    try:
        root = strict_json(data)
    except ValueError as error:
        raise _bad("M1", f"not valid JSON: {error}") from None
    if not isinstance(root, dict):
        raise _bad("M1", f"found a JSON {type(root).__name__}, needed an object")
    version = root.get("format_version")
    if type(version) is not int:
        raise _bad("M1", f"format_version is {shown(version)}, needed an integer")
    if version != FORMAT_VERSION:
        raise _bad("M2", f"found format_version {version}, this reader knows {FORMAT_VERSION}; upgrade qlformat")
    keys = _strings(root, "must_understand")
    unknown = sorted(set(keys) - UNDERSTOOD)
    if unknown:
        raise _bad("M3", f"the checkpoint needs a reader that understands {shown(unknown)}; upgrade qlformat")
    if root.get("kind") != "base":
        raise _bad("M1", f"found kind {shown(root.get('kind'))}, needed 'base'")
    recipe, skip = _recipe(_object(root, "recipe"))
    calibration = _object(root["recipe"], "calibration") if "calibration" in root["recipe"] else None
    tensors = tuple(_tensor(entry) for entry in _objects(root, "tensors"))
    manifest = Manifest(
        writer=_text(root, "writer"),
        source=_source(_object(root, "source")),
        recipe=recipe,
        skip=skip,
        tensors=tensors,
        weights=tuple(_weight(entry) for entry in _objects(root, "weights")),
        files=_files(root, {entry.shard for entry in tensors}),
        fingerprint=_digest(root, "fingerprint"),
        must_understand=keys,
        calibration=calibration,
    )
    _digest(root, "self_sha256")  # whether it is right is for a verifier to say (rule M6)
    _check_unique([entry.name for entry in manifest.tensors], "tensors")
    _check_unique([entry.name for entry in manifest.weights], "weights")
    _check_unique([entry.name for entry in manifest.files], "files")
    return manifest


def _bad(rule: str, message: str) -> FormatError:
    return FormatError(message, rule=rule, file=FILE_NAME)


def _object(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise _bad("M1", f"{key} is {shown(value)}, needed an object")
    return value


def _objects(parent: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = parent.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _bad("M1", f"{key} is not a list of objects")
    return value


def _text(parent: Mapping[str, Any], key: str) -> str:
    value = parent.get(key)
    if not isinstance(value, str) or not value:
        raise _bad("M1", f"{key} is {shown(value)}, needed a string")
    return value


def _optional_text(parent: Mapping[str, Any], key: str) -> str | None:
    return None if parent.get(key) is None else _text(parent, key)


def _digest(parent: Mapping[str, Any], key: str) -> str:
    value = _text(parent, key)
    if not _HEX64.fullmatch(value):
        raise _bad("M1", f"{key} is {shown(value)}, needed 64 hexadecimal digits")
    return value


def _strings(parent: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = parent.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _bad("M1", f"{key} is {shown(value)}, needed a list of strings")
    return tuple(value)


def _shape(parent: Mapping[str, Any]) -> tuple[int, ...]:
    value = parent.get("shape")
    if not isinstance(value, list) or any(type(dim) is not int or dim < 0 for dim in value):
        raise _bad("M1", f"shape is {shown(value)}, needed a list of integers")
    return tuple(value)


def _number(parent: Mapping[str, Any], key: str) -> float | None:
    value = parent.get(key)
    if value is not None and (type(value) not in (int, float) or not 0 <= value < 1e300):
        raise _bad("M1", f"{key} is {shown(value)}, needed a number that is not negative")
    return None if value is None else float(value)


def _boolean(parent: Mapping[str, Any], key: str) -> bool:
    value = parent.get(key)
    if not isinstance(value, bool):
        raise _bad("M1", f"{key} is {shown(value)}, needed true or false")
    return value


def _recipe(entry: Mapping[str, Any]) -> tuple[Recipe, tuple[str, ...]]:
    blocksize = entry.get("blocksize")
    if type(blocksize) is not int:
        raise _bad("M1", f"recipe.blocksize is {shown(blocksize)}, needed an integer")
    try:
        recipe = Recipe(
            _text(entry, "quant_type"), blocksize, _boolean(entry, "double_quant"), _text(entry, "compute_dtype")
        )
    except FormatError:
        raise
    except QlfError as error:  # Recipe explains itself; here it becomes a rule of the manifest
        raise _bad("M1", f"recipe: {error}") from None
    expected = NESTED_BLOCKSIZE if recipe.double_quant else None
    if entry.get("nested_blocksize") != expected:
        raise _bad("M1", f"recipe.nested_blocksize is {shown(entry.get('nested_blocksize'))}, needed {expected}")
    return recipe, _strings(entry, "skip")


def _source(entry: Mapping[str, Any]) -> Source:
    return Source(_optional_text(entry, "repo_id"), _optional_text(entry, "revision"), _files(entry, frozenset()))


def _files(parent: Mapping[str, Any], shards: Set[str]) -> tuple[FileEntry, ...]:
    return tuple(_file(entry, shards) for entry in _objects(parent, "files"))


def _file(entry: Mapping[str, Any], shards: Set[str]) -> FileEntry:
    name, size = _text(entry, "name"), entry.get("size")
    if not is_plain_path(name):
        raise _bad("M9", f"the file name {shown(name)} leaves the repository; only plain relative paths are allowed")
    if type(size) is not int or size < 0:
        raise _bad("M1", f"size of {shown(name)} is {shown(size)}, needed an integer that is not negative")
    if "header_sha256" not in entry:
        return FileEntry(name, size, _digest(entry, "sha256"))
    if "sha256" in entry or name not in shards:
        raise _bad("M1", f"{shown(name)} has a header_sha256, which is for shards, in the place of sha256")
    return FileEntry(name, size, None, _digest(entry, "header_sha256"))


def _tensor(entry: Mapping[str, Any]) -> TensorEntry:
    shard = _text(entry, "shard")
    if not is_plain_path(shard) or "/" in shard:
        raise _bad("M9", f"the shard name {shown(shard)} leaves the repository; only plain file names are allowed")
    return TensorEntry(_text(entry, "name"), _text(entry, "dtype"), _shape(entry), shard, _digest(entry, "sha256"))


def _weight(entry: Mapping[str, Any]) -> WeightEntry:
    return WeightEntry(
        name=_text(entry, "name"),
        encoding=_text(entry, "encoding"),
        dtype=_text(entry, "dtype"),
        shape=_shape(entry),
        reason=_text(entry, "reason"),
        transposed=_boolean(entry, "transposed"),
        rms_error=_number(entry, "rms_error"),
        relative_error=_number(entry, "relative_error"),
    )


def is_plain_path(name: str) -> bool:
    """Whether a "/" separated path stays inside its directory on every system: relative, no "..", no backslash."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not set(name) & set("\\:\0") and name.isprintable()


def _check_unique(names: list[str], what: str) -> None:
    if len(set(names)) != len(names):
        repeated = [name for name, count in Counter(names).items() if count > 1][:3]
        raise _bad("M1", f"{what} lists {shown(repeated)} more than once")
