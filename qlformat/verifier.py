"""Verify a checkpoint: structure, every rule, every hash, every decoded value, and with a source every code."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qlformat import manifest, native, remote, repository
from qlformat.checkpoint import CHUNK_ELEMENTS, Checkpoint
from qlformat.codebook import CODEBOOKS
from qlformat.consistency import check_consistency
from qlformat.errors import FormatError, QlfError
from qlformat.hashing import hash_file
from qlformat.layout import QuantState
from qlformat.progress import Progress, ProgressMeter
from qlformat.recompute import SourceComparison
from qlformat.source import open_source
from qlformat.stored import CONFIG_NAME
from qlformat.weights import Severity, Weight
from qlformat.workers import Stopped, run_all

ShardTensorHashes = Mapping[str, Mapping[str, str]]
"""Hexadecimal sha256 of stored tensors: name of the shard -> name of the tensor -> hash."""

# The least float32 that rounds to infinity.
_OVERFLOW = {"bfloat16": float.fromhex("0x1.ffp127"), "float16": 65520.0, "float32": float("inf")}


@dataclass(frozen=True)
class Finding:
    """Something that verify found.

    Attributes:
        rule: id of the rule concerned.
        severity: "error" for a broken rule, "note" for what could not be checked or is only worth knowing.
        message: what was found and what was needed, one line.
        tensor, file: where.
    """

    rule: str
    severity: Severity
    message: str
    tensor: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return str(QlfError(self.message, rule=self.rule, tensor=self.tensor, file=self.file))


def verify(
    path: str | Path,
    source: str | Path | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    decode: bool = True,
    stop: threading.Event | None = None,
    on_structure: Callable[[list[Finding]], ShardTensorHashes | None] | None = None,
) -> list[Finding]:
    """Check a checkpoint against every rule of the format. It is sound when no finding has severity "error".

    A plain bitsandbytes repository, without qlf.json, is checked as far as it goes; notes say what could not be.
    Memory is bounded by the threads' chunks, whatever the size of the model.

    Args:
        path: directory of the checkpoint, or a Hub repository id, which is downloaded.
        source: the 16-bit model it was made from (directory, file or repository id), to quantize it again and compare.
        threads: workers; all CPUs of the process by default.
        progress: called from the workers, under a lock.
        decode: decode every weight. False decodes those alone whose scales are so large that a value could be beyond
            the range of its dtype: the findings are the same, in half the time.
        stop: set it in another thread to give up.
        on_structure: called with what is found without reading the weights' bytes, before they are read; what it raises
            ends the check. It may return hashes of the stored tensors' bytes: they are not read for that again.

    Returns:
        The findings, errors first, in an order that does not depend on the threads.

    Raises:
        QlfError: there is no such checkpoint.
        SourceError: the source cannot be read.
        Stopped: `stop` was set.
    """
    findings = _Findings()
    with Checkpoint(remote.local_directory(path), findings.add) as checkpoint:
        check_consistency(checkpoint, findings.add)
        work = _Work(checkpoint, findings, progress, stop or threading.Event(), decode=decode)
        workers = threads or native.default_threads()
        if on_structure is not None:
            work.take_hashes(on_structure(findings.sorted()) or {})
        if source is None:
            work.run(workers)
        else:
            with open_source(source) as opened:
                work.compare(SourceComparison(checkpoint, opened, findings.add))
                work.run(workers)
    return findings.sorted()


class _Findings:
    """Collects findings from several threads."""

    def __init__(self) -> None:
        self._found: set[Finding] = set()
        self._lock = threading.Lock()

    def add(self, problem: QlfError, severity: Severity = "error") -> None:
        finding = Finding(problem.rule or "R4", severity, problem.message, problem.tensor, problem.file)
        with self._lock:
            self._found.add(finding)

    def sorted(self) -> list[Finding]:
        def key(finding: Finding) -> tuple[bool, str, str, str, str]:
            return (
                finding.severity != "error",
                finding.file or "",
                finding.tensor or "",
                finding.rule,
                finding.message,
            )

        return sorted(self._found, key=key)


class _Work:
    """The part of verify that reads all bytes: one task for each weight, each other tensor and each file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        findings: _Findings,
        progress: Callable[[Progress], None] | None,
        stop: threading.Event,
        *,
        decode: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._decode = decode
        self._report = findings.add
        self._manifest = checkpoint.manifest
        self._hashes: dict[str, str] = {}
        self._tasks: list[Callable[[], None]] = []
        self._progress = progress
        self._bytes = 0
        self._stop = stop
        self._plan()

    def _plan(self) -> None:
        checkpoint = self._checkpoint
        if self._manifest is not None:
            self._plan_files(self._manifest)
        elif not checkpoint.has_manifest:
            message = "there is no qlf.json: hashes, fingerprint and placement could not be checked"
            self._report(FormatError(message, rule="M1", file=manifest.FILE_NAME), "note")
        for name in checkpoint.tensors:
            weight = checkpoint.weights.get(name)
            if weight is not None and weight.quant_state is not None:
                self._tasks.append(partial(self._read_weight, weight, weight.quant_state))
            else:
                self._tasks.append(partial(self._read_tensor, name))
            self._bytes += checkpoint.tensors[name].info.nbytes

    def _plan_files(self, parsed: manifest.Manifest) -> None:
        for entry in parsed.files:
            self._tasks.append(partial(self._check_file, entry))
            self._bytes += entry.size if entry.sha256 is not None else 0
        listed = {entry.name for entry in parsed.files}
        found = self._checkpoint.weight_files
        owned = [CONFIG_NAME, *(found.names if found else ())]
        if found and found.index is not None:
            owned.append(repository.index_name())
        for name in owned:
            if name not in listed:
                self._report(FormatError("qlf.json does not list this file", rule="M6", file=name))
        others = sorted(_visible_files(self._checkpoint.path) - listed - set(owned) - {manifest.FILE_NAME})
        others = [name for name in others if not name.endswith(".safetensors") or "/" in name]
        if others:
            names = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
            message = f"it does not list {names}: not checked"
            self._report(FormatError(message, rule="M6", file=manifest.FILE_NAME), "note")

    def take_hashes(self, hashes: ShardTensorHashes) -> None:
        """Do without reading what somebody has hashed."""
        for name, stored in self._checkpoint.tensors.items():
            known = hashes.get(stored.shard, {}).get(name)
            if known is not None:
                self._hashes[name] = known

    def compare(self, comparison: SourceComparison) -> None:
        """Also compare with a source."""
        self._tasks += comparison.tasks(self._stop)
        self._bytes += comparison.bytes_total

    def run(self, threads: int) -> None:
        """Do everything; errors of reading become findings.

        Raises:
            Stopped: somebody asked for it.
        """
        self._meter = ProgressMeter(self._progress, len(self._tasks), self._bytes, "verifying")
        run_all([partial(self._do, task) for task in self._tasks], threads, self._stop)
        self._give_up_when_asked()
        self._check_fingerprint()

    def _give_up_when_asked(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _do(self, task: Callable[[], None]) -> None:
        self._give_up_when_asked()
        try:
            task()
        except FormatError as problem:
            self._report(problem)
        except OSError as error:
            message = f"cannot be read: {error.strerror or error}"
            self._report(FormatError(message, rule="R4", file=str(error.filename or "") or None))
        self._meter.add(0, 1)

    def _check_file(self, entry: manifest.FileEntry) -> None:
        if entry.sha256 is None:
            shard = self._checkpoint.shards.get(entry.name)
            if shard is None:
                return  # why it could not be opened is found already
            size, digest, needed = shard.size, hashlib.sha256(shard.header_bytes()).hexdigest(), entry.header_sha256
            what = "a header with sha256"  # the rest are its tensors' bytes (S5), which M5 is about
        else:
            size, digest = hash_file(repository.resolve_file(self._checkpoint.path, entry.name))
            needed, what = entry.sha256, "sha256"
            self._meter.add(size)
        if size != entry.size:
            message = f"found {size} bytes, qlf.json says {entry.size}; fetch it again"
        elif digest != needed:
            message = f"found {what} {digest}, qlf.json says {needed}; fetch it again"
        else:
            return
        self._report(FormatError(message, rule="M6", file=entry.name))

    def _read_tensor(self, name: str) -> None:
        """Hash a stored tensor other than packed bytes."""
        if name not in self._hashes:
            self._hashes[name] = self._checkpoint.tensor_sha256(name)
        self._meter.add(self._checkpoint.tensors[name].info.nbytes)

    def _read_weight(self, weight: Weight, state: QuantState) -> None:
        """Hash the packed bytes of a weight and decode them, in one pass; of one that is hashed already, what is left.

        A decoded value is a code of at most 1 times absmax, rounded once. Rounding keeps the order, so where absmax
        itself does not round to infinity no value does, and decoding can be left out.
        """
        checkpoint = self._checkpoint
        digest = hashlib.sha256()
        largest = self._check_scales(weight, state)
        decoded = largest is not None and (self._decode or largest >= _OVERFLOW[weight.dtype])
        finite = True
        hashed = weight.name in self._hashes
        chunks = range(0, state.elements, CHUNK_ELEMENTS)
        if hashed and not decoded:
            chunks = chunks[-1:]  # for the padding
            self._meter.add(chunks.start // 2)
        for first in chunks:
            last = min(first + CHUNK_ELEMENTS, state.elements)
            packed = checkpoint.read_part(weight.name, first // 2, -(-last // 2) - first // 2)
            if not hashed:
                digest.update(packed.data)
            self._give_up_when_asked()
            if decoded:
                finite &= _all_finite(checkpoint.decode_packed(weight, packed, first, last))
            if last == state.elements:
                self._check_padding(weight, state, int(packed[-1]))
            self._meter.add(packed.nbytes)
        if not finite:
            message = f"some values are beyond the range of {weight.dtype} and decode to infinity"
            self._bad("D1" if state.nested else "T4", message, weight.name, "note")
        if not hashed:
            self._hashes[weight.name] = digest.hexdigest()

    def _check_scales(self, weight: Weight, state: QuantState) -> float | None:
        """The largest absmax of a weight; None when one is not sound, and a finding says so."""
        largest = 0.0
        try:
            for first in range(0, state.blocks, CHUNK_ELEMENTS):
                absmax = self._checkpoint.absmax(weight, first, min(first + CHUNK_ELEMENTS, state.blocks))
                largest = max(largest, float(np.abs(absmax).max(initial=0.0)))
        except FormatError as problem:
            self._report(problem)
            return None
        return largest

    def _check_padding(self, weight: Weight, state: QuantState, last_byte: int) -> None:
        needed = CODEBOOKS[state.quant_type].zero_code
        if weight.elements % 2 and last_byte & 0xF != needed:
            message = f"the pad nibble is {last_byte & 0xF}, needed {needed}, the code of zero"
            # bitsandbytes pads as it likes; readers never look at it.
            self._bad("T8", message, weight.name, "error" if self._checkpoint.has_manifest else "note")

    def _check_fingerprint(self) -> None:
        """Rules M5 and M7, from the hashes of all tensors."""
        if self._manifest is None:
            return
        checkpoint = self._checkpoint
        for entry in self._manifest.tensors:
            found = self._hashes.get(entry.name)
            if found is not None and found != entry.sha256:
                self._bad("M5", f"found sha256 {found}, qlf.json says {entry.sha256}; fetch it again", entry.name)
        recorded = self._manifest.fingerprint
        listed = manifest.fingerprint((e.name, e.dtype, e.shape, e.sha256) for e in self._manifest.tensors)
        if listed != recorded:
            self._bad_fingerprint(f"the tensors that it lists have fingerprint {listed}, it says {recorded}")
        # Without all shards the bytes have no fingerprint; what is wrong with the shards is found already.
        complete = checkpoint.weight_files is not None and len(checkpoint.shards) == len(checkpoint.weight_files.names)
        if complete and self._hashes.keys() == checkpoint.tensors.keys():
            infos = [stored.info for stored in checkpoint.tensors.values()]
            stored = manifest.fingerprint((i.name, i.dtype, i.shape, self._hashes[i.name]) for i in infos)
            if stored not in (recorded, listed):
                self._bad_fingerprint(f"the stored tensors have fingerprint {stored}, it says {recorded}")

    def _bad_fingerprint(self, message: str) -> None:
        self._report(FormatError(message, rule="M7", file=manifest.FILE_NAME))

    def _bad(self, rule: str, message: str, tensor: str, severity: Severity = "error") -> None:
        shard = self._checkpoint.tensors[tensor].shard
        self._report(FormatError(message, rule=rule, tensor=tensor, file=shard), severity)


def _all_finite(values: npt.NDArray[np.generic]) -> bool:
    if values.dtype == np.uint16:  # bfloat16 bits: an exponent of ones
        return not bool(((values.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(values).all())


def _visible_files(directory: Path) -> set[str]:
    """Relative names of all files but hidden ones (rule M6 is silent on .git and the like)."""
    found = set()
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        found |= {Path(parent, name).relative_to(directory).as_posix() for name in names if not name.startswith(".")}
    return found
