"""What adapters are merged onto: a 4-bit checkpoint or a 16-bit model, as float32 values of any piece of a weight."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qlformat import codec, native, native_merge, remote, repository
from qlformat.carried import carried_names
from qlformat.casting import cast_into
from qlformat.checkpoint import FLOAT_DTYPES, NUMPY_DTYPES, AnyArray, Checkpoint
from qlformat.errors import QlfError
from qlformat.layout import Recipe, element_count, strict_json
from qlformat.manifest import FileEntry
from qlformat.shards import TORCH_NAMES
from qlformat.source import Source, SourceTensor, cached_identity, open_source
from qlformat.weights import Weight

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """A weight as the 16-bit model has it.

    Attributes:
        name: on disk.
        shape: of the 16-bit model: [in, out] for a Conv1D, else [out, in] for a layer.
        dtype: torch name; of a 4-bit weight the one it decodes to.
        quantized: stored in 4 bits.
        stored_as: name of the stored weight; another than `name` for the output embedding of a model that was tied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantized: bool = False
    stored_as: str = ""

    @property
    def elements(self) -> int:
        """Element count."""
        return element_count(self.shape)


class Base:
    """Weights to merge onto. Safe to share between threads; a context manager.

    Attributes:
        path: the directory.
        config: config.json without its quantization_config.
        weights: by name on disk, in the order of the files.
        fingerprint: of a 4-bit checkpoint, else None.
        recipe: of a 4-bit checkpoint, else None.
        carried: (relative name, path) of tokenizer and other files.
        repo_id, revision: Hub repository, or None.
        made_from: {"repo_id", "revision"} of the model that a 4-bit checkpoint was made from, where qlf.json names it.
    """

    path: Path
    config: dict[str, Any]
    weights: dict[str, BaseWeight]
    fingerprint: str | None = None
    recipe: Recipe | None = None
    carried: list[tuple[str, Path]]
    repo_id: str | None = None
    revision: str | None = None
    made_from: dict[str, str | None] | None = None

    def __init__(self) -> None:
        self._local = threading.local()

    def read(self, weight: BaseWeight, first: int, last: int) -> F32:
        """Elements [first, last) of a floating-point weight as float32, flat.

        The array belongs to the calling thread and is overwritten by its next call.
        """
        raise NotImplementedError

    def elements(self, weight: BaseWeight, first: int, last: int) -> tuple[AnyArray, str]:
        """Elements [first, last) and their dtype: as they are stored, or decoded to float32. They live as `read`'s."""
        return self.read(weight, first, last), "float32"

    def copy(self, weight: BaseWeight, offset: int, buffer: memoryview) -> None:
        """Bytes of a weight that is not quantized, as they are stored."""
        raise NotImplementedError

    def files(self) -> list[FileEntry]:
        """Name and size of the weight files (and their hash where it costs nothing)."""
        raise NotImplementedError

    def untie(self, head: str, embedding: str) -> None:
        """Give the output embedding a weight of its own, a copy of the input embedding."""
        found = self.weights[embedding]
        self.weights[head] = BaseWeight(head, found.shape, found.dtype, found.quantized, embedding)
        self.config = {**self.config, "tie_word_embeddings": False}

    def check_unchanged(self) -> None:
        """Raise FormatError when somebody has written to the files since they were opened."""
        raise NotImplementedError

    def close(self) -> None:
        """Close every file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scratch(self, use: str, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes of this thread, the same ones each time."""
        found: npt.NDArray[np.uint8] | None = getattr(self._local, use, None)
        if found is None or found.size < size:
            found = np.empty(size, dtype=np.uint8)
            setattr(self._local, use, found)
        return found[:size]


def open_base(path: str | Path) -> Base:
    """Open a base: a 4-bit checkpoint when its config.json says so, else a 16- or 32-bit model.

    Raises:
        QlfError: it is neither, or is damaged.
    """
    directory = Path(path)
    if directory.is_file():
        return PlainBase(open_source(directory))
    directory = remote.local_directory(path)
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise QlfError(f"{directory}: found an adapter, needed the base model; give the adapter with --adapter")
    try:
        config = strict_json(repository.read_file(directory, "config.json"))
    except ValueError as error:
        raise QlfError(f"not valid JSON: {error}", file="config.json") from None
    declared = config.get("quantization_config") if isinstance(config, dict) else None
    if isinstance(declared, dict) and declared.get("quant_method") == "bitsandbytes":
        return QuantizedBase(Checkpoint(directory))
    return PlainBase(open_source(directory))


class PlainBase(Base):
    """A 16- or 32-bit model."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self.path = source.directory
        self.config = dict(source.config)
        self.repo_id, self.revision = source.repo_id, source.revision
        self.carried = source.carried
        self.weights = {}
        for tensor in source.tensors.values():
            dtype = TORCH_NAMES.get(tensor.dtype)
            if dtype is None or dtype.startswith(("float8", "complex")):
                raise QlfError(f"found dtype {tensor.dtype}, needed float32, float16 or bfloat16", tensor=tensor.name)
            self.weights[tensor.name] = BaseWeight(tensor.name, tensor.shape, dtype, False, tensor.name)

    def read(self, weight: BaseWeight, first: int, last: int) -> F32:
        """Elements [first, last) as float32."""
        raw, dtype = self.elements(weight, first, last)
        if dtype == "float32":
            return raw.view(np.float32)
        return widen(raw, dtype, self._scratch("values", (last - first) * 4).view(np.float32))

    def elements(self, weight: BaseWeight, first: int, last: int) -> tuple[AnyArray, str]:
        """Elements [first, last) as they are stored."""
        stored = NUMPY_DTYPES[weight.dtype]
        raw = self._scratch("raw", (last - first) * stored.itemsize).view(stored)
        self._tensor(weight).read_into(first * stored.itemsize, raw.data.cast("B"))
        return raw, weight.dtype

    def copy(self, weight: BaseWeight, offset: int, buffer: memoryview) -> None:
        """Bytes as they are."""
        self._tensor(weight).read_into(offset, buffer)

    def files(self) -> list[FileEntry]:
        """Sizes; hashing them would take about as long as the merge."""
        return [FileEntry(name, path.stat().st_size, None) for name, path in self._source.files]

    def check_unchanged(self) -> None:
        """Raise FormatError when somebody has written to the files since they were opened."""
        self._source.check_unchanged()

    def close(self) -> None:
        """Close every file."""
        self._source.close()

    def _tensor(self, weight: BaseWeight) -> SourceTensor:
        return self._source.tensors[weight.stored_as]


class QuantizedBase(Base):
    """A 4-bit checkpoint, ours or bitsandbytes' own."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self.repo_id, self.revision = cached_identity(checkpoint.path)
        self.config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        manifest = checkpoint.manifest
        self.fingerprint = manifest.fingerprint if manifest else checkpoint.fingerprint()
        states = [weight.quant_state for weight in checkpoint.weights.values() if weight.quant_state is not None]
        declared = str(checkpoint.config["quantization_config"].get("bnb_4bit_compute_dtype", "bfloat16"))
        compute = declared if declared in FLOAT_DTYPES else "bfloat16"
        if manifest is not None:
            self.recipe = manifest.recipe
            origin = manifest.source
            self.made_from = {"repo_id": origin.repo_id, "revision": origin.revision} if origin.repo_id else None
        elif states:
            self.recipe = Recipe(states[0].quant_type, states[0].blocksize, states[0].nested, compute)
        self.carried = [(name, repository.resolve_file(self.path, name)) for name in carried_names(checkpoint)]
        self.weights = {}
        for weight in checkpoint.weights.values():
            shape = weight.shape[::-1] if weight.transposed else weight.shape
            quantized = weight.quant_state is not None
            self.weights[weight.name] = BaseWeight(weight.name, shape, weight.dtype, quantized, weight.name)

    def read(self, weight: BaseWeight, first: int, last: int) -> F32:
        """Elements [first, last) as float32, decoded with one rounding (spec/format.md, section 9)."""
        stored = self.checkpoint.weights[weight.stored_as]
        if stored.quant_state is None:
            return self._plain(stored, first, last)
        if stored.transposed:
            return self._turned(stored)[first:last].copy()  # the caller may change what it gets
        return self._decode(stored, first, last)

    def copy(self, weight: BaseWeight, offset: int, buffer: memoryview) -> None:
        """Bytes of a weight that is not quantized."""
        self.checkpoint.read_into(weight.stored_as, offset, buffer)

    def files(self) -> list[FileEntry]:
        """Of the manifest, or sizes."""
        if self.checkpoint.manifest is not None:
            return [entry for entry in self.checkpoint.manifest.files if entry.name.endswith(".safetensors")]
        return [FileEntry(reader.name, reader.size, None) for reader in self.checkpoint.shards.values()]

    def check_unchanged(self) -> None:
        """Raise FormatError when somebody has written to the files since they were opened."""
        self.checkpoint.check_unchanged()

    def close(self) -> None:
        """Close every file."""
        self.checkpoint.close()

    def _plain(self, stored: Weight, first: int, last: int) -> F32:
        dtype = NUMPY_DTYPES[stored.dtype]
        raw = self._scratch("raw", (last - first) * dtype.itemsize).view(dtype)
        self.checkpoint.read_into(stored.name, first * dtype.itemsize, raw.data.cast("B"))
        return raw if stored.dtype == "float32" else widen(raw, stored.dtype, self._floats(last - first))

    def _floats(self, count: int) -> F32:
        return self._scratch("values", count * 4).view(np.float32)

    def _decode(self, stored: Weight, first: int, last: int) -> F32:
        state = stored.quant_state
        if state is None:
            raise QlfError("this weight is not quantized", tensor=stored.name)
        begin = first - first % state.blocksize
        packed = self._scratch("raw", -(-last // 2) - begin // 2)
        self.checkpoint.read_into(stored.name, begin // 2, packed.data)
        absmax = self.checkpoint.absmax(stored, begin // state.blocksize, -(-last // state.blocksize))
        out = self._floats(last - begin)
        codec.dequantize(
            packed, absmax, last - begin, quant_type=state.quant_type, blocksize=state.blocksize, dtype="float32",
            out=out,
        )  # fmt: skip
        return out[first - begin :]

    def _turned(self, stored: Weight) -> F32:
        """A Conv1D weight as the model has it, [in, out], flat; it is held whole."""
        held: tuple[str, F32] | None = getattr(self._local, "turned", None)
        if held is None or held[0] != stored.name:
            whole: AnyArray = self.checkpoint.dequantize(stored.name, "float32")
            held = (stored.name, codec.transpose(whole).reshape(-1))
            self._local.turned = held
        return held[1]


def widen(raw: AnyArray, dtype: str, out: F32) -> F32:
    """16-bit elements as float32, exactly."""
    if native.available():
        native_merge.convert(raw, dtype, out, "float32")
    else:
        cast_into(raw, dtype, out, "float32")
    return out


def sizes(base: Mapping[str, BaseWeight]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: weight.shape for name, weight in base.items()}
