"""Is what a directory holds fit to be published, or to be kept: every kind by its own check."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from qlformat import repository
from qlformat.adapter_verifier import verify_adapter
from qlformat.errors import FormatError, QlfError
from qlformat.hub.contents import Contents
from qlformat.progress import Progress
from qlformat.shards import ShardReader
from qlformat.verifier import Finding, ShardTensorHashes, verify


def require_sound(
    contents: Contents,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    allow_base_mismatch: bool = False,
    stop: threading.Event | None = None,
    structure_is_sound: Callable[[], ShardTensorHashes] | None = None,
) -> tuple[str, ...]:
    """Check a directory and return what is worth knowing about it.

    4-bit checkpoints and adapters are checked as by `qlf verify`, an adapter's pin included; of other models the
    structure of every file and the index. Set `stop` in another thread to give up.
    `structure_is_sound` is called before the bytes of a 4-bit checkpoint's weights are read, which takes the longest,
    and returns the hashes of stored tensors that are known by then.

    Raises:
        QlfError: something is wrong; the line says what.
        Stopped: `stop` was set.
    """
    if contents.kind == "adapter":
        found = verify_adapter(contents.path, allow_base_mismatch=allow_base_mismatch)
    elif contents.four_bit:

        def on_structure(found: list[Finding]) -> ShardTensorHashes:
            _notes(contents.path, found)
            return structure_is_sound() if structure_is_sound is not None else {}

        found = verify(
            contents.path, threads=threads, progress=progress, decode=False, stop=stop, on_structure=on_structure
        )
    else:
        return _check_model(contents.path)
    return _notes(contents.path, found)


def _notes(path: Path, found: Sequence[Finding]) -> tuple[str, ...]:
    """The notes among the findings, where there is nothing worse."""
    wrong = [finding for finding in found if finding.severity == "error"]
    if wrong:
        more = f", and {len(wrong) - 1} more; `qlf verify` lists all" if len(wrong) > 1 else ""
        raise QlfError(f"{path} is not sound: {wrong[0]}{more}", rule=None)
    return tuple(str(finding) for finding in found if not _is_about_other_files(finding))


def _is_about_other_files(finding: Finding) -> bool:
    """The note that files are there which qlf.json does not list: a card and pictures always are."""
    return finding.rule == "M6"


def _check_model(path: Path) -> tuple[str, ...]:
    """Rules R1 to R5 and S1 to S5 for the safetensors of a plain model."""
    if not (path / "model.safetensors").exists() and not (path / repository.index_name()).exists():
        raise QlfError(f"{path}: found no safetensors weights, needed model.safetensors or its shards with an index")
    files = repository.weight_files(path)
    home: dict[str, str] = {}
    for name in files.names:
        with ShardReader(repository.resolve_file(path, name), name) as reader:
            for tensor in reader.header.tensors:
                if tensor in home:
                    raise FormatError(
                        f"found here and in {home[tensor]}, needed once", rule="R5", tensor=tensor, file=name
                    )
                home[tensor] = name
    if files.index is not None and dict(files.index) != home:
        wrong = sorted(name for name in files.index.keys() | home.keys() if files.index.get(name) != home.get(name))[0]
        found, said = home.get(wrong, "no shard"), files.index.get(wrong, "no file")
        raise FormatError(
            f"found it in {found}, the index says {said}", rule="R2", tensor=wrong, file=repository.index_name()
        )
    return ("a 16- or 32-bit model: the structure of its files was checked, not its values",)
