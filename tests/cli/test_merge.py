"""`qlf merge`: what it prints, and one clear line for every bad input, with nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlformat import convert
from tests.cli.conftest import Run
from tests.sources import CONFIG, file_bytes, llama_values, write_source

Adapter = Callable[..., Path]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A 4-bit checkpoint; its source is beside it."""
    convert(write_source(tmp_path / "fp16"), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    """adapter("name", r=4, pin="...", config={...}): LoRA on every linear layer of the small Llama."""

    def make(name: str = "adapter", r: int = 4, pin: str | None = None, config: dict[str, Any] | None = None) -> Path:
        out = tmp_path / name
        out.mkdir()
        rng = np.random.default_rng(len(name))
        tensors = {}
        for weight, values in llama_values().items():
            if ".layers." in weight and values.ndim == 2:
                module = f"base_model.model.{weight.removesuffix('.weight')}"
                for half, shape in (("A", (r, values.shape[1])), ("B", (values.shape[0], r))):
                    tensors[f"{module}.lora_{half}.weight"] = rng.standard_normal(shape).astype(np.float32) * 0.05
        save_file(tensors, out / "adapter_model.safetensors")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        written = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": targets, **(config or {})}
        (out / "adapter_config.json").write_text(json.dumps(written))
        if pin is not None:
            manifest = {"format_version": 1, "kind": "adapter", "must_understand": [], "writer": "test"}
            (out / "qlf.json").write_text(json.dumps({**manifest, "base": {"fingerprint": pin}}))
        return out

    return make


def change(adapter: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = dict(load_file(path))
    edit(tensors)
    save_file(tensors, path)


def fingerprint(base: Path) -> str:
    return str(json.loads((base / "qlf.json").read_text())["fingerprint"])


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_merge(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pinned = adapter(pin=fingerprint(base))
    result = qlf("merge", base, "--adapter", pinned, "-o", out, "--to", "bfloat16")
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == f"Wrote {out}" and "  applied 28 tensors of adapter, each once" in lines
    assert "1.000 of the change" in result.out and "note" not in result.out
    assert {path.name for path in out.iterdir()} == {
        "config.json", "merge_report.json", "merge_report.svg", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_json_and_nf4(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    args = ["merge", base, "--adapter", f"{adapter()}:0.5", "-o", tmp_path / "out", "--to", "nf4", "--json"]
    report = qlf(*args, "--source", tmp_path / "fp16").json
    assert report["adapters"][0]["weight"] == 0.5 and report["onto"] == "source" and report["rounding"] == "nearest"
    assert report["fingerprint"] == fingerprint(tmp_path / "out")
    assert qlf("verify", tmp_path / "out").code == 0
    names = {entry["name"] for entry in json.loads((tmp_path / "out" / "qlf.json").read_text())["files"]}
    assert {"merge_report.json", "merge_report.svg"} <= names


def test_what_is_at_stake_is_said(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    result = qlf("merge", base, "--adapter", adapter(), "-o", tmp_path / "out", "--to", "nf4")
    assert "loses most of a small fine-tune" in result.out and "--source" in result.out


def test_an_adapter_of_adapters(qlf: Run, adapter: Adapter, tmp_path: Path) -> None:
    args = ["--adapter", adapter("a"), "--adapter", adapter("bb"), "-o", tmp_path / "out", "--to", "adapter"]
    result = qlf("merge", *args, "--rank", "6")
    assert result.code == 0 and "rank    6" in result.out
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 6
    assert qlf("merge", "somewhere", *args).code == 2


def nan(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_A.weight"][0, 0] = np.nan


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return edit


def put(name: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[name] = np.ones(shape, dtype=np.float32)

    return edit


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "NaN": (nan, "NaN or infinity"),
    "half is missing": (drop(f"{Q}.lora_B.weight"), "lora_B of this module is missing"),
    "module is missing": (
        drop(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
        "model.layers.0.self_attn.q_proj (a target",
    ),
    "unknown module": (
        rename(f"{Q}.lora_A.weight", "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"),
        "layers.7",
    ),
    "extra tensor": (put("base_model.model.model.layers.0.something", 3), "layers.0.something (no such weight"),
    "unknown kind": (put(f"{Q}.lora_C.weight", 3, 3), "lora_C.weight (no such weight"),
    "shape": (put(f"{Q}.lora_A.weight", 4, 63), "the base's weight has [64, 64]"),
    "rank": (
        lambda t: (put(f"{Q}.lora_A.weight", 2, 64)(t), put(f"{Q}.lora_B.weight", 64, 2)(t))[0],
        "rank 2 is stored",
    ),
    "saved shape": (put("base_model.model.lm_head.weight", 90, 64), "lm_head.weight (shape [90, 64]"),
    "nothing": (lambda tensors: tensors.clear(), "holds no tensor"),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_adapters(
    edit: Callable[[dict[str, Any]], None], message: str, qlf: Run, base: Path, adapter: Adapter, tmp_path: Path
) -> None:
    made = adapter()
    change(made, edit)
    refused(qlf, tmp_path, message, base, "--adapter", made, "--to", "bfloat16")


def refused(qlf: Run, tmp_path: Path, message: str, *args: object) -> None:
    """One line with this text, exit code 1, and not a byte written."""
    before = file_bytes(tmp_path)
    result = qlf("merge", *args, "-o", tmp_path / "new" / "out")
    assert result.code == 1 and message in result.error, result.err
    assert file_bytes(tmp_path) == before and not (tmp_path / "new").exists()


def test_another_base(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    other = adapter("other", pin="0" * 64)
    refused(qlf, tmp_path, "belongs to the base with fingerprint 0000", base, "--adapter", other, "--to", "bfloat16")
    refused(qlf, tmp_path, "not in 4 bits", tmp_path / "fp16", "--adapter", other, "--to", "bfloat16")
    args = ["merge", base, "--adapter", other, "-o", tmp_path / "out", "--to", "bfloat16", "--allow-base-mismatch"]
    result = qlf(*args)
    assert result.code == 0 and "trained on another base; used all the same" in result.out


def test_another_architecture(qlf: Run, adapter: Adapter, tmp_path: Path) -> None:
    small = {**CONFIG, "hidden_size": 32, "intermediate_size": 48}
    write_source(tmp_path / "small", config=small)
    refused(qlf, tmp_path, "does not fit this base", tmp_path / "small", "--adapter", adapter(), "--to", "float16")


def test_adapters_of_different_bases(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    both = ["--adapter", adapter("a", pin=fingerprint(base)), "--adapter", adapter("bb", pin="1" * 64)]
    refused(qlf, tmp_path, "trained on different bases", base, *both, "--to", "bfloat16")
    refused(qlf, tmp_path, "trained on different bases", *both, "--to", "adapter")


def test_adapters_of_one_name_are_told_apart(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    for run, pin in (("run1", fingerprint(base)), ("run2", "1" * 64)):
        (tmp_path / run).mkdir()
        adapter(f"{run}/adapter", pin=pin)
    both = ["--adapter", tmp_path / "run1" / "adapter", "--adapter", tmp_path / "run2" / "adapter"]
    refused(qlf, tmp_path, "the adapters run1/adapter and run2/adapter were", base, *both, "--to", "bfloat16")
    args = ["merge", base, *both, "-o", tmp_path / "out", "--to", "bfloat16", "--allow-base-mismatch", "--json"]
    assert qlf(*args).json["applied"] == {"run1/adapter": 28, "run2/adapter": 28}


@pytest.mark.parametrize(
    ("suffix", "message"),
    [(":0", "a weight of 0"), (":-0.0", "a weight of 0"), (":", "needed PATH or PATH:WEIGHT"),
     (":much", "needed PATH or PATH:WEIGHT"), (":nan", "needed PATH or PATH:WEIGHT"), ("x", "found nothing")],
)  # fmt: skip
def test_weights(suffix: str, message: str, qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    refused(qlf, tmp_path, message, base, "--adapter", f"{adapter()}{suffix}", "--to", "bfloat16")


KINDS = {
    "IA3": ({"peft_type": "IA3"}, "found an adapter of type 'IA3'"),
    "unknown": ({"peft_type": "FOO"}, "found an adapter of type 'FOO'"),
    "none": ({"peft_type": None}, "found an adapter of type None"),
    "QALoRA": ({"use_qalora": True}, "QA-LoRA (use_qalora)"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "'pissa' on a base that peft changed"),
    "DoRA": ({"use_dora": True}, "lora_magnitude_vector is missing"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha is '8'"),
}


@pytest.mark.parametrize(("config", "message"), KINDS.values(), ids=KINDS)
def test_kinds(config: dict[str, Any], message: str, qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    refused(qlf, tmp_path, message, base, "--adapter", adapter(config=config), "--to", "bfloat16")


def test_options_that_do_not_go_together(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    one = [base, "--adapter", adapter()]
    for message, args in (
        ("combines adapters, and there is one", ["--to", "bfloat16", "--method", "ties"]),
        ("combines adapters, and there is one", ["--to", "bfloat16", "--method", "cat"]),
        ("given twice", ["--to", "bfloat16", "--adapter", tmp_path / "adapter"]),
        ("--density belongs to", ["--to", "bfloat16", "--density", "0.5"]),
        ("found density 1.5", ["--to", "bfloat16", "--method", "ties", "--density", "1.5", "--adapter", adapter("b")]),
        ("--rank belongs to", ["--to", "bfloat16", "--rank", "3"]),
        ("needs the original model", ["--to", "nf4", "--onto", "source"]),
        ("give a text with --calibration", ["--to", "nf4", "--rounding", "feedback"]),
        ("--calibration is for --to nf4", ["--to", "float16", "--calibration", tmp_path / "x"]),
        ("measured on held-out data", ["--to", "nf4", "--min-retention", "0.9"]),
        ("is it the original", ["--to", "nf4", "--source", tmp_path / "more"]),
        ("needed the original 16-bit model", ["--to", "nf4", "--source", base]),
        ("far from the base's", ["--to", "nf4", "--source", tmp_path / "random"]),
    ):
        if not (tmp_path / "more").exists():
            values = llama_values(seed=5)
            write_source(tmp_path / "random", config=CONFIG)
            from tests.sources import encoded, write_safetensors

            write_safetensors(tmp_path / "random" / "model.safetensors", encoded(values, "float16"))
            write_source(tmp_path / "more")
            more = {**llama_values(), "extra.weight": np.ones((2, 2), dtype=np.float32)}
            write_safetensors(tmp_path / "more" / "model.safetensors", encoded(more, "float16"))
        refused(qlf, tmp_path, message, *one, *args)


def test_a_16_bit_base_has_no_source(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    plain = tmp_path / "fp16"
    refused(qlf, tmp_path, "in 16 bits already", plain, "--adapter", adapter(), "--to", "nf4", "--source", plain)


def test_inputs_are_not_overwritten(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    made = adapter()
    before = file_bytes(tmp_path)
    for out, what in ((base, "the base lies here"), (made, "the adapter adapter lies here"), (tmp_path, "lies here")):
        result = qlf("merge", base, "--adapter", made, "-o", out, "--to", "bfloat16", "--overwrite")
        assert result.code == 1 and what in result.error
    shutil.copytree(base, tmp_path / "taken")
    result = qlf("merge", base, "--adapter", made, "-o", tmp_path / "taken", "--to", "bfloat16")
    assert result.code == 1 and "--overwrite" in result.error
    shutil.rmtree(tmp_path / "taken")
    assert file_bytes(tmp_path) == before


def test_bases_that_are_none(qlf: Run, base: Path, adapter: Adapter, tmp_path: Path) -> None:
    made = adapter()
    refused(qlf, tmp_path, "needed the base model", made, "--adapter", made, "--to", "bfloat16")
    refused(qlf, tmp_path, "found no directory", tmp_path / "none", "--adapter", made, "--to", "bfloat16")
    assert qlf("merge", "--adapter", made, "-o", tmp_path / "out", "--to", "nf4").code == 2


def test_too_little_retention_publishes_nothing(
    qlf: Run, base: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlformat.quality import evaluation

    losses = {"base": 4.0, "live": 3.0, "merged": 3.4}

    def evaluate(model: Path, *, adapter: Path | None = None, **_: Any) -> Any:
        side = "live" if adapter is not None else "base" if model == base else "merged"
        return SimpleNamespace(loss=losses[side], tokens=7, sha256="0" * 64)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    (tmp_path / "held-out.txt").write_text("some text")
    args = [base, "--adapter", adapter(pin=fingerprint(base)), "--to", "bfloat16"]
    args += ["--eval-data", tmp_path / "held-out.txt", "--min-retention"]
    refused(qlf, tmp_path, "found a retention of 0.600, needed 0.9", *args, "0.9")
    result = qlf("merge", *args, "0.5", "-o", tmp_path / "out")
    assert (
        result.code == 0 and "retention 0.600 (held-out loss 4.0000 base, 3.0000 adapter, 3.4000 merged" in result.out
    )
