"""Verify a checkpoint as far as its headers go: of a repository on a hub a few range requests, no weights.

The headers, the quant_states and the code tables are put where they belong in files that have the size of the real
ones and are otherwise holes. So the rules are checked by the code that checks a whole checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qlformat import manifest, remote, repository, shards
from qlformat.checkpoint import Checkpoint
from qlformat.consistency import check_consistency
from qlformat.errors import FormatError, QlfError
from qlformat.layout import QUANT_STATE_PREFIX, split_companion
from qlformat.stored import CONFIG_NAME
from qlformat.verifier import Finding
from qlformat.weights import Report, Severity

_FIRST_FETCH = 32 << 10
_LARGEST_SMALL_TENSOR = 64 << 10
_LARGEST_FILE = 1 << 50
_SMALL = ("quant_map", "nested_quant_map")


@dataclass(frozen=True)
class HeaderCheck:
    """What headers tell.

    Attributes:
        findings: errors first.
        fetched: bytes of file content that were fetched; None for a local directory.
    """

    name: str
    revision: str | None
    findings: tuple[Finding, ...]
    fetched: int | None


def verify_headers(path: str | Path) -> HeaderCheck:
    """Check structure, configuration, index, manifest and headers, and no weight's bytes.

    Args:
        path: directory of a 4-bit checkpoint, or a repository id "ORG/NAME" or "ORG/NAME@revision".

    Raises:
        QlfError: there is no such directory or repository, or the hub cannot be reached.
    """
    files = remote.open_files(path)
    if isinstance(files, remote.LocalFiles):
        return HeaderCheck(files.name, files.revision, tuple(_check(files.directory, files)), None)
    with tempfile.TemporaryDirectory(prefix="qlf-headers-") as place:
        _mirror(files, Path(place))
        found = _check(Path(place), files)
    return HeaderCheck(files.name, files.revision, tuple(found), getattr(files, "transferred", None))


def _mirror(files: remote.Files, place: Path) -> None:
    """Put what headers and JSON say into files of the right size."""
    for name in (CONFIG_NAME, manifest.FILE_NAME, repository.index_name()):
        if name in files.sizes:
            (place / name).write_bytes(files.read(name))
    for name, size in files.sizes.items():
        if not name.endswith(".safetensors") or not manifest.is_plain_path(name) or "/" in name:
            continue
        if size > _LARGEST_FILE:
            raise FormatError(f"found {size} bytes, such a file is not plausible", rule="R4", file=name)
        with (place / name).open("wb") as file:
            os.ftruncate(file.fileno(), size)
            if size:
                _put_small_parts(files, name, size, file.fileno())


def _put_small_parts(files: remote.Files, name: str, size: int, handle: int) -> None:
    (start,) = files.read_ranges(name, [(0, min(size, _FIRST_FETCH))])
    os.pwrite(handle, start, 0)
    try:
        length = shards.header_length(start[:8], size, name)
        if len(start) < 8 + length:
            (rest,) = files.read_ranges(name, [(len(start), 8 + length)])
            os.pwrite(handle, rest, len(start))
            start += rest
        header = shards.parse_header(start[8 : 8 + length], size, name)
    except FormatError:
        return  # who reads the file finds the same
    ranges = []
    for tensor, info in header.tensors.items():
        companion = split_companion(tensor)
        small = companion is not None and (companion[1] in _SMALL or companion[1].startswith(QUANT_STATE_PREFIX))
        if small and info.nbytes <= _LARGEST_SMALL_TENSOR:
            ranges.append((header.data_start + info.begin, header.data_start + info.end))
    for (begin, _), data in zip(ranges, files.read_ranges(name, ranges), strict=True):
        os.pwrite(handle, data, begin)


def _check(directory: Path, files: remote.Files) -> list[Finding]:
    found: set[Finding] = set()

    def report(problem: QlfError, severity: Severity = "error") -> None:
        found.add(Finding(problem.rule or "R4", severity, problem.message, problem.tensor, problem.file))

    with Checkpoint(directory, report) as checkpoint:
        check_consistency(checkpoint, report)
        if checkpoint.manifest is not None:
            _check_manifest(checkpoint, checkpoint.manifest, files, report)
        elif not checkpoint.has_manifest:
            message = "there is no qlf.json: hashes, fingerprint and placement could not be checked"
            report(FormatError(message, rule="M1", file=manifest.FILE_NAME), "note")
    return sorted(found, key=lambda one: (one.severity != "error", one.file or "", one.tensor or "", one.rule))


def _check_manifest(checkpoint: Checkpoint, parsed: manifest.Manifest, files: remote.Files, report: Report) -> None:
    """Rules M6, as far as sizes and headers go, and M7, of the tensors that the manifest lists."""
    for entry in parsed.files:
        size = _size(checkpoint.path, files, entry.name)
        if size != entry.size:
            found = "no such file" if size is None else f"{size} bytes"
            report(FormatError(f"found {found}, qlf.json says {entry.size} bytes", rule="M6", file=entry.name))
        shard = checkpoint.shards.get(entry.name)
        if shard is not None and entry.header_sha256 is not None:
            digest = hashlib.sha256(shard.header_bytes()).hexdigest()
            if digest != entry.header_sha256:
                message = f"found a header with sha256 {digest}, qlf.json says {entry.header_sha256}; fetch it again"
                report(FormatError(message, rule="M6", file=entry.name))
    listed = manifest.fingerprint((e.name, e.dtype, e.shape, e.sha256) for e in parsed.tensors)
    if listed != parsed.fingerprint:
        message = f"the tensors that it lists have fingerprint {listed}, it says {parsed.fingerprint}"
        report(FormatError(message, rule="M7", file=manifest.FILE_NAME))


def _size(directory: Path, files: remote.Files, name: str) -> int | None:
    if name in files.sizes or not isinstance(files, remote.LocalFiles):
        return files.sizes.get(name)
    path = directory / name
    return path.stat().st_size if path.is_file() else None
