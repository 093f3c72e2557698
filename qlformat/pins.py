"""Pins: whether an adapter belongs to a base (spec/format.md, appendix E), wherever that base is.

An adapter names its base by repository, commit and fingerprint. The fingerprint alone decides: a repository that was
renamed or got new commits still fits while its tensors are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlformat import adapter, manifest, remote, repository
from qlformat.adapter import BasePin
from qlformat.checkpoint import Checkpoint
from qlformat.errors import FormatError, PinError, QlfError
from qlformat.layout import strict_json
from qlformat.source import cached_identity

OVERRIDE = "--allow-base-mismatch"
"""The option that every command with an adapter has."""
_CONFIG = "config.json"


@dataclass(frozen=True)
class FoundBase:
    """A base that was looked at.

    Attributes:
        name: for messages.
        fingerprint: of its tensors; None for a model that is not in 4 bits.
        repo_id, revision: repository and commit on the Hub, or None.
    """

    name: str
    fingerprint: str | None
    repo_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class PinCheck:
    """What `check` found.

    Attributes:
        pin: what the adapter records; None for one that is not pinned.
        base: what it was compared with; None when there was nothing to compare.
        notes: what a user should know.
    """

    pin: BasePin | None
    base: FoundBase | None
    notes: tuple[str, ...] = ()


def home(pin: BasePin) -> str:
    """Where the pinned base was on the Hub: "ORG/NAME@commit", or ""."""
    return f"{pin.repo_id}@{pin.revision}" if pin.repo_id and pin.revision else pin.repo_id or ""


def compare(name: str, pin: BasePin | None, base: FoundBase, *, allowed: bool = False) -> str | None:
    """Compare an adapter's pin with the base that it is to be used on.

    Args:
        name: the adapter's, for messages.
        pin: None for a plain peft adapter.
        base: what it is to be used on.
        allowed: whether the user asked for another base.

    Returns:
        A note when the adapter is not pinned, or belongs to another base and that is allowed; else None.

    Raises:
        PinError: the adapter belongs to another base.
    """
    if pin is None:
        return f"the adapter {name} is not pinned to a base; only names and shapes were compared"
    if pin.fingerprint == base.fingerprint:
        return None
    if allowed:
        return f"the adapter {name} was trained on another base; used all the same, as asked"
    found = f"found {base.fingerprint}" if base.fingerprint else "found a model that is not in 4 bits"
    place = home(pin)
    raise PinError(
        f"the adapter {name} belongs to the base with fingerprint {pin.fingerprint}{f' ({place})' if place else ''}, "
        f"{found}{f' in {base.name}' if base.name else ''}; give that base, or use {OVERRIDE}"
    )


def check_together(pins: Sequence[tuple[str, BasePin | None]], *, allowed: bool = False) -> list[str]:
    """Refuse adapters (name, pin) of different bases together, unless that is allowed; returns notes."""
    found = {pin.fingerprint: name for name, pin in pins if pin is not None}
    if len(found) < 2:
        return []
    names = " and ".join(found.values())
    if not allowed:
        raise PinError(
            f"the adapters {names} were trained on different bases; merge those of one base, or use {OVERRIDE}"
        )
    return [f"the adapters {names} were trained on different bases; merged all the same, as asked"]


def check_opened(directory: Path, base: Checkpoint, *, allowed: bool = False) -> str | None:
    """Compare the adapter in `directory` with an open base; see `compare`.

    The fingerprint of a base with a manifest is the recorded one (`verify` proves it); that of a plain repository is
    computed, which reads it once.
    """
    pin = adapter.read_pin(directory)
    if pin is None:
        return compare(directory.name, None, FoundBase("", None))
    fingerprint = base.manifest.fingerprint if base.manifest else base.fingerprint()
    return compare(directory.name, pin, FoundBase("", fingerprint), allowed=allowed)


def check(directory: str | Path, base: str | Path | None = None, *, allowed: bool = False) -> PinCheck:
    """Find the base of the adapter in `directory` and compare it with the pin.

    Args:
        directory: a peft adapter.
        base: a directory or a Hub repository; by default the repository that the adapter names, at its commit, or
            where that commit is gone, at its newest one.
        allowed: whether another base is no error.

    Raises:
        PinError: the fingerprints differ.
        QlfError: it is no adapter; or the base cannot be found or read.
        FormatError: a qlf.json breaks a rule.
    """
    path = Path(directory)
    name, pin = path.resolve().name, adapter.read_pin(path)
    if base is not None:
        found = look_at(base)
        note = compare(name, pin, found, allowed=allowed)
        return PinCheck(pin, found, (note,) if note else ())
    if pin is None:
        return PinCheck(None, None, (f"the adapter {name} is not pinned to a base",))
    if pin.repo_id is None:
        return PinCheck(pin, None, (f"the pin of {name} names no repository: give its base with --base",))
    return _check_on_hub(name, pin, pin.repo_id, allowed)


def record_home(directory: str | Path, base: str) -> FoundBase:
    """Write into an adapter where its base is on the Hub: repository and commit, after comparing the fingerprint.

    An adapter that was trained on a directory names no repository. Once the base is published, this names it, in
    qlf.json and, for peft, in adapter_config.json.

    Args:
        directory: a pinned adapter.
        base: "ORG/NAME" or "ORG/NAME@revision".

    Raises:
        PinError: that base is another one.
        QlfError: the adapter is not pinned, or there is no such base.
    """
    path = Path(directory)
    pin = adapter.read_pin(path)
    if pin is None:
        raise QlfError(f"{path}: found no {manifest.FILE_NAME}, needed an adapter that is pinned to its base")
    found = look_at(base)
    compare(path.resolve().name, pin, found)
    if found.repo_id is None:
        raise QlfError(f"{base}: found a directory, needed the Hub repository of the base, ORG/NAME")
    config = strict_json(repository.read_file(path, adapter.CONFIG_NAME))
    _write_json(path / adapter.CONFIG_NAME, {**config, "base_model_name_or_path": found.repo_id})
    made = strict_json(repository.read_file(path, manifest.FILE_NAME))
    made["base"] = {**made["base"], "repo_id": found.repo_id, "revision": found.revision}
    if made.get("files"):
        made["files"] = [adapter.as_entry(entry) for entry in adapter.file_entries(path)]
    _write_json(path / manifest.FILE_NAME, made)
    return found


def look_at(base: str | Path) -> FoundBase:
    """The fingerprint of a base: from qlf.json, or of a plain repository computed from its bytes (it is downloaded).

    Raises:
        QlfError: there is no such base, or it is an adapter.
        FormatError: it breaks a rule.
    """
    files = remote.open_files(base)
    if adapter.CONFIG_NAME in files.sizes and _CONFIG not in files.sizes:
        raise QlfError(f"{base}: found an adapter, needed its base")
    repo_id, revision = identity(files)
    if manifest.FILE_NAME in files.sizes:
        return FoundBase(str(base), _recorded(files), repo_id, revision)
    if not _four_bit(files):
        return FoundBase(str(base), None, repo_id, revision)
    with Checkpoint(remote.local_directory(base)) as checkpoint:
        return FoundBase(str(base), checkpoint.fingerprint(), repo_id, revision)


def identity(files: remote.Files) -> tuple[str | None, str | None]:
    """(repository, commit) on the Hub of a model, also of a snapshot in the Hub's cache; (None, None) elsewhere."""
    if files.repo_id is None and isinstance(files, remote.LocalFiles):
        return cached_identity(files.directory)
    return files.repo_id, files.revision


def _check_on_hub(name: str, pin: BasePin, repo_id: str, allowed: bool) -> PinCheck:
    """Compare the pin with the repository that it names: at its commit, or where that is gone, at the newest."""
    notes = []
    try:
        files = remote.open_files(home(pin))
    except FormatError:
        raise
    except QlfError:
        if pin.revision is None:
            raise
        files = remote.open_files(repo_id)
        notes.append(f"the commit {pin.revision} that it names is gone, compared with {files.revision}")
    if manifest.FILE_NAME not in files.sizes:
        lost = f"{files.name} has no qlf.json: give it with --base to download it and compute its fingerprint"
        return PinCheck(pin, None, (*notes, lost))
    found = FoundBase(files.name, _recorded(files), *identity(files))
    note = compare(name, pin, found, allowed=allowed)
    notes += [note] if note else _moved(pin, repo_id, found)
    return PinCheck(pin, found, tuple(notes))


def _moved(pin: BasePin, repo_id: str, found: FoundBase) -> list[str]:
    """A note where the repository's newest commit, which other loaders take, holds another base by now."""
    try:
        newest = remote.open_files(repo_id)
        if newest.revision == found.revision:
            return []
        fingerprint = _recorded(newest) if manifest.FILE_NAME in newest.sizes else None
    except QlfError:  # offline, with that one commit in the cache
        return []
    if fingerprint == pin.fingerprint:
        return []
    what = f"a base with fingerprint {fingerprint}" if fingerprint else "a model without qlf.json"
    return [f"the newest commit of {repo_id} holds {what}: load the base with revision {found.revision}"]


def _recorded(files: remote.Files) -> str:
    """The fingerprint of the tensors that qlf.json lists, which is what it records, or M7 is broken."""
    parsed = manifest.parse(files.read(manifest.FILE_NAME))
    listed = manifest.fingerprint((entry.name, entry.dtype, entry.shape, entry.sha256) for entry in parsed.tensors)
    if listed != parsed.fingerprint:
        raise FormatError(
            f"the tensors that {files.name} lists have fingerprint {listed}, it says {parsed.fingerprint}; fetch it "
            "again",
            rule="M7",
            file=manifest.FILE_NAME,
        )
    return listed


def _write_json(path: Path, value: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _four_bit(files: remote.Files) -> bool:
    """Whether config.json is that of a model in bitsandbytes' 4-bit layout."""
    try:
        config = strict_json(files.read(_CONFIG))
    except ValueError as error:
        raise QlfError(f"not valid JSON: {error}", file=_CONFIG) from None
    declared = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(declared, dict) and declared.get("quant_method") == "bitsandbytes"
