"""Open a 4-bit checkpoint, ours or bitsandbytes' own: names, weights, bytes and decoded values, read lazily."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat import codec, manifest, native, reference
from qlformat.errors import FormatError, QlfError
from qlformat.layout import NESTED_BLOCKSIZE, QuantState
from qlformat.lazy import LazyWeight
from qlformat.stored import StoredCheckpoint
from qlformat.weights import Weight

CHUNK_ELEMENTS = 1 << 20
"""Elements decoded at a time: a multiple of every blocksize times 256, small enough for the CPU caches."""
_HASH_CHUNK = 1 << 20

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
AnyArray = npt.NDArray[np.generic]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "bool": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"<{kind[0]}{bits // 8}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
"""torch name -> NumPy dtype of its elements; bfloat16 is held as its bits."""

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
_CASTABLE = (*FLOAT_DTYPES, "float64")


def dtype_name(dtype: object) -> str:
    """The torch name of a dtype to decode to, given as a name, a torch.dtype or one of NumPy's.

    Raises:
        QlfError: it is none of FLOAT_DTYPES.
    """
    known = isinstance(dtype, np.dtype) or (isinstance(dtype, type) and issubclass(dtype, np.generic))
    name = np.dtype(dtype).name if known else str(dtype).removeprefix("torch.")  # type: ignore[call-overload]
    if name not in FLOAT_DTYPES:
        raise QlfError(f"dtype {dtype!r} is not supported; use one of {', '.join(FLOAT_DTYPES)}")
    return str(name)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: one with qlf.json, or a plain 4-bit repository written by bitsandbytes.

    Only headers, config.json, qlf.json and the quant_state and code table tensors are read.

    Args:
        path: the repository's directory.

    Raises:
        FormatError: the first broken rule among S, R1 to R5, C1, M1 to M3, M9, T1 to T7, T9 and D1 to D3.
        QlfError: there is no such directory.
    """
    return Checkpoint(path)


class Checkpoint(StoredCheckpoint):
    """An open checkpoint: a StoredCheckpoint that decodes.

    Safe to share between threads; a context manager.

        with open_checkpoint("out") as checkpoint:
            weight = checkpoint["model.layers.0.mlp.down_proj.weight"]     # nothing is decoded yet
            weight.shape, weight.dtype, weight[0:128], weight.astype("float32")[-1]
    """

    def __getitem__(self, name: str) -> LazyWeight:
        """The weight of this name, to be decoded whole or in rows; QlfError when there is none."""
        return LazyWeight(self, self.weight(name))

    def __contains__(self, name: object) -> bool:
        """Whether there is a weight of this name."""
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        """The names of the weights."""
        return iter(self.weights)

    def __len__(self) -> int:
        """Number of weights."""
        return len(self.weights)

    def tensor_sha256(self, name: str) -> str:
        """Hexadecimal sha256 of the bytes of a stored tensor."""
        digest = hashlib.sha256()
        size = self.tensors[name].info.nbytes
        for offset in range(0, size, _HASH_CHUNK):
            digest.update(self.read_part(name, offset, min(_HASH_CHUNK, size - offset)).data)
        return digest.hexdigest()

    def fingerprint(self, threads: int | None = None) -> str:
        """The fingerprint, computed from the bytes of all tensors (the manifest is not asked)."""
        names = list(self.tensors)
        with ThreadPoolExecutor(threads or native.default_threads()) as pool:
            hashes = list(pool.map(self.tensor_sha256, names))
        infos = [self.tensors[name].info for name in names]
        return manifest.fingerprint((i.name, i.dtype, i.shape, h) for i, h in zip(infos, hashes, strict=True))

    def weight(self, name: str) -> Weight:
        """The weight of this name.

        Raises:
            QlfError: there is none.
        """
        found = self.weights.get(name)
        if found is None:
            raise QlfError("the checkpoint has no such weight", tensor=name)
        return found

    def dequantize(self, name: str, dtype: str | None = None, rows: tuple[int, int] | None = None) -> AnyArray:
        """A weight, or some rows of it, decoded.

        Args:
            name: name of the weight.
            dtype: "float32", "float16" or "bfloat16"; the weight's own by default. Tensors of integers and bools
                keep their dtype.
            rows: (first, end) of the first dimension; all by default.

        Returns:
            The logical shape (the rows asked for), float32 or float16; bfloat16 as uint16 bits.

        Raises:
            FormatError: T4 or D1, an absmax is not finite or negative; S5, the file was written to since it was opened.
        """
        weight = self.weight(name)
        shape = weight.shape
        start, end = 0, weight.elements
        if rows is not None:
            if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise QlfError(f"rows {rows} were asked for, the shape is {list(shape)}", tensor=name)
            width = weight.elements // shape[0] if shape[0] else 0
            start, end = rows[0] * width, rows[1] * width
            shape = (rows[1] - rows[0], *shape[1:])
        out = np.empty(end - start, dtype=NUMPY_DTYPES[self.decoded_dtype(weight, dtype)])
        for first in range(start, end, CHUNK_ELEMENTS):
            last = min(first + CHUNK_ELEMENTS, end)
            out[first - start : last - start] = self.decode(weight, first, last, dtype)
        self.check_unchanged()
        return out.reshape(shape)

    def iter_dequantized(
        self, name: str, dtype: str | None = None, chunk_elements: int = CHUNK_ELEMENTS
    ) -> Iterator[AnyArray]:
        """The decoded elements of a weight in row-major order, in flat arrays of at most `chunk_elements`.

        Dtypes and errors are those of `dequantize`; memory is bounded by the chunk.
        """
        weight = self.weight(name)
        for first in range(0, weight.elements, chunk_elements):
            values = self.decode(weight, first, min(first + chunk_elements, weight.elements), dtype)
            self.check_unchanged()
            yield values

    def decode(self, weight: Weight, first: int, last: int, dtype: str | None = None) -> AnyArray:
        """Elements [first, last) of a weight, flat; see `dequantize`."""
        state = weight.quant_state
        if state is None:
            source = NUMPY_DTYPES[weight.dtype]
            raw = self.read_part(weight.name, first * source.itemsize, (last - first) * source.itemsize)
            return cast(raw.view(source), weight.dtype, self.decoded_dtype(weight, dtype))
        begin = first - first % state.blocksize  # even: blocksizes are
        packed = self.read_part(weight.name, begin // 2, -(-last // 2) - begin // 2)
        return self.decode_packed(weight, packed, begin, last, dtype)[first - begin :]

    def decode_packed(self, weight: Weight, packed: U8, first: int, last: int, dtype: str | None = None) -> AnyArray:
        """Elements [first, last) of a quantized weight from its packed bytes; `first` begins a block."""
        state = _state(weight)
        absmax = self.absmax(weight, first // state.blocksize, -(-last // state.blocksize))
        return codec.dequantize(
            packed,
            absmax,
            last - first,
            quant_type=state.quant_type,
            blocksize=state.blocksize,
            dtype=self.decoded_dtype(weight, dtype),
        )

    def absmax(self, weight: Weight, first: int, last: int) -> F32:
        """Decoded absmax of blocks [first, last) of a quantized weight, float32.

        Raises:
            FormatError: T4 or D1, a stored value is not finite or negative.
        """
        state = _state(weight)
        name = f"{weight.name}.absmax"
        if not state.nested:
            values: F32 = self.read_part(name, first * 4, (last - first) * 4).view("<f4")
            self.check_scales(values, "T4", name)
            return values
        begin = first // NESTED_BLOCKSIZE
        codes, nested = self.nested_scales(weight, begin * NESTED_BLOCKSIZE, last)
        offset = np.float32(state.nested_offset)
        table = self.nested_maps.get(weight.name)
        if table is None:
            decoded = codec.double_dequantize(codes, nested, offset)
        else:  # an older bitsandbytes wrote another table than the specified one; its own table is the right one
            decoded = table[codes] * np.repeat(nested, NESTED_BLOCKSIZE)[: codes.size] + offset
        return decoded[first - begin * NESTED_BLOCKSIZE :]

    def nested_scales(self, weight: Weight, first: int, last: int) -> tuple[U8, F32]:
        """What double quantization stores for blocks [first, last): codes uint8, and nested_absmax float32 for them.

        Args:
            weight: a double-quantized weight.
            first: begins a nested block.
            last: end, at most the number of blocks.

        Raises:
            FormatError: D1, a nested_absmax is not finite or negative.
        """
        codes = self.read_part(f"{weight.name}.absmax", first, last - first)
        name, begin = f"{weight.name}.nested_absmax", first // NESTED_BLOCKSIZE
        nested: F32 = self.read_part(name, begin * 4, (-(-last // NESTED_BLOCKSIZE) - begin) * 4).view("<f4")
        self.check_scales(nested, "D1", name)
        return codes, nested

    def decoded_dtype(self, weight: Weight, dtype: str | None) -> str:
        """The torch name of what `decode` gives for this weight when `dtype` is asked for."""
        wanted = None if dtype is None else dtype_name(dtype)
        return wanted if wanted is not None and weight.dtype in _CASTABLE else weight.dtype

    def check_scales(self, values: F32, rule: str, tensor: str) -> None:
        """Refuse scales of a stored tensor that are not finite or negative: FormatError with this rule."""
        bad = ~(np.isfinite(values) & ~(values < 0))
        if bad.any():
            found = values[bad][0]
            raise FormatError(
                f"found {found} among the scales, needed finite values that are not negative; fetch it again",
                rule=rule,
                tensor=tensor,
                file=self.tensors[tensor].shard,
            )


def cast(values: AnyArray, source: str, target: str) -> AnyArray:
    """Elements of one torch dtype as another, nearest with ties to even; NaN stays NaN. bfloat16 as uint16 bits."""
    if source == target:
        return values
    with np.errstate(over="ignore"):  # beyond the target's range the nearest value is infinity
        wide = reference.to_float32(values, source)
        if target != "bfloat16":
            return wide.astype(NUMPY_DTYPES[target])
    narrow = reference.from_float32(wide, target).view(np.uint16)
    narrow[np.isnan(wide)] = 0x7FC0
    return narrow


def _state(weight: Weight) -> QuantState:
    if weight.quant_state is None:
        raise QlfError("this weight is not quantized", tensor=weight.name)
    return weight.quant_state
