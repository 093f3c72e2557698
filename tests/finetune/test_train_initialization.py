"""How an adapter begins: nearer to the source than the base, and published as LoRA on the base as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qlformat
from qlformat.errors import QlfError
from qlformat.finetune import fixed_part, initialization, layers, low_rank, metrics
from qlformat.finetune.options import make
from qlformat.finetune.trainer import FinetuneReport, finetune, prepare

ADAPTER = "adapter_model.safetensors"


def options(base: Path, data: Path, **more: Any) -> dict[str, Any]:
    return {"base": str(base), "data": str(data), "seq_len": 128, "grad_accum": 2, "rank": 4, "max_steps": 4,
            "save_steps": 2, "packing": False, **more}  # fmt: skip


def train(base: Path, data: Path, out: Path, **more: Any) -> FinetuneReport:
    return finetune(prepare(options(base, data, **more)), out)


def tuned(base: Path, **more: Any) -> Any:
    """A fresh adapter on the base."""
    model: Any = qlformat.load_model(base, device_map="cpu", dtype="float32")
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return layers.add_lora(model, make({"base": "b", "data": "d", "rank": 8, "dropout": 0.0, **more}), "b").eval()


def weights(model: Any, base: Path, source: Path) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """(adapted layer, weight of the source, what the base decodes to)."""
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with qlformat.open(base) as checkpoint:
        for name, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                plain = name.removeprefix("base_model.model.")
                decoded = torch.from_numpy(checkpoint.dequantize(f"{plain}.weight", "float32"))
                yield module, original.get_submodule(plain).weight.detach(), decoded


def computed(module: Any) -> torch.Tensor:
    """The matrix [out, in] that a layer multiplies by, adapter and all."""
    with torch.no_grad():
        matrix: torch.Tensor = module(torch.eye(module.in_features)).T
    return matrix


@pytest.mark.parametrize(("init", "rslora"), [("loftq", False), ("loftq", True), ("pissa", False), ("pissa", True)])
def test_every_layer_begins_nearer_to_the_source(tiny_base: Path, tiny_source: Path, init: str, rslora: bool) -> None:
    model = tuned(tiny_base, init=init, source=str(tiny_source), rslora=rslora)
    share = {"loftq": initialization.loftq, "pissa": initialization.pissa}[init](model, tiny_base, str(tiny_source))
    before = after = 0.0
    for module, original, decoded in weights(model, tiny_base, tiny_source):
        left = (original - computed(module)).square().sum().item()
        error = (original - decoded).square().sum().item()
        assert left < error
        before, after = before + error, after + left
    assert share == pytest.approx(1 - after / before, rel=1e-3) and share > 0.15


def test_pissa_trains_the_principal_part_and_takes_the_best_of_its_rank_out_of_the_base(
    tiny_base: Path, tiny_source: Path
) -> None:
    model = tuned(tiny_base, init="pissa", source=str(tiny_source))
    initialization.pissa(model, tiny_base, str(tiny_source))
    for module, original, decoded in weights(model, tiny_base, tiny_source):
        left, values, right = torch.linalg.svd(original.double(), full_matrices=False)
        principal = (left[:, :8] * values[:8]) @ right[:8]
        delta = module.get_delta_weight("default").detach().double()
        assert torch.allclose(delta, principal, atol=1e-5)
        best = torch.linalg.svdvals(decoded.double() + principal - original.double())[8:].square().sum().item()
        assert (original - computed(module)).square().sum().item() == pytest.approx(best, rel=1e-3)
        assert module.lora_A["default"].weight.square().sum().item() == pytest.approx(
            module.lora_B["default"].weight.square().sum().item(), rel=1e-3
        )


@pytest.mark.parametrize("rslora", [False, True])
def test_plain_peft_computes_what_was_trained_on_the_base_as_it_is(
    tiny_base: Path, tiny_source: Path, chats: Path, tmp_path: Path, rslora: bool
) -> None:
    """The held-out loss of the run is that of the published adapter in a process without qlformat."""
    from qlformat.finetune.dataset import load_rows, tokenize

    report = train(tiny_base, chats, tmp_path / "a", init="pissa", source=str(tiny_source), rslora=rslora, lr=1e-2,
                   eval_data=str(chats))  # fmt: skip
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_bytes())
    assert config["r"] == 8 and config["lora_alpha"] == pytest.approx(32 * (2**0.5 if rslora else 2))
    assert {value.shape[0] for name, value in load_file(tmp_path / "a" / ADAPTER).items() if "lora_A" in name} == {8}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    data, _ = tokenize(load_rows(chats), tokenizer, 128, packing=False)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{name: list(row[name]) for name in ("input_ids", "labels")} for row in data]))
    script = f"""
import json, sys; sys.modules["qlformat"] = None
import peft, torch, transformers
base = transformers.AutoModelForCausalLM.from_pretrained({str(tiny_base)!r}, dtype=torch.float32)
for module in base.modules():
    if hasattr(module, "compute_dtype"):
        module.compute_dtype, module.compute_type_is_set = torch.float32, True
model = peft.PeftModel.from_pretrained(base, {str(tmp_path / "a")!r}).eval()
losses = []
for row in json.load(open({str(rows)!r})):
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
    labels = torch.tensor(row["labels"][1:])
    losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100).item())
print(sum(losses) / len(losses))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert report.eval_start is not None and report.eval_loss is not None
    assert abs(report.eval_loss - report.eval_start) > 0.01
    assert float(done.stdout) == pytest.approx(report.eval_loss, abs=1e-4)


def test_without_training_the_published_adapter_is_the_beginning(
    tiny_base: Path, tiny_source: Path, tmp_path: Path
) -> None:
    model = tuned(tiny_base, init="pissa", source=str(tiny_source))
    initialization.pissa(model, tiny_base, str(tiny_source))
    model.save_pretrained(tmp_path / "a")
    fixed_part.publish(tmp_path / "a", model)
    loaded = peft.PeftModel.from_pretrained(tuned(tiny_base).unload(), tmp_path / "a").eval()
    for (module, *_), (other, *_) in zip(
        weights(model, tiny_base, tiny_source), weights(loaded, tiny_base, tiny_source), strict=True
    ):
        assert torch.allclose(computed(module), computed(other), atol=1e-5)


def test_the_fixed_part_neither_trains_nor_shows_in_checkpoints(tiny_base: Path, tiny_source: Path) -> None:
    model = tuned(tiny_base, init="pissa", source=str(tiny_source))
    plain = layers.trainable(model)
    names = set(model.state_dict())
    initialization.pissa(model, tiny_base, str(tiny_source))
    assert layers.trainable(model) == plain and set(model.state_dict()) == names


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_the_same_bytes_again_and_after_a_stop(
    tiny_base: Path, tiny_source: Path, chats: Path, tmp_path: Path, init: str
) -> None:
    from qlformat.finetune.checkpointing import Interrupted

    more = {"init": init, "source": str(tiny_source)}
    train(tiny_base, chats, tmp_path / "whole", **more)
    asked = iter([False] * 5)
    with pytest.raises(Interrupted):
        finetune(prepare(options(tiny_base, chats, **more)), tmp_path / "cut", should_stop=lambda: next(asked, True))
    torch.randn(7)  # another random state does not matter
    finetune(prepare(options(tiny_base, chats, **more)), tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_pissa_is_said_in_what_is_left(tiny_base: Path, tiny_source: Path, chats: Path, tmp_path: Path) -> None:
    report = train(tiny_base, chats, tmp_path / "a", init="pissa", source=str(tiny_source), max_steps=1)
    assert any(note.startswith("PiSSA: ") and "twice the rank" in note for note in report.notes)
    fields = json.loads((tmp_path / "a" / "qlf.json").read_bytes())
    assert fields["options"]["dropout"] == 0 and fields["options_from"]["dropout"].startswith("init pissa")
    assert "half of the adapter's ranks" in (tmp_path / "a" / "README.md").read_text()
    assert metrics.read(tmp_path / "a" / "metrics.jsonl")


def test_dora_begins_with_the_magnitude_of_the_corrected_weight(tiny_base: Path, tiny_source: Path) -> None:
    model = tuned(tiny_base, init="loftq", source=str(tiny_source), dora=True)
    initialization.loftq(model, tiny_base, str(tiny_source))
    for module, _, decoded in weights(model, tiny_base, tiny_source):
        delta = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
        found = module.lora_magnitude_vector["default"].weight.float()  # peft keeps it in the base's float16
        assert torch.allclose(found, (decoded + delta).norm(dim=1), rtol=1e-3)
        assert (found - (decoded + delta).norm(dim=1)).norm() < 0.2 * (found - decoded.norm(dim=1)).norm()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"init": "pissa"}, "init pissa needs the 16-bit model"),
        ({"init": "pissa", "source": "s", "dropout": 0.1}, "found dropout with init pissa"),
        ({"init": "pissa", "source": "s", "dora": True}, "found dora with init pissa"),
        ({"source": "s"}, "found a source without a use"),
        ({"init": "olora", "source": "s"}, "needed one of default, loftq, pissa"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(QlfError, match=message):
        make({"base": "b", "data": "d", **given})


@pytest.mark.parametrize("method", ["loftq", "pissa"])
def test_a_source_of_another_shape_is_refused(tiny_base: Path, tiny_source: Path, tmp_path: Path, method: str) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_source)
    config.intermediate_size = 96
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "other")
    model = tuned(tiny_base, init=method, source="s")
    with pytest.raises(QlfError, match=r"_proj\.weight is \[.*96.*\], in the base \[.*128.*\]; give the model of the"):
        initialization.begin(model, tiny_base, str(tmp_path / "other"), method)


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_weights_that_the_source_stores_transposed(tmp_path: Path, init: str) -> None:
    """GPT-2's Conv1D: [in, out] in the source, [out, in] in the base."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=512, n_positions=128)
    original = transformers.GPT2LMHeadModel(config)
    original.save_pretrained(tmp_path / "source")
    qlformat.convert(tmp_path / "source", tmp_path / "base")
    model = tuned(tmp_path / "base", init=init, source="s")
    initialization.begin(model, tmp_path / "base", str(tmp_path / "source"), init)
    module = model.get_base_model().transformer.h[0].attn.c_attn
    weight = original.transformer.h[0].attn.c_attn.weight.detach().T
    with torch.no_grad():
        found = (module(torch.eye(64)) - module(torch.zeros(1, 64))).T
    with qlformat.open(tmp_path / "base") as checkpoint:
        decoded = torch.from_numpy(checkpoint.dequantize("transformer.h.0.attn.c_attn.weight", "float32"))
    assert (weight - found).square().sum() < 0.9 * (weight - decoded).square().sum()


def test_a_source_that_is_what_the_base_decodes_to_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    qlformat.export(tiny_base, tmp_path / "plain", dtype="float32")
    with pytest.raises(QlfError, match="found no weight that differs from the base"):
        initialization.loftq(tuned(tiny_base, init="loftq", source="s"), tiny_base, str(tmp_path / "plain"))


def test_a_large_matrix_of_noise_is_approximated_nearly_as_well_as_can_be() -> None:
    noise = torch.randn(600, 900, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    left, values, right = low_rank.truncated(noise, 8)
    assert torch.equal(before, torch.get_rng_state())
    again = low_rank.truncated(noise, 8)
    assert all(torch.equal(one, two) for one, two in zip((left, values, right), again, strict=True))
    taken = 1 - (noise - (left * values) @ right).square().sum() / noise.square().sum()
    best = torch.linalg.svdvals(noise)[:8].square().sum() / noise.square().sum()
    assert 0.98 * best < taken <= best * (1 + 1e-5)
    assert torch.allclose(left.T @ left, torch.eye(8), atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5)])
def test_a_rank_beyond_the_smaller_side_is_filled_with_zeros(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    left, values, right = low_rank.truncated(matrix, 9)
    assert left.shape == (shape[0], 9) and values.shape == (9,) and right.shape == (9, shape[1])
    assert torch.allclose((left * values) @ right, matrix, atol=1e-5)
