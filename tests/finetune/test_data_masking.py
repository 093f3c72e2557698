"""The label mask: exactly the assistant's tokens are trained, whatever the chat template does."""

from __future__ import annotations

import copy
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from qlformat.finetune.dataset import load_rows, preview, tokenize
from qlformat.finetune.masking import IGNORED, tokenize_rendered
from qlformat.finetune.rendering import Renderer
from qlformat.finetune.rows import DataError, Row, Rows

START, END = 1, 2  # <|im_start|>, <|im_end|> of SmolLM2
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CHAT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]
THOUGHTS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\ngreet\n</think>\n\nHello"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\nIt is 4."},
]

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS_SYSTEM = NO_SYSTEM.partition("{% endif %}")[2].replace(
    "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
) + DROPS_SYSTEM
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)


UPPER = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | upper + '<|im_end|>' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def loaded(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture
def tokenizer(loaded: Any) -> Any:
    """SmolLM2's; a copy, as tests change its template and its tokens."""
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def loaded_sentencepiece(stories_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(stories_dir)


@pytest.fixture
def sentencepiece(loaded_sentencepiece: Any) -> Any:
    """Llama's tokenizer: word marks in front, bytes for rare characters, and no chat template."""
    return copy.deepcopy(loaded_sentencepiece)


def rows_of(*rows: Row, tmp_path: Path, skip_bad: bool = False) -> Rows:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(path, skip_bad=skip_bad)


def masked(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one row."""
    (pair,) = tokenize_rendered(tokenizer, [Renderer(tokenizer).render(row)])
    return pair[0].tolist(), pair[1].tolist()


def trained(tokenizer: Any, row: Row) -> list[str]:
    """The text of each run of trained tokens."""
    ids, labels = masked(tokenizer, row)
    assert len(ids) == len(labels) and all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs: list[list[int]] = []
    before = IGNORED
    for label in labels:
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


def chatml_labels(tokenizer: Any, ids: list[int]) -> list[int]:
    """What must be trained of SmolLM2's chat format, by walking over its tokens."""
    header = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    labels, at = [IGNORED] * len(ids), 0
    while at < len(ids):
        if ids[at] == START and ids[at + 1 : at + 1 + len(header)] == header:
            at += 1 + len(header)
            end = ids.index(END, at) if END in ids[at:] else len(ids) - 1
            labels[at : end + 1] = ids[at : end + 1]
            at = end
        at += 1
    return labels


def test_smollm2_literally(tokenizer: Any) -> None:
    ids, labels = masked(tokenizer, {"messages": CHAT})
    text = (
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
        "Hello!<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    )
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ("Hello!", "It is 4.")]
    expected = [IGNORED] * len(ids)
    for end, answer in zip([at for at, token in enumerate(ids) if token == END][2::2], answers, strict=True):
        expected[end - len(answer) : end + 1] = [*answer, END]
    assert labels == expected


def test_real_conversations(tokenizer: Any, chats_file: Path) -> None:
    rows = load_rows(chats_file).select(range(0, 4000, 20))
    data, stats = tokenize(rows, tokenizer, 100_000, packing=False)
    assert len(data) == len(rows) == 200 and stats.notes == ()
    total = 0
    for row in data:
        assert row["labels"] == chatml_labels(tokenizer, row["input_ids"])
        total += sum(label != IGNORED for label in row["labels"])
    assert total == stats.trained_tokens > 20_000
    assert stats.tokens == sum(stats.lengths) == sum(len(row["input_ids"]) for row in data)


@pytest.mark.parametrize(
    "content",
    [
        " white space \n", "\n\nnew lines\n\n", "😀 é 漢字 \u200d", "a<|im_end|>b", "<|im_start|>assistant\nfake",
        "assistant", "{{ 1 }}", "\ue000\ue001", "x" * 5000, "0",
    ],
)  # fmt: skip
def test_odd_answers(tokenizer: Any, content: str) -> None:
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}] * 2
    ids, labels = masked(tokenizer, {"messages": chat})
    end = [at for at, label in enumerate(labels) if label != IGNORED][-1]
    assert ids[end] == END
    # A new line at the head of an answer is one token with the one that ends the header.
    merged = "\n" if content.startswith("\n") else ""
    assert trained(tokenizer, {"messages": chat}) == [f"{merged}{content}<|im_end|>"] * 2


def test_tokens_merged_over_the_boundary(tokenizer: Any) -> None:
    """A newline at the head of an answer merges with the header's own into one token, which must be trained."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nHello"}]
    ids, labels = masked(tokenizer, {"messages": chat})
    first = next(at for at, label in enumerate(labels) if label != IGNORED)
    assert tokenizer.decode([ids[first]]) in ("\n", "\n\n")
    assert trained(tokenizer, {"prompt": "The sky is", "completion": " blue"}) == [" blue<|im_end|>"]
    ids, labels = masked(tokenizer, {"prompt": "unbeliev", "completion": "able"})
    whole = tokenizer("unbelievable", add_special_tokens=False)["input_ids"]
    assert ids == [*whole, END] and len(whole) < 4 and labels[-2:] == [whole[-1], END]


def test_system_messages(tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert trained(tokenizer, {"messages": chat}) == ["Hello!<|im_end|>", "It is 4.<|im_end|>"]
    ids, _ = masked(tokenizer, {"messages": chat})
    assert DEFAULT_SYSTEM not in tokenizer.decode(ids) and "Be brief." in tokenizer.decode(ids)


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_template_without_a_system_role_gets_it_in_the_first_user_message(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer)
    rendered = renderer.render({"messages": [{"role": "system", "content": "Be brief."}, *CHAT]})
    assert rendered.text.startswith("<|im_start|>user\nBe brief.\n\nHi there<|im_end|>")
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["Hello!<|im_end|>", "It is 4.<|im_end|>"]
    assert any("takes no system message" in note for note in renderer.notes)


def test_llama2_with_sentencepiece(sentencepiece: Any) -> None:
    sentencepiece.chat_template = LLAMA2
    ids, labels = masked(sentencepiece, {"messages": CHAT})
    bos, eos = sentencepiece.bos_token_id, sentencepiece.eos_token_id
    assert ids.count(bos) == 2 and labels.count(eos) == 2
    assert [text.strip() for text in trained(sentencepiece, {"messages": CHAT})] == ["Hello! </s>", "It is 4. </s>"]
    emoji = [{"role": "user", "content": "😀"}, {"role": "assistant", "content": "😀"}]
    ids, labels = masked(sentencepiece, {"messages": emoji})  # four byte tokens that share one character
    assert sum(label != IGNORED for label in labels) >= 5
    assert trained(sentencepiece, {"messages": emoji})[0].strip().startswith("😀")


def test_a_tokenizer_without_offsets_gives_the_same_mask(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = [
        {"messages": CHAT}, {"messages": CHAT[:3]}, {"prompt": "1+1=", "completion": "2"}, {"text": "Once upon"},
    ]  # fmt: skip
    fast = [masked(tokenizer, row) for row in rows]
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert [masked(tokenizer, row) for row in rows] == fast


def test_plain_rows(tokenizer: Any, sentencepiece: Any) -> None:
    assert trained(tokenizer, {"prompt": "1+1=", "completion": "2"}) == ["2<|im_end|>"]
    ids, labels = masked(tokenizer, {"text": "Once upon a time"})
    assert labels == [IGNORED, *ids[1:]] and ids[-1] == tokenizer.eos_token_id
    ids, labels = masked(sentencepiece, {"text": "Once upon a time"})
    assert ids[0] == sentencepiece.bos_token_id and labels == [IGNORED, *ids[1:]] and ids[-1] == 2
    assert masked(sentencepiece, {"prompt": "", "completion": "Once"})[1][0] == IGNORED


def test_instructions_with_and_without_a_template(tokenizer: Any, sentencepiece: Any) -> None:
    row = {"instruction": "Add the numbers.", "input": "1 2", "output": "3"}
    assert trained(tokenizer, row) == ["3<|im_end|>"]
    assert "user\nAdd the numbers.\n\n1 2<|im_end|>" in tokenizer.decode(masked(tokenizer, row)[0])
    renderer = Renderer(sentencepiece)
    text = renderer.render(row).text
    assert text.endswith("### Instruction:\nAdd the numbers.\n\n### Input:\n1 2\n\n### Response:\n3")
    assert "### Input" not in renderer.render({**row, "input": ""}).text
    assert any("Alpaca" in note for note in renderer.notes)
    assert trained(sentencepiece, row) == ["3</s>"]


def test_context_messages_are_not_trained(tokenizer: Any) -> None:
    assert trained(tokenizer, {"messages": CHAT, "context": 3}) == ["It is 4.<|im_end|>"]
    for template in (GENERATION, NO_SYSTEM):
        tokenizer.chat_template = template
        chat = [{"role": "system", "content": "S"}, *CHAT]
        assert trained(tokenizer, {"messages": chat, "context": 4}) == ["It is 4.<|im_end|>"]


def test_generation_marks_decide(tokenizer: Any) -> None:
    tokenizer.chat_template = GENERATION
    assert trained(tokenizer, {"messages": CHAT}) == ["Hello!<|im_end|>", "It is 4.<|im_end|>"]
    tokenizer.chat_template = GENERATION.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endg", "{{ m['content'] }}{% endg"
    )
    renderer = Renderer(tokenizer)
    renderer.render({"messages": CHAT})
    assert any("may not learn to stop" in note for note in renderer.notes)


def test_templates_that_defeat_the_mask_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_of({"messages": CHAT}, tmp_path=tmp_path)
    tokenizer.chat_template = UPPER.replace("m['content'] | upper", "(m['content'] | length) | string")
    with pytest.raises(DataError, match=r"rows.jsonl: line 1: the chat template rewrites the answers; mark them with"):
        tokenize(rows, tokenizer, 100, packing=False)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="shows 0 of 2 answers"):
        tokenize(rows, tokenizer, 100, packing=False)
    tokenizer.chat_template = UPPER  # changes the answers, and one still sees where they are
    assert trained(tokenizer, {"messages": CHAT}) == ["HELLO!<|im_end|>", "IT IS 4.<|im_end|>"]


def test_a_template_refusing_one_row(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = ALTERNATES
    bad = {"messages": [CHAT[0], *CHAT]}
    with pytest.raises(DataError, match=r"line 2: the chat template refuses this chat: Conversation roles must alter"):
        tokenize(rows_of({"messages": CHAT}, bad, tmp_path=tmp_path), tokenizer, 100, packing=False)
    rows = rows_of({"messages": CHAT}, bad, tmp_path=tmp_path, skip_bad=True)
    data, stats = tokenize(rows, tokenizer, 100, packing=False)
    assert len(data) == 1 and [skipped.place.number for skipped in stats.skipped] == [2]


def test_a_chat_without_a_template(sentencepiece: Any, tmp_path: Path) -> None:
    for skip_bad in (False, True):
        rows = rows_of({"messages": CHAT}, tmp_path=tmp_path, skip_bad=skip_bad)
        with pytest.raises(DataError, match=r"no chat template; use a base with one .* chat_template.jinja"):
            tokenize(rows, sentencepiece, 100, packing=False)


def test_a_template_without_end_of_turn_is_noted(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    renderer = Renderer(tokenizer)
    rendered = renderer.render({"messages": CHAT})
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["Hello!", "It is 4."]
    assert any("may not learn to stop" in note for note in renderer.notes)


def test_the_preview_is_made_of_the_labels(tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_of({"text": "x"}, tmp_path=tmp_path)
    assert preview(rows, tokenizer).pieces == [("x", False), ("<|im_end|>", True)]
    example = preview(rows_of({"messages": CHAT}, tmp_path=tmp_path), tokenizer)
    assert [text for text, on in example.pieces if on] == ["Hello!<|im_end|>", "It is 4.<|im_end|>"]
    ids, labels = masked(tokenizer, {"messages": CHAT})
    assert "".join(text for text, _ in example.pieces) == tokenizer.decode(ids)
    assert (example.tokens, example.trained_tokens) == (len(ids), sum(label != IGNORED for label in labels))


# ---------------------------------------------------------------- against TRL's own marks

SAME = {
    "cohere": CHAT, "gemma": CHAT, "gemma3": CHAT, "lfm2": CHAT, "lfm2_v2": CHAT, "llama3": CHAT, "qwen2_5": CHAT,
    "qwen3_instruct_2507": CHAT, "qwen3_vl": CHAT, "qwen3": CHAT[:2],
}  # fmt: skip


def published(tokenizer: Any, name: str) -> str:
    """A chat template that TRL ships, with the control tokens it writes known to the tokenizer."""
    text = (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    control = sorted(set(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", text)))
    tokenizer.add_tokens(control, special_tokens=True)
    return text


@pytest.mark.parametrize("name", SAME)
def test_the_mask_equals_the_one_of_a_marked_template(tokenizer: Any, name: str) -> None:
    """TRL keeps a second copy of these models' templates with the answers marked by hand."""
    tokenizer.chat_template = published(tokenizer, name)
    ids, ours = masked(tokenizer, {"messages": SAME[name]})
    tokenizer.chat_template = published(tokenizer, f"{name}_training")
    same_ids, theirs = masked(tokenizer, {"messages": SAME[name]})
    assert ids == same_ids
    differ = np.flatnonzero(np.array(ours) != np.array(theirs))
    # Theirs also train on the white space that the template writes behind the end of a turn.
    assert all(ours[at] == IGNORED and tokenizer.decode([ids[at]]).strip() == "" for at in differ)
    assert sum(label != IGNORED for label in ours) > 8


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Qwen3 drops the reasoning of earlier answers; its header leaves <think> to the model.
        ("qwen3", ["Hello<|im_end|>", "<think>\nadd\n</think>\n\nIt is 4.<|im_end|>"]),
        # Qwen3.6's header already opens the reasoning.
        ("qwen3_6", ["Hello<|im_end|>", "add\n</think>\n\nIt is 4.<|im_end|>"]),
    ],
)
def test_reasoning_templates(tokenizer: Any, name: str, expected: list[str]) -> None:
    tokenizer.chat_template = published(tokenizer, name)
    assert trained(tokenizer, {"messages": THOUGHTS}) == expected
