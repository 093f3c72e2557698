"""Load the CUDA kernels on a device and launch them on torch's current stream."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qlformat.backends import cuda_program
from qlformat.errors import NativeError

THREADS = 256
"""Threads in a block; the kernels are written for this number."""

_NEEDED_CAPABILITY = (8, 0)

Argument = int | np.float32
"""A pointer or unsigned 64-bit integer (cuda-core passes a Python int as 64 bits), or a float."""


@dataclass(frozen=True)
class _Module:
    """The kernels on one device, and how many blocks of each it holds at once."""

    code: Any
    multiprocessors: int
    loaded: dict[str, tuple[Any, int]] = field(default_factory=dict)

    def kernel(self, name: str) -> tuple[Any, int]:
        if name not in self.loaded:
            kernel = self.code.get_kernel(name)
            resident = kernel.occupancy.max_active_blocks_per_multiprocessor(THREADS, 0)
            self.loaded[name] = kernel, max(1, resident) * self.multiprocessors
        return self.loaded[name]


def _check_driver(nvrtc_version: str) -> None:
    """Machine code of a CUDA release runs on drivers of the same major release or a newer one."""
    from cuda.bindings import driver

    status, version = driver.cuDriverGetVersion()
    if int(status):
        raise NativeError(f"the CUDA driver does not answer (status {int(status)}); update it")
    needed = int(nvrtc_version.split(".")[0])
    if version // 1000 < needed:
        found = f"{version // 1000}.{version % 1000 // 10}"
        raise NativeError(
            f"found a driver for CUDA {found}, needed {needed}.0 for NVRTC {nvrtc_version}; update the driver, or "
            f"pip install 'cuda-core[cu{version // 1000}]'"
        )


@contextlib.contextmanager
def _current(index: int) -> Iterator[None]:
    """Make a device the current one, for the driver too: in a new thread it has no context yet, and torch sets none."""
    from cuda.core import Device

    with torch.cuda.device(index):
        Device(index).set_current()
        yield


def _load(index: int) -> _Module:
    capability = torch.cuda.get_device_capability(index)
    if capability < _NEEDED_CAPABILITY:
        found = ".".join(map(str, capability))
        raise NativeError(f"found compute capability {found}, needed 8.0 or newer")
    versions = cuda_program.toolchain()
    from cuda.core import ObjectCode

    _check_driver(versions["nvrtc"])
    code = cuda_program.cubin(f"sm_{capability[0]}{capability[1]}")
    module = _Module(ObjectCode.from_cubin(code), torch.cuda.get_device_properties(index).multi_processor_count)
    with _current(index):
        module.kernel("qlf_dequantize_nested_bfloat16")  # the driver reads the code now, and may refuse it
    return module


@functools.cache
def _module(index: int) -> tuple[_Module | None, str]:
    try:
        return _load(index), ""
    except NativeError as error:
        return None, str(error)
    except Exception as error:  # the classes of cuda-core's and the driver's errors are not ours
        return None, f"the kernels cannot be loaded: {' '.join(str(error).split())[:200] or type(error).__name__}"


def why_unavailable(device: torch.device) -> str:
    """Why the kernels cannot be used on a CUDA device, in one line; "" when they can. Compiles them on first use."""
    return _module(torch.cuda.current_device() if device.index is None else device.index)[1]


def launch(device: torch.device, name: str, blocks: int, arguments: tuple[Argument, ...]) -> None:
    """Start a kernel on the device's current stream and return; `blocks` thread blocks at most, fewer if they loop.

    Raises:
        NativeError: the kernels cannot be used there.
    """
    module, reason = _module(device.index)
    if module is None:
        raise NativeError(f"CUDA kernels unavailable: {reason}")
    from cuda.core import LaunchConfig, Stream
    from cuda.core import launch as start

    with _current(device.index):
        kernel, resident = module.kernel(name)
        stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        start(stream, LaunchConfig(grid=min(blocks, resident), block=THREADS), kernel, *arguments)
