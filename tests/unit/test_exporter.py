"""Export without torch: bytes, dtypes, shards, carried files, and that nothing is left half-written."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlformat.checkpoint import open_checkpoint
from qlformat.errors import FormatError, QlfError, TargetError
from qlformat.exporter import export
from qlformat.layout import Recipe
from qlformat.progress import Progress
from tests import builders
from tests.builders import LLAMA_PLAIN, LLAMA_QUANTIZED, Tensor, build_checkpoint, make_checkpoint, read_tensors

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def exported_tensors(out: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in sorted(out.glob("*.safetensors")):
        found |= read_tensors(shard)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("recipe", "source_dtype"), [(Recipe(), "bfloat16"), (Recipe("fp4", 32, False), "float32")])
def test_values(tmp_path: Path, dtype: str, recipe: Recipe, source_dtype: str) -> None:
    build_checkpoint(tmp_path / "base", recipe=recipe, dtype=source_dtype, shards=2)
    report = export(tmp_path / "base", tmp_path / "out", dtype=dtype)
    found = exported_tensors(tmp_path / "out")
    with open_checkpoint(tmp_path / "base") as base:
        assert found.keys() == base.weights.keys()
        for name, weight in base.weights.items():
            assert (found[name].dtype, found[name].shape) == (STORED[dtype], weight.shape)
            assert found[name].data == base.dequantize(name, dtype).tobytes()
        assert report.params == sum(weight.elements for weight in base.weights.values())
        assert report.base_bytes == sum(p.stat().st_size for p in (tmp_path / "base").glob("*.safetensors"))
    assert report.files == ("model.safetensors",)
    assert report.output_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert json.loads(json.dumps(report.as_dict()))["dtype"] == dtype


def test_the_bytes_do_not_depend_on_the_threads(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "base", quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN)
    for threads in (1, 3):
        export(tmp_path / "base", tmp_path / str(threads), threads=threads, shard_size=1000)
    one, three = tmp_path / "1", tmp_path / "3"
    assert sorted(os.listdir(one)) == sorted(os.listdir(three))
    for path in one.iterdir():
        assert path.read_bytes() == (three / path.name).read_bytes()


def test_shards_and_their_index(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "base", quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN)
    report = export(tmp_path / "base", tmp_path / "out", dtype="float16", shard_size=1200)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert list(report.files) == shards
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert len(shards) > 3
    held = {name: shard for shard in shards for name in read_tensors(tmp_path / "out" / shard)}
    assert index["weight_map"] == held
    sizes = [sum(len(t.data) for t in read_tensors(tmp_path / "out" / shard).values()) for shard in shards]
    assert index["metadata"]["total_size"] == sum(sizes) == 2 * report.params
    assert max(sizes) <= 1200


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "base")
    report = export(tmp_path / "base", tmp_path / "out", shard_size=1)
    assert len(report.files) == 4


def test_conv1d_is_turned_back(tmp_path: Path) -> None:
    built = make_checkpoint(quantized={WEIGHT: (24, 16)})
    built.weights = [replace(entry, transposed=entry.name == WEIGHT) for entry in built.weights]
    built.write(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "out", dtype="float32")
    tensor = exported_tensors(tmp_path / "out")[WEIGHT]
    with open_checkpoint(tmp_path / "base") as base:
        needed = base.dequantize(WEIGHT, "float32")
    assert tensor.shape == (16, 24)
    assert np.array_equal(np.frombuffer(tensor.data, dtype=np.float32).reshape(16, 24), needed.T)


def test_integers_and_odd_shapes_stay(tmp_path: Path) -> None:
    built = make_checkpoint(quantized={"a.weight": (3, 5)})
    extra: Mapping[str, Tensor] = {
        "ids": Tensor("I64", (2,), bytes(16)),
        "mask": Tensor("BOOL", (3,), b"\1\0\1"),
        "scalar": Tensor("F32", (), np.float32(0.1).tobytes()),
        "empty": Tensor("F32", (0, 3), b""),
        "wide": Tensor("F64", (1,), np.float64(0.1).tobytes()),
    }
    built.tensors |= extra
    built.placement |= dict.fromkeys(extra, "model.safetensors")
    built.write(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "out", dtype="float16")
    found = exported_tensors(tmp_path / "out")
    assert found["ids"] == extra["ids"]
    assert found["mask"] == extra["mask"]
    assert found["scalar"] == Tensor("F16", (), np.float16(0.1).tobytes())
    assert found["wide"] == Tensor("F16", (1,), np.float16(0.1).tobytes())
    assert found["empty"] == Tensor("F16", (0, 3), b"")
    assert found["a.weight"].shape == (3, 5)


def test_config_and_carried_files(tmp_path: Path) -> None:
    carried = {"tokenizer.json": b"{}", "chat/template.jinja": b"{{ x }}", "modeling.py": b"import os\n"}
    built = make_checkpoint(carried=carried)
    built.config |= {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "hidden_size": 16},
        "audio_config": {"dtype": None, "kind": "x"},
        "rope_scaling": {"dtype": "linear"},
    }
    built.write(tmp_path / "base")
    (tmp_path / "base" / "unlisted.txt").write_text("x")
    export(tmp_path / "base", tmp_path / "out", dtype="float16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")
    assert config["text_config"] == {"dtype": "float16", "hidden_size": 16}
    assert config["audio_config"]["dtype"] == "float16"
    assert config["rope_scaling"] == {"dtype": "linear"}
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {"config.json", "model.safetensors", *carried}
    for name, data in carried.items():
        assert (tmp_path / "out" / name).read_bytes() == data


def test_a_config_without_dtype_gets_one(tmp_path: Path) -> None:
    built = make_checkpoint()
    del built.config["dtype"]
    built.write(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_plain_repository_carries_what_is_no_weight(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "base", manifest=False, carried={"tokenizer.model": b"x", "LICENSE": b"y"})
    about_it = ("README.md", "quantization-error.png", "merge_report.json", "merge_report.svg")
    for name in ("pytorch_model.bin", "x.gguf", ".hidden", *about_it):
        (tmp_path / "base" / name).write_text("x")
    export(tmp_path / "base", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["LICENSE", "config.json", "model.safetensors", "tokenizer.model"]


def test_values_beyond_float16_are_noted(tmp_path: Path) -> None:
    values = {WEIGHT: builders.example_values(WEIGHT, (16, 16), 1e6)}
    build_checkpoint(tmp_path / "base", values=values)
    (note,) = export(tmp_path / "base", tmp_path / "out", dtype="float16").notes
    assert WEIGHT in note
    assert export(tmp_path / "base", tmp_path / "wide", dtype="bfloat16").notes == ()


def test_progress(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "base")
    seen: list[Progress] = []
    export(tmp_path / "base", tmp_path / "out", progress=seen.append)
    last = seen[-1]
    assert (last.phase, last.tensors_done, last.bytes_done) == ("exporting", last.tensors_total, last.bytes_total)


def refused(tmp_path: Path, error: type[QlfError], **options: Any) -> str:
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        export(tmp_path / "base", options.pop("out", tmp_path / "out"), **options)
    assert "\n" not in str(caught.value)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    return str(caught.value)


def test_refusals_leave_everything_as_it_was(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "base")
    assert "int8" in refused(tmp_path, QlfError, dtype="int8")
    assert "source lies here" in refused(tmp_path, TargetError, out=tmp_path / "base", overwrite=True)
    assert "source lies here" in refused(tmp_path, TargetError, out=tmp_path, overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "--overwrite" in refused(tmp_path, TargetError)
    export(tmp_path / "base", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_broken_base_leaves_nothing(tmp_path: Path) -> None:
    built = make_checkpoint(recipe=Recipe(double_quant=False))
    name = f"{WEIGHT}.absmax"
    built.tensors[name] = replace(built.tensors[name], data=b"\xff" * len(built.tensors[name].data))
    built.write(tmp_path / "base")
    assert "[T4]" in refused(tmp_path, FormatError)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "base", quantized={WEIGHT: (256, 256)})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        assert "size limit" in refused(tmp_path, TargetError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_checkpoint(tmp_path / "base")
    monkeypatch.setattr("qlformat.staging.free_bytes", lambda directory: 1000)
    assert "1.00 kB free" in refused(tmp_path, TargetError)
