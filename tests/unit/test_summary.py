"""summarize: local and over HTTP, 4-bit and 16-bit, reading headers only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlformat.errors import FormatError, QlfError
from qlformat.layout import Recipe
from qlformat.manifest import Source, WeightEntry
from qlformat.remote import HubFiles, local_directory, merge_ranges
from qlformat.summary import summarize
from tests import builders
from tests.builders import (
    LLAMA_CONFIG,
    LLAMA_PLAIN,
    LLAMA_QUANTIZED,
    Tensor,
    build_checkpoint,
    build_source,
    make_checkpoint,
)
from tests.hub_server import COMMIT, Hub, use_endpoint

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
SINGLE = "model.safetensors"
LINEAR = sum(np.prod(shape) for shape in LLAMA_QUANTIZED.values())
OTHER = sum(np.prod(shape) for shape in LLAMA_PLAIN.values())
EMBEDDING = np.prod(LLAMA_PLAIN["model.embed_tokens.weight"])
HEAD = np.prod(LLAMA_PLAIN["lm_head.weight"])


def test_a_checkpoint_of_ours(tmp_path: Path) -> None:
    built = make_checkpoint(quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN, shards=2)
    built.source = Source("org/model", "c0ffee")
    built.write(tmp_path)
    found = summarize(tmp_path)
    assert (found.format, found.architecture, found.model_type) == ("qlf 1", "LlamaForCausalLM", "llama")
    assert (found.total_params, found.quantized_params) == (LINEAR + OTHER, LINEAR)
    assert found.unquantized == {"embedding": EMBEDDING, "output-embedding": HEAD, "norm": 48}
    assert found.unquantized_share == pytest.approx(OTHER / (LINEAR + OTHER))
    assert found.recipe == Recipe()
    assert found.fingerprint == json.loads((tmp_path / "qlf.json").read_text())["fingerprint"]
    assert found.writer == builders.WRITER
    assert found.source == "org/model@c0ffee"
    assert found.shards == {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert found.stored_bytes == sum(found.shards.values())
    assert found.converted_bytes is None
    rows = {row.name: row for row in found.tensors}
    assert rows.keys() == LLAMA_QUANTIZED.keys() | LLAMA_PLAIN.keys()
    for entry in built.weights:
        row = rows[entry.name]
        assert (row.encoding, row.shape, row.dtype, row.reason) == (
            entry.encoding,
            entry.shape,
            "bfloat16",
            entry.reason,
        )
        assert row.relative_error == entry.relative_error
        names = [name for name in built.tensors if name == entry.name or name.startswith(f"{entry.name}.")]
        assert row.nbytes == sum(len(built.tensors[name].data) for name in names)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("fp4", 32), Recipe("nf4", 128, False)])
def test_bits(tmp_path: Path, recipe: Recipe) -> None:
    """The paper's figure counts what grows with the weight; the other one counts every byte."""
    shape = (256, 128)
    n = 256 * 128
    built = build_checkpoint(tmp_path, quantized={WEIGHT: shape}, plain={}, recipe=recipe)
    blocks = n // recipe.blocksize
    scales = blocks + 4 * (blocks / 256) if recipe.double_quant else 4 * blocks
    found = summarize(tmp_path)
    assert found.bits_per_weight == pytest.approx(8 * (n / 2 + scales) / n)
    assert found.stored_bits_per_weight == 8 * sum(len(tensor.data) for tensor in built.tensors.values()) / n
    if recipe == Recipe():
        assert found.bits_per_weight == pytest.approx(4.127, abs=5e-4)


def test_a_16_bit_model_says_what_would_be_quantized(tmp_path: Path) -> None:
    build_source(tmp_path / "source", dtype="float16", shards=2)
    found = summarize(tmp_path / "source")
    assert found.format == "16-bit"
    assert (found.total_params, found.quantized_params) == (LINEAR + OTHER, LINEAR)
    assert {row.name for row in found.tensors if row.encoding == "nf4"} == LLAMA_QUANTIZED.keys()
    assert (found.fingerprint, found.writer) == (None, None)
    assert any("not quantized" in note for note in found.notes)
    build_checkpoint(tmp_path / "out", quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN, dtype="float16")
    after = summarize(tmp_path / "out")
    assert found.bits_per_weight == after.bits_per_weight
    assert found.converted_bytes is not None
    payload = sum(row.nbytes for row in after.tensors)
    # The digits of nested_offset are not known before the conversion.
    assert abs(found.converted_bytes - payload) <= 24 * len(LLAMA_QUANTIZED)


def test_a_32_bit_model(tmp_path: Path) -> None:
    build_source(tmp_path, dtype="float32")
    assert summarize(tmp_path).format == "32-bit"


def test_a_plain_repository(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN, manifest=False)
    found = summarize(tmp_path)
    assert found.format == "bitsandbytes 4-bit"
    assert found.recipe == Recipe()
    assert found.unquantized == {"embedding": EMBEDDING, "output-embedding": HEAD, "norm": 48}
    assert found.fingerprint is None
    assert any("no qlf.json" in note for note in found.notes)
    assert all(row.relative_error is None for row in found.tensors)


def test_a_linear_layer_that_somebody_left_out(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in LLAMA_QUANTIZED.items() if name != WEIGHT}
    built = make_checkpoint(quantized=shapes, plain={**LLAMA_PLAIN, WEIGHT: (16, 16)}, manifest=False)
    built.write(tmp_path)
    assert summarize(tmp_path).unquantized["skipped"] == 256


def test_the_json_has_everything_but_the_tensors(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    found = summarize(tmp_path)
    brief = json.loads(json.dumps(found.as_dict()))
    assert "tensors" not in brief
    assert brief["unquantized_share"] == found.unquantized_share
    assert len(json.loads(json.dumps(found.as_dict(tensors=True)))["tensors"]) == 4


def test_only_headers_are_read(tmp_path: Path) -> None:
    """The packed bytes may be anything, even missing: a sparse file of the right size will do."""
    build_checkpoint(tmp_path)
    path = tmp_path / SINGLE
    header, data = builders.read_container(path)
    needed = summarize(tmp_path)
    start = path.stat().st_size - len(data)
    states = {name: entry["data_offsets"] for name, entry in header.items() if ".quant_state." in name}
    with path.open("r+b") as file:
        for position in range(len(data)):
            if not any(begin <= position < end for begin, end in states.values()):
                file.seek(start + position)
                file.write(b"\xaa")
    assert summarize(tmp_path) == needed


def rule(path: Path) -> str | None:
    with pytest.raises(QlfError) as caught:
        summarize(path)
    assert "\n" not in str(caught.value)
    return caught.value.rule


def test_what_is_refused(tmp_path: Path) -> None:
    assert rule(tmp_path / "none") is None
    build_checkpoint(tmp_path / "a")
    builders.edit_json(
        tmp_path / "a" / "config.json", lambda root: root["quantization_config"].update(quant_method="awq")
    )
    with pytest.raises(QlfError, match="'awq'"):
        summarize(tmp_path / "a")
    build_checkpoint(tmp_path / "b")
    with pytest.raises(QlfError, match="found a file"):
        summarize(tmp_path / "b" / SINGLE)
    (tmp_path / "b" / SINGLE).unlink()
    assert rule(tmp_path / "b") == "R1"
    (tmp_path / "b" / "pytorch_model.bin").touch()
    with pytest.raises(QlfError, match=r"\.bin weights"):
        summarize(tmp_path / "b")
    build_checkpoint(tmp_path / "c", shards=2)
    (tmp_path / "c" / builders.shard_name(0, 2)).unlink()
    assert rule(tmp_path / "c") == "R4"
    build_checkpoint(tmp_path / "d")
    (tmp_path / "d" / "config.json").write_text("[]")
    assert rule(tmp_path / "d") == "C1"
    build_checkpoint(tmp_path / "e")
    (tmp_path / "e" / SINGLE).write_bytes(b"\xff" * 100)
    assert rule(tmp_path / "e") == "S1"
    build_checkpoint(tmp_path / "f")
    (tmp_path / "f" / "config.json").unlink()
    assert rule(tmp_path / "f") == "R4"
    built = make_checkpoint()
    del built.tensors[f"{WEIGHT}.absmax"]
    built.write(tmp_path / "g")
    assert rule(tmp_path / "g") == "T1"


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, shards=2)
    first, second = (tmp_path / builders.shard_name(i, 2) for i in range(2))
    second.write_bytes(first.read_bytes())
    assert rule(tmp_path) == "R5"


@pytest.mark.parametrize(
    ("ranges", "needed"),
    [
        ([], []),
        ([(5, 9)], [(5, 9)]),
        ([(20, 30), (0, 10)], [(0, 30)]),
        ([(0, 10), (21, 30)], [(0, 10), (21, 30)]),
        ([(0, 30), (5, 10), (40, 41)], [(0, 41)]),
    ],
)
def test_merged_ranges(ranges: list[tuple[int, int]], needed: list[tuple[int, int]]) -> None:
    assert merge_ranges(ranges, gap=10) == needed


# Over HTTP.


def big_checkpoint(path: Path, **options: Any) -> None:
    """Sixteen weights of 64 kB each and a large embedding: 3 MB, mostly not header."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (256, 512) for i in range(16)}
    values = {name: np.resize(builders.example_values("x", (512,)), 256 * 512) for name in shapes}
    built = make_checkpoint(quantized=shapes, plain={}, values=values, **options)
    built.tensors["model.embed_tokens.weight"] = Tensor("BF16", (1000, 1000), bytes(2_000_000))
    built.placement["model.embed_tokens.weight"] = next(iter(built.placement.values()))
    built.weights.append(WeightEntry("model.embed_tokens.weight", "none", "bfloat16", (1000, 1000), "embedding"))
    built.write(path)


def test_a_remote_checkpoint_costs_its_headers_only(hub: Hub) -> None:
    big_checkpoint(hub.root / "org" / "model")
    found = summarize("org/model")
    local = summarize(hub.root / "org" / "model")
    assert found.repo_id == "org/model"
    assert found.revision == COMMIT
    assert (found.tensors, found.fingerprint, found.bits_per_weight) == (
        local.tensors,
        local.fingerprint,
        local.bits_per_weight,
    )
    small = sum((hub.root / "org" / "model" / name).stat().st_size for name in ("qlf.json", "config.json"))
    assert hub.sent - small < 0.06 * found.stored_bytes
    weights = [wanted for name, wanted in hub.requests if name == SINGLE]
    assert len(weights) == 2  # the header, and all quant_states together
    assert all(weights)


def test_remote_shards_and_revisions(hub: Hub) -> None:
    build_checkpoint(hub.root / "org" / "model", shards=3)
    found = summarize("org/model@v1")
    assert found.name == "org/model@v1"
    assert found.tensors == summarize(hub.root / "org" / "model").tensors
    assert len(found.shards) == 3


def test_a_remote_header_longer_than_the_first_fetch(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    build_checkpoint(hub.root / "org" / "model")
    monkeypatch.setattr("qlformat.summary._FIRST_FETCH", 100)
    assert summarize("org/model").tensors == summarize(hub.root / "org" / "model").tensors


def test_a_remote_16_bit_model(hub: Hub) -> None:
    build_source(hub.root / "org" / "model", config={**LLAMA_CONFIG, "dtype": "bfloat16"})
    found = summarize("org/model")
    assert (found.format, found.quantized_params) == ("16-bit", LINEAR)


def test_a_server_that_ignores_ranges(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.ranges = False
    build_checkpoint(hub.root / "org" / "model")
    assert summarize("org/model").tensors == summarize(hub.root / "org" / "model").tensors
    monkeypatch.setattr("qlformat.remote._MAX_SKIPPED", 100)
    with pytest.raises(QlfError, match="ignores range requests"):
        summarize("org/model")


def test_ranges_come_back_in_the_order_asked(hub: Hub) -> None:
    path = hub.root / "org" / "model"
    path.mkdir(parents=True)
    data = np.arange(300_000, dtype=np.uint32).tobytes()
    (path / "x.safetensors").write_bytes(data)
    files = HubFiles("org/model", None)
    ranges = [(900_000, 900_010), (0, 5), (7, 9), (400_000, 500_000), (900_005, 900_020)]
    assert files.read_ranges("x.safetensors", ranges) == [data[begin:end] for begin, end in ranges]
    assert files.transferred == hub.sent
    assert len(hub.requests) == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/none", "no such repository"),
        ("org/secret", "gated"),
        ("org/model@v9", "no such revision"),
    ],
)
def test_remote_refusals(hub: Hub, name: str, says: str) -> None:
    build_checkpoint(hub.root / "org" / "model")
    hub.gated.add("org/secret")
    for action in (summarize, local_directory):
        with pytest.raises(QlfError) as caught:
            action(name)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_broken_remote_file_has_its_rule(hub: Hub) -> None:
    path = hub.root / "org" / "model"
    build_checkpoint(path)
    (path / "config.json").unlink()
    with pytest.raises(FormatError) as caught:
        summarize("org/model")
    assert caught.value.rule == "R4"


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path)
    huggingface_hub.close_session()
    for action in (summarize, local_directory):
        with pytest.raises(QlfError) as caught:
            action("org/model")
        assert "check the connection" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_verify_downloads_a_remote_repository(hub: Hub) -> None:
    from qlformat.verifier import verify

    path = hub.root / "org" / "model"
    build_checkpoint(path)
    (path / "model.gguf").write_bytes(b"x")
    assert verify("org/model") == []
    assert {name for name, _ in hub.requests} == {"config.json", "qlf.json", SINGLE}
