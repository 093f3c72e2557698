"""Open the 16- or 32-bit checkpoint that is to be quantized: a directory, a file or a Hub repository.

Reads are positional and by chunk, so that a conversion never holds a whole file. Only headers are read here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from qlformat import repository
from qlformat.errors import FormatError, SourceError
from qlformat.file_names import MERGE_REPORT
from qlformat.layout import split_companion, strict_json
from qlformat.shards import ShardReader, TensorInfo

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors dtype -> torch name, for the dtypes that can be quantized."""

_REPO_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".bpe", ".vocab"}
_CARRIED_NAMES = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)", re.IGNORECASE)
_NOT_CARRIED = {"config.json", "qlf.json", MERGE_REPORT, "adapter_config.json", "quantize_config.json"}
_FOREIGN_SUFFIXES = (".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".SCB", ".weight_packed", ".g_idx")
_MAX_CONFIG_BYTES = 64 << 20


class WeightFile(Protocol):
    """A file of tensors: ShardReader and TorchFile."""

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of a tensor."""

    def end_position(self, info: TensorInfo) -> int:
        """Position in the file behind the tensor's bytes, 0 when that is not known."""

    def check_unchanged(self) -> None:
        """Raise FormatError or SourceError when somebody has written to the file since it was opened."""

    def close(self) -> None:
        """Close the file."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the source: safetensors dtype, shape, size in bytes, and the file it is in."""

    info: TensorInfo
    file: str
    reader: WeightFile

    @property
    def name(self) -> str:
        """Name in the source."""
        return self.info.name

    @property
    def dtype(self) -> str:
        """safetensors dtype."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the source."""
        return self.info.shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.info.nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on. Safe to call from several threads."""
        self.reader.read_into(self.info, offset, buffer)


class Source:
    """An open source checkpoint.

    Attributes:
        directory: where its files are.
        repo_id, revision: Hub repository and commit, or None.
        config: content of config.json.
        tensors: by name, in the order of the files and of the tensors in each.
        files: (name, path) of the weight files.
        carried: (relative name, path) of tokenizer, generation config, chat template, code and licence files.
        notes: what a user should hear about, such as tensors that shared memory.
    """

    def __init__(self, directory: Path, repo_id: str | None = None, revision: str | None = None) -> None:
        self.directory = directory
        self.repo_id = repo_id
        self.revision = revision
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, SourceTensor] = {}
        self.files: list[tuple[str, Path]] = []
        self.carried: list[tuple[str, Path]] = []
        self.notes: list[str] = []
        self._open: list[WeightFile] = []

    def add_file(self, name: str) -> list[str]:
        """Open one weight file of the directory; the names of its tensors are returned."""
        path = repository.resolve_file(self.directory, name)
        infos: Mapping[str, TensorInfo]
        reader: WeightFile
        if name.endswith(".safetensors"):
            shard = ShardReader(path, name)
            reader, infos = shard, shard.header.tensors
        else:
            from qlformat.torch_file import TorchFile

            loaded = TorchFile(path, name)
            reader, infos = loaded, loaded.tensors
            self.notes += [f"{alias} shares memory with {kept}: stored once" for alias, kept in loaded.aliases.items()]
        self._open.append(reader)
        self.files.append((name, path))
        for info in infos.values():
            other = self.tensors.get(info.name)
            if other:
                raise FormatError(
                    f"found in {other.file} and in {name}, needed in one of them", rule="R5", tensor=info.name
                )
            self.tensors[info.name] = SourceTensor(info, name, reader)
        return list(infos)

    def check_unchanged(self) -> None:
        """Make sure that what was read is what was checked.

        Raises:
            FormatError, SourceError: a file was written to since it was opened.
        """
        for reader in self._open:
            reader.check_unchanged()

    def close(self) -> None:
        """Close every file."""
        for reader in self._open:
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(src: str | Path) -> Source:
    """Open a source checkpoint and check that it can be quantized.

    Args:
        src: a directory in the layout of a Hub repository, one .safetensors or .bin file with its config.json
            beside it, or a Hub repository id, "ORG/MODEL" or "ORG/MODEL@revision", which is downloaded.

    Raises:
        SourceError: it is missing, quantized already (E2), of an unsupported kind (E4), or has no config.json.
        FormatError: a file breaks a container (S) or repository (R) rule.
    """
    path = Path(src)
    if path.is_dir():
        source = Source(path, *cached_identity(path))
    elif path.is_file():
        source = Source(path.parent)
    else:
        source = _download(str(src))
        path = source.directory
    try:
        _read_config(source)
        names = [path.name] if path.is_file() else None
        _open_weights(source, names)
        _refuse_quantized(source)
        source.carried = sorted(_carried_files(source.directory))
    except BaseException:
        source.close()
        raise
    return source


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form ORG/MODEL or ORG/MODEL@revision."""
    return _REPO_ID.fullmatch(text) is not None


def cached_identity(path: Path) -> tuple[str | None, str | None]:
    """(repo_id, commit) of a snapshot directory in the Hub cache, (None, None) elsewhere."""
    parts = path.resolve().parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/"), parts[-1]
    return None, None


def _download(text: str) -> Source:
    match = _REPO_ID.fullmatch(text)
    if not match:
        raise SourceError(f"found no file or directory {text!r}; give a path or a Hub repository id, ORG/MODEL")
    from qlformat.download import download_source  # huggingface_hub costs half a second to import

    path = download_source(match["repo"], match["revision"])
    return Source(path, match["repo"], path.name)


def _read_config(source: Source) -> None:
    try:
        path = repository.resolve_file(source.directory, "config.json")
    except FormatError:
        _refuse_gguf(source)
        if (source.directory / "adapter_config.json").exists():
            raise SourceError(
                "found an adapter without its base; give the base model", rule="E4", file="adapter_config.json"
            ) from None
        if not os.path.lexists(source.directory / "config.json"):
            raise SourceError(
                f"found no config.json in {source.directory}, needed one to know the model; is this a model repository?"
            ) from None
        raise
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {_MAX_CONFIG_BYTES} bytes")
        config = strict_json(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"not valid JSON: {error}", file="config.json") from None
    if not isinstance(config, dict):
        raise SourceError("found JSON that is not an object", file="config.json")
    source.config = config


def _refuse_gguf(source: Source) -> None:
    """For a directory without weights that could be read."""
    others = sorted(path.name for path in source.directory.glob("*.gguf"))
    if others:
        raise SourceError(
            "found GGUF files, needed safetensors; get the 16-bit repository of the model", rule="E4", file=others[0]
        ) from None


def _open_weights(source: Source, names: list[str] | None) -> None:
    """Open the named files, or the safetensors of the directory, or else its .bin files."""
    if names:
        if not names[0].endswith((".safetensors", ".bin")):
            raise SourceError(
                "found an unsupported kind of file, needed .safetensors or .bin", rule="E4", file=names[0]
            )
        source.add_file(names[0])
        return
    try:
        found = repository.weight_files(source.directory)
    except FormatError as error:
        torch_names = {p.name for p in source.directory.glob("pytorch_model*.bin*")}
        if error.rule != "R1" or any(source.directory.glob("*.safetensors*")):
            raise
        if not torch_names:
            _refuse_gguf(source)
            raise
        found = repository.weight_files(source.directory, stem="pytorch_model", suffix=".bin")
    placed = {name: source.add_file(name) for name in found.names}
    if found.index is None:
        return
    for file, tensors in placed.items():
        for tensor in tensors:
            if found.index.get(tensor) != file:
                raise FormatError(
                    f"found in {file}, the index says {found.index.get(tensor)!r}", rule="R5", tensor=tensor
                )
    # A .bin shard may alias tensors, which are then listed once; safetensors must hold every name of the index.
    missing = [name for name in found.index if name not in source.tensors]
    if missing and not source.notes:
        raise FormatError(f"the index names it, {found.index[missing[0]]} lacks it", rule="R5", tensor=missing[0])


def _refuse_quantized(source: Source) -> None:
    declared = source.config.get("quantization_config")
    if isinstance(declared, dict):
        method = declared.get("quant_method", "unknown")
        bits = "4-bit " if declared.get("load_in_4bit") else ""
        raise SourceError(
            f"the model is quantized already ({bits}{method}); give the 16-bit model it was made from",
            rule="E2",
            file="config.json",
        )
    for name in source.tensors:
        companion = split_companion(name)
        if name.endswith(_FOREIGN_SUFFIXES) or (companion and companion[0] in source.tensors):
            raise SourceError(
                "the model is quantized already: this tensor belongs to a quantized weight; give the 16-bit model",
                rule="E2",
                tensor=name,
            )


def _carried_files(directory: Path) -> list[tuple[str, Path]]:
    found = []
    for path in [*directory.iterdir(), *directory.glob("*/*")]:
        name = path.relative_to(directory).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or not path.is_file():
            continue
        wanted = path.suffix in _CARRIED_SUFFIXES or _CARRIED_NAMES.match(path.name)
        # Folders hold code and templates; other folders of a repository (onnx, original) are other formats.
        if "/" in name and path.suffix not in {".py", ".jinja"}:
            continue
        if wanted and path.name not in _NOT_CARRIED and not path.name.endswith(".index.json"):
            found.append((name, repository.resolve_file(directory, name)))
    return found
