"""One merge into a staging directory: weights in parallel, the same bytes for any number of threads, resumable."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qlformat import __version__
from qlformat.hashing import hash_file
from qlformat.journal import Journal, StoredWeight
from qlformat.manifest import FILE_NAME as MANIFEST_NAME
from qlformat.manifest import FileEntry, Manifest, TensorEntry, WeightEntry, fingerprint
from qlformat.manifest import Source as SourceEntry
from qlformat.merge.base import Base
from qlformat.merge.checksum import PageSums
from qlformat.merge.direct_shard import DirectShardWriter
from qlformat.merge.figures import Kept
from qlformat.merge.merged import MergedFile
from qlformat.merge.planning import MergePlan
from qlformat.merge.stream import MergedStream
from qlformat.plan import Item, natural_key
from qlformat.progress import Progress, ProgressMeter
from qlformat.repository import index_name
from qlformat.shards import ShardWriter
from qlformat.staging import require_space
from qlformat.tensor_stream import Rounded

if TYPE_CHECKING:
    from qlformat.calibration.engine import Calibration

_MARGIN_BYTES = 16 << 20
_DIRECT_BYTES = 256 << 20
"""Outputs from this size on are written past the page cache."""
_DIRECT_WORKERS = 2
"""Workers for each thread then: while one waits for the disk, another computes."""


class Run:
    """Writes the merged model; see `execute`.

    Args:
        base: what is carried over comes from it.
        file: the merged weights.
        plan: what is written.
        changed: names of the weights that adapters change.
        directory: to write in.
        key: identity of the merge, for the journal.
        progress: called from the workers, under a lock.
        calibrated: chooses the codes of the decoder layers, for feedback rounding.
    """

    def __init__(
        self,
        base: Base,
        file: MergedFile,
        plan: MergePlan,
        changed: frozenset[str],
        directory: Path,
        key: str,
        progress: Callable[[Progress], None] | None,
        calibrated: Calibration | None = None,
    ) -> None:
        self._base, self._plan, self._changed = base, plan, changed
        self._calibrated = calibrated
        self._directory = directory
        self.journal = Journal(directory, key)
        if not self.journal.done:
            require_space(directory, plan.output_bytes + _MARGIN_BYTES)
        total = sum(item.tensor.nbytes for item in plan.items)
        self._meter = ProgressMeter(progress, len(plan.items), total, "merging")
        direct = plan.output_bytes >= _DIRECT_BYTES
        writer = DirectShardWriter if direct else ShardWriter
        self._workers = _DIRECT_WORKERS if direct else 1
        self._writers = [
            writer(directory / name, plan.shard_specs(shard)) for shard, name in enumerate(plan.shard_names)
        ]
        # Without a manifest they are for --resume alone.
        digest = PageSums if plan.quantized is None else hashlib.sha256
        self._stream = MergedStream(directory, self._writers, self._meter, plan.dtypes, digest, file, changed)
        self._lock = threading.Lock()
        self._pending = Counter(item.shard for item in plan.items)
        self._stored: dict[str, StoredWeight] = {}
        self._kept: dict[str, Kept] = {}
        self._shard_files: dict[str, FileEntry] = {}

    @property
    def kept(self) -> list[Kept]:
        """The figures of the changed weights, in natural order."""
        return [self._kept[name] for name in sorted(self._kept, key=natural_key)]

    def execute(self, threads: int) -> None:
        """Write the shards, the files carried over, the index and config.json.

        Raises:
            SourceError: E1, a merged weight to be quantized is not finite.
        """
        try:
            self._run_calibration()
            self._run_workers(threads)
        finally:
            self.journal.close()
            self._stream.close()
            for writer in self._writers:
                writer.close()
        for name, path in self._base.carried:
            target = self._directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        if len(self._writers) > 1:
            (self._directory / index_name()).write_bytes(self._index())
        (self._directory / "config.json").write_bytes(self._plan.config)

    def publish(self, report: Mapping[str, bytes]) -> Manifest | None:
        """Write the files of the report, and qlf.json for a 4-bit result; may be called again with another report."""
        for name, data in report.items():
            (self._directory / name).write_bytes(data)
        if self._plan.quantized is None:
            return None
        manifest = self._manifest(sorted(report))
        (self._directory / MANIFEST_NAME).write_bytes(manifest.to_json())
        return manifest

    def _run_calibration(self) -> None:
        """Store the weights of the decoder layers as their codes come."""
        if self._calibrated is None:
            return
        items = {item.name: item for item in self._plan.items}
        self._meter.enter("calibrating")
        for rounded in self._calibrated.run():
            self._write(items[rounded.name], rounded)
        self._meter.enter("merging")

    def _run_workers(self, threads: int) -> None:
        left = [item for item in self._plan.items if item.name not in self._stored]
        self._stream.run([partial(self._write, item) for item in left], self._workers * threads)

    def _write(self, item: Item, rounded: Rounded | None = None) -> None:
        stored = self.journal.done.get(item.name)
        if stored is None or not self._stream.is_intact(item, stored):
            stored = self._stream.write(item, rounded)
            self.journal.add(stored)
        kept = self._stream.measured(item, stored) if item.name in self._changed else None
        with self._lock:
            self._stored[item.name] = stored
            if kept is not None:
                self._kept[item.name] = kept
            self._pending[item.shard] -= 1
            last = self._pending[item.shard] == 0
        if last:
            name = self._plan.shard_names[item.shard]
            size, digest = self._writers[item.shard].finish()
            self._shard_files[name] = FileEntry(name, size, None, digest)

    def _index(self) -> bytes:
        shards = {spec.name: self._plan.shard_names[item.shard] for item in self._plan.items for spec in item.specs}
        total = sum(writer.path.stat().st_size - writer.data_start for writer in self._writers)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shards.items()))}
        return (json.dumps(index, indent=2) + "\n").encode()

    def _manifest(self, report: list[str]) -> Manifest:
        plan = self._plan.quantized
        if plan is None:
            raise TypeError("a 16-bit result has no manifest")
        items = sorted(self._plan.items, key=lambda item: natural_key(item.name))
        tensors = [entry for item in items for entry in self._tensor_entries(item)]
        names = [*self._plan.shard_names, *(name for name, _ in self._base.carried)]
        names += [index_name()] if len(self._writers) > 1 else []
        names += ["config.json", *report]
        return Manifest(
            writer=f"qlformat {__version__}",
            source=SourceEntry(),
            recipe=plan.recipe,
            skip=plan.skip,
            tensors=tuple(tensors),
            weights=tuple(self._weight_entry(item) for item in items),
            files=tuple(self._file_entry(name) for name in names),
            calibration=asdict(self._calibrated.record) if self._calibrated else None,
            fingerprint=fingerprint((t.name, t.dtype, t.shape, t.sha256) for t in tensors),
        )

    def _file_entry(self, name: str) -> FileEntry:
        return self._shard_files.get(name) or FileEntry(name, *hash_file(self._directory / name))

    def _tensor_entries(self, item: Item) -> list[TensorEntry]:
        stored = self._stored[item.name]
        shard = self._plan.shard_names[item.shard]
        late = (len(stored.quant_state.encode()),) if stored.quant_state is not None else ()
        return [
            TensorEntry(spec.name, spec.dtype, late if spec.late else spec.shape, shard, stored.sha256[spec.name])
            for spec in item.specs
        ]

    def _weight_entry(self, item: Item) -> WeightEntry:
        stored, dtype = self._stored[item.name], self._plan.dtypes[item.name]
        if item.state is None:
            return WeightEntry(item.name, "none", dtype, item.tensor.shape, item.reason)
        error = max(stored.squared_error, 0.0)
        relative = math.sqrt(error / stored.signal) if stored.signal else 0.0
        rms = math.sqrt(error / item.elements)
        return WeightEntry(
            name=item.name,
            encoding=item.state.quant_type,
            dtype=dtype,
            shape=item.state.shape,
            reason=item.reason,
            transposed=item.transpose,
            rms_error=float(f"{rms:.6g}"),
            relative_error=float(f"{relative:.6g}"),
        )
