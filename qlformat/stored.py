"""The files of a 4-bit checkpoint, opened and checked: config.json, qlf.json, shards, index and the weights in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qlformat import manifest, repository, selection
from qlformat.codebook import CODEBOOKS, DYNAMIC8
from qlformat.errors import FormatError, QlfError
from qlformat.layout import QuantState, strict_json
from qlformat.shards import ShardReader
from qlformat.weights import Report, StoredTensor, Weight, find_weights, strict

CONFIG_NAME = "config.json"

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


class StoredCheckpoint:
    """An open checkpoint as it is stored. Safe to share between threads; a context manager.

    Args:
        path: the repository's directory.
        report: receives structural problems. The default raises the first one; verify collects them.

    Attributes:
        path: the directory.
        config: content of config.json.
        manifest: content of qlf.json; None in a plain bitsandbytes repository.
        has_manifest: whether there is a qlf.json, even a broken one.
        weight_files: which files hold the weights; None when that is what is broken.
        shards: open files by name.
        tensors: every stored tensor by name.
        weights: the weights of the model by name.
        nested_maps: weight name -> float32 [256], where an older bitsandbytes wrote another 8-bit table.
    """

    def __init__(self, path: str | Path, report: Report = strict) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            found = "a file" if self.path.exists() else "nothing"
            raise QlfError(f"{self.path}: found {found}, needed the directory of a checkpoint")
        self.config: dict[str, Any] = {}
        self.manifest: manifest.Manifest | None = None
        self.has_manifest = os.path.lexists(self.path / manifest.FILE_NAME)
        self.weight_files: repository.WeightFiles | None = None
        self.shards: dict[str, ShardReader] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.weights: dict[str, Weight] = {}
        self.nested_maps: dict[str, F32] = {}
        self._report = report
        self._closed = False
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> bytes:
        """All bytes of a stored tensor."""
        return bytes(self._shard_of(name).read(self.tensors[name].info))

    def read_part(self, name: str, offset: int, size: int) -> U8:
        """`size` bytes of a stored tensor from `offset` on, uint8 [size]."""
        data = np.empty(size, dtype=np.uint8)
        self._shard_of(name).read_into(self.tensors[name].info, offset, data.data)
        return data

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) with bytes of a stored tensor from `offset` on."""
        self._shard_of(name).read_into(self.tensors[name].info, offset, buffer)

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Have the system read bytes of a stored tensor in the background."""
        self._shard_of(name).prefetch(self.tensors[name].info, offset, size)

    def check_unchanged(self) -> None:
        """Make sure that what was read is what was checked.

        Raises:
            FormatError: S5, a shard was written to since it was opened.
        """
        for reader in self.shards.values():
            reader.check_unchanged()

    def close(self) -> None:
        """Close every file; reading afterwards is an error."""
        self._closed = True
        for reader in self.shards.values():
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shard_of(self, name: str) -> ShardReader:
        if self._closed:
            raise QlfError(f"{self.path}: the checkpoint is closed; read inside of its with block", tensor=name)
        stored = self.tensors.get(name)
        if stored is None:
            raise QlfError("the checkpoint has no such stored tensor", tensor=name)
        return self.shards[stored.shard]

    def _open(self) -> None:
        self._guard(self._read_config)
        if self.has_manifest:
            self._guard(self._read_manifest)
        try:
            self.weight_files = repository.weight_files(self.path)
        except FormatError as problem:
            self._report(problem)
            return
        for name in self.weight_files.names:
            self._open_shard(name)
        complete = len(self.shards) == len(self.weight_files.names)
        self._check_index(self.weight_files.index, complete)
        self.weights = find_weights(self.tensors, self.read, self._report, complete=complete)
        self._mark_transposed()
        for weight in self.weights.values():
            if weight.quant_state is not None:
                self._check_tables(weight.name, weight.quant_state)

    def _read_config(self) -> None:
        try:
            config = strict_json(repository.read_file(self.path, CONFIG_NAME))
        except ValueError as error:
            raise FormatError(f"not valid JSON: {error}", rule="C1", file=CONFIG_NAME) from None
        except FormatError as problem:
            raise FormatError(problem.message, rule="C1", file=CONFIG_NAME) from None
        self.config = config if isinstance(config, dict) else {}
        declared = self.config.get("quantization_config")
        if not isinstance(declared, dict):
            raise FormatError(
                "found no quantization_config, needed one: this is not a 4-bit checkpoint; convert it first",
                rule="C1",
                file=CONFIG_NAME,
            )
        method, bits = declared.get("quant_method"), declared.get("load_in_4bit")
        if method != "bitsandbytes" or bits is not True:
            raise FormatError(
                f"found quant_method {method!r} and load_in_4bit {bits!r}, needed 'bitsandbytes' and true",
                rule="C1",
                file=CONFIG_NAME,
            )

    def _read_manifest(self) -> None:
        try:
            data = repository.read_file(self.path, manifest.FILE_NAME)
        except FormatError as problem:
            raise FormatError(problem.message, rule="M1", file=manifest.FILE_NAME) from None
        self.manifest = manifest.parse(data)

    def _guard(self, step: Callable[[], None]) -> None:
        try:
            step()
        except FormatError as problem:
            self._report(problem)

    def _open_shard(self, name: str) -> None:
        try:
            reader = ShardReader(repository.resolve_file(self.path, name), name)
        except FormatError as problem:
            self._report(problem)
            return
        except OSError as error:
            self._report(FormatError(f"this file cannot be read: {error.strerror}", rule="R4", file=name))
            return
        self.shards[name] = reader
        for info in reader.header.tensors.values():
            other = self.tensors.get(info.name)
            if other:
                self._report(
                    FormatError(f"found here and in {other.shard}, needed once", rule="R5", tensor=info.name, file=name)
                )
            else:
                self.tensors[info.name] = StoredTensor(info, name)

    def _check_index(self, index: Mapping[str, str] | None, complete: bool) -> None:
        """Rule R5: the index and the shards name the same tensors."""
        if index is None:
            return
        for name, stored in self.tensors.items():
            if index.get(name) != stored.shard:
                says = f"the index says {index[name]}" if name in index else "the index does not name it"
                self._report(FormatError(f"found here, but {says}", rule="R5", tensor=name, file=stored.shard))
        for name, shard in index.items():
            if complete and name not in self.tensors:
                self._report(
                    FormatError(f"the index names it in {shard}, which lacks it", rule="R5", tensor=name, file=shard)
                )

    def _mark_transposed(self) -> None:
        if self.manifest is not None:
            turned = {entry.name for entry in self.manifest.weights if entry.transposed}
        else:
            quantized = [weight.name for weight in self.weights.values() if weight.quant_state is not None]
            turned = {name for name in quantized if selection.is_conv1d(self.config, name)}
        for name in turned & self.weights.keys():
            self.weights[name] = replace(self.weights[name], transposed=True)

    def _check_tables(self, name: str, state: QuantState) -> None:
        """Rules T5 and D2: the code tables on disk are the specified ones, bit for bit."""
        stored = f"{name}.quant_map"
        shard = self.tensors[stored].shard
        if self.read(stored) != CODEBOOKS[state.quant_type].values.tobytes():
            message = f"the table differs from the {state.quant_type} codebook"
            self._report(FormatError(message, rule="T5", tensor=stored, file=shard))
        if not state.nested:
            return
        stored = f"{name}.nested_quant_map"
        table: F32 = np.frombuffer(self.read(stored), dtype="<f4")
        if table.tobytes() == DYNAMIC8.tobytes():
            return
        if self.has_manifest or not _is_known_table(table):
            message = "the table differs from the 8-bit codebook"
            self._report(FormatError(message, rule="D2", tensor=stored, file=shard))
            return
        self.nested_maps[name] = table
        message = f"{int((table != DYNAMIC8).sum())} entries are as another bitsandbytes wrote them; decoded with them"
        self._report(FormatError(message, rule="D2", tensor=stored, file=shard), "note")


def _is_known_table(table: F32) -> bool:
    """Whether bitsandbytes wrote this 8-bit table, somewhere or some time (spec/format.md, section 17).

    Its CPU encoder once overwrote the first entry by -1.0; and without fused multiply-add torch computes some entries
    one or two units in the last place away.
    """
    units = np.abs(table.view(np.int32).astype(np.int64) - DYNAMIC8.view(np.int32))
    return bool((units[1:] <= 2).all() and (units[0] <= 2 or table[0] == -1))
