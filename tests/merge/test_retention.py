"""Retention: held-out loss of base, base with the live adapter, and merged; too little publishes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

import qlformat
from qlformat import QlfError
from qlformat.merge.merger import merge
from qlformat.merge.options import AdapterSpec, MergeOptions
from qlformat.quality.evaluation import evaluate
from tests.finetune.conftest import tiny_base, tiny_source
from tests.merge.conftest import TARGETS
from tests.sources import file_bytes

__all__ = ["tiny_base", "tiny_source"]

TEXT = "one two three four five six seven eight nine ten " * 40


def train(exact: Path, out: Path) -> Path:
    """Write an adapter of the model `exact` that learned the text a little."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exact)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :128]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(12):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(str(out))
    return out


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny base."""
    exact = tmp_path_factory.mktemp("trained") / "exact"
    qlformat.export(tiny_base, exact, dtype="float32")
    return train(exact, exact.with_name("adapter"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text(TEXT)
    return path


def test_bfloat16_keeps_it(tiny_base: Path, trained: Path, text: Path, tmp_path: Path) -> None:
    asked = MergeOptions("bfloat16", min_retention=0.9)
    report = merge(tiny_base, [AdapterSpec(trained)], tmp_path / "out", asked, eval_data=text)
    found = report.content["retention"]
    assert found["base"] - found["adapter"] > 0.1 and found["reference"] == "live adapter"
    assert found["retention"] == pytest.approx((found["base"] - found["merged"]) / (found["base"] - found["adapter"]))
    assert found["retention"] == pytest.approx(1, abs=0.02)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["retention"] == found
    evaluated = evaluate(tmp_path / "out", text=text)
    assert evaluated.loss == pytest.approx(found["merged"])


def test_nf4_is_sound_after_the_evaluation(tiny_base: Path, trained: Path, text: Path, tmp_path: Path) -> None:
    merge(tiny_base, [AdapterSpec(trained)], tmp_path / "out", MergeOptions("nf4"), eval_data=text)
    assert [finding for finding in qlformat.verify(tmp_path / "out") if finding.severity == "error"] == []


def test_too_little_publishes_nothing(tiny_base: Path, trained: Path, text: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    asked = MergeOptions("bfloat16", min_retention=2.0)
    with pytest.raises(QlfError, match=r"found a retention of .*, needed 2 .*nothing was written"):
        merge(tiny_base, [AdapterSpec(trained)], tmp_path / "out", asked, eval_data=text)
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_without_a_gain(tiny_base: Path, trained: Path, text: Path, tmp_path: Path) -> None:
    """Turned around, it makes the model worse; weighted, it is measured as merged in float32."""
    asked = MergeOptions("bfloat16", min_retention=0.5)
    with pytest.raises(QlfError, match="gains nothing"):
        merge(tiny_base, [AdapterSpec(trained, -1.0)], tmp_path / "out", asked, eval_data=text)
    report = merge(tiny_base, [AdapterSpec(trained, 0.5)], tmp_path / "out", MergeOptions("bfloat16"), eval_data=text)
    assert report.content["retention"]["reference"] == "merged in float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held-out.txt", "out"]


def test_feedback_rounding(tiny_base: Path, tiny_source: Path, trained: Path, text: Path, tmp_path: Path) -> None:
    """The codes are chosen by the activations on a text; the format is the same, and the report says how."""
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(TEXT * 4)
    merge(tiny_base, [AdapterSpec(trained)], tmp_path / "exact", MergeOptions("float32"), source=tiny_source)
    found = {}
    for rounding, given in (("nearest", None), ("feedback", calibration)):
        out = tmp_path / rounding
        report = merge(
            tiny_base, [AdapterSpec(trained)], out, MergeOptions("nf4"),
            source=tiny_source, calibration=given,
        )  # fmt: skip
        assert report.content["rounding"] == rounding
        assert [finding for finding in qlformat.verify(out) if finding.severity == "error"] == []
        compared = evaluate(out, text=text, against=tmp_path / "exact").against
        assert compared is not None
        found[rounding] = compared.kl_divergence
    assert found["feedback"] < found["nearest"]
    merge(
        tiny_base, [AdapterSpec(trained)], tmp_path / "again", MergeOptions("nf4", rounding="feedback"),
        source=tiny_source, calibration=calibration,
    )  # fmt: skip
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "feedback" / name).read_bytes()


DRIVER = """
import os, signal, sys
from pathlib import Path
from qlformat.merge import run
from qlformat.merge.merger import merge
from qlformat.merge.options import AdapterSpec, MergeOptions
base, source, adapter, out, text = sys.argv[1:]
add, count = run.Journal.add, 0
def killed(self, weight):
    global count
    add(self, weight)
    count += 1
    if count == 9:  # in the second decoder layer
        os.kill(os.getpid(), signal.SIGKILL)
run.Journal.add = killed
merge(base, [AdapterSpec(Path(adapter))], out, MergeOptions("nf4"), source=source, calibration=Path(text), threads=1)
"""


def test_a_calibrated_merge_is_resumed(tiny_base: Path, tiny_source: Path, trained: Path, tmp_path: Path) -> None:
    """The activations are computed again; what was stored is compared and kept, and the bytes are the same."""
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(TEXT * 4)
    out = tmp_path / "out"
    words = [sys.executable, "-c", DRIVER, tiny_base, tiny_source, trained, out, calibration]
    environment = {**os.environ, "PYTHONPATH": str(Path(qlformat.__file__).parents[1])}
    done = subprocess.run([str(word) for word in words], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    given = {"source": tiny_source, "calibration": calibration}
    specs = [AdapterSpec(trained)]
    merge(tiny_base, specs, out, MergeOptions("nf4"), resume=True, **given)
    merge(tiny_base, specs, tmp_path / "whole", MergeOptions("nf4"), **given)
    assert file_bytes(out) == file_bytes(tmp_path / "whole")
    assert [finding for finding in qlformat.verify(out) if finding.severity == "error"] == []
