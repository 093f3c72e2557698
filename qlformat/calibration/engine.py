"""Calibrated quantization of a model, layer by layer: codes and scales for every weight of the decoder layers.

Memory: one layer in float32, the hidden states of the calibration windows, and the Hessian of one group of layers.
Within a layer the groups are quantized in the order in which they run, and what enters a group has come through all
that is quantized already.
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
from qlformat.calibration.settings import METHOD, CalibrationRecord, CalibrationSettings
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
HELD_OUT = 8
"""Every eighth window takes no part in the Hessian; on it the result must beat plain rounding."""


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
        windows: int64 [windows, tokens], to calibrate on (texts.windows).
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
        self.record = CalibrationRecord(
            method=METHOD,
            text_sha256=text_sha256,
            samples=windows.shape[0],
            window=windows.shape[1],
            damping=settings.damping,
            sweeps=settings.sweeps,
            refits=settings.refits,
            seed=settings.seed,
            threads=torch.get_num_threads(),
        )

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
            walk.embed(self._windows)
        for index in range(len(walk.layers)):
            with torch.no_grad():  # left before the yield: the mode belongs to the thread, not to this generator
                results = self._layer(index)
            yield from results
            if progress:
                progress(index + 1, len(walk.layers))

    def _layer(self, index: int) -> list[Rounded]:
        self._walk.enter(index)
        results = [rounded for group in self._walk.groups(index) for rounded in self._quantize(index, group)]
        self._walk.leave(index)
        return results

    def _quantize(self, index: int, group: list[tuple[str, Any]]) -> Iterator[Rounded]:
        """Quantize the linear layers that read one input, and put what they decode to in their place."""
        fitted, held_out = self._hessians(index, group[0][1])
        for name, module in group:
            state = self._states[name]
            turned = hasattr(module, "nf")  # Conv1D of GPT-2, which stores [in, out]
            weight = (module.weight.T if turned else module.weight).float().contiguous()
            if not weight.isfinite().all():
                raise SourceError(
                    f"found NaN or infinity, needed finite values; repair the source, or leave it out with "
                    f"--skip {name}",
                    rule="E1", tensor=name,
                )  # fmt: skip
            rounding = Rounding(weight, state, self._settings)
            plain, decoded_plain = rounding.nearest()
            chosen, decoded = rounding.fit(fitted)
            before = feedback.output_error(weight, decoded_plain, held_out)
            after = feedback.output_error(weight, decoded, held_out)
            if not after < before:
                chosen, decoded, after = plain, decoded_plain, before
            module.weight.data = decoded.T.contiguous() if turned else decoded
            packed, absmax = chosen
            yield Rounded(name, packed, absmax, after / before if before else 1.0)

    def _hessians(self, index: int, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Second moments of a linear layer's input, float32 [in, in]: of the windows fitted to, and of the others.

        The first token of a window is left out, and no token counts more than the usual one: in many models a few
        tokens have activations a thousand times as large, and would hide what all the others need.
        """
        import torch

        sums = [torch.zeros(0), torch.zeros(0)]
        counts, position, usual = [0, 0], 0, None
        for batch in self._walk.inputs(index, module):
            rows = batch.reshape(-1, self._windows.shape[1], batch.shape[-1])[:, 1:]
            norms = rows.square().sum(-1, keepdim=True)
            usual = norms.median() if usual is None else usual
            shares = (usual / norms.clamp_min(1e-30)).clamp_max(1)
            for window, share in zip(rows, shares, strict=True):
                part = int(position % HELD_OUT == HELD_OUT - 1)
                moments = (window * share).T @ window
                sums[part] = moments if not counts[part] else sums[part] + moments
                counts[part] += len(window)
                position += 1
        if not counts[1]:
            sums[1], counts[1] = sums[0], counts[0]
        return sums[0] / counts[0], sums[1] / counts[1]


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

    def fit(self, hessian: torch.Tensor) -> tuple[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]], torch.Tensor]:
        """Scales by activation, codes with error feedback; what is stored, and what it decodes to.

        Args:
            hessian: float32 [in, in].
        """
        import torch

        weight, state, settings = self._weight, self._state, self._settings
        hessian = feedback.damped(hessian, settings.damping)
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        back = torch.argsort(order)
        factor = feedback.inverse_factor(hessian[order][:, order])
        importance = factor.diagonal().square().reciprocal()[back]
        absmax = scales.search(weight, importance, state.blocksize, self._grid)
        for attempt in range(settings.refits + 1):
            decoded_absmax = scales.stored(absmax, state.nested).clamp_min(scales.SMALLEST)
            scale = scales.spread(decoded_absmax, state.blocksize, weight.shape)
            rounded = feedback.round_columns(weight[:, order], scale[:, order], factor, self._grid)[:, back]
            for _ in range(settings.sweeps):
                rounded = feedback.descend(weight, rounded, scale, hessian, self._grid)
            if attempt < settings.refits:
                absmax = scales.refit(weight, rounded / scale, decoded_absmax, hessian, state.blocksize)
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
