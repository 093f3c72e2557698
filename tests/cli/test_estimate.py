"""`qlf estimate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qlf.estimate import OPTIMIZERS

from qlformat import training_memory
from tests.cli.conftest import Run

LLAMA_33B = {
    "model_type": "llama", "hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60,
    "num_attention_heads": 52, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_33B))
    return tmp_path


def test_the_table(qlf: Run, model: Path) -> None:
    result = qlf("estimate", model, "--rank", 64, "--seq-len", 512, "--gpu", "24GB")
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == f"{model} (llama)"
    assert "32.5 B: linear 32.1 B, embedding 213.0 M, output 213.0 M" in lines[1]
    assert "487.6 M (1.5 %), LoRA of rank 64 on 420 layers" in lines[2]
    rows = {line.split("  ")[1].strip(): line for line in lines[5:14] if line.startswith("  ")}
    assert {"weights", "adapters", "gradients", "optimizer", "activations", "workspace", "with runtime"} <= set(rows)
    assert rows["weights"].split()[1:3] == ["17.4", "GB"]
    assert "fits on 24.0 GB: QLoRA needs 23.9 GB" in result.out
    assert "full 16-bit fine-tuning needs 390.3 GB" in result.out


def test_what_to_change(qlf: Run, model: Path) -> None:
    result = qlf("estimate", model, "--gpu", "24GB", "--batch-size", 8)
    assert result.code == 1 and result.err == ""
    assert "does not fit on 24.0 GB" in result.out and "would fit with --batch-size 2" in result.out
    tight = qlf("estimate", model, "--gpu", "16GB")
    assert tight.code == 1 and "no single change makes it fit" in tight.out and "take a larger GPU" in tight.out
    paged = qlf("estimate", model, "--gpu", "24GB", "--rank", 64, "--seq-len", 512, "--optimizer", "paged_adamw_32bit")
    assert paged.code == 0 and "only while the optimizer's state is paged out" in paged.out


def test_without_a_gpu_the_smallest_that_holds_it_is_named(qlf: Run, model: Path) -> None:
    result = qlf("estimate", model)
    assert result.code == 0 and "it fits on a GPU of 24 GB" in result.out


def test_json(qlf: Run, model: Path) -> None:
    found = qlf("estimate", model, "--gpu", "24GiB", "--json").json
    assert found["gpu"] == 24 << 30 and found["fits"] is True and found["advice"] == []
    assert found["parameters"]["total"] == sum(v for k, v in found["parameters"].items() if k != "total")
    memory = found["memory"]
    kinds = ("weights", "adapters", "gradients", "optimizer", "activations", "workspace")
    assert memory["total"] == sum(memory[kind] for kind in kinds)
    assert memory["needed"] == memory["total"] + found["runtime"]
    failed = qlf("estimate", model, "--gpu", "8GB", "--json")
    assert failed.code == 1 and failed.json["fits"] is False


def test_wrong_usage(qlf: Run, model: Path, tmp_path: Path) -> None:
    assert qlf("estimate", model, "--gpu", "24").code == 2
    assert "24GB" in qlf("estimate", model, "--gpu", "big").error
    assert qlf("estimate", model, "--rank", 0).code == 2
    unknown = tmp_path / "other"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "mamba"}')
    result = qlf("estimate", unknown)
    assert result.code == 1 and "model type 'mamba' is not known to the estimate" in result.error


def test_the_optimizers_are_those_of_the_library() -> None:
    assert OPTIMIZERS == training_memory.OPTIMIZERS
