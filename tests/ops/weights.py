"""Weights for the tests of the operators, and what the reference makes of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from qlformat import reference
from qlformat.layout import BLOCKSIZES, QUANT_TYPES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose equality is that of the bits: -0.0 differs from 0.0."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(views[tensor.element_size()])


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    different = torch.nonzero(bits(found).flatten() != bits(expected).flatten()).flatten()
    assert not different.numel(), (
        f"{different.numel()} of {found.numel()} elements differ, first at {int(different[0])}: "
        f"{found.flatten()[different[0]].item()!r}, needed {expected.flatten()[different[0]].item()!r}"
    )


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: str
    quant_type: str
    blocksize: int
    seed: int

    def weight(self) -> torch.Tensor:
        """Mixed magnitudes: ordinary weights, zero blocks, subnormals, the largest values, both zeros."""
        generator = torch.Generator().manual_seed(self.seed)
        flat = torch.randn(int(np.prod(self.shape)), generator=generator)
        kinds = torch.randint(0, 8, (flat.numel() // self.blocksize + 1,), generator=generator)
        scale = torch.tensor([0.02, 0.02, 0.02, 1.0, 0.0, 1e-39, 1e-44, 1e4])[kinds]
        flat = flat * scale.repeat_interleave(self.blocksize)[: flat.numel()]
        return flat.to(DTYPES[self.dtype]).reshape(self.shape)


def random_cases(count: int, seed: int, largest: int = 20_000) -> list[Case]:
    """Cases of all kinds, most of them small; every combination of dtype, quant_type and blocksize comes up."""
    chosen = random.Random(seed)
    combinations = [(d, q, b) for d in DTYPES for q in QUANT_TYPES for b in BLOCKSIZES]
    cases = []
    for number in range(count):
        dtype, quant_type, blocksize = combinations[number % len(combinations)]
        dims = chosen.choice((1, 2, 2, 3))
        n = chosen.choice((1, 2, 3, blocksize - 1, blocksize, blocksize + 1, chosen.randrange(1, largest), largest))
        shape: tuple[int, ...] = (n,)
        if dims > 1:
            inner = chosen.randrange(1, 40)
            shape = (max(1, n // inner), inner) if dims == 2 else (max(1, n // (3 * inner)), 3, inner)
        cases.append(Case(shape, dtype, quant_type, blocksize, seed=number))
    return cases


@dataclass(frozen=True)
class Encoded:
    """The reference's encoding of a weight, as tensors, and what each form decodes to."""

    packed: torch.Tensor
    absmax: torch.Tensor
    codes: torch.Tensor
    nested_absmax: torch.Tensor
    nested_offset: float
    plain: torch.Tensor
    nested: torch.Tensor


def _tensor(array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor).reshape(shape)


def encoded(case: Case) -> Encoded:
    weight = case.weight()
    x = weight.float().flatten().numpy()
    packed, absmax = reference.quantize(x, case.quant_type, case.blocksize)
    codes, nested_absmax, offset = reference.double_quantize(absmax)
    with np.errstate(over="ignore"):
        dense = [
            reference.from_float32(
                reference.dequantize(packed, scales, x.size, case.quant_type, case.blocksize), case.dtype
            )
            for scales in (absmax, reference.double_dequantize(codes, nested_absmax, offset))
        ]
    return Encoded(
        torch.from_numpy(packed)[:, None],
        torch.from_numpy(absmax),
        torch.from_numpy(codes),
        torch.from_numpy(nested_absmax),
        float(offset),
        _tensor(dense[0], case.dtype, case.shape),
        _tensor(dense[1], case.dtype, case.shape),
    )
