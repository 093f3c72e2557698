"""What the calls of the native kernels share: checks of arrays and numbers, and the status that comes back."""

from __future__ import annotations

import ctypes
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat.errors import NativeError

ISA_LEVELS = {"scalar": 0, "avx2": 1, "avx512": 2, "neon": 3}
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

_BEST_ISA = -1
_UNSUPPORTED_ISA = 3


def levels_of(kernels: ctypes.CDLL) -> list[str]:
    """Names of the instruction sets that the library and this processor can run."""
    return [name for name, level in ISA_LEVELS.items() if kernels.qlf_isa_supported(level)]


def choice(what: str, value: str, choices: dict[str, int]) -> int:
    """The enumerator of a name."""
    if value not in choices:
        raise NativeError(f"{what}: found {value!r}, needed one of {', '.join(choices)}")
    return choices[value]


def isa_level(isa: str | None) -> int:
    """The enumerator of an instruction set; None: that of QLF_ISA, or the best available."""
    wanted = isa or os.environ.get("QLF_ISA")
    return choice("isa", wanted, ISA_LEVELS) if wanted else _BEST_ISA


def integer(what: str, value: Any, least: int, most: int = 1 << 48) -> int:
    """An integer within bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise NativeError(f"{what}: found {value!r}, needed an integer from {least} to {most}")
    return number


def float32_cell(what: str, value: Any) -> F32:
    """One float32 in memory. A np.float32 is copied, not converted: flush-to-zero would lose a subnormal one."""
    try:
        return np.array([value], dtype=np.float32)
    except (TypeError, ValueError):
        raise NativeError(f"{what}: found {value!r}, needed a number") from None


def storage(dtype: str) -> tuple[npt.DTypeLike, ...]:
    """NumPy dtypes that hold elements of `dtype`; the first is the one returned."""
    choice("dtype", dtype, DTYPES)
    return {"float32": (np.float32,), "float16": (np.float16, np.uint16), "bfloat16": (np.uint16,)}[dtype]


def checked(name: str, array: Array, dtypes: Sequence[npt.DTypeLike], size: int, *, writable: bool = False) -> int:
    """Address of a C-contiguous array of exactly `size` elements of one of `dtypes`."""
    if not isinstance(array, np.ndarray) or array.dtype not in dtypes:
        needed = " or ".join(str(np.dtype(dtype)) for dtype in dtypes)
        raise NativeError(f"{name}: found {getattr(array, 'dtype', type(array).__name__)}, needed {needed}")
    if array.size != size:
        raise NativeError(f"{name}: found {array.size} elements, needed {size}")
    if not array.flags.c_contiguous or (writable and not array.flags.writeable):
        raise NativeError(f"{name}: needed a C-contiguous{' writable' if writable else ''} array")
    address: int = array.__array_interface__["data"][0]
    return address


def disjoint(outputs: Sequence[Array], inputs: Sequence[Array]) -> None:
    """Refuse outputs that share memory with another array."""
    arrays = [*outputs, *inputs]
    for i, output in enumerate(outputs):
        if any(np.may_share_memory(output, other) for other in arrays[i + 1 :]):
            raise NativeError("an output array overlaps another array; pass separate memory")


def raise_for(kernels: ctypes.CDLL, status: int) -> None:
    """Turn a status of the library that is not 0 into an error."""
    if status == _UNSUPPORTED_ISA:
        raise NativeError(f"isa: this processor or library has only {', '.join(levels_of(kernels))}")
    if status:
        raise NativeError(f"the native kernels refused their arguments (status {status})")
