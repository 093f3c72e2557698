"""Calibrated quantization of a model, layer by layer: codes and scales for every weight of the decoder layers.

Memory: one layer in float32, and what flows through it for all windows at once; before that, while a small model writes
its own calibration text, all of the model. Linear layers are quantized in the order in which they run, and what enters
one has come through all that is quantized already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qlformat import codec, reference
from qlformat.calibration import feedback, scales
from qlformat.calibration.activations import LayerWalk, Tensors
from qlformat.calibration.moments import Moments
from qlformat.calibration.own_text import own_windows
from qlformat.calibration.settings import METHOD, CalibrationRecord, CalibrationSettings
from qlformat.calibration.texts import begin_token
from qlformat.codebook import CODEBOOKS
from qlformat.errors import SourceError
from qlformat.layout import QuantState
from qlformat.source import TORCH_DTYPES, Source

if TYPE_CHECKING:
    import torch

_NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}


@dataclass(frozen=True)
class Rounded:
    """One weight, rounded.

    Attributes:
        name: of the weight.
        packed: uint8 [ceil(n/2)], codes two a byte.
        absmax: float32 [blocks], before double quantization.
        gain: output error on held-out windows, as a share of that of plain rounding; 1 when that was kept.
    """

    name: str
    packed: npt.NDArray[np.uint8]
    absmax: npt.NDArray[np.float32]
    gain: float


class Calibration:
    """One calibrated quantization.

    Args:
        directory: of the model's configuration and tokenizer.
        names: of all weights of the source.
        states: weight to be quantized -> its quant_state; only matrices are calibrated.
        tensors: gives any weight of the source, float32, in the source's own orientation.
        windows: int64 [windows, tokens], of the text to calibrate on (texts.windows).
        text_sha256: of the text they were taken from.
        settings: how.

    Raises:
        QlfError: the model cannot be walked.
    """

    def __init__(
        self,
        directory: Path,
        names: Iterable[str],
        states: Mapping[str, QuantState],
        tensors: Tensors,
        windows: torch.Tensor,
        text_sha256: str,
        settings: CalibrationSettings,
    ) -> None:
        import torch

        self._states, self._settings = states, settings
        self._walk = LayerWalk(directory, names, states, tensors)
        self._windows = windows
        self._begin = begin_token(directory) if settings.own_tokens and self._writes_itself() else None
        self._own = 0 if self._begin is None else -(-settings.own_tokens // windows.shape[1])
        self.record = CalibrationRecord(
            method=METHOD,
            text_sha256=text_sha256,
            samples=self._own + windows.shape[0],
            own_samples=self._own,
            window=windows.shape[1],
            damping=settings.damping,
            correction=settings.correction,
            sweeps=settings.sweeps,
            seed=settings.seed,
            threads=torch.get_num_threads(),
        )

    def _writes_itself(self) -> bool:
        """Whether the model is small enough to be in memory, and keeps its past in a cache that grows."""
        model = self._walk.model
        size = sum(parameter.numel() for parameter in model.parameters())
        return size <= self._settings.own_limit and not getattr(model, "_is_stateful", False)

    def run(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Rounded]:
        """Quantize; every weight of a layer is given when the layer is done.

        Args:
            progress: called with (layers done, layers).

        Raises:
            SourceError: rule E1, NaN or infinity in a weight.
            QlfError: the model's layers do not run as they should.
        """
        import torch

        walk = self._walk
        with torch.no_grad():
            walk.embed(self._all_windows())
        for index in range(len(walk.layers)):
            results: list[Rounded] = []
            with torch.no_grad():  # left before the yield: the mode belongs to the thread, not to this generator
                walk.quantize(index, _Visitor(self._states, self._settings, len(self._windows) + self._own, results))
            yield from results
            if progress:
                progress(index + 1, len(walk.layers))

    def _all_windows(self) -> torch.Tensor:
        import torch

        if self._begin is None:
            return self._windows
        with self._walk.whole() as model:
            size = self._windows.shape[1]
            own = own_windows(model, self._begin, self._own, size, self._settings.seed)
        return torch.cat([own, self._windows])


class _Visitor:
    """Quantizes the linear layers of one decoder layer when they are about to run."""

    def __init__(
        self, states: Mapping[str, QuantState], settings: CalibrationSettings, windows: int, results: list[Rounded]
    ) -> None:
        self._states, self._settings, self._windows, self._results = states, settings, windows, results
        self._moments: Moments | None = None

    def __call__(self, name: str, module: Any, entering: torch.Tensor, exact: torch.Tensor) -> None:
        """Quantize one, and put what it decodes to in its place; those that read the same input share its moments."""
        state = self._states[name]
        turned = hasattr(module, "nf")  # Conv1D of GPT-2, which stores [in, out]
        weight = (module.weight.T if turned else module.weight).float().contiguous()
        if not weight.isfinite().all():
            raise SourceError(
                f"found NaN or infinity, needed finite values; repair the source, or leave it out with --skip {name}",
                rule="E1", tensor=name,
            )  # fmt: skip
        if self._moments is None or self._moments.entering is not entering:
            self._moments = Moments(entering, exact, self._windows, self._settings)
        moments = self._moments
        rounding = Rounding(weight, state, self._settings)
        plain, decoded_plain = rounding.nearest()
        chosen, decoded = rounding.fit(moments)
        before, after = moments.output_error(weight, decoded_plain), moments.output_error(weight, decoded)
        if not after < before:
            chosen, decoded, after = plain, decoded_plain, before
        module.weight.data = decoded.T.contiguous() if turned else decoded
        packed, absmax = chosen
        self._results.append(Rounded(name, packed, absmax, after / before if before else 1.0))


class Rounding:
    """Ways to round one weight, float32 [out, in], to the codes and scales of a recipe."""

    def __init__(self, weight: torch.Tensor, state: QuantState, settings: CalibrationSettings) -> None:
        import torch

        book = CODEBOOKS[state.quant_type]
        self._weight, self._state, self._settings = weight, state, settings
        values = book.values[book.order]
        self._grid = feedback.Grid(torch.from_numpy(values.copy()), torch.from_numpy(book.thresholds.copy()))

    def nearest(self) -> tuple[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]], torch.Tensor]:
        """What plain rounding stores (spec section "Encoding"), and what it decodes to."""
        import torch

        state = self._state
        flat = self._weight.reshape(-1).numpy()
        packed, absmax = codec.quantize(
            flat, dtype="float32", quant_type=state.quant_type, blocksize=state.blocksize
        )  # fmt: skip
        scale = scales.stored(torch.from_numpy(absmax), state.nested).numpy()
        decoded = codec.dequantize(
            packed, scale, flat.size, quant_type=state.quant_type, blocksize=state.blocksize, dtype="float32"
        )
        return (packed, absmax), torch.from_numpy(decoded).view(self._weight.shape)

    def fit(self, moments: Moments) -> tuple[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]], torch.Tensor]:
        """Scales by activation, codes with error feedback; what is stored, and what it decodes to."""
        state, order = self._state, moments.order
        target = moments.corrected(self._weight)
        absmax = scales.search(target, moments.importance, state.blocksize, self._grid)
        decoded_absmax = scales.stored(absmax, state.nested).clamp_min(scales.SMALLEST)
        scale = scales.spread(decoded_absmax, state.blocksize, target.shape)
        rounded = feedback.round_columns(target[:, order], scale[:, order], moments.factor, self._grid)
        rounded = rounded[:, moments.back].contiguous()
        for _ in range(self._settings.sweeps):
            rounded = feedback.descend(target, rounded, scale, moments.hessian, self._grid)
        return (self._packed(rounded / scale), absmax.numpy()), rounded

    def _packed(self, codes: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Codes two a byte, from the grid's values."""
        import torch

        book = CODEBOOKS[self._state.quant_type]
        ranks = torch.bucketize(codes.reshape(-1), self._grid.thresholds).numpy()
        found = book.order[ranks]
        if found.size % 2:
            found = np.append(found, np.uint8(book.zero_code))
        packed: npt.NDArray[np.uint8] = (found[0::2] << np.uint8(4)) | found[1::2]
        return packed


def source_tensors(source: Source) -> Tensors:
    """Gives the weights of an open source as float32 tensors."""

    def load(name: str) -> torch.Tensor:
        import torch

        tensor = source.tensors[name]
        dtype = TORCH_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise SourceError(
                f"found dtype {tensor.dtype}, needed F32, F16 or BF16 to run the model; leave --calibration out",
                tensor=name, file=tensor.file,
            )  # fmt: skip
        raw = np.empty(tensor.nbytes, dtype=np.uint8)
        tensor.read_into(0, raw.data)
        values = reference.to_float32(raw.view(_NUMPY[dtype]), dtype)
        return torch.from_numpy(np.ascontiguousarray(values)).view(tensor.shape)

    return load
