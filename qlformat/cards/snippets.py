"""The load snippets of cards. Every one is executed by a test, as it is in the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Model:
    """What a snippet loads.

    Attributes:
        name: repository or directory.
        revision: commit, or None for the newest.
        auto_class: of transformers.
        tokenizer: "chat", "plain" or None, where there is none.
    """

    name: str
    revision: str | None = None
    auto_class: str = "AutoModelForCausalLM"
    tokenizer: str | None = None

    @property
    def at(self) -> str:
        """The arguments of from_pretrained."""
        return f'"{self.name}"' + (f', revision="{self.revision}"' if self.revision else "")


def describe(name: str, directory: Path | None, config: Mapping[str, Any], revision: str | None = None) -> Model:
    """What is needed to load the model of a config.json; tokenizer files are looked for in `directory`."""
    return Model(name, revision, auto_class(config), None if directory is None else tokenizer_kind(directory))


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads this architecture."""
    architecture = _architecture(config)
    if architecture.endswith("ForConditionalGeneration") and "vision_config" in config:
        return "AutoModelForImageTextToText"
    if config.get("is_encoder_decoder"):
        return "AutoModelForSeq2SeqLM"
    return "AutoModelForCausalLM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else "AutoModel"


def pipeline_tag(config: Mapping[str, Any]) -> str | None:
    """The task that the Hub files the model under."""
    tags = {
        "AutoModelForCausalLM": "text-generation",
        "AutoModelForImageTextToText": "image-text-to-text",
        "AutoModelForSeq2SeqLM": "text2text-generation",
    }
    return tags.get(auto_class(config))


def tokenizer_kind(directory: Path) -> str | None:
    """ "chat", "plain" or None, by the files of the tokenizer."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    settings = directory / "tokenizer_config.json"
    inside = settings.is_file() and b'"chat_template"' in settings.read_bytes()
    return "chat" if inside or (directory / "chat_template.jinja").is_file() else "plain"


def transformers(model: Model) -> str:
    """Load with transformers alone, and ask."""
    names = [model.auto_class] + (["AutoTokenizer"] if model.tokenizer else [])
    lines = [
        f"from transformers import {', '.join(names)}",
        "",
        f"model = {model.auto_class}.from_pretrained({model.at})",
    ]
    return python(*lines, *_ask(model))


def peft_training(model: Model) -> str:
    """Put new LoRA layers on a 4-bit model with peft, to train."""
    task = 'task_type="CAUSAL_LM", ' if model.auto_class == "AutoModelForCausalLM" else ""
    return python(
        "import peft",
        f"from transformers import {model.auto_class}",
        "",
        f"model = {model.auto_class}.from_pretrained({model.at})",
        "model = peft.prepare_model_for_kbit_training(model)",
        f'lora = peft.LoraConfig({task}target_modules="all-linear")',
        "model = peft.get_peft_model(model, lora)",
        "model.print_trainable_parameters()",
    )


def qlformat(model: Model, adapter: str | None = None) -> str:
    """Load with qlformat; an adapter's pin is checked."""
    name = f"{model.name}@{model.revision}" if model.revision else model.name
    more = f', adapter="{adapter}"' if adapter else ""
    return python("import qlformat", "", f'model = qlformat.load_model("{name}"{more})')


def adapter_transformers(base: Model, adapter: str) -> str:
    """Load an adapter with transformers, which calls peft."""
    return python(
        f"from transformers import {base.auto_class}",
        "",
        f"model = {base.auto_class}.from_pretrained({base.at})",
        f'model.load_adapter("{adapter}")',
    )


def adapter_peft(base: Model, adapter: str) -> str:
    """Load an adapter with peft, and ask."""
    names = [base.auto_class] + (["AutoTokenizer"] if base.tokenizer else [])
    return python(
        "import peft",
        f"from transformers import {', '.join(names)}",
        "",
        f"base = {base.auto_class}.from_pretrained({base.at})",
        f'model = peft.PeftModel.from_pretrained(base, "{adapter}")',
        *_ask(base),
    )


def python(*lines: str) -> str:
    """A block of Python."""
    return "\n".join(["```python", *lines, "```"])


def shell(*lines: str) -> str:
    """A block of shell commands."""
    return "\n".join(["```", *lines, "```"])


def _ask(model: Model) -> list[str]:
    if model.tokenizer is None or model.auto_class != "AutoModelForCausalLM":
        return []
    lines = [f"tokenizer = AutoTokenizer.from_pretrained({model.at})"]
    if model.tokenizer == "chat":
        lines += [
            f'chat = [{{"role": "user", "content": "{QUESTION}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    else:
        lines += [f'inputs = tokenizer("{QUESTION}", return_tensors="pt").to(model.device)']
    return [
        *lines,
        "answer = model.generate(**inputs, max_new_tokens=20)",
        "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
    ]


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
