"""`qlf convert`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from qlf import reasons

import qlformat
from qlformat.manifest import parse
from tests.builders import LLAMA_CONFIG, LLAMA_PLAIN, LLAMA_QUANTIZED, build_source
from tests.cli.conftest import Run

# Ctrl-C while the first tensor is converted.
INTERRUPTED = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits SIGINT ignored
from qlf import progress
from qlf.main import main
def update(self, now):
    if not done:
        done.append(now)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
done = []
progress.Log.update = update
sys.exit(main(sys.argv[1:]))
"""


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_report(qlf: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "my model"
    result = qlf("convert", source, out)
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == f"Wrote {out}"
    text = result.out
    assert "double quantization" in text and "bits each (nf4, blocksize 64" in text
    assert "embeddings" in text and "output embedding" in text
    assert f"Next: qlf verify '{out}'" in text
    assert f"AutoModelForCausalLM.from_pretrained({str(out)!r})" in text
    assert (out / "qlf.json").is_file()


def test_json(qlf: Run, source: Path, tmp_path: Path) -> None:
    result = qlf("convert", source, tmp_path / "out", "--json")
    assert result.code == 0 and result.err == ""
    manifest = parse((tmp_path / "out" / "qlf.json").read_bytes())
    report = result.json
    assert report["fingerprint"] == manifest.fingerprint
    assert report["out"] == str(tmp_path / "out")
    assert report["total_params"] == sum(math.prod(shape) for shape in {**LLAMA_QUANTIZED, **LLAMA_PLAIN}.values())


def test_options_reach_the_library(qlf: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["--quant-type", "fp4", "--blocksize", "128", "--no-double-quant", "--compute-dtype", "float16",
            "--shard-size", "1KB", "--threads", "1", "--skip", "*.q_proj", "--skip", "*.k_proj.weight"]  # fmt: skip
    assert qlf("convert", source, out, *args).code == 0
    manifest = parse((out / "qlf.json").read_bytes())
    assert manifest.recipe == qlformat.Recipe("fp4", 128, False, "float16")
    assert manifest.skip == ("*.q_proj", "*.k_proj.weight")
    skipped = [weight.name for weight in manifest.weights if weight.reason == "skip-pattern"]
    assert skipped == ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert len({tensor.shard for tensor in manifest.tensors}) > 1


def test_experts_come_first(qlf: Run, tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    weights = {**LLAMA_QUANTIZED, **LLAMA_PLAIN, experts: (4, 64, 64)}
    source = build_source(tmp_path / "source", weights=weights)
    result = qlf("convert", source, tmp_path / "out")
    assert result.code == 0
    lines = result.out.splitlines()
    assert "fused experts" in lines[1] and "%" in lines[1] and lines[1].startswith("  note: ")
    kept = next(line for line in lines if line.startswith("  as is"))
    assert kept.split(maxsplit=2)[2].startswith("fused experts ")


@pytest.mark.parametrize(
    ("architecture", "hint"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM.from_pretrained"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM.from_pretrained"),
        ("T5ForConditionalGeneration", " T5ForConditionalGeneration.from_pretrained"),
        ("os; system", "AutoModelForCausalLM.from_pretrained"),
    ],
)
def test_the_last_line_names_the_class_that_loads(qlf: Run, tmp_path: Path, architecture: str, hint: str) -> None:
    source = build_source(tmp_path / "source", config=LLAMA_CONFIG | {"architectures": [architecture]})
    result = qlf("convert", source, tmp_path / "out")
    assert hint in result.out.splitlines()[-1]


def test_no_hint_where_transformers_cannot_load(qlf: Run, tmp_path: Path) -> None:
    experts = "model.layers.0.feed_forward.experts.gate_up_proj"
    config = LLAMA_CONFIG | {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    weights = {**LLAMA_QUANTIZED, **LLAMA_PLAIN, experts: (4, 64, 64)}
    result = qlf("convert", build_source(tmp_path / "source", config=config, weights=weights), tmp_path / "out")
    assert result.code == 0
    assert "cannot load those that stay fused" in result.out
    assert "from_pretrained" not in result.out


def test_kept_names_experts_first_and_nothing_else_as_experts() -> None:
    kept = {"norm": 10, "embedding": 500, "merged-on-load": 5, "fused-experts": 15, "odd-reason": 20, "empty": 0}
    assert reasons.kept(kept, 1000) == [
        "fused experts 1.5 %", "embeddings 50.0 %", "odd-reason 2.0 %", "norms 1.0 %",
        "split or merged while loading 0.5 %",
    ]  # fmt: skip


def test_many_notes_are_cut_short(qlf: Run, source: Path, tmp_path: Path) -> None:
    skips = [word for i in range(8) for word in ("--skip", f"nothing{i}")]
    result = qlf("convert", source, tmp_path / "out", *skips)
    notes = [line for line in result.out.splitlines() if line.startswith("  note: ")]
    assert len(notes) == 5 and "more notes, see --json" in result.out
    result = qlf("convert", source, tmp_path / "out2", *skips, "--json")
    assert len([note for note in result.json["notes"] if "nothing" in note]) == 8


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupt_and_resume(child: Run, source: Path, tmp_path: Path, as_json: bool) -> None:
    out = tmp_path / "out"
    flags = ["--json"] if as_json else []
    result = child("-c", INTERRUPTED, "convert", source, out, *flags)
    assert result.code == 130
    assert result.error == "qlf: interrupted; run the same command with --resume to go on"
    assert (result.json["error"]["rule"] is None) if as_json else (result.out == "")
    assert not out.exists()
    assert child("-m", "qlf", "convert", source, out, "--resume").code == 0
    assert child("-m", "qlf", "convert", source, tmp_path / "undisturbed").code == 0
    assert _contents(out) == _contents(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "undisturbed"]
