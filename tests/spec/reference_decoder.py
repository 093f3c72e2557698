"""The reference decoder behind the protocol of spec/kit/run.py: python tests/spec/reference_decoder.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # as a program it is not told where the library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qlformat import reference
from qlformat.codebook import CODEBOOKS, DYNAMIC8
from qlformat.errors import FormatError, QlfError
from qlformat.shards import ShardReader
from qlformat.verifier import verify
from qlformat.weights import StoredTensor, find_weights

UNSUPPORTED = 3


def answer(lines: list[str]) -> bytes:
    """The bytes that a request asks for.

    Raises:
        QlfError: the request must be refused; `rule` says by which rule.
        NotImplementedError: the request is unknown.
    """
    if lines[:1] == ["decode"]:
        return decode(Path(lines[1]), lines[2])
    if lines[:1] == ["verify"]:
        for finding in verify(lines[1], threads=1):
            if finding.severity == "error":
                raise FormatError(finding.message, rule=finding.rule, tensor=finding.tensor, file=finding.file)
        return b""
    raise NotImplementedError


def decode(path: Path, name: str) -> bytes:
    """The decoded elements of one weight of one file, by the slow reference."""
    with ShardReader(path) as reader:
        stored = {info.name: StoredTensor(info, path.name) for info in reader.header.tensors.values()}

        def read(tensor: str) -> bytes:
            return bytes(reader.read(stored[tensor].info))

        weight = find_weights(stored, read)[name]
        state = weight.quant_state
        if state is None:
            raise FormatError("this tensor is not quantized", rule="T1", tensor=name)
        book = CODEBOOKS[state.quant_type]
        if read(f"{name}.quant_map") != book.values.tobytes():
            raise FormatError("the table is not the codebook", rule="T5", tensor=name)
        packed = np.frombuffer(read(name), dtype=np.uint8)
        if state.nested_offset is None:
            absmax = scales(read(f"{name}.absmax"), "T4")
        else:
            if read(f"{name}.nested_quant_map") != DYNAMIC8.tobytes():
                raise FormatError("the table is not the 8-bit codebook", rule="D2", tensor=name)
            codes = np.frombuffer(read(f"{name}.absmax"), dtype=np.uint8)
            nested = scales(read(f"{name}.nested_absmax"), "D1")
            absmax = reference.double_dequantize(codes, nested, np.float32(state.nested_offset))
        values = reference.dequantize(packed, absmax, state.elements, state.quant_type, state.blocksize)
        return reference.from_float32(values, state.dtype).tobytes()


def scales(data: bytes, rule: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Scales, checked."""
    values = np.frombuffer(data, dtype="<f4")
    if not (np.isfinite(values) & (values >= 0)).all():
        raise FormatError("a scale is negative or not finite", rule=rule)
    return values


def main() -> int:
    """Answer the request on stdin."""
    lines = sys.stdin.read().splitlines()
    if lines[:1] != ["qlf-kit 1"]:
        return UNSUPPORTED
    try:
        sys.stdout.buffer.write(answer(lines[1:]))
    except QlfError as error:
        print(error, file=sys.stderr)
        return 1
    except NotImplementedError:
        return UNSUPPORTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
