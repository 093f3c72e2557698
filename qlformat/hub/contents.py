"""What a directory holds and what of it is published: a base, an adapter or a 16-bit model, without a run's remains."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlformat import manifest, repository
from qlformat.adapter import CONFIG_NAME as ADAPTER_CONFIG
from qlformat.errors import FormatError, QlfError
from qlformat.file_names import CARD, CARD_PICTURE, MERGE_REPORT
from qlformat.hub.client import RemoteFile
from qlformat.layout import strict_json
from qlformat.stored import CONFIG_NAME

Kind = Literal["base", "adapter", "merged", "model"]
"""base: 4-bit. adapter: peft's. merged: what `qlf merge` wrote, 4-bit or not. model: any other 16- or 32-bit model."""

CARD_FILES = (CARD, CARD_PICTURE)
"""What writing the card writes."""
WEIGHTS_SUFFIX = ".safetensors"

_PICKLED = re.compile(r"(pytorch_model.*|adapter_model|training_args)\.bin|.*\.(pt|pth|ckpt|pkl|pickle)")
_UNFINISHED = re.compile(r".*\.(partial|incomplete|tmp|lock|part)|.*~")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_RUN = re.compile(r"runs|wandb|__pycache__|events\.out\.tfevents\..*")
_TRAINER = re.compile(r"trainer_state\.json|rng_state.*|optimizer.*|scheduler.*")

# What belongs to the state of a model: where the new state lacks it, it goes, or two states would be mixed.
_OWNED = re.compile(
    r"[^/]*\.safetensors(\.index\.json)?|(pytorch_model|adapter_model)[^/]*\.bin(\.index\.json)?"
    r"|qlf\.json|config\.json|adapter_config\.json|merge_report\.(json|svg)|generation_config\.json"
)


@dataclass(frozen=True)
class LocalFile:
    """A file to publish: its name in the repository, where it is, its size and its time of change in nanoseconds."""

    name: str
    path: Path
    size: int
    changed_ns: int

    def unchanged(self) -> bool:
        """Whether it is what it was when it was listed."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (self.size, self.changed_ns)


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not published, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """A directory to publish.

    Attributes:
        kind: what it holds.
        four_bit: whether its weights are bitsandbytes' 4-bit layout, which the format's rules are about.
        fingerprint: of qlf.json, of a base.
        files: what is published, weights first.
    """

    path: Path
    kind: Kind
    four_bit: bool
    fingerprint: str | None
    files: tuple[LocalFile, ...]
    left_out: tuple[LeftOut, ...]


def read_contents(path: Path) -> Contents:
    """Look at a directory.

    Raises:
        QlfError: it is none, holds neither a model nor an adapter, or a file in it has a name that no repository takes.
        FormatError: qlf.json or config.json is broken, or a link leads out of the directory.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise QlfError(f"{path}: found {found}, needed the directory of a checkpoint, an adapter or a model")
    kind, four_bit = _kind(path)
    parsed = _manifest(path) if four_bit else None
    listed = frozenset(entry.name for entry in parsed.files) if parsed else frozenset()
    files, left_out = _files(path, listed)
    return Contents(path, kind, four_bit, parsed.fingerprint if parsed else None, files, left_out)


def owned(name: str) -> bool:
    """Whether a file of a repository is part of a model's state, so that a new state without it removes it."""
    return _OWNED.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether a file holds weights."""
    return name.endswith(WEIGHTS_SUFFIX)


def equals(path: Path, size: int, sha256: str, remote: RemoteFile) -> bool:
    """Whether a local file is the remote one."""
    if size != remote.size:
        return False
    return sha256 == remote.sha256 if remote.sha256 is not None else git_blob_id(path) == remote.blob_id


def git_blob_id(path: Path) -> str:
    """git's name of a file's content: SHA-1 over "blob SIZE" and a zero byte, then the bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _kind(path: Path) -> tuple[Kind, bool]:
    """(kind, whether the weights are 4-bit)."""
    names = set(os.listdir(path))
    weights = "model.safetensors" in names or repository.index_name() in names
    if ADAPTER_CONFIG in names:
        if weights:
            raise QlfError(
                f"{path}: found an adapter and a model in one directory, needed one of them; publish each from its own"
            )
        return "adapter", False
    if CONFIG_NAME not in names:
        raise QlfError(
            f"{path}: found neither {CONFIG_NAME} nor {ADAPTER_CONFIG}, needed the directory of a model or an adapter"
        )
    try:
        config = strict_json(repository.read_file(path, CONFIG_NAME))
    except ValueError as error:
        raise FormatError(f"not valid JSON: {error}", rule="C1", file=CONFIG_NAME) from None
    declared = config.get("quantization_config") if isinstance(config, dict) else None
    four_bit = isinstance(declared, dict) or manifest.FILE_NAME in names
    if MERGE_REPORT in names:
        return "merged", four_bit
    return ("base" if four_bit else "model"), four_bit


def _manifest(path: Path) -> manifest.Manifest | None:
    if not os.path.lexists(path / manifest.FILE_NAME):
        return None
    return manifest.parse(repository.read_file(path, manifest.FILE_NAME))


def _files(root: Path, listed: frozenset[str]) -> tuple[tuple[LocalFile, ...], tuple[LeftOut, ...]]:
    """Files to publish and what is left out. What qlf.json lists is published whatever it is called."""
    files, left_out = [], []
    for parent, folders, names in os.walk(root):
        for folder in sorted(folders):
            name = Path(parent, folder).relative_to(root).as_posix()
            reason = _folder_reason(folder)
            if reason and not any(entry.startswith(f"{name}/") for entry in listed):
                folders.remove(folder)
                left_out.append(LeftOut(f"{name}/", reason))
            elif Path(parent, folder).is_symlink():
                folders.remove(folder)
                left_out.append(LeftOut(f"{name}/", "a link to a folder"))
        for file in sorted(names):
            name = Path(parent, file).relative_to(root).as_posix()
            reason = None if name in listed else _file_reason(file)
            if reason:
                left_out.append(LeftOut(name, reason))
            else:
                files.append(_local(root, name))
    files.sort(key=lambda file: (not is_weights(file.name), file.name))
    return tuple(files), tuple(sorted(left_out, key=lambda entry: entry.name))


def _local(root: Path, name: str) -> LocalFile:
    if not manifest.is_plain_path(name):
        raise QlfError(f"the file name {name[:200]!r} is not allowed in a repository; rename the file")
    path = repository.resolve_file(root, name)
    found = path.stat()
    return LocalFile(name, path, found.st_size, found.st_mtime_ns)


def _folder_reason(name: str) -> str | None:
    if name.startswith("."):
        return "hidden"
    if _CHECKPOINT.fullmatch(name):
        return "a checkpoint of a run"
    if _RUN.fullmatch(name):
        return "the log of a run"
    return "unfinished" if _UNFINISHED.fullmatch(name) else None


def _file_reason(name: str) -> str | None:
    if _PICKLED.fullmatch(name):
        return "pickled: loading it may run code; publish safetensors"
    if _TRAINER.fullmatch(name):
        return "the state of a trainer"
    return _folder_reason(name)
