"""Tiny models with a tokenizer of single bytes, and a text to calibrate on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

WORDS = (
    "the",
    "a",
    "small",
    "large",
    "river",
    "house",
    "over",
    "under",
    "walks",
    "sees",
    "finds",
    "green",
    "and",
    "but",
)


def add_tokenizer(directory: Path) -> None:
    """Every byte is a token; token 256 begins a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<s>": 256}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(directory)


def small_model(directory: Path, config: transformers.PretrainedConfig) -> Path:
    """A model with random weights, saved in float16."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # the usual initialization is so small that attention sees no difference
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    model.to(torch.float16).save_pretrained(directory)
    add_tokenizer(directory)
    return directory


def llama_config() -> transformers.LlamaConfig:
    """Rows of 96 and 160 elements: blocks of 64 cross them."""
    return transformers.LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=260, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float16."""
    return small_model(tmp_path_factory.mktemp("calibration") / "llama", llama_config())


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 6,000 bytes of words."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(1200)), encoding="utf-8")
    return path
