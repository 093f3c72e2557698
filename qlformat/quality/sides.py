"""The weights of a model to compare, 4-bit or not, read in pieces as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from qlformat import codec, reference, remote, repository
from qlformat.checkpoint import NUMPY_DTYPES, AnyArray, Checkpoint
from qlformat.errors import FormatError, QlfError
from qlformat.layout import strict_json
from qlformat.source import Source, open_source
from qlformat.weights import PLAIN_DTYPES, Weight

U8 = npt.NDArray[np.uint8]
Reals = npt.NDArray[np.float32] | npt.NDArray[np.float64]

_CONFIG = "config.json"


class Side(Protocol):
    """One of the two models.

    Attributes:
        name: as it was asked for.
        config: content of config.json.
        weights: by name, in the order in which they are stored.
    """

    name: str
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]

    def elements(self, weight: Weight, first: int, last: int) -> AnyArray:
        """Elements [first, last) in the weight's own dtype, flat and row-major; bfloat16 as its bits."""

    def packed(self, weight: Weight, first: int, last: int) -> U8:
        """The 4-bit codes of elements [first, last), two a byte; `first` is even."""

    def close(self) -> None:
        """Close every file."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_side(path_or_repo: str | Path) -> Side:
    """Open a 4-bit checkpoint (of qlformat or bitsandbytes), or a 16- or 32-bit model.

    Args:
        path_or_repo: a directory, one .safetensors or .bin file of a model, or a Hub repository "ORG/NAME[@revision]".

    Raises:
        QlfError: there is none, it is an adapter, or it is quantized in another way.
        FormatError: it breaks a rule of the container or of the format.
    """
    path = remote.local_directory(path_or_repo)
    if path.is_dir() and is_four_bit(path):
        return FourBit(path, str(path_or_repo))
    return Plain(path, str(path_or_repo))


def is_four_bit(directory: Path) -> bool:
    """Whether config.json says that the model is in bitsandbytes' 4 bits; False where there is none to read."""
    try:
        config = strict_json(repository.read_file(directory, _CONFIG))
    except (FormatError, ValueError):
        return False
    declared = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(declared, dict) and declared.get("quant_method") == "bitsandbytes"


class FourBit:
    """A 4-bit checkpoint (see Side)."""

    def __init__(self, path: Path, name: str) -> None:
        self._checkpoint = Checkpoint(path)
        self.name = name
        self.config: Mapping[str, Any] = self._checkpoint.config
        self.weights: Mapping[str, Weight] = self._checkpoint.weights

    def elements(self, weight: Weight, first: int, last: int) -> AnyArray:
        """See Side."""
        return self._checkpoint.decode(weight, first, last)

    def packed(self, weight: Weight, first: int, last: int) -> U8:
        """See Side."""
        return self._checkpoint.read_part(weight.name, first // 2, -(-last // 2) - first // 2)

    def close(self) -> None:
        """See Side."""
        self._checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Plain:
    """A model that is not quantized (see Side)."""

    def __init__(self, path: Path, name: str) -> None:
        self._source: Source = open_source(path)
        self.name = name
        self.config: Mapping[str, Any] = self._source.config
        self.weights: Mapping[str, Weight] = {}
        try:
            self.weights = {
                tensor.name: Weight(tensor.name, tensor.shape, _torch_name(tensor.name, tensor.dtype))
                for tensor in self._source.tensors.values()
            }
        except BaseException:
            self._source.close()
            raise

    def elements(self, weight: Weight, first: int, last: int) -> AnyArray:
        """See Side."""
        found = np.empty(last - first, dtype=NUMPY_DTYPES[weight.dtype])
        self._source.tensors[weight.name].read_into(first * found.itemsize, found.view(np.uint8).data)
        return found

    def packed(self, weight: Weight, first: int, last: int) -> U8:
        """See Side; there are none."""
        raise QlfError("this weight is not quantized", tensor=weight.name)

    def close(self) -> None:
        """See Side."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _torch_name(tensor: str, dtype: str) -> str:
    found = PLAIN_DTYPES.get(dtype)
    if found is None:
        raise QlfError(f"found dtype {dtype}, which cannot be compared; give the 16-bit model", tensor=tensor)
    return found


def as_reals(values: AnyArray, dtype: str) -> Reals:
    """Elements as float32, or float64 where float32 would lose some of their digits."""
    if dtype in ("float32", "float16", "bfloat16"):
        return reference.to_float32(values, dtype)
    return values.astype(np.float64)


class Reader:
    """The elements of one weight of a side as numbers.

    Args:
        side: where it is.
        weight: which one.
        turned: give it transposed, [columns, rows]; the matrix is then held whole, as 16-bit `Conv1D` weights of GPT-2
            lie the other way around than 4-bit ones.
    """

    def __init__(self, side: Side, weight: Weight, turned: bool = False) -> None:
        self._side, self._weight = side, weight
        self.shape = weight.shape[::-1] if turned else weight.shape
        self._whole: AnyArray | None = None
        if turned:
            matrix = side.elements(weight, 0, math.prod(weight.shape)).reshape(weight.shape)
            self._whole = codec.transpose(matrix).reshape(-1)

    def read(self, first: int, last: int) -> Reals:
        """Elements [first, last) in row-major order."""
        whole = self._whole
        found = self._side.elements(self._weight, first, last) if whole is None else whole[first:last]
        return as_reals(found, self._weight.dtype)
