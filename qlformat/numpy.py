"""Weights as NumPy arrays, for projects without torch: nothing here imports it.

    import qlformat.numpy
    state = qlformat.numpy.load_state_dict("out", dtype="float32")
    with qlformat.numpy.open("out") as checkpoint:
        rows = checkpoint["model.embed_tokens.weight"].astype("float32")[0:128]

NumPy has no bfloat16: with that dtype, arrays are uint16 and hold its bits, the upper half of a float32
(`(bits.astype(np.uint32) << 16).view(np.float32)` is the value).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qlformat import remote
from qlformat.checkpoint import NUMPY_DTYPES, AnyArray, Checkpoint, dtype_name
from qlformat.checkpoint import open_checkpoint as open  # noqa: A004 (reads like gzip.open)
from qlformat.decoder import chosen_weights, decode_weights, model_shape, out_of_memory, require_memory, thread_count

__all__ = ["load_state_dict", "open"]


def load_state_dict(
    path_or_repo: str | Path,
    dtype: str | np.dtype[Any] | type[np.generic] | None = None,
    names: Iterable[str] | None = None,
    threads: int | None = None,
) -> dict[str, AnyArray]:
    """All weights of a 4-bit checkpoint, or some, decoded to NumPy arrays.

    Args:
        path_or_repo: directory of a checkpoint, ours or bitsandbytes' own, or a Hub repository "ORG/NAME[@revision]".
        dtype: "float32", "float16", numpy's own of these, or "bfloat16" (uint16 bits, see above); by default each
            weight's own. Tensors of integers and bools keep theirs.
        names: exact names of the weights wanted.
        threads: all processors of this process by default.

    Returns:
        Name -> array, in the shapes of the 16-bit model ([in, out] for the Conv1D of GPT-2).

    Raises:
        FormatError: the checkpoint breaks a structural rule, T4 or D1; or a file changed while it was read (S5).
        QlfError: no such repository, name or dtype; or the arrays do not fit into memory.
    """
    wanted = None if dtype is None else dtype_name(dtype)
    count = thread_count(threads)
    with Checkpoint(remote.local_directory(path_or_repo)) as checkpoint:
        found: dict[str, AnyArray] = {}
        weights = chosen_weights(checkpoint, names)
        require_memory(checkpoint, weights, wanted)
        for weight in weights:
            kind = NUMPY_DTYPES[checkpoint.decoded_dtype(weight, wanted)]
            try:
                found[weight.name] = np.empty(model_shape(weight), dtype=kind)
            except MemoryError:
                found.clear()  # and not when the caller lets go of the error
                raise out_of_memory(checkpoint, weight, weights, wanted) from None
        decode_weights(checkpoint, found, wanted, count)
        return found
