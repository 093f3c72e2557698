"""The CUDA kernels as machine code: their sources, compiled by NVRTC through cuda-core, kept in a cache on disk.

Needs neither a GPU nor a driver. Environment: QLF_CACHE_DIR (default: $XDG_CACHE_HOME/qlformat, ~/.cache/qlformat).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlformat.errors import NativeError

PROGRAM = '#include "dequantize.cu"\n#include "quantize.cu"\n'
"""What is compiled: all kernels in one module."""

FILES = ("device.cuh", "dequantize.cu", "quantize.cu")
_CODEBOOK = "qlf/codebook.h"
_MAGIC = b"QLFCUBIN"
EXACT: dict[str, Any] = {"std": "c++17", "fma": False, "ftz": False, "prec_div": True}
"""The results are specified bit by bit: no contraction, subnormals kept, division rounded to nearest."""


@dataclass(frozen=True)
class Sources:
    """Where the kernel sources are: `include` holds what they include, and `digest` is over all of them."""

    include: tuple[Path, ...]
    digest: str


def sources() -> Sources:
    """Find the sources: installed beside the library, or in the checkout that this file is in.

    Raises:
        NativeError: they are not there.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "kernels"
    for include in ((package / "_native" / "cuda",), (checkout / "cuda", checkout / "include")):
        files = [*(include[0] / name for name in FILES), include[-1] / _CODEBOOK]
        if all(path.is_file() for path in files):
            content = hashlib.sha256()
            for path in files:
                content.update(hashlib.sha256(path.read_bytes()).digest())
            return Sources(include, content.hexdigest())
    raise NativeError("the CUDA sources are not installed; reinstall qlformat with a C++17 compiler on the PATH")


def toolchain() -> dict[str, str]:
    """Versions of what compiles.

    Raises:
        NativeError: cuda-core or NVRTC cannot be used.
    """
    try:
        import cuda.core
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise NativeError(f"cuda-core is not installed ({_line(error)}); pip install 'qlformat[cuda]'") from None
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # whatever the loader of a shared library can raise
        raise NativeError(f"NVRTC cannot be loaded ({_line(error)}); pip install 'qlformat[cuda]'") from None
    if int(status):
        raise NativeError(f"NVRTC does not answer (status {int(status)}); reinstall nvidia-cuda-nvrtc")
    return {"cuda-core": str(cuda.core.__version__), "nvrtc": f"{major}.{minor}"}


def cubin(architecture: str) -> bytes:
    """Machine code of all kernels for an architecture such as "sm_90", from the cache or newly compiled.

    Raises:
        NativeError: no sources, no compiler, or an architecture that it does not know.
    """
    found, versions = sources(), toolchain()
    key = json.dumps([found.digest, PROGRAM, architecture, sorted(versions.items()), sorted(EXACT.items())])
    entry = _cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    code = _read(entry)
    if code is None:
        code = compiled(found, architecture)
        _write(entry, code)
    return code


def compiled(found: Sources, architecture: str) -> bytes:
    """The kernels compiled now.

    Raises:
        NativeError: an architecture that NVRTC does not know.
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=architecture, include_path=[str(path) for path in found.include], **EXACT)
    try:
        return bytes(Program(PROGRAM, "c++", options).compile("cubin").code)
    except Exception as error:  # cuda-core raises several classes of its own
        raise NativeError(f"NVRTC cannot compile the kernels for {architecture}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """An error of another library as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _cache_directory() -> Path:
    own = os.environ.get("QLF_CACHE_DIR")
    if own:
        return Path(own) / "cuda"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlformat" / "cuda"


def _read(entry: Path) -> bytes | None:
    """The code of an entry, or None when there is none or it is damaged."""
    try:
        data = entry.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + hashlib.sha256().digest_size
    code = data[start:]
    return code if code and data[:start] == _MAGIC + hashlib.sha256(code).digest() else None


def _write(entry: Path, code: bytes) -> None:
    """Keep an entry, whole or not at all. A cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, beside = tempfile.mkstemp(dir=entry.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(code).digest() + code)
            os.replace(beside, entry)
        except OSError:
            Path(beside).unlink(missing_ok=True)
            raise
