"""The files of a model repository: which hold the weights, and which may be opened (rules R1 to R4 and R6)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlformat.errors import FormatError
from qlformat.layout import strict_json
from qlformat.manifest import is_plain_path

MAX_JSON_BYTES = 256 << 20
"""Limit for the JSON files of a repository; a manifest of 100,000 tensors has about 25 MB."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights of a repository.

    Attributes:
        index: tensor name -> file name, or None for a single file.
        names: file names, sorted.
    """

    index: Mapping[str, str] | None
    names: list[str]


def index_name(stem: str = "model", suffix: str = ".safetensors") -> str:
    """Name of the index file of a sharded checkpoint."""
    return f"{stem}{suffix}.index.json"


def weight_files(directory: Path, *, stem: str = "model", suffix: str = ".safetensors") -> WeightFiles:
    """Find the weight files of a repository without opening them.

    Args:
        directory: the repository.
        stem: "model", or "pytorch_model" for .bin files.
        suffix: ".safetensors" or ".bin".

    Raises:
        FormatError: R1 (neither or both of the single file and the index), R2 (the index), R3 (a name in it) or
            R4 (the index is no regular file of the repository).
    """
    single, index = stem + suffix, index_name(stem, suffix)
    has_single, has_index = os.path.lexists(directory / single), os.path.lexists(directory / index)
    if has_single == has_index:
        found = "both" if has_single else "neither"
        raise FormatError(f"found {found} of {single} and {index}, needed exactly one of them", rule="R1")
    if has_single:
        return WeightFiles(None, [single])
    weight_map = parse_index(read_file(directory, index), index, suffix)
    return WeightFiles(weight_map, sorted(set(weight_map.values())))


def parse_index(data: bytes, file: str, suffix: str = ".safetensors") -> dict[str, str]:
    """Tensor name -> file name from the bytes of an index.

    Raises:
        FormatError: R2 (not JSON, or no weight_map of strings) or R3 (a name that is not a plain file name).
    """
    try:
        root = strict_json(data)
    except ValueError as error:
        raise FormatError(f"not valid JSON: {error}", rule="R2", file=file) from None
    weight_map = root.get("weight_map") if isinstance(root, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError("found no weight_map of strings to strings in the index", rule="R2", file=file)
    if not weight_map:
        raise FormatError("the weight_map names no tensor", rule="R2", file=file)
    for name in sorted(set(weight_map.values())):
        if not is_plain_path(name) or "/" in name or not name.endswith(suffix) or name == suffix:
            raise FormatError(
                f"names the shard {name[:200]!r}, needed a plain file name that ends in {suffix}", rule="R3", file=file
            )
    return weight_map


def resolve_file(directory: Path, name: str) -> Path:
    """Path of a regular file of the repository, links resolved.

    A link may lead to a file inside the repository, or into the blobs of the Hub cache that holds the repository
    (models--ORG--NAME/snapshots/REVISION links to models--ORG--NAME/blobs).

    Args:
        directory: the repository; it may itself be reached through links.
        name: "/" separated path inside it.

    Raises:
        FormatError: R4.
    """
    if not is_plain_path(name):
        raise FormatError(f"the name {name[:200]!r} is not a plain relative path", rule="R4")
    root = os.path.realpath(directory)
    try:
        real = os.path.realpath(directory / name, strict=True)
        mode = os.stat(real).st_mode
    except OSError as error:
        raise _unreadable(name, error) from None
    if not any(os.path.commonpath((real, base)) == base for base in (root, _hub_blobs(root)) if base):
        raise FormatError("this link leads out of the repository; replace it by the file itself", rule="R4", file=name)
    if not stat.S_ISREG(mode):
        raise FormatError("found something that is not a regular file, needed a file", rule="R4", file=name)
    return Path(real)


def read_file(directory: Path, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a small file of the repository.

    Raises:
        FormatError: R4, also for a file of more than `limit` bytes.
    """
    path = resolve_file(directory, name)
    try:
        with path.open("rb") as file:
            # No more than it has: read() gets memory for all that it is asked for, which can be scarce.
            data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise _unreadable(name, error) from None
    if len(data) > limit:
        raise FormatError(f"found more than {limit} bytes, such a file is not plausible", rule="R4", file=name)
    return data


def stray_weights(directory: Path, known: Collection[str]) -> list[str]:
    """Names of *.safetensors files in the directory that do not belong to the checkpoint (rule R6), sorted."""
    return sorted(name for name in os.listdir(directory) if name.endswith(".safetensors") and name not in known)


def _hub_blobs(root: str) -> str | None:
    """The blobs directory when `root` is a snapshot in a Hub cache."""
    snapshots, _ = os.path.split(root)
    repository, last = os.path.split(snapshots)
    known = last == "snapshots" and os.path.basename(repository).startswith("models--")
    return os.path.join(repository, "blobs") if known else None


def _unreadable(name: str, error: OSError) -> FormatError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return FormatError("this file is missing; fetch the repository again", rule="R4", file=name)
    return FormatError(f"this file cannot be read: {error.strerror}", rule="R4", file=name)
