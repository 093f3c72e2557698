"""The converter: bytes that depend on nothing but source and recipe, and nothing lost when it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlformat import reference
from qlformat.converter import convert
from qlformat.errors import FormatError, QlfError, SourceError, TargetError
from qlformat.layout import QuantState, Recipe
from qlformat.manifest import parse
from qlformat.progress import Progress
from qlformat.shards import ShardReader
from tests.sources import CONFIG, encoded, file_bytes, llama_values, write_safetensors, write_source

DRIVER = Path(__file__).with_name("convert_driver.py")
ROOT = Path(__file__).resolve().parents[2]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def drive(source: Path, out: Path, kind: str, call: int, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(DRIVER), str(source), str(out), kind, str(call), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


def stored(out: Path) -> dict[str, bytes]:
    tensors = {}
    for path in out.glob("*.safetensors"):
        with ShardReader(path) as reader:
            tensors |= {name: bytes(reader.read(info)) for name, info in reader.header.tensors.items()}
    return tensors


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe("fp4", 128, False), Recipe("nf4", 4096, True)], ids=str)
def test_every_stored_tensor_equals_the_reference(tmp_path: Path, dtype: str, recipe: Recipe) -> None:
    source = write_source(tmp_path / "src", dtype=dtype)
    report = convert(source, tmp_path / "out", recipe=recipe, threads=2)
    tensors = stored(tmp_path / "out")
    errors = {entry.name: entry for entry in report.manifest.weights}
    quantized = 0
    for name, (_, shape, data) in encoded(llama_values(), dtype).items():
        if f"{name}.absmax" not in tensors:
            assert tensors[name] == data
            continue
        quantized += 1
        raw = np.frombuffer(data, dtype=np.uint16 if dtype == "bfloat16" else np.dtype(dtype))
        values = reference.to_float32(raw, dtype)
        packed, absmax = reference.quantize(values, recipe.quant_type, recipe.blocksize)
        assert tensors[name] == packed.tobytes()
        offset, decoded = None, absmax
        if recipe.double_quant:
            codes, nested, mean = reference.double_quantize(absmax)
            offset, decoded = float(mean), reference.double_dequantize(codes, nested, mean)
            assert tensors[f"{name}.absmax"] == codes.tobytes()
            assert tensors[f"{name}.nested_absmax"] == nested.tobytes()
        else:
            assert tensors[f"{name}.absmax"] == absmax.tobytes()
        state = QuantState(recipe.quant_type, recipe.blocksize, dtype, shape, offset)
        assert tensors[f"{name}.quant_state.bitsandbytes__{recipe.quant_type}"] == state.to_json()
        exact = values.astype(np.float64)
        difference = reference.dequantize(packed, decoded, values.size, recipe.quant_type, recipe.blocksize) - exact
        # The figures come from float32 block sums: measured within 2e-6 of the exact ones, relative.
        assert errors[name].rms_error == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-4)
        assert errors[name].relative_error == pytest.approx(
            np.linalg.norm(difference) / np.linalg.norm(exact), rel=1e-4
        )
    assert quantized == 14


def test_threads_source_shards_and_repetition_change_no_byte(tmp_path: Path) -> None:
    one = write_source(tmp_path / "one")
    outs = {}
    for threads in (1, 2, 5):
        convert(one, tmp_path / f"t{threads}", threads=threads, shard_size=30_000)
        outs[threads] = file_bytes(tmp_path / f"t{threads}")
    assert outs[1] == outs[2] == outs[5]
    assert len(list((tmp_path / "t1").glob("*.safetensors"))) > 2
    three = write_source(tmp_path / "three", shards=3)
    convert(three, tmp_path / "from_three", shard_size=30_000)
    weights = {name: data for name, data in outs[1].items() if name.endswith(".safetensors")}
    other = file_bytes(tmp_path / "from_three")
    assert weights == {name: data for name, data in other.items() if name.endswith(".safetensors")}


def test_fingerprint_does_not_depend_on_the_shard_size(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    prints = {
        convert(source, tmp_path / f"{size}", shard_size=size).manifest.fingerprint for size in (1, 50_000, 10**9)
    }
    assert len(prints) == 1
    assert len(list((tmp_path / "1").glob("*.safetensors"))) == len(llama_values())


def test_the_source_is_never_changed(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src", shards=2)
    before = file_bytes(source)
    convert(source, tmp_path / "out")
    assert file_bytes(source) == before


def test_what_is_carried_over(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src", shards=2)
    for name in ("generation_config.json", "chat_template.jinja", "modeling_x.py", "LICENSE", "vocab.txt"):
        (source / name).write_text("{}")
    (source / "code").mkdir()
    (source / "code" / "helper.py").write_text("")
    about_it = ("README.md", "quantization-error.png", "merge_report.json", "merge_report.svg")
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin.index.json", ".hidden.json", *about_it):
        (source / name).write_text("{}")
    convert(source, tmp_path / "out")
    carried = {
        "generation_config.json",
        "chat_template.jinja",
        "modeling_x.py",
        "LICENSE",
        "vocab.txt",
        "code/helper.py",
    }
    written = {"config.json", "qlf.json", "model.safetensors", "tokenizer.json"}
    assert set(file_bytes(tmp_path / "out")) == carried | written


def test_killed_anywhere_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    calls = int(drive(source, tmp_path / "undisturbed", "none", 0).stdout)
    expected = file_bytes(tmp_path / "undisturbed")
    assert calls > 100
    out = tmp_path / "out"
    moments = sorted({*range(1, calls + 1, max(1, calls // 12)), *range(calls - 6, calls + 1)})
    for moment in moments:
        killed = drive(source, out, "kill", moment, "resume")
        assert killed.returncode == -9
        finished = drive(source, out, "none", 0, "resume")
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert file_bytes(out) == expected, f"killed at call {moment} of {calls}"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src", "undisturbed"]
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink()
        out.rmdir()


def test_killed_again_and_again(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    drive(source, tmp_path / "undisturbed", "none", 0)
    kills = 0
    while drive(source, tmp_path / "out", "kill", 40, "resume").returncode == -9:
        kills += 1
        assert kills < 50
    assert kills >= 2
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "undisturbed")


def test_killed_while_replacing_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    out = tmp_path / "out"
    convert(write_source(tmp_path / "other", dtype="float32"), out)
    old = file_bytes(out)
    calls = int(drive(source, tmp_path / "undisturbed", "none", 0).stdout)
    new = file_bytes(tmp_path / "undisturbed")
    for moment in range(calls - 6, calls + 8):
        drive(source, out, "kill", moment, "overwrite")
        present = [p for p in tmp_path.iterdir() if p.is_dir() and p.name in ("out", ".out.qlf-old")]
        contents = [{k: v for k, v in file_bytes(p).items() if not k.startswith(".qlf-")} for p in present]
        assert old in contents or new in contents
        finished = drive(source, out, "none", 0, "resume", "overwrite")
        assert finished.returncode == 0, finished.stdout
        assert file_bytes(out) == new
        convert(tmp_path / "other", out, overwrite=True)


def test_resume_refuses_other_options(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    assert drive(source, tmp_path / "out", "kill", 60).returncode == -9
    with pytest.raises(TargetError, match="other options"):
        convert(source, tmp_path / "out", recipe=Recipe(blocksize=128), resume=True)
    assert drive(source, tmp_path / "out", "none", 0, "resume").returncode == 0


def test_resume_notices_damaged_partial_work(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    drive(source, tmp_path / "undisturbed", "none", 0)
    assert drive(source, tmp_path / "out", "kill", 90).returncode == -9
    partial = next((tmp_path / ".out.qlf-partial").glob("model-00001*"))
    data = bytearray(partial.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    partial.write_bytes(data)
    assert drive(source, tmp_path / "out", "none", 0, "resume").returncode == 0
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("moment", [1, 5, 30, 60, 90])
def test_disk_full_is_one_line_and_can_be_resumed(tmp_path: Path, moment: int) -> None:
    source = write_source(tmp_path / "src")
    drive(source, tmp_path / "undisturbed", "none", 0)
    full = drive(source, tmp_path / "out", "enospc", moment)
    assert full.returncode == 1
    assert full.stdout.startswith("TargetError")
    assert "disk is full" in full.stdout
    assert full.stdout.count("\n") == 1
    assert full.stderr == ""
    assert not (tmp_path / "out").exists()
    assert drive(source, tmp_path / "out", "none", 0, "resume").returncode == 0
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "undisturbed")


def test_too_little_space_is_said_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "src")
    monkeypatch.setattr("qlformat.staging.free_bytes", lambda directory: 1000)
    with pytest.raises(TargetError, match=r"found 1\.00 kB free, needed"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_an_existing_target_is_refused_and_untouched(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    convert(source, tmp_path / "out")
    before = file_bytes(tmp_path / "out")
    with pytest.raises(TargetError, match="not empty"):
        convert(source, tmp_path / "out", recipe=Recipe(blocksize=128))
    assert file_bytes(tmp_path / "out") == before
    convert(source, tmp_path / "out", recipe=Recipe(blocksize=128), overwrite=True)
    assert file_bytes(tmp_path / "out") != before


def test_the_source_is_not_a_possible_target(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    before = file_bytes(source)
    for out in (source, tmp_path):
        with pytest.raises(TargetError):
            convert(source, out, overwrite=True)
    assert file_bytes(source) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1000, 4095])
def test_non_finite_weights_are_refused_by_name(tmp_path: Path, value: float, place: int) -> None:
    values = llama_values()
    values[Q_PROJ].reshape(-1)[place] = value
    source = write_source(tmp_path / "src", encoded(values, "float32"), dtype="float32")
    with pytest.raises(SourceError) as caught:
        convert(source, tmp_path / "out")
    assert (caught.value.rule, caught.value.tensor) == ("E1", Q_PROJ)
    first = place // 64 * 64
    assert f"elements {first} to {first + 63} of 4096" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_non_finite_values_elsewhere_are_kept(tmp_path: Path) -> None:
    values = llama_values()
    values["model.norm.weight"][0] = np.inf
    convert(write_source(tmp_path / "src", encoded(values, "float16")), tmp_path / "out")
    assert np.isinf(np.frombuffer(stored(tmp_path / "out")["model.norm.weight"], dtype=np.float16)[0])


def test_skip_patterns(tmp_path: Path) -> None:
    report = convert(write_source(tmp_path / "src"), tmp_path / "out", skip=["model.layers.0.*", "*.o_proj.weight"])
    kept = {entry.name for entry in report.manifest.weights if entry.reason == "skip-pattern"}
    assert Q_PROJ in kept
    assert "model.layers.1.self_attn.o_proj.weight" in kept
    assert report.quantized_params < report.total_params / 2
    assert parse((tmp_path / "out" / "qlf.json").read_bytes()).skip == ("model.layers.0.*", "*.o_proj.weight")


def test_zero_size_and_scalar_tensors_are_kept(tmp_path: Path) -> None:
    tensors = encoded(llama_values(), "float16") | {
        "model.layers.0.empty": ("F16", (0, 64), b""),
        "model.scale": ("F32", (), b"\0\0\x80?"),
        "model.steps": ("I64", (1,), bytes(8)),
    }
    convert(write_source(tmp_path / "src", tensors), tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found["model.layers.0.empty"] == b""
    assert found["model.scale"] == b"\0\0\x80?"


@pytest.mark.parametrize(("shape", "data"), [((0,), b""), ((0, 64), b""), ((), b"\0\0")])
def test_a_weight_without_rows_is_refused_unless_skipped(tmp_path: Path, shape: tuple[int, ...], data: bytes) -> None:
    tensors = encoded(llama_values(), "float16") | {Q_PROJ: ("F16", shape, data)}
    source = write_source(tmp_path / "src", tensors)
    error = refused(source, tmp_path / "out")
    assert error.tensor == Q_PROJ and str(list(shape)) in str(error) and f"--skip {Q_PROJ}" in str(error)
    convert(source, tmp_path / "out", skip=[Q_PROJ])
    assert stored(tmp_path / "out")[Q_PROJ] == data


def test_constant_and_zero_weights(tmp_path: Path) -> None:
    values = llama_values()
    values[Q_PROJ][:] = 0
    values["model.layers.0.self_attn.k_proj.weight"][:] = 3
    report = convert(write_source(tmp_path / "src", encoded(values, "float16")), tmp_path / "out")
    errors = {entry.name: entry.relative_error for entry in report.manifest.weights}
    assert errors[Q_PROJ] == 0.0
    assert errors["model.layers.0.self_attn.k_proj.weight"] == 0.0


def refused(source: Path, out: Path) -> QlfError:
    with pytest.raises(QlfError) as caught:
        convert(source, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8"])
def test_other_dtypes_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    tensors = encoded(llama_values(), "float16") | {Q_PROJ: (dtype, (64, 64), bytes(4096))}
    error = refused(write_source(tmp_path / "src", tensors), tmp_path / "out")
    assert (error.rule, error.tensor) == ("E3", Q_PROJ)
    assert dtype in str(error)


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    convert(write_source(tmp_path / "src"), tmp_path / "four")
    assert refused(tmp_path / "four", tmp_path / "out").rule == "E2"
    gptq = dict(CONFIG) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    error = refused(write_source(tmp_path / "gptq", config=gptq), tmp_path / "out")
    assert error.rule == "E2"
    assert "gptq" in str(error)
    tensors = encoded(llama_values(), "float16") | {f"{Q_PROJ}_scale_inv": ("F32", (1,), bytes(4))}
    assert refused(write_source(tmp_path / "fp8", tensors), tmp_path / "out").rule == "E2"


def test_gguf_and_adapters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    assert refused(tmp_path / "gguf", tmp_path / "out").rule == "E4"
    assert refused(tmp_path / "gguf" / "model.gguf", tmp_path / "out").rule == "E4"
    (tmp_path / "gguf" / "config.json").write_text(json.dumps(CONFIG))
    error = refused(tmp_path / "gguf", tmp_path / "out")
    assert error.rule == "E4" and error.file == "model.gguf"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "adapter" in str(refused(tmp_path / "adapter", tmp_path / "out"))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    assert "no file or directory" in str(refused(tmp_path / "nothing", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    assert "config.json" in str(refused(tmp_path / "empty", tmp_path / "out"))


def test_shards_and_index(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src", shards=2)
    index_path = source / "model.safetensors.index.json"
    index: dict[str, Any] = json.loads(index_path.read_text())
    second = source / "model-00002-of-00002.safetensors"

    def with_map(rule: str, change: dict[str, str]) -> None:
        index_path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        assert refused(source, tmp_path / "out").rule == rule

    with_map("R4", {Q_PROJ: "missing.safetensors"})
    with_map("R3", {Q_PROJ: "../src/model-00001-of-00002.safetensors"})
    with_map("R3", {Q_PROJ: str(second)})
    with_map("R5", {"not.there.weight": second.name})
    swapped = next(name for name, file in index["weight_map"].items() if file != second.name)
    with_map("R5", {swapped: second.name})
    index_path.write_text(json.dumps(index))
    twice = encoded(llama_values(), "float16")
    write_safetensors(
        second, {name: twice[name] for name in twice if index["weight_map"][name] == second.name or name == swapped}
    )
    assert refused(source, tmp_path / "out").rule == "R5"
    second.unlink()
    outside = tmp_path / "outside.safetensors"
    write_safetensors(outside, {name: twice[name] for name in twice if index["weight_map"][name] == second.name})
    second.symlink_to(outside)
    assert refused(source, tmp_path / "out").rule == "R4"


def test_both_kinds_of_weights_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src", shards=2)
    write_source(source)
    assert refused(source, tmp_path / "out").rule == "R1"


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[Progress] = []
    convert(write_source(tmp_path / "src"), tmp_path / "out", progress=seen.append)
    finished = [p for p in seen if p.phase == "converting"][-1]
    assert (finished.tensors_done, finished.bytes_done) == (finished.tensors_total, finished.bytes_total)
    assert finished.tensors_total == len(llama_values())


def test_a_write_protected_parent_is_one_line(tmp_path: Path) -> None:
    with pytest.raises((TargetError, FormatError), match=r"cannot write|no permission|read-only"):
        convert(write_source(tmp_path / "src"), "/proc/out")


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    code = (
        "import sys; from qlformat.converter import convert; convert(sys.argv[1], sys.argv[2]); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'rich', 'safetensors'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_source_is_hashed_on_request(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src", shards=2)
    assert convert(source, tmp_path / "plain").manifest.source.files == ()
    found = convert(source, tmp_path / "hashed", hash_source=True).manifest.source.files
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")}
    assert {entry.name: entry.sha256 for entry in found} == expected


def test_resume_does_not_take_another_sources_result_for_its_own(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    convert(source, tmp_path / "out")
    before = file_bytes(tmp_path / "out")
    assert convert(source, tmp_path / "out", resume=True).manifest.to_json() == before["qlf.json"]
    write_source(source, encoded(llama_values(seed=1), "float16"))
    with pytest.raises(TargetError, match="another source"):
        convert(source, tmp_path / "out", resume=True)
    assert file_bytes(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]
