"""A tiny 4-bit base with a real tokenizer and chat template, and a few chats to train on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import qlformat

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A float16 Llama of two layers with SmolLM2's tokenizer."""
    import torch
    import transformers

    out = tmp_path_factory.mktemp("tiny") / "tiny-fp16"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).half().save_pretrained(out)
    for name in TOKENIZER:
        shutil.copy(smollm2_dir / name, out / name)
    return out


@pytest.fixture(scope="session")
def tiny_base(tiny_source: Path) -> Path:
    """The 4-bit base made from tiny_source."""
    out = tiny_source.with_name("tiny")
    qlformat.convert(tiny_source, out)
    return out


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 chats of different lengths."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Count to {n}."},
                      {"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))}]}
        for n in range(1, 41)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
