"""Decode the weights of a checkpoint into memory that the caller has allocated, on all processors.

Files are read, not mapped: a mapped file that another process cuts short would end this one. The bytes go through a
buffer for each thread that stays in the processor's cache, so reading costs no second pass over memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from qlformat import codec, free_memory, native
from qlformat.casting import cast_into
from qlformat.checkpoint import NUMPY_DTYPES, U8, AnyArray, Checkpoint
from qlformat.errors import QlfError
from qlformat.first_touch import FirstTouch, Output
from qlformat.layout import QuantState
from qlformat.weights import Weight

PIECE_ELEMENTS = 1 << 21
"""Elements that one thread takes at a time: a multiple of every blocksize times 256; 1 MiB of packed bytes."""

_PIECES_AHEAD = 16
"""How far the system reads ahead of the pieces being decoded; without it the disk would wait for the decoder."""
_SHOWN_NAMES = 5


def chosen_weights(checkpoint: Checkpoint, names: Iterable[str] | None) -> list[Weight]:
    """The weights of these names, all by default, in the order in which they are stored.

    Raises:
        QlfError: a name is not in the checkpoint; the message has the ones most like it.
    """
    if names is None:
        return list(checkpoint.weights.values())
    wanted = {names} if isinstance(names, str) else set(names)
    unknown = sorted(str(name) for name in wanted if name not in checkpoint.weights)
    if unknown:
        close = get_close_matches(unknown[0], checkpoint.weights, n=_SHOWN_NAMES, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {len(checkpoint.weights)} others"
        more = f" (and {len(unknown) - 1} more names)" if len(unknown) > 1 else ""
        if _is_tied_head(checkpoint, unknown[0]):
            hint = "this model's output embedding is tied: the input embedding is stored for both"
        raise QlfError(f"{checkpoint.path}: found no weight named {unknown[0]!r}{more}; {hint}")
    return [weight for name, weight in checkpoint.weights.items() if name in wanted]


def _is_tied_head(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith("lm_head.weight") and checkpoint.config.get("tie_word_embeddings", True) is True


def decoded_bytes(checkpoint: Checkpoint, weights: Iterable[Weight], dtype: str | None) -> int:
    """Memory that these weights take when they are decoded."""
    return sum(w.elements * NUMPY_DTYPES[checkpoint.decoded_dtype(w, dtype)].itemsize for w in weights)


def out_of_memory(
    checkpoint: Checkpoint, weight: Weight, weights: Iterable[Weight], dtype: str | None, where: str = "cpu"
) -> QlfError:
    """The error for a weight whose memory could not be had."""
    needed, total = decoded_bytes(checkpoint, [weight], dtype), decoded_bytes(checkpoint, weights, dtype)
    return QlfError(
        f"out of memory on {where}: {needed} bytes for this weight could not be had, all of them need {total}; "
        "load fewer with names=, use a smaller dtype, or keep the model in 4 bits",
        tensor=weight.name,
    )


def require_memory(checkpoint: Checkpoint, weights: Iterable[Weight], dtype: str | None) -> None:
    """Refuse to begin what cannot end: a system that overcommits memory would kill the process half way.

    Raises:
        QlfError: the decoded weights are larger than what the machine, or the control group, has left with its swap.
    """
    free, needed = free_memory.on_host(), decoded_bytes(checkpoint, weights, dtype)
    if free is not None and needed > free.size + free_memory.swap():
        raise QlfError(
            f"out of memory on cpu: the weights need {needed} bytes, {free.of} has {free.size} left; load fewer with "
            "names=, use a smaller dtype, or keep the model in 4 bits"
        )


def thread_count(threads: int | None) -> int:
    """How many threads to use: those asked for, or all processors of this process.

    Raises:
        QlfError: not a positive whole number.
    """
    if threads is None:
        return native.default_threads()
    if not isinstance(threads, int) or threads < 1:
        raise QlfError(f"found threads={threads!r}, needed a whole number of at least 1, or None for all processors")
    return threads


def model_shape(weight: Weight) -> tuple[int, ...]:
    """Shape of the weight in the 16-bit model: that of the quant_state, or turned around for a Conv1D."""
    return weight.shape[::-1] if weight.transposed else weight.shape


def decode_weights(
    checkpoint: Checkpoint,
    outputs: Mapping[str, AnyArray],
    dtype: str | None = None,
    threads: int | None = None,
) -> None:
    """Decode weights, in parallel over all of them and inside each.

    Args:
        checkpoint: open.
        outputs: name -> C-contiguous array of the weight's `model_shape` and of the NumPy dtype that belongs to
            `checkpoint.decoded_dtype(weight, dtype)`. No other thread may use them meanwhile.
        dtype: "float32", "float16", "bfloat16", or None for each weight's own.
        threads: all processors of this process by default. The result does not depend on it.

    Raises:
        FormatError: T4 or D1, a scale is negative or not finite; S5, a file changed while it was read. The outputs then
            hold anything.
    """
    count = thread_count(threads)
    stop = threading.Event()
    touch = FirstTouch()
    pieces: list[_Piece] = []
    for weight in checkpoint.weights.values():
        if weight.name in outputs:
            job = _Job(checkpoint, weight, outputs[weight.name], checkpoint.decoded_dtype(weight, dtype), touch)
            pieces += job.pieces()

    def run(index: int) -> None:
        if stop.is_set():
            return
        for later in pieces[index + _PIECES_AHEAD : index + _PIECES_AHEAD + 1]:
            later.prefetch()
        pieces[index].run()

    for piece in pieces[:_PIECES_AHEAD]:
        piece.prefetch()
    with ThreadPoolExecutor(count, thread_name_prefix="qlf") as pool:
        futures = [pool.submit(run, index) for index in range(len(pieces))]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:  # also an interruption by the user
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    checkpoint.check_unchanged()


class _Job:
    """One weight on its way into its output."""

    def __init__(self, checkpoint: Checkpoint, weight: Weight, output: AnyArray, dtype: str, touch: FirstTouch) -> None:
        self._checkpoint = checkpoint
        self._weight = weight
        self._dtype = dtype
        self._output = output
        self._flat = output.reshape(-1)
        self._memory: Output = touch.output(output.ctypes.data, output.nbytes)

    def pieces(self) -> list[_Piece]:
        """The work, in parts that may run at the same time."""
        count = self._weight.elements
        step = max(count, 1) if self._weight.transposed else PIECE_ELEMENTS
        return [_Piece(self, first, min(first + step, count)) for first in range(0, count, step)]

    def prefetch(self, first: int, last: int) -> None:
        """Have the bytes of elements [first, last) read in the background."""
        begin, end = self._stored_offset(first), self._stored_offset(last)
        self._checkpoint.prefetch(self._weight.name, begin, end - begin)

    def run(self, first: int, last: int) -> None:
        """Decode elements [first, last)."""
        if self._weight.transposed:
            self._transposed()
            return
        out = self._flat[first:last]
        self._memory.populate(out.ctypes.data, out.nbytes)
        self._decode(first, out)

    def _stored_offset(self, element: int) -> int:
        if self._weight.quant_state is not None:
            return -(-element // 2)
        return element * NUMPY_DTYPES[self._weight.dtype].itemsize

    def _transposed(self) -> None:
        """Conv1D, GPT-2's: small enough to be held whole."""
        whole = np.empty(self._weight.elements, dtype=self._flat.dtype)
        for first in range(0, whole.size, PIECE_ELEMENTS):
            self._decode(first, whole[first : first + PIECE_ELEMENTS])
        self._output[...] = codec.transpose(whole.reshape(self._weight.shape))

    def _decode(self, first: int, out: AnyArray) -> None:
        """Fill `out` with the elements from `first` on."""
        name, state = self._weight.name, self._weight.quant_state
        if state is not None:
            packed = _buffer(-(-out.size // 2))
            self._checkpoint.read_into(name, first // 2, packed.data)
            self._unpack(packed, state, first, out)
            return
        source = NUMPY_DTYPES[self._weight.dtype]
        if self._weight.dtype == self._dtype:
            self._checkpoint.read_into(name, first * source.itemsize, out.view(np.uint8).data)
            return
        raw = _buffer(out.size * source.itemsize)
        self._checkpoint.read_into(name, first * source.itemsize, raw.data)
        cast_into(raw.view(source), self._weight.dtype, out, self._dtype)

    def _unpack(self, packed: U8, state: QuantState, first: int, out: AnyArray) -> None:
        """Decode with the scales of just these blocks; a piece begins a nested block."""
        begin, end = first // state.blocksize, -(-(first + out.size) // state.blocksize)
        how: dict[str, Any] = {
            "quant_type": state.quant_type, "blocksize": state.blocksize, "dtype": self._dtype, "out": out
        }  # fmt: skip
        if state.nested_offset is not None and self._weight.name not in self._checkpoint.nested_maps:
            codes, nested = self._checkpoint.nested_scales(self._weight, begin, end)
            codec.dequantize_nested(packed, codes, nested, state.nested_offset, out.size, **how)
        else:
            codec.dequantize(packed, self._checkpoint.absmax(self._weight, begin, end), out.size, **how)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements [first, last) of one weight."""

    job: _Job
    first: int
    last: int

    def prefetch(self) -> None:
        self.job.prefetch(self.first, self.last)

    def run(self) -> None:
        self.job.run(self.first, self.last)


_local = threading.local()


def _buffer(size: int) -> U8:
    """`size` bytes that belong to this thread, the same ones each time."""
    buffer: U8 | None = getattr(_local, "buffer", None)
    if buffer is None or buffer.size < size:
        buffer = _local.buffer = np.empty(size, dtype=np.uint8)
    return buffer[:size]
