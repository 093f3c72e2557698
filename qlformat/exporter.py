"""Export a 4-bit checkpoint as an ordinary 16- or 32-bit model repository, streaming (`qlf export`)."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qlformat import codec, native, remote, repository
from qlformat.carried import carried_names
from qlformat.checkpoint import CHUNK_ELEMENTS, FLOAT_DTYPES, AnyArray, Checkpoint
from qlformat.errors import QlfError
from qlformat.plan import natural_key, shard_names, with_dtype
from qlformat.progress import Progress, ProgressMeter
from qlformat.shards import TORCH_NAMES, ShardWriter, TensorSpec
from qlformat.staging import Staging, require_space
from qlformat.stored import CONFIG_NAME
from qlformat.weights import Weight
from qlformat.workers import run_all

DEFAULT_SHARD_SIZE = 5_000_000_000
_MARGIN_BYTES = 16 << 20
_STORED_DTYPES = {torch_name: dtype for dtype, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        out: the new repository.
        dtype: of its floating-point tensors.
        seconds: wall time.
        base_bytes, output_bytes: sizes of the weight files.
        params: element count.
        files: names of the weight files.
        notes: what the user should know.
    """

    out: Path
    dtype: str
    seconds: float
    base_bytes: int
    output_bytes: int
    params: int
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report for --json."""
        return {
            "out": str(self.out),
            "dtype": self.dtype,
            "seconds": round(self.seconds, 3),
            "base_bytes": self.base_bytes,
            "output_bytes": self.output_bytes,
            "params": self.params,
            "files": list(self.files),
            "notes": list(self.notes),
        }


def export(
    base: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    shard_size: int = DEFAULT_SHARD_SIZE,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Write the dequantized model, which transformers loads like any other.

    Quantized weights are decoded, other floating-point tensors are cast, integers and bools stay; Conv1D weights are
    turned back to [in, out]. Tokenizer and other files are carried over.

    Args:
        base: directory of a 4-bit checkpoint, ours or bitsandbytes' own, or a Hub repository id.
        out: directory of the new repository.
        dtype: "bfloat16", "float16" or "float32".
        shard_size: most bytes of tensors in one file.
        threads: workers; all CPUs of the process by default.
        overwrite: replace a model that is at `out`.
        progress: called from the workers, under a lock.

    Raises:
        FormatError: the checkpoint breaks a structural rule, T4 or D1.
        TargetError: the output cannot be written; what was there before is untouched.
    """
    started = time.monotonic()
    if dtype not in FLOAT_DTYPES:
        raise QlfError(f"dtype {dtype!r} is not supported; use one of {', '.join(FLOAT_DTYPES)}")
    target = Path(out)
    with Checkpoint(remote.local_directory(base)) as checkpoint:
        with Staging(target, overwrite=overwrite, source=checkpoint.path) as staging:
            run = _Run(checkpoint, staging.path, dtype, shard_size, progress)
            run.execute(threads or native.default_threads())
            checkpoint.check_unchanged()
            staging.commit()
        return ExportReport(
            out=target,
            dtype=dtype,
            seconds=time.monotonic() - started,
            base_bytes=sum(reader.size for reader in checkpoint.shards.values()),
            output_bytes=sum((target / name).stat().st_size for name in run.names),
            params=sum(weight.elements for weight in checkpoint.weights.values()),
            files=tuple(run.names),
            notes=tuple(sorted(run.notes)),
        )


class _Run:
    """One export into a staging directory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: Path,
        dtype: str,
        shard_size: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._directory = directory
        self._dtype = dtype
        self._stop = threading.Event()
        self.notes: list[str] = []
        specs = {weight.name: self._spec(weight) for weight in checkpoint.weights.values()}
        self._total = sum(spec.nbytes for spec in specs.values())
        require_space(directory, self._total + _MARGIN_BYTES)
        self._meter = ProgressMeter(progress, len(specs), self._total, "exporting")
        placed = list(_place(list(specs.values()), shard_size))
        self.names = shard_names(len(placed))
        self._writers = [ShardWriter(directory / name, group) for name, group in zip(self.names, placed, strict=True)]
        self._home = {spec.name: i for i, group in enumerate(placed) for spec in group}

    def execute(self, threads: int) -> None:
        """Write every file of the repository."""
        try:
            self._write_weights(threads)
            for writer in self._writers:
                writer.finish()
        finally:
            for writer in self._writers:
                writer.close()
        self._carry()
        if len(self.names) > 1:
            shards = {name: self.names[home] for name, home in sorted(self._home.items())}
            self._write_json(repository.index_name(), {"metadata": {"total_size": self._total}, "weight_map": shards})
        config = {key: value for key, value in self._checkpoint.config.items() if key != "quantization_config"}
        if not {"dtype", "torch_dtype"} & config.keys():
            config["dtype"] = self._dtype
        self._write_json(CONFIG_NAME, with_dtype(config, self._dtype))

    def _spec(self, weight: Weight) -> TensorSpec:
        dtype = _STORED_DTYPES[self._checkpoint.decoded_dtype(weight, self._dtype)]
        return TensorSpec(weight.name, dtype, weight.shape[::-1] if weight.transposed else weight.shape)

    def _write_weights(self, threads: int) -> None:
        weights = self._checkpoint.weights.values()
        run_all([partial(self._write_weight, weight) for weight in weights], threads, self._stop)

    def _write_weight(self, weight: Weight) -> None:
        writer = self._writers[self._home[weight.name]]
        offset = 0
        finite = True
        for values in self._chunks(weight):
            if self._stop.is_set():
                return
            writer.write(weight.name, offset, values.reshape(-1).view(np.uint8).data)
            offset += values.nbytes
            # Only float16 has a smaller range than the dtypes that a source may have.
            finite &= self._dtype != "float16" or values.dtype != np.float16 or bool(np.isfinite(values).all())
            self._meter.add(values.nbytes)
        if not finite:
            self.notes.append(f"{weight.name}: values beyond the range of float16 became infinite; export to bfloat16")
        self._meter.add(0, 1)

    def _chunks(self, weight: Weight) -> Iterator[AnyArray]:
        if weight.transposed:  # small enough to be held whole: Conv1D is GPT-2's
            yield codec.transpose(self._checkpoint.dequantize(weight.name, self._dtype))
            return
        for first in range(0, weight.elements, CHUNK_ELEMENTS):
            last = min(first + CHUNK_ELEMENTS, weight.elements)
            yield self._checkpoint.decode(weight, first, last, self._dtype)

    def _carry(self) -> None:
        source = self._checkpoint.path
        for name in carried_names(self._checkpoint):
            target = self._directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository.resolve_file(source, name), target)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        (self._directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="ascii")


def _place(specs: Sequence[TensorSpec], shard_size: int) -> Iterator[list[TensorSpec]]:
    """Groups of at most `shard_size` bytes, in natural order of the names; a larger tensor has its own."""
    group: list[TensorSpec] = []
    used = 0
    for spec in sorted(specs, key=lambda spec: natural_key(spec.name)):
        if group and used + spec.nbytes > shard_size:
            yield group
            group, used = [], 0
        group.append(spec)
        used += spec.nbytes
    yield group
