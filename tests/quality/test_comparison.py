"""Comparing the weights of two models."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qlformat
from qlformat import QlfError, SourceError, reference
from qlformat.layout import Recipe
from qlformat.quality import comparison
from qlformat.quality.comparison import diff, same_codes, tally
from qlformat.quality.picture import draw, kinds
from tests.builders import (
    DEFAULT_PLAIN,
    DEFAULT_QUANTIZED,
    LLAMA_CONFIG,
    LLAMA_PLAIN,
    LLAMA_QUANTIZED,
    build_checkpoint,
    build_source,
    edit_json,
    example_values,
    make_checkpoint,
)

DOWN, Q = DEFAULT_QUANTIZED
SOURCE_SHAPES = {**DEFAULT_QUANTIZED, **DEFAULT_PLAIN}


def by_name(found: comparison.Differences) -> dict[str, comparison.TensorDifference]:
    return {tensor.name: tensor for tensor in found.tensors}


def test_sums_by_hand() -> None:
    found = tally(np.float32([3, 4, 0, 1]), np.float32([3, 2, 0, 1.5]))
    assert (found.count, found.error, found.norm, found.max_error) == (4, 4.25, 26.0, 2.0)
    assert (found.equal, found.not_finite) == (2, 0)
    assert found.relative_error == math.sqrt(4.25 / 26)


def test_what_is_not_finite_counts_in_no_error() -> None:
    nan, inf = math.nan, math.inf
    found = tally(np.float32([nan, nan, inf, inf, 2]), np.float32([nan, 1, inf, -inf, 3]))
    assert (found.equal, found.not_finite) == (2, 2)
    assert (found.error, found.norm, found.max_error) == (1.0, 4.0, 1.0)


def test_equal_codes_by_hand() -> None:
    a, b = np.uint8([0x12, 0x34, 0x50]), np.uint8([0x12, 0x35, 0x5F])
    assert same_codes(a, b, 6) == 4
    assert same_codes(a, b, 5) == 4  # the last low nibble is padding
    assert same_codes(a, a, 5) == 5


def test_a_checkpoint_against_itself_in_other_shards(tmp_path: Path) -> None:
    a = build_checkpoint(tmp_path / "a").path
    b = build_checkpoint(tmp_path / "b", shards=3).path
    found = diff(a, b)
    assert found.equal and found.different == [] and found.relative_error == 0.0
    assert found.equal_codes == 1.0 and found.as_dict()["equal"] is True
    assert {tensor.equal_codes for tensor in found.tensors} == {1.0, None}


def test_figures_equal_those_of_whole_arrays(tmp_path: Path) -> None:
    """Against NumPy on the reference's arrays, for 4 bits against the 16-bit source."""
    source = build_source(tmp_path / "source", weights=SOURCE_SHAPES, shards=2)
    packed = build_checkpoint(tmp_path / "packed").path
    found = diff(source, packed)
    assert [tensor.name for tensor in found.different] == sorted(
        DEFAULT_QUANTIZED, key=lambda name: by_name(found)[name].relative_error or 0, reverse=True
    )
    with qlformat.open(packed) as checkpoint:
        for name, shape in SOURCE_SHAPES.items():
            bits = reference.from_float32(example_values(name, shape), "bfloat16")
            a = reference.to_float32(bits, "bfloat16").astype(np.float64)
            b = checkpoint.dequantize(name, "float32").reshape(-1).astype(np.float64)
            if name in DEFAULT_QUANTIZED:  # decoded to the dtype that the checkpoint names
                b = reference.to_float32(checkpoint.dequantize(name).reshape(-1), "bfloat16").astype(np.float64)
            tensor = by_name(found)[name]
            assert tensor.relative_error == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
            assert tensor.max_error == np.abs(b - a).max()
            assert tensor.equal_values == (a == b).mean()
            assert tensor.equal_codes is None
            assert (tensor.encoding_a, tensor.encoding_b) == (
                "bfloat16", "nf4" if name in DEFAULT_QUANTIZED else "bfloat16",
            )  # fmt: skip
    with_tolerance = diff(source, packed, tolerance=0.2)
    assert with_tolerance.equal and not diff(source, packed, tolerance=0.01).equal


def test_pieces_and_threads_change_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    shapes = {name: (129, 300)}
    values = {name: example_values(name, shapes[name]) * 3}
    a = build_source(tmp_path / "a", weights=shapes)
    b = build_checkpoint(tmp_path / "b", quantized=shapes, plain={}, values=values).path
    first = diff(a, b, threads=1)
    assert diff(a, b, threads=3).tensors == first.tensors
    monkeypatch.setattr(comparison, "PIECE_ELEMENTS", 1 << 20)
    (whole,), (parts,) = diff(a, b).tensors, first.tensors
    assert whole.relative_error == pytest.approx(parts.relative_error, rel=1e-12)
    assert (whole.max_error, whole.equal_values) == (parts.max_error, parts.equal_values)


def test_shares_of_equal_codes(tmp_path: Path) -> None:
    values = example_values(Q, (16, 16))
    changed = values.copy()
    changed[:64] *= -1
    a = build_checkpoint(tmp_path / "a", quantized={Q: (16, 16)}, plain={}, values={Q: values}).path
    b = build_checkpoint(tmp_path / "b", quantized={Q: (16, 16)}, plain={}, values={Q: changed}).path
    plain = build_checkpoint(
        tmp_path / "plain", quantized={Q: (16, 16)}, plain={}, values={Q: values}, recipe=Recipe(double_quant=False)
    ).path
    fp4 = build_checkpoint(
        tmp_path / "fp4", quantized={Q: (16, 16)}, plain={}, values={Q: values}, recipe=Recipe("fp4")
    ).path
    share = diff(a, b).equal_codes
    assert share is not None and 0.75 <= share < 0.80  # of the first block, only the zeros' codes stay
    assert diff(a, plain).equal_codes == 1.0 and not diff(a, plain).equal
    (tensor,) = diff(a, fp4).tensors
    assert tensor.equal_codes is None and (tensor.encoding_a, tensor.encoding_b) == ("nf4", "fp4")


def test_missing_weights_and_other_shapes(tmp_path: Path) -> None:
    a = build_source(tmp_path / "a", weights={"x.weight": (4, 4), "y.weight": (4, 4), "z.weight": (2, 3)})
    b = build_source(tmp_path / "b", weights={"y.weight": (4, 4), "z.weight": (3, 2), "w.weight": (1,)})
    found = diff(a, b)
    assert (found.only_a, found.only_b) == (("x.weight",), ("w.weight",))
    (other,) = found.different
    assert (other.name, other.shape_a, other.shape_b) == ("z.weight", (2, 3), (3, 2))
    assert not other.compared and other.relative_error is None
    assert not found.equal and not diff(a, b, tolerance=9).equal


def test_models_without_a_common_name_are_not_equal(tmp_path: Path) -> None:
    a = build_source(tmp_path / "a", weights={"x.weight": (4,)})
    b = build_source(tmp_path / "b", weights={"y.weight": (4,)})
    assert not diff(a, b).equal and diff(a, b).tensors == ()


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_output_embedding_is_not_missing(tmp_path: Path, tied: bool) -> None:
    shapes = {"model.embed_tokens.weight": (4, 4)}
    a = build_source(tmp_path / "a", weights={**shapes, "lm_head.weight": (4, 4)})
    b = build_source(tmp_path / "b", weights=shapes, config={**LLAMA_CONFIG, "tie_word_embeddings": tied})
    for found in (diff(a, b), diff(b, a)):
        assert found.equal is tied
        assert bool(found.only_a or found.only_b) is not tied
        assert len(found.notes) == int(tied)


def test_a_conv1d_is_turned(tmp_path: Path) -> None:
    """Stored [in, out] in 16 bits and [out, in] in 4."""
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_embd=48, n_head=4, vocab_size=64, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    qlformat.convert(tmp_path / "gpt2", tmp_path / "nf4")
    name = "transformer.h.0.attn.c_attn.weight"
    tensor = by_name(diff(tmp_path / "gpt2", tmp_path / "nf4"))[name]
    assert tensor.shape_a == tensor.shape_b == (144, 48)
    assert tensor.relative_error is not None and 0.05 < tensor.relative_error < 0.15
    back = by_name(diff(tmp_path / "nf4", tmp_path / "gpt2"))[name]
    assert back.shape_a == (144, 48) and back.max_error == tensor.max_error
    qlformat.export(tmp_path / "nf4", tmp_path / "plain", dtype="float32")
    assert diff(tmp_path / "nf4", tmp_path / "plain").equal
    assert diff(tmp_path / "nf4", tmp_path / "nf4").equal


def test_the_errors_are_those_that_convert_measured(stories_dir: Path, tmp_path: Path) -> None:
    qlformat.convert(stories_dir, tmp_path / "nf4")
    found = diff(stories_dir, tmp_path / "nf4")
    with qlformat.open(tmp_path / "nf4") as checkpoint:
        assert checkpoint.manifest is not None
        recorded = {entry.name: entry.relative_error for entry in checkpoint.manifest.weights}
    assert len(found.different) == 42
    for tensor in found.different:
        assert tensor.relative_error == pytest.approx(recorded[tensor.name], rel=1e-5)


def test_nan_in_a_model(tmp_path: Path) -> None:
    shapes = {"x.weight": (4,)}
    a = build_source(tmp_path / "a", weights=shapes, values={"x.weight": np.float32([1, 2, 3, math.nan])})
    b = build_source(tmp_path / "b", weights=shapes, values={"x.weight": np.float32([1, 2, 3, 4])})
    (tensor,) = diff(a, b, tolerance=9).different
    assert (tensor.not_finite, tensor.relative_error, tensor.equal_values) == (1, 0.0, 0.75)
    assert diff(a, a).equal


def test_a_reference_of_zeros(tmp_path: Path) -> None:
    shapes = {"x.weight": (4,)}
    zeros = build_source(tmp_path / "a", weights=shapes, values={"x.weight": np.zeros(4, np.float32)})
    other = build_source(tmp_path / "b", weights=shapes)
    assert diff(zeros, other, tolerance=9).tensors[0].relative_error is None
    assert not diff(zeros, other, tolerance=9).equal
    assert diff(other, zeros).relative_error == 1.0
    assert diff(zeros, zeros).equal


def test_a_single_file_and_integers(tmp_path: Path) -> None:
    a = build_source(tmp_path / "a", weights={"x.weight": (4,)})
    assert diff(a / "model.safetensors", a).equal


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_a_tolerance_that_is_none(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(QlfError, match="needed a number from 0 on"):
        diff(tmp_path, tmp_path, tolerance=tolerance)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    good = build_source(tmp_path / "good")
    with pytest.raises(QlfError, match="found no directory"):
        diff(good, tmp_path / "missing")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="found an adapter without its base"):
        diff(tmp_path / "adapter", good)
    edit_json(good / "config.json", lambda root: root.update(quantization_config={"quant_method": "gptq"}))
    with pytest.raises(SourceError, match="quantized already"):
        diff(good, good)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    a = build_source(tmp_path / "a", weights=SOURCE_SHAPES)
    b = build_checkpoint(tmp_path / "b").path
    code = (
        "import sys; from qlformat.quality.comparison import diff; "
        f"diff({str(a)!r}, {str(b)!r}); print('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_picture(tmp_path: Path) -> None:
    source = build_source(tmp_path / "source")
    a = build_checkpoint(tmp_path / "a", quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN).path
    changed: dict[str, Any] = {name: example_values(name, shape) * 2 for name, shape in LLAMA_QUANTIZED.items()}
    b = make_checkpoint(quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN, values=changed).write(tmp_path / "b")
    found = diff(source, a)
    # Norms are equal in all layers, the embeddings are in none.
    expected = {name.split("layers.0.")[1].removesuffix(".weight") for name in LLAMA_QUANTIZED}
    assert set(kinds(found)) == expected
    for number, (left, right) in enumerate([(source, a), (a, b), (a, a)]):
        draw(diff(left, right), tmp_path / f"{number}.png")
        draw(diff(left, right), tmp_path / "again.png")
        data = (tmp_path / f"{number}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and data == (tmp_path / "again.png").read_bytes()
    with pytest.raises(QlfError, match="the picture cannot be written"):
        draw(found, tmp_path / "missing" / "x.png")
    lone = build_source(tmp_path / "lone", weights={"x.weight": (4,)})
    with pytest.raises(QlfError, match="nothing to draw"):
        draw(diff(lone, lone), tmp_path / "x.png")
