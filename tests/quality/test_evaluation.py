"""Perplexity, divergence and agreement, against plain loops over transformers' own models."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.nn import functional

import qlformat
from qlformat import QlfError
from qlformat.finetune.dataset import load_rows, tokenize
from qlformat.quality import scoring
from qlformat.quality.evaluation import evaluate
from qlformat.quality.models import load
from qlformat.quality.windows import text_windows
from tests.finetune.conftest import chats, tiny_base, tiny_source

__all__ = ["chats", "tiny_base", "tiny_source"]

WINDOW, STRIDE, TOKENS = 32, 20, 80


@pytest.fixture(scope="module")
def text(texts_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the stories."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_bytes((texts_dir / "tiny.utf8").read_bytes()[:3000].decode(errors="ignore").encode())
    return path


@pytest.fixture(scope="module")
def stories_nf4(stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quality") / "stories-nf4"
    qlformat.convert(stories_dir, out)
    return out


def plain_losses(model: Any, tokenizer: Any, text: str, bos: bool) -> torch.Tensor:
    """Negative log-likelihood of each token of the text, by a loop over single tokens; float64."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]
    begin = [tokenizer.bos_token_id] if bos else []
    losses = []
    for at in range(1 - len(begin), len(ids)):
        # The window in which the token counts: the first one that reaches it.
        first = next(start for start in range(0, len(ids), STRIDE) if start + WINDOW - len(begin) > at)
        seen = torch.tensor([begin + ids[first:at]])
        with torch.inference_mode():
            logits = model(seen).logits[0, -1].float()
        losses.append(functional.cross_entropy(logits.double(), torch.tensor(ids[at])))
    return torch.stack(losses)


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_equals_that_of_a_plain_loop(stories_dir: Path, text: Path, bos: bool) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(stories_dir).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories_dir)
    losses = plain_losses(model, tokenizer, text.read_text(), bos)
    found = evaluate(stories_dir, text=text, window=WINDOW, stride=STRIDE, max_tokens=TOKENS, bos=bos)
    assert found.tokens == len(losses) == TOKENS - (not bos)
    assert found.loss == pytest.approx(losses.mean().item(), abs=2e-6)
    assert found.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)
    assert (found.dtype, found.bos, found.four_bit, found.device) == ("float32", bos, False, "cpu")
    assert found.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()


def test_a_4bit_model_equals_its_16bit_export(stories_nf4: Path, text: Path, tmp_path: Path) -> None:
    qlformat.export(stories_nf4, tmp_path / "plain", dtype="float32")
    options: dict[str, Any] = {"text": text, "window": WINDOW, "max_tokens": TOKENS}
    found = evaluate(stories_nf4, **options, against=tmp_path / "plain")
    assert found.against is not None
    assert (found.against.loss_difference, found.against.kl_divergence, found.against.top1_agreement) == (0, 0, 1)
    assert found.loss == found.against.loss == evaluate(tmp_path / "plain", **options).loss
    packed = evaluate(stories_nf4, **options, keep_4bit=True)
    assert packed.four_bit and packed.loss == pytest.approx(found.loss, abs=1e-3)


def test_comparison_equals_a_plain_computation(stories_dir: Path, stories_nf4: Path, text: Path) -> None:
    found = evaluate(
        stories_nf4, text=text, window=WINDOW, stride=STRIDE, max_tokens=TOKENS, against=stories_dir
    ).against
    assert found is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories_dir)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:TOKENS]
    models = [load(path).model for path in (stories_nf4, stories_dir)]
    kl = agreed = difference = 0.0
    for window in text_windows(ids, WINDOW, STRIDE, tokenizer.bos_token_id):
        before, targets = torch.from_numpy(window.counted - 1), torch.from_numpy(window.ids[window.counted])
        with torch.inference_mode():
            model, other = (m(torch.from_numpy(window.ids)[None]).logits[0, before].double() for m in models)
        log_model, log_other = model.log_softmax(-1), other.log_softmax(-1)
        kl += functional.kl_div(log_model, log_other, log_target=True, reduction="sum").item()
        agreed += (model.argmax(-1) == other.argmax(-1)).sum().item()
        difference += (functional.nll_loss(log_model, targets, reduction="sum") -
                       functional.nll_loss(log_other, targets, reduction="sum")).item()  # fmt: skip
    assert kl > 0 and found.kl_divergence == pytest.approx(kl / TOKENS, rel=1e-4)
    assert found.top1_agreement == agreed / TOKENS < 1
    assert found.loss_difference == pytest.approx(difference / TOKENS, abs=1e-5)


def test_conversations_count_what_training_would(tiny_base: Path, chats: Path) -> None:
    found = evaluate(tiny_base, data=chats, window=64)
    loaded = load(tiny_base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    rows = load_rows(chats)
    dataset, stats = tokenize(rows, tokenizer, 64, packing=False)
    total, count = 0.0, 0
    for row in dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        trained = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            total += loaded.model(input_ids=ids, labels=labels).loss.item() * trained  # transformers' own loss
        count += trained
    assert found.tokens == count == stats.trained_tokens
    assert found.loss == pytest.approx(total / count, abs=1e-5)
    assert (found.kind, found.stride, found.sha256) == ("data", None, rows.sha256)
    assert found.data is not None and found.data["truncated_rows"] == stats.truncated_rows > 0
    assert any("lost their end" in note for note in found.notes)
    few = evaluate(tiny_base, data=chats, max_tokens=100)
    assert few.text_tokens <= 100 and few.windows < found.windows


def test_an_adapter(stories_dir: Path, stories_nf4: Path, text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(stories_dir)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories_dir)
    losses = plain_losses(model, tokenizer, text.read_text(), True)
    options: dict[str, Any] = {"text": text, "window": WINDOW, "stride": STRIDE, "max_tokens": TOKENS}
    found = evaluate(stories_dir, adapter=tmp_path / "adapter", **options, against=stories_dir)
    assert found.loss == pytest.approx(losses.mean().item(), rel=2e-6)
    assert found.against is not None and found.against.loss != found.loss
    assert any("not pinned" in note for note in found.notes)
    on_nf4 = evaluate(stories_nf4, adapter=tmp_path / "adapter", **options)
    other_way = evaluate(stories_dir, **options, against=stories_nf4, against_adapter=tmp_path / "adapter")
    assert other_way.against is not None and other_way.against.loss == on_nf4.loss


def tiny(path: Path, stories_dir: Path, config: Any, cls: str) -> Path:
    """A random model with the tokenizer of the stories."""
    torch.manual_seed(0)
    getattr(transformers, cls)(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories_dir / name, path / name)
    return path


def test_a_model_that_caps_its_logits(stories_dir: Path, text: Path, tmp_path: Path) -> None:
    """The output layer alone would give other probabilities."""
    config = transformers.Gemma2Config(
        vocab_size=32000, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, max_position_embeddings=128, final_logit_softcapping=0.05, initializer_range=1.0,
    )  # fmt: skip
    path = tiny(tmp_path / "gemma", stories_dir, config, "Gemma2ForCausalLM")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    losses = plain_losses(model, tokenizer, text.read_text(), True)
    found = evaluate(path, text=text, window=WINDOW, stride=STRIDE, max_tokens=TOKENS, bos=True)
    assert found.loss == pytest.approx(losses.mean().item(), abs=5e-6)


def test_logits_are_held_a_few_positions_at_a_time(
    stories_dir: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(stories_dir, text=text, window=WINDOW, max_tokens=TOKENS)
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 8 * 32000 * 7)
    sizes = []
    original: Callable[..., torch.Tensor] = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: sizes.append(len(x)) or original(x, dim=dim))
    parts = evaluate(stories_dir, text=text, window=WINDOW, max_tokens=TOKENS)
    assert max(sizes) == 7
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)


def test_repeated_runs_are_equal_and_leave_the_random_numbers(stories_nf4: Path, text: Path) -> None:
    options: dict[str, Any] = {"text": text, "window": WINDOW, "max_tokens": TOKENS, "seed": 3}
    torch.manual_seed(5)
    first = evaluate(stories_nf4, **options)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    second = evaluate(stories_nf4, **options)
    assert (first.loss, first.top1_accuracy, first.seed) == (second.loss, second.top1_accuracy, 3)
    assert first.as_dict() | {"seconds": 0} == second.as_dict() | {"seconds": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found 0 tokens, needed at least 2"),
        (b"a", "found 1 tokens, needed at least 2"),
        (b"fine \xff", "byte 5 is not UTF-8"),
    ],
)
def test_texts_that_cannot_be_used(stories_dir: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(QlfError, match=message):
        evaluate(stories_dir, text=tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 257}, "the model's context is 256; give a smaller window"),
        ({"window": 1}, "needed at least 2"),
        ({"window": 8, "stride": 8}, "needed 1 to 7"),
        ({"text": "missing.txt"}, "missing.txt: the text cannot be read: No such file"),
        ({"data": "x"}, "both a text and data, or neither"),
        ({"text": None}, "both a text and data, or neither"),
        ({"against_adapter": "x"}, "against_adapter without against"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"device": "cuda:99"}, "was asked for, found"),
        ({"dtype": "int8"}, "'int8' is not supported"),
        ({"text": None, "data": "x.jsonl", "stride": 4}, "every row is a window of its own"),
    ],
)
def test_bad_arguments(stories_dir: Path, text: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QlfError, match=message):
        evaluate(stories_dir, **({"text": text} | options))


def test_vocabularies_that_differ(stories_dir: Path, tiny_source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(QlfError, match=r"predicts one of 32000 tokens, .* one of 49152"):
        evaluate(stories_dir, text=text, against=tiny_source)
    other = shutil.copytree(stories_dir, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["▁Once"], vocab["▁upon"] = vocab["▁upon"], vocab["▁Once"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(QlfError, match="give their 32000 tokens different numbers"):
        evaluate(stories_dir, text=text, against=other)
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(QlfError, match="found no tokenizer that loads"):
        evaluate(stories_dir, text=text, against=other)
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    assert evaluate(stories_dir, text=text, max_tokens=20, against=other).against is not None


def test_models_that_cannot_be_used(stories_dir: Path, text: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(stories_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(QlfError, match="found no tokenizer that loads"):
        evaluate(bare, text=text)
    with pytest.raises(QlfError, match="found no directory"):
        evaluate(tmp_path / "nothing", text=text)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    headless = tiny(tmp_path / "headless", stories_dir, config, "LlamaModel")
    with pytest.raises(QlfError, match="needed a causal language model"):
        evaluate(headless, text=text)
    with pytest.raises(QlfError, match="found no adapter_config"):
        evaluate(stories_dir, text=text, adapter=bare)
    broken = tiny(tmp_path / "broken", stories_dir, config, "LlamaForCausalLM")
    model = transformers.LlamaForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(broken)
    with pytest.raises(QlfError, match="the logits are not finite in float32"):
        evaluate(broken, text=text)
