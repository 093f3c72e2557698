"""Summarize a model from its headers: what is quantized, how, in how many bits, and what is not and why.

Only headers, config.json, qlf.json and the quant_state tensors are read, so a repository on the Hub costs a few
range requests. A 16-bit model is summarized too: what a conversion would quantize.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlformat import manifest, remote, repository, shards
from qlformat.errors import FormatError, QlfError
from qlformat.layout import MAX_QUANT_STATE_BYTES, QUANT_STATE_PREFIX, QuantState, Recipe, split_companion, strict_json
from qlformat.selection import Selection, select
from qlformat.source import TORCH_DTYPES
from qlformat.stored import CONFIG_NAME
from qlformat.weights import StoredTensor, Weight, find_weights

_FIRST_FETCH = 32 << 10
"""Bytes asked for at once from the start of a file; most headers fit."""
_CODED = ("", ".absmax", ".nested_absmax")
"""Parts of a weight that grow with it; the code tables and the quant_state JSON are constants."""


@dataclass(frozen=True)
class TensorRow:
    """One weight.

    Attributes:
        encoding: quant_type, or "none"; for a 16-bit model the one that a conversion would give it.
        dtype: torch name of the dtype it decodes to.
        nbytes: bytes stored for it now, companions included.
        reason: why it is quantized or not, a key of selection.py.
        relative_error: of the quantization, from qlf.json.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    shard: str
    reason: str
    relative_error: float | None = None

    @property
    def elements(self) -> int:
        """Element count."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Summary:
    """What the headers of a model say.

    Attributes:
        name: path or repository id.
        format: "qlf 1", "bitsandbytes 4-bit", or "16-bit" or "32-bit" for a model that is not quantized.
        architecture, model_type: from config.json.
        total_params, quantized_params: element counts; for a 16-bit model, what would be quantized.
        stored_bytes: size of all weight files.
        bits_per_weight: bits of packed, absmax and nested_absmax for each quantized weight (paper, section 3).
        stored_bits_per_weight: the same with the code tables and quant_states, which are constants for each tensor.
        converted_bytes: for a 16-bit model, bytes of the tensors after a conversion by the default recipe.
        unquantized: reason -> element count of what is not quantized, the largest first.
        fingerprint, writer: from qlf.json.
        source: repository and commit it was made from, from qlf.json.
        shards: weight file -> size in bytes.
        tensors: one row for each weight.
        notes: what could not be known.
        fetched_bytes: bytes of file content that were fetched from the Hub; None for a directory.
    """

    name: str
    format: str
    repo_id: str | None
    revision: str | None
    architecture: str | None
    model_type: str | None
    total_params: int
    quantized_params: int
    stored_bytes: int
    bits_per_weight: float | None
    stored_bits_per_weight: float | None
    converted_bytes: int | None
    unquantized: Mapping[str, int]
    recipe: Recipe | None
    fingerprint: str | None
    writer: str | None
    source: str | None
    shards: Mapping[str, int]
    tensors: tuple[TensorRow, ...] = field(repr=False)
    notes: tuple[str, ...]
    fetched_bytes: int | None = None

    @property
    def unquantized_share(self) -> float:
        """Share of the parameters that are not quantized, 0 to 1."""
        return 1 - self.quantized_params / self.total_params if self.total_params else 0.0

    def as_dict(self, *, tensors: bool = False) -> dict[str, Any]:
        """The summary for --json."""
        found = {**asdict(self), "unquantized_share": self.unquantized_share}
        if not tensors:
            del found["tensors"]
        return found


def summarize(path: str | Path) -> Summary:
    """Summarize a directory or a Hub repository ("ORG/NAME", "ORG/NAME@revision"), 4-bit or 16-bit.

    Raises:
        FormatError: the first broken structural rule.
        QlfError: there is no such model, it is quantized in another format, or the Hub cannot be reached.
    """
    return _Summarizer(remote.open_files(path)).summary()


class _Summarizer:
    def __init__(self, files: remote.Files) -> None:
        self._files = files
        self._config = _json_object(files, CONFIG_NAME)
        self._manifest: manifest.Manifest | None = None
        if manifest.FILE_NAME in files.sizes:
            self._manifest = manifest.parse(files.read(manifest.FILE_NAME))
        self._four_bit = self._is_four_bit()
        self._names = self._shard_names()
        self._tensors = self._read_headers()
        states = self._read_states()
        self._weights = find_weights(self._tensors, states.__getitem__)
        self._selection: Selection = select(self._config, {w.name: w.shape for w in self._weights.values()})

    def summary(self) -> Summary:
        """Everything that is known."""
        rows = tuple(self._row(weight) for weight in self._weights.values())
        left: Counter[str] = Counter()
        for row in rows:
            if row.encoding == "none":
                left[row.reason] += row.elements
        quantized = [row for row in rows if row.encoding != "none"]
        params = sum(row.elements for row in quantized)
        specs = self._specs(quantized)
        coded = sum(nbytes for suffix, nbytes in specs if suffix in _CODED)
        stored = sum(nbytes for _, nbytes in specs)
        architectures = self._config.get("architectures")
        parsed = self._manifest
        return Summary(
            name=self._files.name,
            format=self._format(),
            repo_id=self._files.repo_id,
            revision=self._files.revision,
            architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
            model_type=str(self._config["model_type"]) if "model_type" in self._config else None,
            total_params=sum(row.elements for row in rows),
            quantized_params=params,
            stored_bytes=sum(self._files.sizes[name] for name in self._names),
            bits_per_weight=8 * coded / params if params else None,
            stored_bits_per_weight=8 * stored / params if params else None,
            converted_bytes=None
            if self._four_bit
            else stored + sum(row.nbytes for row in rows if row.encoding == "none"),
            unquantized=dict(left.most_common()),
            recipe=self._recipe(),
            fingerprint=parsed.fingerprint if parsed else None,
            writer=parsed.writer if parsed else None,
            source=_source_name(parsed),
            shards={name: self._files.sizes[name] for name in self._names},
            tensors=rows,
            notes=self._notes(),
            fetched_bytes=getattr(self._files, "transferred", None),
        )

    def _format(self) -> str:
        if self._manifest is not None:
            return f"qlf {self._manifest.format_version}"
        if self._four_bit:
            return "bitsandbytes 4-bit"
        wide = sum(w.elements for w in self._weights.values() if w.dtype in ("float32", "float64"))
        return "32-bit" if 2 * wide > sum(w.elements for w in self._weights.values()) else "16-bit"

    def _is_four_bit(self) -> bool:
        declared = self._config.get("quantization_config")
        if not isinstance(declared, dict):
            return self._manifest is not None
        method = declared.get("quant_method")
        if method == "bitsandbytes" and declared.get("load_in_4bit") is True:
            return True
        raise QlfError(
            f"{self._files.name}: the model is quantized with {method!r}, needed a 16-bit or bitsandbytes 4-bit model"
        )

    def _shard_names(self) -> list[str]:
        sizes = self._files.sizes
        single, index = "model.safetensors", repository.index_name()
        if (single in sizes) == (index in sizes):
            if any(name.endswith(".bin") for name in sizes) and single not in sizes:
                raise QlfError(f"{self._files.name}: found .bin weights, whose headers cannot be read; convert them")
            found = "both" if single in sizes else "neither"
            raise FormatError(f"found {found} of {single} and {index}, needed exactly one of them", rule="R1")
        if single in sizes:
            return [single]
        names = sorted(set(repository.parse_index(self._files.read(index), index).values()))
        for name in names:
            if name not in sizes:
                raise FormatError("this file is missing; fetch the repository again", rule="R4", file=name)
        return names

    def _read_headers(self) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        self._data_starts: dict[str, int] = {}
        for name in self._names:
            size = self._files.sizes[name]
            (start,) = self._files.read_ranges(name, [(0, min(size, _FIRST_FETCH))])
            length = shards.header_length(start[:8], size, name)
            if len(start) < 8 + length:
                start += self._files.read_ranges(name, [(len(start), 8 + length)])[0]
            header = shards.parse_header(start[8 : 8 + length], size, name)
            self._data_starts[name] = header.data_start
            for info in header.tensors.values():
                if info.name in tensors:
                    other = tensors[info.name].shard
                    raise FormatError(f"found here and in {other}, needed once", rule="R5", tensor=info.name, file=name)
                tensors[info.name] = StoredTensor(info, name)
        return tensors

    def _read_states(self) -> dict[str, bytes]:
        """Bytes of all quant_states, fetched together for each shard."""
        found: dict[str, bytes] = {}
        for shard in self._names:
            wanted = []
            for name, stored in self._tensors.items():
                companion = split_companion(name) if stored.shard == shard else None
                is_state = companion is not None and companion[1].startswith(QUANT_STATE_PREFIX)
                if is_state and stored.info.nbytes <= MAX_QUANT_STATE_BYTES:
                    wanted.append(stored.info)
            start = self._data_starts[shard]
            ranges = [(start + info.begin, start + info.end) for info in wanted]
            for info, data in zip(wanted, self._files.read_ranges(shard, ranges), strict=True):
                found[info.name] = data
        return found

    def _row(self, weight: Weight) -> TensorRow:
        stored = self._tensors[weight.name]
        decision = self._selection.decisions[weight.name]
        encoding, nbytes, error, reason = "none", stored.info.nbytes, None, decision.reason
        if weight.quant_state is not None:
            encoding = weight.quant_state.quant_type
            nbytes = sum(self._tensors[name].info.nbytes for name in weight.quant_state.tensor_specs(weight.name))
        elif not self._four_bit and decision.quantize:
            encoding = Recipe().quant_type if stored.info.dtype in TORCH_DTYPES else "none"
        if self._manifest is not None:
            recorded = self._recorded().get(weight.name)
            reason = recorded.reason if recorded else reason
            error = recorded.relative_error if recorded else None
        elif weight.quant_state is None and self._four_bit and decision.quantize:
            reason = "skipped"  # whoever made it had a reason that is not written down
        return TensorRow(weight.name, encoding, weight.shape, weight.dtype, nbytes, stored.shard, reason, error)

    def _recorded(self) -> dict[str, manifest.WeightEntry]:
        if not hasattr(self, "_recorded_weights"):
            entries = self._manifest.weights if self._manifest else ()
            self._recorded_weights = {entry.name: entry for entry in entries}
        return self._recorded_weights

    def _specs(self, rows: list[TensorRow]) -> list[tuple[str, int]]:
        """(suffix, bytes) of every tensor stored, or to be stored, for the quantized weights."""
        recipe = Recipe()
        found = []
        for row in rows:
            state = self._weights[row.name].quant_state or QuantState(
                recipe.quant_type, recipe.blocksize, row.dtype, row.shape, 0.0
            )
            for name, (dtype, shape) in state.tensor_specs(row.name).items():
                stored = self._tensors.get(name) if self._four_bit else None
                nbytes = stored.info.nbytes if stored else math.prod(shape) * shards.DTYPE_BITS[dtype] // 8
                found.append((name.removeprefix(row.name), nbytes))
        return found

    def _recipe(self) -> Recipe | None:
        """The recipe of qlf.json, or the one that all quant_states share; the default for a 16-bit model."""
        if self._manifest is not None:
            return self._manifest.recipe
        if not self._four_bit:
            return Recipe()
        states = [weight.quant_state for weight in self._weights.values() if weight.quant_state]
        found = {(state.quant_type, state.blocksize, state.nested) for state in states}
        declared = self._config.get("quantization_config") or {}
        compute = declared.get("bnb_4bit_compute_dtype") if isinstance(declared, dict) else None
        if len(found) != 1 or compute not in TORCH_DTYPES.values():
            return None
        return Recipe(*found.pop(), str(compute))

    def _notes(self) -> tuple[str, ...]:
        notes = [] if self._four_bit else [f"not quantized yet: a conversion would write {Recipe().quant_type}"]
        if self._four_bit and self._manifest is None:
            notes.append("no qlf.json: fingerprint, errors and the source are not known")
        if self._manifest is None:
            notes += self._selection.notes
        return tuple(notes)


def _json_object(files: remote.Files, name: str) -> dict[str, Any]:
    try:
        config = strict_json(files.read(name))
    except ValueError as error:
        raise FormatError(f"not valid JSON: {error}", rule="C1", file=name) from None
    if not isinstance(config, dict):
        raise FormatError(f"found a JSON {type(config).__name__}, needed an object", rule="C1", file=name)
    return config


def _source_name(parsed: manifest.Manifest | None) -> str | None:
    if parsed is None or parsed.source.repo_id is None:
        return None
    revision = f"@{parsed.source.revision}" if parsed.source.revision else ""
    return f"{parsed.source.repo_id}{revision}"
