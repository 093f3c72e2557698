"""The code tables: what they follow from, and that every copy of them has the same bits."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bitsandbytes import functional

from qlformat.codebook import CODEBOOKS, DYNAMIC8, DYNAMIC8_THRESHOLDS

ROOT = Path(__file__).resolve().parents[2]
F32 = npt.NDArray[np.float32]


def codebook_json(name: str) -> F32:
    bits = json.loads((ROOT / "spec" / "codebooks" / f"{name}.json").read_text())["bits"]
    return np.array([int(pattern, 16) for pattern in bits], dtype=np.uint32).view(np.float32)


def load_script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal_float() -> list[float]:
    """NF4 as appendix A builds it, in float64."""
    quantile = NormalDist().inv_cdf
    cut = 0.9677083
    positive = [quantile(cut + (0.5 - cut) * i / 8) for i in range(8)]
    negative = [-quantile(cut + (0.5 - cut) * i / 7) for i in range(7)]
    ranked = sorted([*positive, 0.0, *negative])
    return [value / ranked[-1] for value in ranked]


def test_nf4_follows_from_the_quantiles_of_the_normal_distribution() -> None:
    assert np.abs(np.array(normal_float()) - CODEBOOKS["nf4"].values).max() < 1e-6


def test_the_cut_off_is_the_mean_of_two_outermost_bin_centres() -> None:
    assert round(((1 - 1 / 30) + (1 - 1 / 32)) / 2, 7) == 0.9677083


def test_nf4_bins_hold_nearly_equal_shares_of_normal_values() -> None:
    # What the construction is for. Not exactly equal: the half ranges have different steps, and codes are rounded to.
    normal = NormalDist()
    edges = CODEBOOKS["nf4"].thresholds * normal.inv_cdf(0.9677083)
    shares = np.diff([normal.cdf(float(edge)) for edge in edges])
    assert shares.min() > 0.85 / 16
    assert shares.max() < 1.15 / 16


def test_fp4_follows_from_its_fields() -> None:
    def magnitude(exponent: int, mantissa: int) -> float:
        return (1 + mantissa / 2) * 2.0 ** (exponent + 1) if exponent else mantissa / 16

    # The field of three bits counts 0, subnormal, then the exponents in the order that bitsandbytes gave them.
    magnitudes = {0: 0.0, 1: magnitude(0, 1), 6: magnitude(0, 0) + 2, 7: 3.0, 4: magnitude(1, 0), 5: magnitude(1, 1)}
    magnitudes.update({2: magnitude(2, 0), 3: magnitude(2, 1)})
    assert sorted(magnitudes.values()) == [0, 0.0625, 2, 3, 4, 6, 8, 12]
    for code in range(16):
        sign = -1 if code > 8 else 1
        needed = np.float32(sign * magnitudes[code % 8]) / np.float32(12)
        assert CODEBOOKS["fp4"].values[code].tobytes() == needed.tobytes(), code


def dynamic_map(fused: bool) -> F32:
    """The 8-bit codebook as appendix B.2 builds it; every scalar operation below is one float32 rounding."""
    start, end = np.float32(0.1), np.float32(1)
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent
        step = (end - start) / np.float32(count)
        edges = []
        for j in range(count + 1):
            base, factor = (start, j) if j < (count + 1) // 2 else (end, j - count)
            exact = np.float32(float(base) + float(step) * factor)  # float64 holds product and sum exactly
            edges.append(exact if fused else base + step * np.float32(factor))
        power = np.float32(10.0 ** (exponent - 6))
        for left, right in pairwise(edges):
            value = (left + right) / np.float32(2) * power
            values += [float(value), -float(value)]
    return np.sort(np.array(values, dtype=np.float32))


def test_dynamic8_follows_from_its_algorithm() -> None:
    assert dynamic_map(fused=True).tobytes() == DYNAMIC8.tobytes()
    assert DYNAMIC8.size == 256
    assert float(DYNAMIC8[0]) == pytest.approx(-0.9929688)
    assert (np.diff(DYNAMIC8) > 0).all()


def test_dynamic8_without_fused_multiply_add_is_the_other_known_table() -> None:
    # Appendix C and section 17: what bitsandbytes stores on machines without FMA.
    distance = np.abs(dynamic_map(fused=False).view(np.int32) - DYNAMIC8.view(np.int32))
    assert (distance > 0).sum() == 42
    assert distance.max() == 2


def cell_code(s: F32) -> npt.NDArray[np.int64]:
    """The 8-bit code of scaled values by the table of 65,536 cells of appendix B.3."""
    one, half = np.float32(1), np.float32(0.5)
    cell = np.floor((s + one) * half * np.float32(65535) + half).astype(np.int64)
    centre = 2 * cell / 65535 - 1
    values = DYNAMIC8.astype(np.float64)
    return np.searchsorted((values[:-1] + values[1:]) / 2, centre)


def test_the_8_bit_thresholds_follow_from_the_cells() -> None:
    code = np.arange(255)
    assert (cell_code(DYNAMIC8_THRESHOLDS) <= code).all()
    assert (cell_code(np.nextafter(DYNAMIC8_THRESHOLDS, np.float32(2))) > code).all()
    assert (np.diff(DYNAMIC8_THRESHOLDS) >= 0).all()
    equal = np.flatnonzero(np.diff(DYNAMIC8_THRESHOLDS) == 0)
    assert equal.tolist() == list(range(123, 130))
    assert cell_code(np.zeros(1, dtype=np.float32))[0] == 131
    middles = (DYNAMIC8[:-1].astype(np.float64) + DYNAMIC8[1:]) / 2
    assert np.abs(DYNAMIC8_THRESHOLDS - middles).max() < 1.6e-5
    stored = np.array([int(bits, 16) for bits in dynamic8_json()["threshold_bits"]], dtype=np.uint32)
    assert stored.tobytes() == DYNAMIC8_THRESHOLDS.tobytes()


def test_bitsandbytes_has_the_same_8_bit_thresholds() -> None:
    code = torch.from_numpy(DYNAMIC8.copy())
    for side, values in (("at", DYNAMIC8_THRESHOLDS), ("above", np.nextafter(DYNAMIC8_THRESHOLDS, np.float32(2)))):
        block = torch.from_numpy(np.concatenate([values, np.float32([1])]))  # an absmax of 1 scales by nothing
        found = functional.quantize_blockwise(block, code=code, blocksize=256)[0].numpy()[:255]
        assert (found == np.searchsorted(DYNAMIC8_THRESHOLDS, values, side="left")).all(), side


def dynamic8_json() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((ROOT / "spec" / "codebooks" / "dynamic8.json").read_text())
    return found


def test_every_copy_has_the_bits_of_the_json() -> None:
    for name, book in CODEBOOKS.items():
        assert codebook_json(name).tobytes() == book.values.tobytes()
    assert codebook_json("dynamic8").tobytes() == DYNAMIC8.tobytes()
    sync = load_script("tools/sync_codebooks.py")
    assert sync.render() == (ROOT / "qlformat" / "_tables.py").read_text()


def test_the_decimal_values_in_the_json_are_its_bits() -> None:
    for name in ("nf4", "fp4", "dynamic8"):
        found = json.loads((ROOT / "spec" / "codebooks" / f"{name}.json").read_text())
        assert found["count"] == len(found["bits"])
        if "values" in found:
            assert np.array(found["values"], dtype=np.float32).tobytes() == codebook_json(name).tobytes()


@pytest.mark.parametrize(("name", "appendix"), [("nf4", "A"), ("fp4", "B")])
def test_format_md_prints_the_same_bits(name: str, appendix: str) -> None:
    text = (ROOT / "spec" / "format.md").read_text().split(f"## Appendix {appendix}: ")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (\S+) \| `0x([0-9a-f]{8})` \|$", text, re.MULTILINE)
    assert [int(code) for code, _, _ in rows] == list(range(16))
    bits = np.array([int(pattern, 16) for _, _, pattern in rows], dtype=np.uint32).view(np.float32)
    assert bits.tobytes() == CODEBOOKS[name].values.tobytes()
    assert np.array([value for _, value, _ in rows]).astype(np.float32).tobytes() == bits.tobytes()


def test_the_c_decoder_has_the_same_bits() -> None:
    source = (ROOT / "spec" / "kit" / "decoder.c").read_text()
    table = source.split("BOOKS[2][16]")[1].split(";")[0]
    bits = [int(pattern, 16) for pattern in re.findall(r"0x([0-9a-f]{8})", table)]
    needed = np.concatenate([CODEBOOKS["nf4"].values, CODEBOOKS["fp4"].values]).view(np.uint32)
    assert bits == needed.tolist()


def test_order_and_thresholds_are_those_of_the_spec() -> None:
    text = " ".join((ROOT / "spec" / "format.md").read_text().split())
    order = CODEBOOKS["fp4"].order.tolist()
    assert ", ".join(map(str, order)) in text
    for book in CODEBOOKS.values():
        ranked = book.values[book.order]
        assert (np.diff(ranked) >= 0).all()
        assert book.thresholds.tobytes() == ((ranked[:-1] + ranked[1:]) * np.float32(0.5)).tobytes()
        assert book.values[book.zero_code] == 0
    assert CODEBOOKS["fp4"].order.tolist().index(0) + 1 == CODEBOOKS["fp4"].order.tolist().index(8)
    assert DYNAMIC8_THRESHOLDS.shape == (255,)


def test_bitsandbytes_has_the_same_tables() -> None:
    for name, book in CODEBOOKS.items():
        assert functional.get_4bit_type(name, device="cpu").numpy().tobytes() == book.values.tobytes()
    made = functional.create_dynamic_map().numpy()
    # It is made by torch.linspace on the machine that runs this: with FMA our bits, without it the known others.
    assert made.tobytes() in (DYNAMIC8.tobytes(), dynamic_map(fused=False).tobytes())
