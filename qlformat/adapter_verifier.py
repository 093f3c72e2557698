"""Verify an adapter (`qlf verify ADAPTER`): its files, its numbers, and that its base is the one it is pinned to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qlformat import adapter, manifest, pins, remote, repository
from qlformat.errors import FormatError, PinError, QlfError
from qlformat.hashing import hash_file
from qlformat.layout import strict_json
from qlformat.shards import ShardReader, TensorInfo
from qlformat.verifier import Finding

_PIECE_BYTES = 4 << 20
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_BF16_EXPONENT = 0x7F80


def is_adapter(path: str | Path) -> bool:
    """Whether a directory, or else a Hub repository, holds an adapter and no model.

    Raises:
        QlfError: there is no such repository, or the Hub cannot be reached.
    """
    if Path(path).is_file():
        return False
    names = remote.open_files(path).sizes
    return adapter.CONFIG_NAME in names and "config.json" not in names


def verify_adapter(
    path: str | Path, base: str | Path | None = None, *, allow_base_mismatch: bool = False
) -> list[Finding]:
    """Check the files of a peft adapter, and its pin.

    Args:
        path: its directory, or a Hub repository, which is downloaded.
        base: the base to compare with, a directory or a Hub repository; by default the one that the pin names.
        allow_base_mismatch: another base is a note then, and no error.

    Returns:
        The findings, errors first. A base that cannot be looked at is a note.

    Raises:
        QlfError: there is no such adapter, or no such `base`.
    """
    directory = remote.local_directory(path)
    if not (directory / adapter.CONFIG_NAME).is_file():
        raise QlfError(f"{path}: found no {adapter.CONFIG_NAME}, needed the directory of a peft adapter")
    found = [*_check_config(directory), *_check_files(directory), *_check_weights(directory)]
    found += _check_pin(directory, base, allow_base_mismatch)
    return sorted(found, key=lambda finding: finding.severity != "error")


def _check_config(directory: Path) -> Iterator[Finding]:
    name = adapter.CONFIG_NAME
    try:
        config = strict_json(repository.read_file(directory, name))
    except FormatError as error:
        yield _of(error)
        return
    except ValueError as error:
        yield Finding("C1", "error", f"not valid JSON: {error}", file=name)
        return
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        yield Finding("C1", "error", "found no peft_type, needed the configuration of a peft adapter", file=name)


def _check_files(directory: Path) -> Iterator[Finding]:
    """Rule M6 for the files that qlf.json lists; M1 to M3 and M9 for qlf.json itself."""
    if not (directory / manifest.FILE_NAME).is_file():
        return
    try:
        listed = adapter.parse(repository.read_file(directory, manifest.FILE_NAME)).files
    except FormatError as error:
        yield _of(error)
        return
    if not listed:
        yield Finding("M6", "note", "it lists no files: no hash could be checked", file=manifest.FILE_NAME)
    for entry in listed:
        try:
            size, digest = hash_file(repository.resolve_file(directory, entry.name))
        except FormatError as error:
            yield _of(error)
            continue
        if size != entry.size:
            message = f"found {size} bytes, qlf.json says {entry.size}; fetch it again"
        elif digest != entry.sha256:
            message = f"found sha256 {digest}, qlf.json says {entry.sha256}; fetch it again"
        else:
            continue
        yield Finding("M6", "error", message, file=entry.name)


def _check_weights(directory: Path) -> Iterator[Finding]:
    """The container's rules, and that every number is finite."""
    name = adapter.WEIGHTS_NAME
    if not (directory / name).exists():
        yield Finding("R1", "error", f"found no {name}, needed the adapter's weights as safetensors")
        return
    try:
        with ShardReader(repository.resolve_file(directory, name), name) as reader:
            if not reader.header.tensors:
                yield Finding("R1", "error", "found no tensor, needed those of the adapter", file=name)
            for info in reader.header.tensors.values():
                if not _finite(reader, info):
                    message = "found NaN or infinity, needed finite values; train it again"
                    yield Finding("E1", "error", message, tensor=info.name, file=name)
    except FormatError as error:
        yield _of(error)


def _check_pin(directory: Path, base: str | Path | None, allowed: bool) -> Iterator[Finding]:
    name = manifest.FILE_NAME
    try:
        checked = pins.check(directory, base, allowed=allowed)
    except PinError as error:
        yield Finding("M7", "error", error.message, file=name)
    except FormatError as error:
        if error.rule not in ("M1", "M2", "M3", "M9") or base is not None:  # those of the adapter are found already
            yield Finding(str(error.rule), "error", f"its base breaks a rule: {error.message}", file=error.file)
    except QlfError as error:
        if base is not None:
            raise
        yield Finding("M7", "note", f"its base could not be looked at: {error}", file=name)
    else:
        for note in checked.notes:
            yield Finding("M7", "note", note, file=name)


def _finite(reader: ShardReader, info: TensorInfo) -> bool:
    if info.dtype not in _FLOATS and info.dtype != "BF16":
        return True
    buffer = bytearray(min(_PIECE_BYTES, info.nbytes))
    for offset in range(0, info.nbytes, _PIECE_BYTES):
        piece = memoryview(buffer)[: min(_PIECE_BYTES, info.nbytes - offset)]
        reader.read_into(info, offset, piece)
        if info.dtype == "BF16":
            bits: npt.NDArray[np.uint16] = np.frombuffer(piece, dtype="<u2")
            sound = not bool(((bits & _BF16_EXPONENT) == _BF16_EXPONENT).any())
        else:
            sound = bool(np.isfinite(np.frombuffer(piece, dtype=_FLOATS[info.dtype])).all())
        if not sound:
            return False
    return True


def _of(error: FormatError) -> Finding:
    return Finding(str(error.rule), "error", error.message, error.tensor, error.file)
