"""The card of an adapter: how to load it on its base, how the training went, on what, and what it is pinned to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlformat import adapter, manifest, pins
from qlformat.adapter import BasePin
from qlformat.cards import content, snippets
from qlformat.cards.content import Content, Inherited, code, section, table
from qlformat.source import is_repo_id

CURVES = "loss.png"
OPTIONS = "finetune.yaml"
_PATHS = frozenset(("base", "data", "eval_data", "config"))
"""Options that name a path of the machine that trained; a card shows its last part."""


@dataclass(frozen=True)
class AdapterFacts:
    """What the files of an adapter say.

    Attributes:
        config: adapter_config.json.
        made: qlf.json; empty for a plain peft adapter.
        pin: the base it is pinned to, or None.
    """

    config: Mapping[str, Any]
    made: Mapping[str, Any]
    pin: BasePin | None

    @property
    def base_name(self) -> str:
        """The base for a snippet: its repository, or the last part of the path it had."""
        if self.pin is not None and self.pin.repo_id:
            return self.pin.repo_id
        name = str(self.config.get("base_model_name_or_path") or "base").partition("@")[0]
        return name if is_repo_id(name) and not name.startswith(".") else Path(name).name

    @property
    def home(self) -> tuple[str | None, str | None]:
        """(repository, commit) that the metadata may name: the base's, or else the one that it was made from."""
        if self.pin is not None and self.pin.repo_id:
            return self.pin.repo_id, self.pin.revision
        source = self.made.get("base_source")
        if isinstance(source, str):
            return source, None
        name = str(self.config.get("base_model_name_or_path") or "")
        plain = self.pin is None and is_repo_id(name) and not Path(name).exists()
        return (name.partition("@")[0] if plain else None), None


def read(directory: Path) -> AdapterFacts:
    """Read adapter_config.json and qlf.json."""
    config = content.read_object(directory / adapter.CONFIG_NAME)
    pin = adapter.read_pin(directory)
    made = content.read_object(directory / manifest.FILE_NAME) if pin is not None else {}
    return AdapterFacts(config, made, pin)


def describe(directory: Path, name: str, inherited: Inherited) -> Content:
    """The card of the adapter in `directory`; see cards.base.describe."""
    facts = read(directory)
    home, _ = facts.home
    title = name.rpartition("/")[2]
    metadata = {
        **inherited.metadata(),
        **({"base_model": home, "base_model_relation": "adapter"} if home else {}),
        "library_name": "peft",
        "pipeline_tag": inherited.pipeline_tag or "text-generation",
        "datasets": _datasets(facts),
        "tags": _tags(facts),
        **_results(facts, title),
    }
    sections = content.join(
        _introduction(facts),
        _load(facts, name),
        _training(directory, facts),
        _data(facts),
        _base(facts, name),
        _options(directory, facts),
        section("Versions", _versions(facts)),
    )
    return Content(title, metadata, sections, inherited.notes)


def _introduction(facts: AdapterFacts) -> str:
    method = _mapping(facts.made, "method")
    trainable, params = method.get("trainable"), method.get("params")
    kind = (
        "DoRA" if facts.config.get("use_dora") else str(facts.config.get("peft_type", "peft")).replace("LORA", "LoRA")
    )
    rank = facts.config.get("r")
    text = f"A {kind} adapter{f' of rank {rank}' if rank else ''} for {code(facts.base_name)}."
    if facts.made.get("options"):
        text += " Trained with `qlf finetune` (QLoRA) on the base's 4-bit weights."
    if isinstance(trainable, int) and isinstance(params, int) and params:
        share = 100 * trainable / params
        text += f" {content.number(trainable)} parameters, {share:.2f} % of the base's {content.number(params)}."
    if _mapping(facts.made, "options").get("init") == "pissa":
        text += " PiSSA: half of the adapter's ranks were trained, the others take out of the base what those began as."
    return text


def _load(facts: AdapterFacts, name: str) -> str:
    revision = facts.pin.revision if facts.pin is not None and facts.pin.repo_id else None
    auto = "AutoModelForCausalLM" if facts.config.get("task_type") in ("CAUSAL_LM", None) else "AutoModel"
    base = snippets.Model(facts.base_name, revision, auto)
    return section(
        "Load it",
        "With peft:",
        snippets.adapter_peft(base, name),
        "With transformers, which calls peft:",
        snippets.adapter_transformers(base, name),
        "With [qlformat](https://pypi.org/project/qlformat/), which refuses any other base:" if facts.pin else
        "With [qlformat](https://pypi.org/project/qlformat/):",
        snippets.qlformat(base, name),
    )  # fmt: skip


def _training(directory: Path, facts: AdapterFacts) -> str:
    result = _mapping(facts.made, "result")
    rows: list[tuple[str, object]] = []
    if result.get("steps") is not None:
        rows.append(("updates", result["steps"]))
    if isinstance(result.get("train_loss"), float):
        rows.append(("training loss at the end", f"{result['train_loss']:.4f}"))
    before, after = result.get("eval_loss_at_start"), result.get("eval_loss")
    if isinstance(before, float) and isinstance(after, float):
        rows.append(("held-out loss, before -> after", f"{before:.4f} -> {after:.4f}"))
    curve = f"![training and held-out loss]({CURVES})" if (directory / CURVES).is_file() else ""
    return section("How it went", curve, table(["nats per token", ""], rows))


def _data(facts: AdapterFacts) -> str:
    data = _mapping(facts.made, "data")
    tokenized = _mapping(data, "tokenized")
    rows = [
        (
            "trained on" if key == "train" else "held out",
            _data_name(used),
            used.get("format", ""),
            f"{used.get('rows', 0):,}",
            code(used.get("rows_sha256", "")),
        )
        for key in ("train", "held_out")
        if (used := _mapping(data, key))
    ]
    tokens = ""
    if tokenized:
        all_, trained = tokenized.get("tokens", 0), tokenized.get("trained_tokens", 0)
        tokens = f"{all_:,} tokens, {trained:,} of them with a loss."
    return section("Data", table(["", "data", "format", "rows", "sha256 of the rows"], rows, frozenset({3})), tokens)


def _base(facts: AdapterFacts, name: str) -> str:
    if facts.pin is None:
        return section("Its base", "The adapter is not pinned: it records the base's name, not what is in it.")
    pin, recipe = facts.pin, _mapping(facts.made, "base_recipe")
    rows: list[tuple[str, object]] = [
        ("base", content.place(pin.repo_id, pin.revision) if pin.repo_id else code(facts.base_name)),
        ("fingerprint of its tensors", code(pin.fingerprint)),
    ]
    if recipe:
        scales = ", double quantization" if recipe.get("double_quant") else ""
        rows.append(("quantized to", f"{recipe.get('quant_type')}, blocksize {recipe.get('blocksize')}{scales}"))
    if facts.made.get("base_source"):
        rows.append(("made from", code(facts.made["base_source"])))
    return section(
        "Its base",
        "The adapter corrects the rounding of the 4-bit base that it was trained on. That base alone, by its "
        "fingerprint, is the right one:",
        table(["", ""], rows),
        snippets.shell(f"qlf verify {name}" if pins.home(pin) else f"qlf verify {name} --base {facts.base_name}"),
    )


def _options(directory: Path, facts: AdapterFacts) -> str:
    options = _mapping(facts.made, "options")
    rows = [
        (key, Path(str(value)).name if key in _PATHS else value)
        for key, value in options.items()
        if value not in (None, [], False)
    ]
    replay = f"`{OPTIONS}` replays the run." if (directory / OPTIONS).is_file() else ""
    return section("Options", replay, table(["option", "value"], rows)) if rows else ""


def _versions(facts: AdapterFacts) -> str:
    versions = _mapping(facts.made, "versions")
    found = versions or {"peft": facts.config.get("peft_version") or content.version("peft")}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def _datasets(facts: AdapterFacts) -> list[str] | None:
    repo_id = _mapping(_mapping(facts.made, "data"), "train").get("repo_id")
    return [repo_id] if isinstance(repo_id, str) else None


def _tags(facts: AdapterFacts) -> list[str]:
    kind = str(facts.config.get("peft_type", "")).lower()
    quantized = ["qlora", "nf4"] if facts.pin is not None else []
    return [*([kind] if kind else []), *quantized, "qlformat"]


def _results(facts: AdapterFacts, title: str) -> dict[str, Any]:
    """The held-out loss as a result that the Hub shows."""
    loss = _mapping(facts.made, "result").get("eval_loss")
    held_out = _mapping(_mapping(facts.made, "data"), "held_out")
    if not isinstance(loss, float) or not held_out:
        return {}
    from huggingface_hub import EvalResult

    name = _data_name(held_out)
    result = EvalResult(
        task_type="text-generation",
        dataset_type=held_out.get("repo_id") or name,
        dataset_name=name,
        dataset_split=held_out.get("split"),
        dataset_revision=held_out.get("revision"),
        metric_type="loss",
        metric_value=float(f"{loss:.6g}"),
        metric_name="held-out loss (nats per token)",
    )
    return {"model_name": title, "eval_results": [result]}


def _data_name(used: Mapping[str, Any]) -> str:
    return str(used.get("repo_id") or Path(str(used.get("name", ""))).name or "data")


def _mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = parent.get(key)
    return found if isinstance(found, dict) else {}
