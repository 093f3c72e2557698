"""qlf.json of an adapter: the base it was trained on, pinned by fingerprint (spec/format.md, appendix E)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlformat import manifest, repository
from qlformat.errors import FormatError, QlfError, shown
from qlformat.hashing import hash_file
from qlformat.layout import strict_json

CONFIG_NAME = "adapter_config.json"
"""What makes a directory a peft adapter."""
WEIGHTS_NAME = "adapter_model.safetensors"

_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BasePin:
    """The base an adapter belongs to.

    Attributes:
        fingerprint: of the base's stored tensors (spec/format.md, section 13).
        repo_id, revision: where it was on the Hub, or None; they help to find it and decide nothing.
    """

    fingerprint: str
    repo_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class AdapterManifest:
    """The fields of an adapter's qlf.json that readers know.

    Attributes:
        writer: name and version of the writing program.
        base: the base it belongs to.
        files: name, size and sha256 of the files that peft reads; empty where they were not recorded.
    """

    writer: str
    base: BasePin
    format_version: int = manifest.FORMAT_VERSION
    must_understand: tuple[str, ...] = field(default=())
    files: tuple[manifest.FileEntry, ...] = field(default=())

    def to_json(self, more: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of qlf.json; `more` holds further fields, which readers ignore."""
        fields: dict[str, Any] = {
            "format_version": self.format_version,
            "kind": "adapter",
            "must_understand": list(self.must_understand),
            "writer": self.writer,
            "base": asdict(self.base),
        }
        if self.files:
            fields["files"] = [as_entry(entry) for entry in self.files]
        return (json.dumps({**(more or {}), **fields}, indent=2) + "\n").encode()


def parse(data: bytes) -> AdapterManifest:
    """Read an adapter's qlf.json.

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
    if version != manifest.FORMAT_VERSION:
        known = manifest.FORMAT_VERSION
        raise _bad("M2", f"found format_version {version}, this reader knows {known}; upgrade qlformat")
    if root.get("kind") != "adapter":
        raise _bad("M1", f"found kind {shown(root.get('kind'))}, needed 'adapter'; give the base as the base")
    features = root.get("must_understand")
    if not isinstance(features, list) or not all(isinstance(item, str) for item in features):
        raise _bad("M1", f"must_understand is {shown(features)}, needed a list of strings")
    unknown = sorted(set(features) - manifest.UNDERSTOOD)
    if unknown:
        raise _bad("M3", f"the adapter needs a reader that understands {shown(unknown)}; upgrade qlformat")
    writer = root.get("writer")
    if not isinstance(writer, str) or not writer:
        raise _bad("M1", f"writer is {shown(writer)}, needed a string")
    pin, files = _pin(root.get("base")), _files(root.get("files", []))
    return AdapterManifest(writer, pin, must_understand=tuple(features), files=files)


def as_entry(file: manifest.FileEntry) -> dict[str, Any]:
    """An entry of `files` as JSON."""
    return {"name": file.name, "size": file.size, "sha256": file.sha256}


def file_entries(directory: Path) -> tuple[manifest.FileEntry, ...]:
    """Name, size and sha256 of the files of an adapter that peft reads."""
    names = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if (directory / name).is_file()]
    return tuple(manifest.FileEntry(name, *hash_file(directory / name)) for name in names)


def read_pin(directory: Path) -> BasePin | None:
    """The base that the adapter in `directory` is pinned to; None for a plain peft adapter.

    Raises:
        QlfError: the directory holds no peft adapter.
        FormatError: its qlf.json breaks M1, M2 or M3.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise QlfError(f"{directory}: found no {CONFIG_NAME}, needed the directory of a peft adapter")
    if not os.path.lexists(directory / manifest.FILE_NAME):
        return None
    return parse(repository.read_file(directory, manifest.FILE_NAME)).base


def _pin(base: object) -> BasePin:
    if not isinstance(base, dict):
        raise _bad("M1", f"base is {shown(base)}, needed an object")
    digest = base.get("fingerprint")
    if not isinstance(digest, str) or not _HEX64.fullmatch(digest):
        raise _bad("M1", f"base.fingerprint is {shown(digest)}, needed 64 hexadecimal digits")
    names = []
    for key in ("repo_id", "revision"):
        value = base.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise _bad("M1", f"base.{key} is {shown(value)}, needed a string or null")
        names.append(value)
    return BasePin(digest, *names)


def _files(entries: object) -> tuple[manifest.FileEntry, ...]:
    if not isinstance(entries, list):
        raise _bad("M1", f"files is {shown(entries)}, needed a list")
    found = []
    for entry in entries:
        known = entry if isinstance(entry, dict) else {}
        name, size, digest = known.get("name"), known.get("size"), known.get("sha256")
        if not isinstance(name, str) or type(size) is not int or size < 0 or not isinstance(digest, str):
            raise _bad("M1", f"files has {shown(entry)}, needed name, size and sha256")
        if not _HEX64.fullmatch(digest):
            raise _bad("M1", f"sha256 of {shown(name)} is {shown(digest)}, needed 64 hexadecimal digits")
        if not manifest.is_plain_path(name):
            raise _bad(
                "M9", f"the file name {shown(name)} leaves the repository; only plain relative paths are allowed"
            )
        found.append(manifest.FileEntry(name, size, digest))
    return tuple(found)


def _bad(rule: str, message: str) -> FormatError:
    return FormatError(message, rule=rule, file=manifest.FILE_NAME)
