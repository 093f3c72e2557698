"""Sequences: packing without loss or contamination, cutting, and the datasets that TRL's collator takes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlformat.finetune.dataset import load_rows, tokenize
from qlformat.finetune.masking import IGNORED
from qlformat.finetune.packing import pack
from qlformat.finetune.rows import DataError, Rows


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def chats(chats_file: Path) -> Rows:
    return load_rows(chats_file).select(range(0, 4000, 40))


def texts(tmp_path: Path, *values: str) -> Rows:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return load_rows(tmp_path / "t.jsonl")


def test_pack_small() -> None:
    assert pack([3, 7, 5, 5, 10], 10) == [[4], [1, 0], [2, 3]]
    assert pack([], 10) == [] and pack([1], 1) == [[0]]
    with pytest.raises(ValueError, match="found rows of 0 to 3 tokens, needed 1 to 10"):
        pack([3, 0], 10)
    with pytest.raises(ValueError, match="rows of 11"):
        pack([11], 10)


@pytest.mark.parametrize("seed", range(5))
def test_pack_is_best_fit_decreasing(seed: int) -> None:
    source = random.Random(seed)
    lengths = [source.randint(1, 64) for _ in range(400)]
    slow: list[list[int]] = []
    for row in sorted(range(400), key=lambda row: (-lengths[row], row)):
        rooms = [64 - sum(lengths[i] for i in sequence) for sequence in slow]
        fitting = [room for room in rooms if room >= lengths[row]]
        if fitting:
            slow[rooms.index(min(fitting))].append(row)
        else:
            slow.append([row])
    fast = pack(lengths, 64)
    assert sorted(row for sequence in fast for row in sequence) == list(range(400))
    assert all(sum(lengths[row] for row in sequence) <= 64 for sequence in fast)
    # Which of two equally full sequences takes a row is free; how full they become is not.
    filled = [sorted(sum(lengths[row] for row in sequence) for sequence in each) for each in (fast, slow)]
    assert filled[0] == filled[1]


def test_packing_keeps_every_row_whole(tokenizer: Any, chats: Rows) -> None:
    padded, plain = tokenize(chats, tokenizer, 1024, packing=False)
    packed, stats = tokenize(chats, tokenizer, 1024, packing=True)
    found = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 1024
        at = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
            at += length
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in padded)
    assert all(labels[0] == IGNORED for _, labels in found)
    assert (stats.tokens, stats.trained_tokens) == (plain.tokens, plain.trained_tokens)
    assert stats.sequences == len(packed) < len(padded) / 1.7 and stats.fill > 0.95 > plain.fill


def test_the_same_rows_give_the_same_dataset(tokenizer: Any, chats: Rows) -> None:
    first, second = (tokenize(chats, tokenizer, 512, packing=True)[0] for _ in range(2))
    assert first.to_dict() == second.to_dict() and first._fingerprint == second._fingerprint
    assert tokenize(chats, tokenizer, 513, packing=True)[0]._fingerprint != first._fingerprint


def test_a_packed_row_does_not_see_its_neighbours(tokenizer: Any, chats: Rows, smollm2_dir: Path) -> None:
    """The logits of rows packed by TRL's collator are those of the rows alone."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    packed, _ = tokenize(chats, tokenizer, 128, packing=True)
    row = max(packed, key=lambda row: len(row["seq_lengths"]))
    assert len(row["seq_lengths"]) > 1
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() == len(row["seq_lengths"])
    ends = np.cumsum(row["seq_lengths"])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        contaminated = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            alone = model(batch["input_ids"][:, begin:end], use_cache=False).logits[0]
            assert (together[begin:end] - alone).abs().max() < 1e-2
            assert begin == 0 or (contaminated[begin:end] - alone).abs().max() > 1
    # The collator's labels are ours.
    assert batch["labels"][0].tolist() == row["labels"]


def test_padded_batches(tokenizer: Any, chats: Rows) -> None:
    data, _ = tokenize(chats, tokenizer, 256, packing=False)
    assert data.column_names == ["input_ids", "labels"]
    rows = [data[index] for index in (0, 1)]
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        assert batch["input_ids"][index, :size].tolist() == row["input_ids"]
        assert batch["labels"][index, :size].tolist() == row["labels"]
        assert (batch["labels"][index, size:] == IGNORED).all() and batch["attention_mask"][index].sum() == size


def test_rows_longer_than_a_sequence_lose_their_end_and_it_is_said(tokenizer: Any, chats: Rows) -> None:
    whole, _ = tokenize(chats, tokenizer, 1 << 20, packing=False)
    sizes = [len(row["input_ids"]) for row in whole]
    cut, stats = tokenize(chats, tokenizer, 128, packing=False)
    assert stats.lengths.tolist() == sizes and stats.truncated_rows == sum(size > 128 for size in sizes)
    assert stats.truncated_share == stats.truncated_rows / 100 > 0.3
    assert stats.lost_tokens == sum(max(0, size - 128) for size in sizes)
    kept = [row for row in whole if any(label != IGNORED for label in row["labels"][:128])]
    assert stats.dropped_rows == len(whole) - len(kept)
    assert [row["input_ids"] for row in cut] == [row["input_ids"][:128] for row in kept]
    said = stats.as_dict()
    assert said["lengths"]["max"] == max(sizes) and said["truncated_share"] == stats.truncated_share
    assert json.loads(json.dumps(said)) == said


def test_long_text_is_cut_into_pieces_without_loss(tokenizer: Any, tmp_path: Path) -> None:
    rows = texts(tmp_path, "one two three four five six seven eight nine ten " * 20, "short")
    data, stats = tokenize(rows, tokenizer, 64, packing=False)
    assert stats.truncated_rows == stats.lost_tokens == 0 and stats.split_rows == 1
    assert stats.tokens == sum(stats.lengths) and len(data) > 3
    whole, _ = tokenize(rows.select([0]), tokenizer, 10_000, packing=False)
    joined = [token for row in data.select(range(len(data) - 1)) for token in row["input_ids"]]
    assert joined == whole[0]["input_ids"]
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in data)


def test_nothing_left_to_train_on(tokenizer: Any, chats: Rows) -> None:
    with pytest.raises(DataError, match=r"no row has anything to train on within 8 tokens \(100 dropped, 0 skipped\)"):
        tokenize(chats, tokenizer, 8, packing=True)
