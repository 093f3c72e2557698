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
from qlformat.checkpoint import Checkpoint
from qlformat.errors import FormatError, QlfError, shown
from qlformat.layout import strict_json

CONFIG_NAME = "adapter_config.json"
"""What makes a directory a peft adapter."""

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
    """The fields of an adapter's qlf.json that every reader needs."""

    writer: str
    base: BasePin
    format_version: int = manifest.FORMAT_VERSION
    must_understand: tuple[str, ...] = field(default=())

    def to_json(self, more: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of qlf.json; `more` holds further fields, which readers ignore."""
        fields = {
            "format_version": self.format_version,
            "kind": "adapter",
            "must_understand": list(self.must_understand),
            "writer": self.writer,
            "base": asdict(self.base),
        }
        return (json.dumps({**(more or {}), **fields}, indent=2) + "\n").encode()


def parse(data: bytes) -> AdapterManifest:
    """Read an adapter's qlf.json.

    Raises:
        FormatError: M1 (structure), M2 (version) or M3 (must_understand).
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
    return AdapterManifest(writer, _pin(root.get("base")), must_understand=tuple(features))


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


def check_pin(directory: Path, base: Checkpoint) -> str | None:
    """Compare the adapter's pin with the base that it is to be used on.

    The fingerprint of a base with a manifest is the recorded one (`verify` proves it); that of a plain repository is
    computed, which reads it once.

    Returns:
        A note when the adapter is not pinned, else None.

    Raises:
        QlfError: as for read_pin; or the adapter belongs to another base.
    """
    pin = read_pin(directory)
    if pin is None:
        return f"the adapter {directory.name} is not pinned to a base; only names and shapes were compared"
    found = base.manifest.fingerprint if base.manifest else base.fingerprint()
    if found != pin.fingerprint:
        home = f" ({pin.repo_id}{f'@{pin.revision}' if pin.revision else ''})" if pin.repo_id else ""
        raise QlfError(
            f"the adapter {directory.name} belongs to the base with fingerprint {pin.fingerprint}{home}, found "
            f"{found}; load it on that base, or, to use it on this one all the same, load the base alone and give it "
            "to peft's PeftModel.from_pretrained"
        )
    return None


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


def _bad(rule: str, message: str) -> FormatError:
    return FormatError(message, rule=rule, file=manifest.FILE_NAME)
