"""Combination methods, adapters out of adapters, figures, determinism and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.utils import merge_utils
from safetensors.torch import load_file

from qlformat import QlfError
from qlformat.merge.merger import merge
from qlformat.merge.options import AdapterSpec, MergeOptions
from tests.merge.conftest import MakeAdapter, edit_config, live_logits
from tests.sources import file_bytes
from tests.unit.test_written_meanwhile import spoiling

ROOT = Path(__file__).resolve().parents[2]
NAME = "model.layers.0.self_attn.q_proj.weight"


def deltas(adapter: Path, scale: float = 2.0) -> torch.Tensor:
    state = load_file(adapter / "adapter_model.safetensors")
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    return state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"] * scale


def merged(base: Path, out: Path, adapters: list[AdapterSpec], **options: Any) -> torch.Tensor:
    merge(base, adapters, out, MergeOptions("float32", **options))
    return load_file(out / "model.safetensors")[NAME]


@pytest.mark.parametrize("kind", ["16 bit", "4 bit", "adapter"])
def test_a_file_that_is_written_to_meanwhile(
    kind: str, small_base: Path, exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(small_base if kind == "4 bit" else exact_base, tmp_path / "base"))
    adapter = make_adapter("a")
    file = adapter / "adapter_model.safetensors" if kind == "adapter" else base / "model.safetensors"
    with pytest.raises(QlfError, match="changed while it was read"):
        merge(base, [AdapterSpec(adapter, 1.0)], tmp_path / "out", MergeOptions("float32"), progress=spoiling(file))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("method", ["ties", "dare-linear", "dare-ties", "magnitude-prune", "svd", "cat", "linear"])
def test_methods(method: str, exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    a, b = make_adapter("a", seed=1), make_adapter("b", seed=2)
    specs = [AdapterSpec(a, 0.75), AdapterSpec(b, -0.5)]
    density = None if method in ("svd", "cat", "linear") else 0.3
    found = merged(exact_base, tmp_path / "out", specs, method=method, density=density)
    base = load_file(exact_base / "model.safetensors")[NAME]
    tensors, weights = [deltas(a), deltas(b)], torch.tensor([0.75, -0.5])
    whole = merge_utils.task_arithmetic(tensors, weights)
    if method == "ties":
        whole = merge_utils.ties(tensors, weights, 0.3)
    elif method == "magnitude-prune":
        whole = merge_utils.magnitude_prune(tensors, weights, 0.3)
    elif method == "svd":
        u, s, v = torch.linalg.svd(whole)
        whole = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    if method.startswith("dare"):
        again = merged(exact_base, tmp_path / "again", specs, method=method, density=0.3)
        other = merged(exact_base, tmp_path / "other", specs, method=method, density=0.3, seed=1)
        assert torch.equal(found, again) and not torch.equal(found, other)
        kept = (found - base).abs() > 1e-7
        assert 0.4 < kept.float().mean() < 0.6  # 1 - 0.7 * 0.7 of the values come from one or both
        return
    torch.testing.assert_close(found - base, whole, rtol=1e-5, atol=2e-6)


def test_an_adapter_of_adapters(exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    a, b = make_adapter("a", seed=1), make_adapter("b", seed=2, target_modules=["q_proj", "up_proj"])
    specs = [AdapterSpec(a, 0.5), AdapterSpec(b, 2.0)]
    report = merge("", specs, tmp_path / "cat", MergeOptions("adapter", method="cat"))
    assert report.content["rank"] == 8 and report.content["relative_error_most"] == 0
    wanted = 0.5 * deltas(a) + 2.0 * deltas(b)
    torch.testing.assert_close(deltas(tmp_path / "cat", 1.0), wanted, rtol=1e-5, atol=1e-6)
    report = merge("", specs, tmp_path / "two", MergeOptions("adapter", rank=2))
    u, s, v = torch.linalg.svd(wanted)
    torch.testing.assert_close(
        deltas(tmp_path / "two", 1.0), u[:, :2] @ torch.diag(s[:2]) @ v[:2], rtol=1e-4, atol=1e-5
    )
    assert 0 < report.content["relative_error_most"] < 1
    # peft loads it, and the base with it answers as the merged model does.
    merge(exact_base, specs, tmp_path / "whole", MergeOptions("float32"))
    torch.testing.assert_close(
        live_logits(exact_base, tmp_path / "cat"), live_logits(tmp_path / "whole"), rtol=1e-4, atol=1e-4
    )


def test_peft_combines_alike(exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    a, b = make_adapter("a", seed=1), make_adapter("b", seed=2)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(exact_base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, a, adapter_name="a")
    model.load_adapter(b, adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.75, 0.25], "both", combination_type="ties_svd", svd_rank=3, density=0.4)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    specs = [AdapterSpec(a, 0.75), AdapterSpec(b, 0.25)]
    merge("", specs, tmp_path / "out", MergeOptions("adapter", method="ties", rank=3, density=0.4))
    torch.testing.assert_close(deltas(tmp_path / "out", 1.0), layer.get_delta_weight("both"), rtol=1e-4, atol=1e-5)


def test_the_report(small_base: Path, small_source: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """The shares are what anybody can compute from the files."""
    adapter = make_adapter()
    merge(small_base, [AdapterSpec(adapter)], tmp_path / "exact", MergeOptions("float32"))
    merge(small_base, [AdapterSpec(adapter)], tmp_path / "out", MergeOptions("bfloat16"))
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["adapters"][0]["tensors"] == report["applied"]["adapter"] == 28
    assert report["base"]["fingerprint"] == json.loads((small_base / "qlf.json").read_text())["fingerprint"]
    found = {entry["name"]: entry for entry in report["weights"]}
    assert len(found) == 14
    from qlformat import open as open_checkpoint

    with open_checkpoint(small_base) as checkpoint:
        base = np.asarray(checkpoint.dequantize(NAME, "float32"), dtype=np.float64)
    whole = load_file(tmp_path / "exact" / "model.safetensors")[NAME].double().numpy()
    stored = load_file(tmp_path / "out" / "model.safetensors")[NAME].double().numpy()
    delta = whole - base
    assert found[NAME]["share"] == pytest.approx(((stored - base) * delta).sum() / (delta * delta).sum(), rel=1e-4)
    error = np.linalg.norm(stored - whole) / np.linalg.norm(whole)
    assert found[NAME]["relative_error"] == pytest.approx(error, rel=1e-3)
    picture = (tmp_path / "out" / "merge_report.svg").read_text()
    assert picture.startswith("<svg") and NAME in picture


def test_the_source_keeps_what_the_grid_loses(
    small_base: Path, small_source: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Small deltas on grid values round away; on the original values they survive in the mean."""
    adapter = make_adapter()
    path = adapter / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({key: value * (0.05 if "lora_B" in key else 1) for key, value in load_file(path).items()}, path)
    specs = [AdapterSpec(adapter)]
    grid = merge(small_base, specs, tmp_path / "grid", MergeOptions("nf4"))
    onto = merge(small_base, specs, tmp_path / "onto", MergeOptions("nf4"), source=small_source)
    assert grid.content["summary"]["share_mean"] < 0.3
    assert onto.content["summary"]["share_mean"] == pytest.approx(1, abs=0.35)
    assert any("--source" in note for note in grid.notes) and onto.content["onto"] == "source"
    back = merge(small_base, specs, tmp_path / "b", MergeOptions("nf4", onto="base"), source=small_source)
    assert back.content["onto"] == "base"
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "grid" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("to", ["nf4", "float16"])
def test_threads_do_not_matter(to: str, small_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    specs = [AdapterSpec(make_adapter())]
    for threads in (1, 3):
        merge(small_base, specs, tmp_path / str(threads), MergeOptions(to), threads=threads, shard_size=20_000)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "3")
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("to", ["nf4", "float16"])
def test_writing_past_the_page_cache_changes_no_weight(
    to: str, small_base: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the padding of the header differs."""
    specs = [AdapterSpec(make_adapter())]
    merge(small_base, specs, tmp_path / "cached", MergeOptions(to))
    monkeypatch.setattr("qlformat.merge.run._DIRECT_BYTES", 0)
    merge(small_base, specs, tmp_path / "direct", MergeOptions(to))
    found, wanted = (load_file(tmp_path / out / "model.safetensors") for out in ("direct", "cached"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    reports = [(tmp_path / out / "merge_report.json").read_bytes() for out in ("direct", "cached")]
    assert reports[0] == reports[1]
    if to == "nf4":
        from qlformat import verify

        assert [finding for finding in verify(tmp_path / "direct") if finding.severity == "error"] == []


DRIVER = """
import sys, os, signal
from pathlib import Path
from qlformat.merge import run
from qlformat.merge.merger import merge
from qlformat.merge.options import AdapterSpec, MergeOptions
base, adapter, out, to = sys.argv[1:5]
add = run.Journal.add
count = 0
def killed(self, weight):
    global count
    add(self, weight)
    count += 1
    if count == 8:
        os.kill(os.getpid(), signal.SIGKILL)
run.Journal.add = killed
merge(base, [AdapterSpec(Path(adapter))], out, MergeOptions(to), threads=1)
"""


@pytest.mark.parametrize("to", ["nf4", "bfloat16"])
def test_resume_after_kill(to: str, small_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter()
    out = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, small_base, adapter, out, to]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(word) for word in command], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    partial = out.with_name(".out.qlf-partial")
    assert len((partial / ".qlf-journal.jsonl").read_text().splitlines()) == 9
    merge(small_base, [AdapterSpec(adapter)], out, MergeOptions(to), resume=True)
    merge(small_base, [AdapterSpec(adapter)], tmp_path / "whole", MergeOptions(to))
    assert file_bytes(out) == file_bytes(tmp_path / "whole") and not partial.exists()


def test_resume_of_another_merge_is_refused(small_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter()
    command = [sys.executable, "-c", DRIVER, small_base, adapter, tmp_path / "out", "bfloat16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([str(word) for word in command], env=environment, check=False)
    with pytest.raises(QlfError, match="without --resume"):
        merge(small_base, [AdapterSpec(adapter, 0.5)], tmp_path / "out", MergeOptions("bfloat16"), resume=True)


def test_idle_adapters_are_said(small_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter()
    path = adapter / "adapter_model.safetensors"
    from safetensors.torch import save_file

    state = load_file(path)
    save_file({key: value * 0 if "lora_B" in key else value for key, value in state.items()}, path)
    report = merge(small_base, [AdapterSpec(adapter)], tmp_path / "all", MergeOptions("bfloat16"))
    assert "changes nothing" in report.notes[0]
    some = {key: value * 0 if "layers.0.self_attn.q_proj.lora_B" in key else value for key, value in state.items()}
    save_file(some, path)
    report = merge(small_base, [AdapterSpec(adapter)], tmp_path / "some", MergeOptions("bfloat16"))
    assert report.notes[0].startswith("1 deltas") and "layers.0.self_attn.q_proj" in report.notes[0]
    assert report.content["zero_deltas"] == {"adapter": ["model.layers.0.self_attn.q_proj"]}


def test_a_rank_that_the_configuration_denies(small_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter()
    edit_config(adapter, r=8)
    with pytest.raises(QlfError, match="rank 4 is stored"):
        merge(small_base, [AdapterSpec(adapter)], tmp_path / "out", MergeOptions("bfloat16"))


def test_the_public_name(small_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    import qlformat

    options = qlformat.MergeOptions("bfloat16")
    report = qlformat.merge_adapters(small_base, [qlformat.AdapterSpec(make_adapter())], tmp_path / "out", options)
    assert isinstance(report, qlformat.MergeReport) and report.out == tmp_path / "out"
    assert "merge_adapters" in dir(qlformat) and qlformat.merge_adapters is merge
