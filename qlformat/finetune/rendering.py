"""Rows as text, and what of it is trained: the assistant's answers, their end-of-turn tokens included.

A chat is rendered by the tokenizer's own chat template. Where the template marks what the model generates
({% generation %}), those marks decide. Elsewhere the chat is rendered a second time with two private characters put
around every answer: they show where the answers are in the text, whatever the template does around them. That the
second text without these characters is the first one proves that they did no harm.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from typing import Any

from qlformat.finetune.rows import DataError, Row, RowError

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [{"role": "user", "content": "?"}]
_PRIVATE = range(0xE000, 0xF8FF)

# The prompt of Stanford Alpaca, with which instruction data has been trained since, for models without a template.
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: what is tokenized.
        spans: [begin, end) in characters of what is trained, ascending.
        special: whether the tokenizer adds its special tokens (BOS); a chat template writes them itself.
        close: whether an end-of-text token is appended, and trained.
    """

    text: str
    spans: list[Span]
    special: bool = False
    close: bool = False


@dataclass
class Renderer:
    """Renders rows with one tokenizer.

    Attributes:
        tokenizer: a transformers tokenizer.
        notes: what the user should know, each once; filled while rendering.
    """

    tokenizer: Any
    notes: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        template = self.tokenizer.chat_template
        # Some tokenizers have several; "default" is the one for plain chats.
        self._template: str | None = template.get("default") if isinstance(template, dict) else template
        self._marked = bool(self._template and _GENERATION.search(self._template))
        self._headers: list[str] | None = None
        special = {str(token) for token in self.tokenizer.get_added_vocab()} | set(self.tokenizer.all_special_tokens)
        names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True) if name.strip())
        self._special = re.compile(rf"(?:{names})") if names else None
        self._specials_at = re.compile(rf"\s*((?:{names})+)") if names else None

    def render(self, row: Row) -> Rendered:
        """The text of a row and the spans to train.

        Raises:
            RowError: the chat template refuses this row, or loses an answer of it.
            DataError: the row is a chat and the tokenizer has no chat template.
        """
        if "messages" in row:
            return self._chat(row["messages"], row.get("context", 0))
        if "instruction" in row:
            return self._instruction(row)
        if "text" in row:
            return Rendered(row["text"], [(0, len(row["text"]))], special=True, close=True)
        prompt, text = row["prompt"], row["prompt"] + row["completion"]
        return Rendered(text, [(len(prompt), len(text))], special=True, close=True)

    def _instruction(self, row: Row) -> Rendered:
        instruction, extra, output = row["instruction"], row["input"], row["output"]
        if self._template:
            question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
            return self._chat([{"role": "user", "content": question}, {"role": "assistant", "content": output}], 0)
        self.notes.add("the tokenizer has no chat template: instructions are rendered in the format of Alpaca")
        paired = ", paired with an input that provides further context" if extra.strip() else ""
        prompt = _ALPACA.format(paired, instruction, f"### Input:\n{extra}\n\n" if extra.strip() else "")
        return Rendered(prompt + output, [(len(prompt), len(prompt) + len(output))], special=True, close=True)

    def _chat(self, messages: list[dict[str, str]], context: int) -> Rendered:
        if not self._template:
            raise DataError(
                "the data holds chats and the base's tokenizer has no chat template; use a base with one (an instruct "
                "model), or put one into chat_template.jinja beside its tokenizer, or give the data as prompt and "
                "completion"
            )
        count = len(messages)
        messages, text, marks = self._text(messages)
        context -= min(context, count - len(messages))
        spans = self._marked_spans(messages, marks, context) if self._marked else self._spans(messages, text, context)
        if not spans:
            raise RowError("the chat template leaves nothing of this chat to train on")
        self._note_open_end(text, spans)
        return Rendered(text, spans)

    def _text(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str, list[Span]]:
        """(messages, text, generation marks) with the system message put where the template takes it."""
        if messages[0]["role"] != "system":
            return messages, *self._apply(messages)
        try:
            text, marks = self._apply(messages)
            if messages[0]["content"].strip() in text:
                return messages, text, marks
        except RowError:
            if len(messages) < 2 or messages[1]["role"] != "user":
                raise
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise RowError("the chat template takes no system message, and no user message follows it")
        self.notes.add("the chat template takes no system message: it is put in front of the first user message")
        first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        messages = [first, *messages[2:]]
        return messages, *self._apply(messages)

    def _apply(self, messages: list[dict[str, str]], prompt: bool = False) -> tuple[str, list[Span]]:
        """(text, marks) of the chat template; `prompt` adds the header that asks for an answer."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise RowError(f"the chat template refuses this chat: {reason}") from None
        return texts[0], [(int(begin), int(end)) for begin, end in marks[0]] if marks else []

    def _marked_spans(self, messages: list[dict[str, str]], marks: list[Span], context: int) -> list[Span]:
        """The template's own marks, one for each answer, without those of the context."""
        answers = sum(message["role"] == "assistant" for message in messages)
        known = sum(message["role"] == "assistant" for message in messages[:context])
        if known and len(marks) != answers:
            raise RowError(f"the chat template marks {len(marks)} answers of {answers}, so its prompt cannot be told")
        return marks[known:]

    def _spans(self, messages: list[dict[str, str]], text: str, context: int) -> list[Span]:
        """The answers in `text`, each from behind the header that asks for it to behind its end-of-turn token."""
        opening, closing = _private_pair(text)
        marked = [self._wrap(message, opening, closing) for message in messages]
        found, _ = self._apply(marked)
        if found.replace(opening, "").replace(closing, "") != text:
            raise RowError("the chat template rewrites the answers; mark them with {% generation %} in the template")
        ends = _positions(found, opening, closing)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(ends) != len(answers):
            raise RowError(f"the chat template shows {len(ends)} of {len(answers)} answers")
        spans, before = [], 0
        for index, (begin, end) in zip(answers, ends, strict=True):
            stop = self._turn_end(text, end)
            asked = messages[index - 1]["content"].strip() if index else ""
            at = text.rfind(asked, before, end if begin is None else begin) if asked else -1
            before = max(before, at + len(asked))  # what the user wrote is not searched for the header
            if index >= context:
                spans.append((self._turn_begin(text, before, begin, end), stop))
            before = stop
        return spans

    def _wrap(self, message: dict[str, str], opening: str, closing: str) -> dict[str, str]:
        if message["role"] != "assistant":
            return message
        content = message["content"]
        # Inside the outer white space, which templates may trim.
        core = content.strip()
        left, _, right = content.partition(core)
        return {"role": "assistant", "content": f"{left}{opening}{core}{closing}{right}"}

    def _turn_begin(self, text: str, before: int, begin: int | None, end: int) -> int:
        """Behind the header that asks for an answer: what stands between it and the answer is the model's to write."""
        if self._headers is None:
            self._headers = self._find_headers()
        for header in self._headers:
            at = text.rfind(header, before, end if begin is None else begin)
            if at >= 0:
                return at + len(header)
        if begin is None:
            raise RowError("the chat template drops a part of an answer; mark the rest with {% generation %} in it")
        return begin

    def _find_headers(self) -> list[str]:
        """The header that asks for an answer, and the part of it that stands before earlier answers as well."""
        asked, plain = self._apply(_PROBE, prompt=True)[0], self._apply(_PROBE)[0]
        if not asked.startswith(plain):
            return []
        headers = [asked[len(plain) :]]
        with contextlib.suppress(RowError):  # some templates refuse a chat that ends so
            answered = self._apply([*_PROBE, {"role": "assistant", "content": chr(_PRIVATE[0])}, *_PROBE])[0]
            same = next((i for i, (a, b) in enumerate(zip(asked, answered, strict=False)) if a != b), len(asked))
            headers.append(asked[len(plain) : same])
        return [header for header in headers if header.strip()]

    def _turn_end(self, text: str, end: int) -> int:
        """Behind the special token that follows an answer, if one does; of several, behind the end-of-text token."""
        found = self._specials_at.match(text, end) if self._specials_at else None
        if found is None or self._special is None:
            return end
        eos = self.tokenizer.eos_token
        at = found[1].find(eos) if eos else -1
        if at >= 0:
            return found.start(1) + at + len(eos)
        first = self._special.match(text, found.start(1))
        return first.end() if first else end

    def _note_open_end(self, text: str, spans: list[Span]) -> None:
        begin, end = spans[-1]
        answer = text[begin:end].rstrip()
        if self._special is None or not re.search(f"{self._special.pattern}$", answer):
            self.notes.add(
                "the chat template puts no end-of-turn token into what is trained, so the model may not learn to stop"
            )


def _private_pair(text: str) -> tuple[str, str]:
    """Two characters that the text has not."""
    free = (chr(code) for code in _PRIVATE if chr(code) not in text)
    opening, closing = next(free, None), next(free, None)
    if opening is None or closing is None:
        raise RowError("the chat uses every private character of Unicode")
    return opening, closing


def _positions(text: str, opening: str, closing: str) -> list[tuple[int | None, int]]:
    """(begin or None, end) of each answer, counted in the text without the two characters.

    A template that drops the first part of an answer (its reasoning) takes the opening character with it.
    """
    found: list[tuple[int | None, int]] = []
    begin: int | None = None
    for removed, match in enumerate(re.finditer(f"{opening}|{closing}", text)):
        position = match.start() - removed
        if match.group() == opening:
            begin = position
        else:
            found.append((begin, position))
            begin = None
    return found
