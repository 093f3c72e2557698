"""Convert a 16- or 32-bit model to an NF4 + double-quantized checkpoint: plan, check everything, then stream.

Workers take whole tensors and move them in chunks: read, quantize, hash, write. Memory is bounded by the chunks and
the absmax of the tensors in work, whatever the size of the model, and the bytes do not depend on the worker count.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat import __version__
from qlformat.calibration.settings import CalibrationSettings
from qlformat.errors import FormatError, SourceError, TargetError
from qlformat.hashing import FileHasher, hash_file
from qlformat.journal import FILE_NAME as JOURNAL_NAME
from qlformat.journal import Journal, StoredWeight
from qlformat.layout import Recipe
from qlformat.manifest import FILE_NAME as MANIFEST_NAME
from qlformat.manifest import FileEntry, Manifest, TensorEntry, WeightEntry, fingerprint, parse
from qlformat.manifest import Source as SourceEntry
from qlformat.plan import Item, Plan, make_plan, natural_key, output_config
from qlformat.progress import Progress, ProgressMeter
from qlformat.repository import index_name
from qlformat.shards import TORCH_NAMES, ShardWriter
from qlformat.source import Source, open_source
from qlformat.staging import LOCK_NAME, Staging, require_space
from qlformat.tensor_stream import Rounded, TensorStream

if TYPE_CHECKING:
    from qlformat.calibration.engine import Calibration

EXPERT_REASON = "fused-experts"
"""Reason of selection.py for experts, stacked or stored one by one."""
DEFAULT_SHARD_SIZE = 5_000_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MARGIN_BYTES = 16 << 20
_LARGE_BYTES = 64 << 20
"""Weights of this size and more come first: one that is begun last leaves the other cores without work."""
"""Space asked for beyond the tensors: headers, JSON files and what is carried over."""


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        out: the finished checkpoint.
        manifest: content of its qlf.json.
        seconds: wall time.
        source_bytes, output_bytes: sizes of the weight files.
        total_params, quantized_params: element counts.
        bits_per_weight: bits of packed, absmax and nested_absmax for each quantized weight (paper, section 3).
        unquantized: reason -> element count of the weights kept as they were, the largest first.
        notes: what the user should know, the most important first.
    """

    out: Path
    manifest: Manifest
    seconds: float
    source_bytes: int
    output_bytes: int
    total_params: int
    quantized_params: int
    bits_per_weight: float
    unquantized: Mapping[str, int]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report for --json."""
        return {
            "out": str(self.out),
            "fingerprint": self.manifest.fingerprint,
            "seconds": round(self.seconds, 3),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "total_params": self.total_params,
            "quantized_params": self.quantized_params,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "unquantized": dict(self.unquantized),
            "notes": list(self.notes),
        }


def convert(
    src: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    skip: Sequence[str] = (),
    shard_size: int = DEFAULT_SHARD_SIZE,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    hash_source: bool = False,
    calibration: str | Path | None = None,
    calibration_settings: CalibrationSettings | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Quantize a model and write a checkpoint that transformers, vLLM and bitsandbytes load.

    Args:
        src: directory, .safetensors or .bin file, or Hub repository id (see source.open_source).
        out: directory of the new checkpoint.
        recipe: how to quantize; NF4, blocksize 64 and double quantization by default.
        skip: globs of tensor or module names to leave unquantized.
        shard_size: most bytes of tensors in one output file.
        threads: workers; all CPUs of the process by default.
        resume: go on with what an interrupted conversion of the same source left behind.
        overwrite: replace a model that is at `out`.
        hash_source: record the sha256 of the source's files, which takes about as long as all the rest. Files in the
            Hub cache carry theirs in their name, so these are recorded always.
        calibration: a UTF-8 text, or a directory of texts: codes and scales are chosen by what they do to the outputs
            of the layers on it, which takes minutes rather than seconds (docs/calibration.md). The format is the same.
        calibration_settings: how, the defaults when None.
        progress: called from the workers, under a lock.

    Raises:
        SourceError, FormatError: the source cannot be converted.
        TargetError: the output cannot be written; what was there before is untouched.
    """
    started = time.monotonic()
    with open_source(src) as source:
        plan = make_plan(source, recipe or Recipe(), skip, shard_size)
        calibrated = None
        if calibration is not None:
            calibrated = _calibration(source, plan, Path(calibration), calibration_settings or CalibrationSettings())
        target = Path(out)
        record = asdict(calibrated.record) if calibrated else None
        finished = _finished(plan, target, record) if resume else None
        replace = overwrite or finished is not None
        with Staging(target, overwrite=replace, resume=resume, source=source.directory) as staging:
            staging.keep = staging.resumed
            run = _Run(source, plan, staging, hash_source, progress, calibrated)
            staging.keep = True
            try:
                manifest = run.execute(threads or len(os.sched_getaffinity(0)))
                source.check_unchanged()
            except (SourceError, FormatError):
                staging.keep = False  # the source is at fault: there is nothing to resume
                raise
            if finished is not None and finished == manifest.to_json():
                _remove_leftovers(target)  # an earlier run had got as far as its last rename
                staging.keep = False
            elif finished is not None and not overwrite:
                staging.keep = False
                raise TargetError(
                    f"{target}: holds a conversion of another source; choose another target or --overwrite"
                )
            else:
                run.journal.remove()
                staging.commit()
    return _report(source, plan, manifest, target, started)


class _Run:
    """One conversion into a staging directory."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        staging: Staging,
        hash_source: bool,
        progress: Callable[[Progress], None] | None,
        calibrated: Calibration | None = None,
    ) -> None:
        self.source = source
        self.plan = plan
        self.directory = staging.path
        self.journal = Journal(staging.path, _journal_key(source, plan, calibrated))
        if not self.journal.done:  # what is resumed has its space already
            require_space(staging.path, plan.output_bytes + _MARGIN_BYTES)
        self._meter = ProgressMeter(progress, len(plan.items), sum(item.tensor.nbytes for item in plan.items))
        self._source_sha256 = _hub_cache_hashes(source)
        wanted = hash_source and not self._source_sha256
        self._hashers = {name: FileHasher(path) for name, path in source.files} if wanted else {}
        self._writers = [
            ShardWriter(staging.path / name, plan.shard_specs(shard)) for shard, name in enumerate(plan.shard_names)
        ]
        self._stream = TensorStream(staging.path, self._writers, self._meter)
        self._lock = threading.Lock()
        self._calibrated = calibrated
        self._pending = Counter(item.shard for item in plan.items)
        self._stored: dict[str, StoredWeight] = {}
        self._shard_files: dict[int, FileEntry] = {}

    def execute(self, threads: int) -> Manifest:
        """Write every file of the checkpoint into the staging directory, qlf.json last."""
        try:
            self._run_calibration()
            self._run_workers(threads)
        finally:
            self._close()
        self._meter.enter("finishing")
        files = [self._shard_files[shard] for shard in range(len(self._writers))]
        files += [self._carry(name, path) for name, path in self.source.carried]
        if len(self._writers) > 1:
            files.append(self._write(index_name(), self._index()))
        files.append(self._write("config.json", output_config(self.source.config, self.plan)))
        manifest = self._manifest(files)
        self._write(MANIFEST_NAME, manifest.to_json())
        return manifest

    def _close(self) -> None:
        self.journal.close()
        self._stream.close()
        for hasher in self._hashers.values():
            hasher.close()
        for writer in self._writers:
            writer.close()

    def _run_calibration(self) -> None:
        """Store the weights of the decoder layers as they come; --resume computes them again, and writes the rest."""
        if self._calibrated is None:
            return
        items = {item.name: item for item in self.plan.items}
        self._meter.enter("calibrating")
        for rounded in self._calibrated.run():
            self._convert(items[rounded.name], rounded)
        self._meter.enter("converting")

    def _run_workers(self, threads: int) -> None:
        left = [item for item in self.plan.items if item.name not in self._stored]
        left.sort(key=lambda item: item.tensor.nbytes // _LARGE_BYTES, reverse=True)
        tasks: list[Callable[[], None]] = [partial(self._convert, item) for item in left]
        tasks += [partial(self._finish_source, name) for name in self._hashers]
        self._stream.run(tasks, threads)

    def _convert(self, item: Item, rounded: Rounded | None = None) -> None:
        stored = self.journal.done.get(item.name)
        if stored is None or not self._stream.is_intact(item, stored):
            stored = self._stream.write(item, rounded)
            self.journal.add(stored)
        if item.tensor.file in self._hashers:
            self._hashers[item.tensor.file].advance(item.tensor.reader.end_position(item.tensor.info))
        with self._lock:
            self._stored[item.name] = stored
            self._pending[item.shard] -= 1
            last = self._pending[item.shard] == 0
        if last:
            self._finish_shard(item.shard)

    def _finish_shard(self, shard: int) -> None:
        writer = self._writers[shard]
        self._stream.release_buffers()  # the header of a large shard takes their place
        size, digest = writer.finish()
        writer.flush()
        self._shard_files[shard] = FileEntry(self.plan.shard_names[shard], size, None, digest)

    def _finish_source(self, name: str) -> None:
        self._source_sha256[name] = self._hashers[name].finish(self._stream.stop)

    def _carry(self, name: str, path: Path) -> FileEntry:
        target = self.directory / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        return FileEntry(name, *hash_file(target))

    def _write(self, name: str, data: bytes) -> FileEntry:
        (self.directory / name).write_bytes(data)
        return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())

    def _index(self) -> bytes:
        shards = {spec.name: self.plan.shard_names[item.shard] for item in self.plan.items for spec in item.specs}
        total = sum(entry.size for entry in self._shard_files.values()) - sum(w.data_start for w in self._writers)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shards.items()))}
        return (json.dumps(index, indent=2) + "\n").encode()

    def _manifest(self, files: Sequence[FileEntry]) -> Manifest:
        items = sorted(self.plan.items, key=lambda item: natural_key(item.name))
        tensors = [entry for item in items for entry in self._tensor_entries(item)]
        sizes = {name: path.stat().st_size for name, path in self.source.files}
        sources = [FileEntry(name, sizes[name], digest) for name, digest in sorted(self._source_sha256.items())]
        return Manifest(
            writer=f"qlformat {__version__}",
            source=SourceEntry(self.source.repo_id, self.source.revision, tuple(sources)),
            recipe=self.plan.recipe,
            skip=self.plan.skip,
            tensors=tuple(tensors),
            weights=tuple(_weight_entry(item, self._stored[item.name]) for item in items),
            files=tuple(files),
            calibration=asdict(self._calibrated.record) if self._calibrated else None,
            fingerprint=fingerprint((t.name, t.dtype, t.shape, t.sha256) for t in tensors),
        )

    def _tensor_entries(self, item: Item) -> list[TensorEntry]:
        stored = self._stored[item.name]
        shard = self.plan.shard_names[item.shard]
        late = (len(stored.quant_state.encode()),) if stored.quant_state is not None else ()
        return [
            TensorEntry(spec.name, spec.dtype, late if spec.late else spec.shape, shard, stored.sha256[spec.name])
            for spec in item.specs
        ]


def _calibration(source: Source, plan: Plan, text: Path, settings: CalibrationSettings) -> Calibration:
    from qlformat.calibration.engine import Calibration, source_tensors  # they lead to torch and transformers
    from qlformat.calibration.texts import read_texts, windows

    texts = read_texts(text)
    states = {item.name: item.state for item in plan.items if item.state}
    context = source.config.get("max_position_embeddings") or source.config.get("n_positions")
    chosen = windows(texts, source.directory, context, settings)
    return Calibration(source.directory, source.tensors, states, source_tensors(source), chosen, texts.sha256, settings)


def _journal_key(source: Source, plan: Plan, calibrated: Calibration | None) -> str:
    key = plan.key(source)
    return key if calibrated is None else f"{key} {json.dumps(asdict(calibrated.record))}"


def _weight_entry(item: Item, stored: StoredWeight) -> WeightEntry:
    dtype = TORCH_NAMES[item.tensor.dtype]
    if item.state is None:
        return WeightEntry(item.name, "none", dtype, item.tensor.shape, item.reason)
    relative = math.sqrt(max(stored.squared_error, 0.0) / stored.signal) if stored.signal else 0.0
    rms = math.sqrt(max(stored.squared_error, 0.0) / item.elements)
    return WeightEntry(
        name=item.name,
        encoding=item.state.quant_type,
        dtype=dtype,
        shape=item.state.shape,
        reason=item.reason,
        transposed=item.transpose,
        rms_error=_six_digits(rms),
        relative_error=_six_digits(relative),
    )


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _finished(plan: Plan, out: Path, calibration: dict[str, Any] | None) -> bytes | None:
    """qlf.json at `out` when it may be the result of this very conversion, interrupted after its last rename."""
    try:
        data = (out / MANIFEST_NAME).read_bytes()
        manifest = parse(data)
    except (OSError, FormatError):
        return None
    same = (manifest.recipe, manifest.skip, manifest.writer) == (plan.recipe, plan.skip, f"qlformat {__version__}")
    return data if same and manifest.calibration == calibration else None


def _remove_leftovers(out: Path) -> None:
    """Files of the staging that an interruption just before their removal left behind."""
    for leftover in (LOCK_NAME, JOURNAL_NAME):
        (out / leftover).unlink(missing_ok=True)


def _hub_cache_hashes(source: Source) -> dict[str, str]:
    """Name -> sha256 of the weight files, when all lie in the Hub cache under their hashes; else nothing."""
    blobs = {name: path for name, path in source.files if path.parent.name == "blobs" and _SHA256.fullmatch(path.name)}
    return {name: path.name for name, path in blobs.items()} if len(blobs) == len(source.files) else {}


def _report(source: Source, plan: Plan, manifest: Manifest, out: Path, started: float) -> Report:
    unquantized: Counter[str] = Counter()
    for item in plan.items:
        if item.state is None:
            unquantized[item.reason] += item.elements
    total = sum(item.elements for item in plan.items)
    quantized = [item for item in plan.items if item.state]
    params = sum(item.elements for item in quantized)
    counted = ("U8", "F32")
    stored = sum(
        spec.nbytes
        for item in quantized
        for spec in item.specs
        if spec.dtype in counted and not spec.late and not spec.name.endswith("quant_map")
    )
    return Report(
        out=out,
        manifest=manifest,
        seconds=time.monotonic() - started,
        source_bytes=sum(path.stat().st_size for _, path in source.files),
        output_bytes=sum(entry.size for entry in manifest.files if entry.name.endswith(".safetensors")),
        total_params=total,
        quantized_params=params,
        bits_per_weight=8 * stored / params,
        unquantized=dict(unquantized.most_common()),
        notes=(*_calibration_note(manifest), *_expert_note(unquantized, total), *plan.selection.notes, *source.notes),
    )


def _calibration_note(manifest: Manifest) -> list[str]:
    used = manifest.calibration
    return [f"calibrated on {used['samples']} windows of {used['window']} tokens"] if used else []


def _expert_note(unquantized: Mapping[str, int], total: int) -> list[str]:
    experts = unquantized.get(EXPERT_REASON, 0)
    if not experts:
        return []
    share = f"{experts / total:.1%} of the weights are fused experts, which bitsandbytes cannot quantize"
    return [f"{share}: they stay in 16 bit, as they do when transformers quantizes this model"]
