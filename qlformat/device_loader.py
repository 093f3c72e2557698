"""Load weights to a GPU: the 4-bit bytes travel, and are decoded where they arrive.

Threads read the files into a ring of pinned buffers. From there the bytes are copied on a stream of their own, while
the current stream decodes the weights that have arrived and the threads read the next ones. The bytes of a weight and
its scales form one image in device memory, which is let go of as soon as the weight is decoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from qlformat import ops
from qlformat.checkpoint import Checkpoint
from qlformat.decoder import out_of_memory, thread_count
from qlformat.errors import QlfError
from qlformat.weights import Weight

STAGING_BYTES = 8 << 20
"""Size of one pinned buffer: large enough for full speed over the bus, small enough to be refilled soon."""
_READERS = 8
_ALIGNMENT = 256
"""Each part of an image begins at a multiple of this, as freshly allocated device memory does."""


class Copied(Protocol):
    """The end of a copy."""

    def synchronize(self) -> None:
        """Wait until the copy is done and its source may be overwritten."""


class Lanes(Protocol):
    """Where copying and decoding run: two streams of a GPU.

    Attributes:
        device: the device.
    """

    device: torch.device

    def staging(self, size: int) -> torch.Tensor:
        """Host memory to copy from, uint8 [size]."""

    def allocate(self, size: int) -> torch.Tensor:
        """Device memory to copy to, uint8 [size]."""

    def send(self, target: torch.Tensor, source: torch.Tensor) -> Copied:
        """Copy in the background, after all copies before."""

    def join(self, arrived: torch.Tensor) -> None:
        """Let what is decoded from now on wait for all copies so far, `arrived` among them."""

    def finish(self) -> None:
        """Wait until everything is decoded."""


class CudaLanes:
    """A stream for copies beside the current stream of a CUDA device (see Lanes)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._decoding = torch.cuda.current_stream(device)
        self._copying = torch.cuda.Stream(device)

    def staging(self, size: int) -> torch.Tensor:
        """Pinned memory, without which a copy would not run in the background."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def allocate(self, size: int) -> torch.Tensor:
        """Device memory that belongs to the copying stream."""
        with torch.cuda.stream(self._copying):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def send(self, target: torch.Tensor, source: torch.Tensor) -> Copied:
        """Copy on the copying stream; the host does not wait."""
        copied: Copied = torch.cuda.Event()
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)
            self._copying.record_event(copied)
        return copied

    def join(self, arrived: torch.Tensor) -> None:
        """The current stream waits for the copies; the memory is not given to a later copy before it has been read."""
        self._decoding.wait_stream(self._copying)
        arrived.record_stream(self._decoding)

    def finish(self) -> None:
        """Wait for the current stream, which has waited for the copies; errors of the device surface here."""
        self._decoding.synchronize()


def load_to_device(
    checkpoint: Checkpoint, weights: Sequence[Weight], dtype: str | None, device: torch.device, threads: int | None
) -> dict[str, torch.Tensor]:
    """Decode weights on a CUDA device; see `loader.load_state_dict`."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        return Pipeline(checkpoint, CudaLanes(torch.device("cuda", index)), dtype, threads).load(weights)


class Pipeline:
    """One load through a ring of staging buffers.

    Args:
        checkpoint: open.
        lanes: of the device to load to.
        dtype: as for `load_state_dict`.
        threads: that read, at most 8: more do not make the bus faster.
        staging_bytes: size of a staging buffer, a multiple of 256.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        lanes: Lanes,
        dtype: str | None = None,
        threads: int | None = None,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self._checkpoint = checkpoint
        self._lanes = lanes
        self._dtype = dtype
        self._readers = min(thread_count(threads), _READERS)
        self._staging_bytes = staging_bytes
        self._loaded: dict[str, torch.Tensor] = {}
        self._current: Weight | None = None

    def load(self, weights: Sequence[Weight]) -> dict[str, torch.Tensor]:
        """The decoded weights by name.

        Raises:
            FormatError: T4, D1 or S5.
            QlfError: out of memory. Nothing that was loaded stays allocated, then as with any other error.
        """
        try:
            self._stream(weights)
            self._lanes.finish()
            self._checkpoint.check_unchanged()
        except torch.OutOfMemoryError:
            self._loaded.clear()
        except BaseException:
            self._loaded.clear()
            raise
        else:
            return self._loaded
        # Outside of the handler: an error raised there would keep the frames that hold the memory.
        failed = self._current or weights[0]
        raise out_of_memory(self._checkpoint, failed, weights, self._dtype, str(self._lanes.device))

    def _stream(self, weights: Sequence[Weight]) -> None:
        self._current = weights[0] if weights else None
        slots = [_Slot(self._lanes.staging(self._staging_bytes)) for _ in range(2 * self._readers if weights else 0)]
        waiting: deque[tuple[Future[None], _Slot, _Chunk]] = deque()
        with ThreadPoolExecutor(self._readers, thread_name_prefix="qlf") as pool:
            try:
                for number, chunk in enumerate(self._chunks(weights)):
                    if len(waiting) == len(slots):
                        self._send(*waiting.popleft())
                    slot = slots[number % len(slots)]  # the one sent longest ago
                    waiting.append((pool.submit(self._fill, slot, chunk), slot, chunk))
                while waiting:
                    self._send(*waiting.popleft())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _chunks(self, weights: Sequence[Weight]) -> Iterator[_Chunk]:
        for weight in weights:
            image = _Image(self._checkpoint, weight)
            ends = [*range(self._staging_bytes, image.size, self._staging_bytes), image.size]
            for begin, end in zip([0, *ends], ends, strict=False):
                yield _Chunk(image, begin, end)

    def _fill(self, slot: _Slot, chunk: _Chunk) -> None:
        if slot.copied is not None:
            slot.copied.synchronize()
        chunk.image.read(chunk.begin, chunk.end, slot.bytes)

    def _send(self, filled: Future[None], slot: _Slot, chunk: _Chunk) -> None:
        filled.result()
        image, size = chunk.image, chunk.end - chunk.begin
        self._current = image.weight
        if image.memory is None:
            image.memory = self._lanes.allocate(image.size)
        slot.copied = self._lanes.send(image.memory[chunk.begin : chunk.end], slot.memory[:size])
        if chunk.end == image.size:
            self._lanes.join(image.memory)
            dtype: Any = getattr(torch, self._checkpoint.decoded_dtype(image.weight, self._dtype))
            self._loaded[image.weight.name] = image.decoded(dtype)
            image.memory = None


class _Slot:
    """A staging buffer, and the copy from it that has to end before it is filled again."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.bytes = memoryview(memory.numpy())
        self.copied: Copied | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """A stored tensor in an image: its bytes [begin, end), and its rule where it holds float32 scales."""

    name: str
    begin: int
    end: int
    scales_rule: str | None


class _Image:
    """The stored tensors that a weight is decoded from, as one run of bytes.

    Attributes:
        weight: the weight.
        size: of the image in bytes.
        memory: on the device, while the weight is loaded.
    """

    def __init__(self, checkpoint: Checkpoint, weight: Weight) -> None:
        self.weight = weight
        self.memory: torch.Tensor | None = None
        self._checkpoint = checkpoint
        self._parts: dict[str, _Part] = {}
        state, position = weight.quant_state, 0
        names: dict[str, str | None] = {"": None}
        if state is not None:
            names |= {".absmax": None, ".nested_absmax": "D1"} if state.nested else {".absmax": "T4"}
        for suffix, rule in names.items():
            size = checkpoint.tensors[weight.name + suffix].info.nbytes
            self._parts[suffix] = _Part(weight.name + suffix, position, position + size, rule)
            position += size + -size % _ALIGNMENT
        self.size = position

    def read(self, begin: int, end: int, buffer: memoryview) -> None:
        """Read bytes [begin, end) of the image into the start of `buffer`; called by the reading threads.

        Raises:
            FormatError: T4 or D1, a scale is not finite or negative.
        """
        for part in self._parts.values():
            first, last = max(begin, part.begin), min(end, part.end)
            if first >= last:
                continue
            into = buffer[first - begin : last - begin]
            self._checkpoint.read_into(part.name, first - part.begin, into)
            if part.scales_rule is not None:
                self._checkpoint.check_scales(np.frombuffer(into, dtype="<f4"), part.scales_rule, part.name)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in the shape of the 16-bit model, once the image is in device memory."""
        weight, state = self.weight, self.weight.quant_state
        if state is None:
            own: Any = getattr(torch, weight.dtype)
            # A copy even without a change of dtype: the image belongs to the copying stream.
            return self._tensor("").view(own).to(dtype, copy=True).reshape(weight.shape)
        nested = self._tensor(".nested_absmax").view(torch.float32) if state.nested else None
        absmax = self._tensor(".absmax")
        table = self._checkpoint.nested_maps.get(weight.name)
        found = ops.dequantize_weight(
            self._tensor(""),
            absmax if state.nested else absmax.view(torch.float32),
            state,
            nested,
            dtype,
            nested_quant_map=None if table is None else torch.tensor(table, device=absmax.device),
        )
        return found.t().contiguous() if weight.transposed else found

    def _tensor(self, suffix: str) -> torch.Tensor:
        if self.memory is None:
            raise QlfError("this weight is not on the device", tensor=self.weight.name)
        part = self._parts[suffix]
        return self.memory[part.begin : part.end]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes [begin, end) of an image."""

    image: _Image
    begin: int
    end: int
