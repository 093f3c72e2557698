"""Find and load libqlf_cpu, the native CPU kernels, once.

Environment: QLF_NATIVE_LIB (path of the library, for tests), QLF_REQUIRE_NATIVE=1 (a library that cannot be loaded is
an error instead of `available() == False`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

from qlformat.errors import NativeError

ABI_VERSION = 1

_P, _I32, _U32, _U64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "qlf_abi_version": (),
    "qlf_isa_supported": (_I32,),
    "qlf_quantize": (_P, _I32, _U64, _I32, _U32, _P, _P, _P, _P, _I32, _I32),
    "qlf_dequantize": (_P, _P, _U64, _I32, _U32, _I32, _P, _I32, _I32),
    "qlf_dequantize_nested": (_P, _P, _P, _P, _U64, _U64, _I32, _U32, _I32, _P, _I32, _I32),
    "qlf_double_quantize": (_P, _U64, _P, _P, _P, _P, _I32),
    "qlf_double_dequantize": (_P, _P, _P, _U64, _P),
    "qlf_squared_error": (_P, _P, _U64, _P, _P),
    "qlf_transpose": (_P, _U64, _U64, _U32, _P, _I32),
    "qlf_convert": (_P, _I32, _U64, _P, _I32, _P, _I32),
    "qlf_sha256_supported": (),
    "qlf_sha256_begin": (_P,),
    "qlf_sha256_parts": (_P, _P, _I32, _U64, _U64, _P, _U64, _P, _P),
    "qlf_sha256_end": (_P, _P),
    "qlf_add_low_rank": (_P, _I32, _U64, _U64, _U64, _P, _P, _U64, _P, _P, _I32, _P, _I32),
}


def _path() -> Path | None:
    """The built library: QLF_NATIVE_LIB, beside this file, or in the site-packages of an editable install.

    `importlib.metadata` would find the last one too, but importing it costs 40 ms.
    """
    override = os.environ.get("QLF_NATIVE_LIB")
    if override:
        return Path(override)
    name = "libqlf_cpu.dylib" if sys.platform == "darwin" else "libqlf_cpu.so"
    candidates = [Path(__file__).parent / "_native" / name]
    candidates += [Path(entry) / "qlformat" / "_native" / name for entry in sys.path if entry]
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason in one line."""
    path = _path()
    if path is None:
        return None, "libqlf_cpu is not installed; reinstall qlformat with a C++17 compiler on the PATH"
    try:
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int32
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {' '.join(str(error).split())}"
    found = library.qlf_abi_version()
    if found != ABI_VERSION:
        return None, f"{path} has interface version {found}, needed {ABI_VERSION}; reinstall qlformat"
    return library, ""


def library() -> ctypes.CDLL:
    """The library.

    Raises:
        NativeError: it is missing or does not fit.
    """
    found, reason = load()
    if found is None:
        raise NativeError(f"native kernels unavailable: {reason}")
    return found


def available() -> bool:
    """Whether the native kernels can be used. With QLF_REQUIRE_NATIVE=1, raises NativeError when they cannot."""
    if os.environ.get("QLF_REQUIRE_NATIVE") == "1":
        library()
    return load()[0] is not None


def why_unavailable() -> str:
    """The reason in one line, or "" when the kernels are available."""
    return load()[1]
