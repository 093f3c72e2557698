"""What transformers does with a model that a config.json describes: its names, its rules, its linear layers.

Rules that follow from a module's name are in this file; what differs per architecture is in `data/architectures.json`,
made by `tools/make_architectures.py` and compared with transformers in the interop tests. Neither torch nor
transformers is imported.

Two name spaces are kept apart: names on disk, and names in the model. transformers renames many checkpoints while it
loads them, and `Loader` does the same.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_TABLE = Path(__file__).parent / "data" / "architectures.json"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

# Last name component of modules that are embeddings. `patch_embed*` is left out: a patch embedding is a Linear or a
# convolution. What these rules get wrong for an architecture is corrected in its table entry.
_EMBEDDING = re.compile(
    r"(?:(?!patch_)\w+_)?(?:embed|embeds|embedding|embeddings|embedder|emb)"
    r"(?:_(?:tokens?|positions?|in|table|global|per_layer|tokens_per_layer))?|wte|wpe|shared|relative_attention_bias"
)
# Routers of mixtures of experts are plain parameters in transformers 5, and too small to matter.
_ROUTER = re.compile(r"gate|router")
# Output layers of models that no table entry describes.
_HEAD = re.compile(r"lm_head|embed_out|lm_loss|output_projection|score|classifier|qa_outputs")
_TOP_LEVEL_HEAD = re.compile(r"output|head|proj_out|out_proj|decoder")
# Multi-token prediction heads, which transformers leaves out of the model.
_UNUSED = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")
_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")

# transformers looks for `weight` and its companions in the whole name, and stops at the first.
_UNLOADABLE = re.compile(r"weight(?!\w)")

QUANTIZED = frozenset({"linear", "conv1d"})
# Reasons under which a module may still be an nn.Linear in the model, so that it has to be named in skip_modules.
_STAYS_LINEAR = frozenset(
    {"output-embedding", "tied", "last-parameter", "keep-in-fp32", "skip-pattern", "unloadable-name"}
)
_NEVER_LINEAR = frozenset(
    {"embedding", "not-linear", "not-2d", "not-in-model", "fused-experts", "norm", "bias", "scalar"}
)


def rule_by_name(module: str) -> str:
    """What the last component of a module's name says of its 2-D weight: "embedding", "router" or "linear"."""
    leaf = module.rpartition(".")[2]
    if _EMBEDDING.fullmatch(leaf):
        return "embedding"
    return "router" if _ROUTER.fullmatch(leaf) else "linear"


def entry_pattern(entry: str) -> re.Pattern[str]:
    """The modules an entry of skip_modules hits: an expression at the start, up to a dot, or a plain suffix."""
    return re.compile(rf"{entry}(?:\.|$)|.*{re.escape(entry)}$")


@dataclass(frozen=True)
class Transform:
    """One step of transformers' renaming on load: the first branch that matches replaces its text by its target.

    `prefixes`: the part of a name before which the step does not look; the first one that fits is taken.
    `targets` is empty for a rename; for a merge it holds every tensor the sources end up in, and the replacement is
    the first of them.
    """

    branches: tuple[tuple[re.Pattern[str], str], ...]
    targets: tuple[str, ...]
    prefixes: tuple[str, ...]
    guarded: bool

    def apply(self, name: str) -> str | None:
        """The new name, or None where no branch matches."""
        prefix = next((p for p in self.prefixes if name.startswith(p)), None)
        if prefix is None:
            return None
        rest = name[len(prefix) :]
        for regex, target in self.branches:
            found = regex.search(rest)
            if found is not None:
                text = target.replace(r"\1", found.group(1)) if r"\1" in target else target
                return prefix + rest.replace(found.group(0), text, 1)
        return None


class Loader:
    """Maps names on disk to names in the model, as transformers does while it loads."""

    def __init__(self, steps: Sequence[Transform], base: str, roots: frozenset[str], names: Iterable[str]) -> None:
        # A guarded group of renames shifts names (norm0 -> norm1 -> norm2): only where the first is present.
        present = [s for s in steps if not s.guarded or any(s.branches[0][0].search(name) for name in names)]
        self._renames = [step for step in present if not step.targets]
        self._merges = [step for step in present if step.targets]
        self._base, self._roots = base, roots

    def load(self, name: str) -> tuple[str, list[str]]:
        """(name in the model, every tensor it becomes a part of or [] where it is only renamed)."""
        for step in self._renames:
            name = step.apply(name) or name
        for step in self._merges:
            merged = step.apply(name)
            if merged is not None:
                first = step.targets[0]
                return self._rooted(merged), [self._rooted(merged.replace(first, t)) for t in step.targets]
        return self._rooted(name), []

    def _rooted(self, name: str) -> str:
        """A checkpoint of the bare model lacks the prefix that the model with a head gives it."""
        return name if not self._base or name.partition(".")[0] in self._roots else f"{self._base}.{name}"


@dataclass(frozen=True)
class Rules:
    """One table entry: what an architecture does differently from the rules by name.

    skip: entry of skip_modules -> reason; keep: glob -> reason; linear, conv1d: globs of modules that are quantized;
    load: (conversion, scope or None) in the order transformers applies them; parts: key in config.json -> (model
    type this entry was made with, its module); unpacks_experts: transformers replaces fused experts by linear layers
    before it loads a 4-bit checkpoint.
    """

    skip: Mapping[str, str]
    keep: Mapping[str, str]
    linear: tuple[str, ...]
    conv1d: tuple[str, ...]
    load: tuple[tuple[str, str | None], ...]
    base: str
    roots: frozenset[str]
    parts: Mapping[str, tuple[str, str]]
    unpacks_experts: bool

    @classmethod
    def of(cls, model_type: str, class_name: str) -> Rules:
        """The entry of a class; the defaults where it needs none."""
        rules = _table()["rules"]
        return cls._read(rules.get(f"{model_type}/{class_name}") or rules.get(class_name) or {})

    @classmethod
    def of_part(cls, model_type: str) -> Rules | None:
        """The rules for a model of this type inside another: as a model of its own, or as part of one in the table."""
        classes = _table()["types"].get(model_type)
        if classes:
            rules = cls.of(model_type, classes[0])
            return replace(rules, skip={}, load=tuple(step for step in rules.load if step[1] is None))
        for entry in _table()["rules"].values():
            for kind, module in entry.get("parts", {}).values():
                if kind == model_type:
                    rules = cls._read(entry)
                    return replace(rules, skip={}, load=tuple(step for step in rules.load if step[1] == module))
        return None

    @classmethod
    def _read(cls, entry: Mapping[str, Any]) -> Rules:
        base = entry.get("base", "model")
        return cls(
            entry.get("skip", {"lm_head": "output-embedding"}),
            entry.get("keep", {}),
            tuple(entry.get("linear", ())),
            tuple(entry.get("conv1d", ())),
            tuple((group, scope) for group, scope in entry.get("load", ())),
            base,
            frozenset(entry.get("roots", (base, "lm_head"))),
            {key: (kind, module) for key, (kind, module) in entry.get("parts", {}).items()},
            entry.get("unpacks_experts", False),
        )

    def patterns(self, skip: Iterable[str]) -> list[tuple[re.Pattern[str], str]]:
        """(expression on a module's name with its numbers written `*`, reason), first match wins."""
        ends = [(glob, "linear") for glob in self.linear] + [(glob, "conv1d") for glob in self.conv1d]
        ends += self.keep.items()
        found = [(_glob(glob), reason) for glob, reason in ends]
        return found + [(entry_pattern(entry), reason) for entry, reason in self.skip.items() if entry in skip]


class Model:
    """What is known about the model that a config.json describes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        model_type = str(config.get("model_type"))
        classes = _table()["types"].get(model_type, [])
        names = config.get("architectures")
        wanted = str(names[0]) if isinstance(names, list) and names else None
        self.known = bool(classes) and wanted in (None, *classes)
        self.notes: list[str] = []
        wrapped = [] if classes else _wrapped_parts(config)
        if not classes:
            how = " and by the types of its two parts" if wrapped else " alone"
            self.notes.append(f"model type {model_type!r} is unknown: tensors were chosen by their names{how}")
        elif not self.known:
            self.notes.append(f"class {wanted!r} of model type {model_type!r} is unknown: treated like {classes[0]}")
        default = wanted if wanted in classes else next(iter(classes), "")
        rules = Rules.of(model_type, str(default))
        others = self._other_parts(config, rules) + wrapped
        tied = config.get("tie_word_embeddings") is not False
        self.skip = [entry for entry, reason in rules.skip.items() if tied or reason != "tied"]
        self.skip += [entry for _, other in wrapped for entry in other.skip]
        self._base = rules.base if self.known else ""
        self._roots = rules.roots
        self._load = [step for step in rules.load if not any(_inside(step[1], scope) for scope, _ in others)]
        self._load += [(group, scope) for scope, other in others for group, _ in other.load]
        part = config.get("text_config")
        text = part if isinstance(part, dict) else config
        self._vocab, self._layers = text.get("vocab_size"), text.get("num_hidden_layers")
        self._patterns = rules.patterns(self.skip)
        self._patterns += [pattern for _, other in others for pattern in other.patterns(self.skip)]
        self.unpacks_experts = rules.unpacks_experts
        self.has_conv1d = any(reason == "conv1d" for _, reason in self._patterns)
        self._cache: dict[tuple[str, bool], str] = {}

    def _other_parts(self, config: Mapping[str, Any], rules: Rules) -> list[tuple[str, Rules]]:
        """(module, rules) of the sub-models whose type is not the one the table entry was made with."""
        found = []
        for key, (usual, module) in rules.parts.items():
            part = config.get(key)
            kind = str(part.get("model_type", usual)) if isinstance(part, dict) else usual
            if kind != usual:
                other = Rules.of_part(kind)
                found.append((module, other or Rules.of("", "")))
                if other is None:
                    self.known = False
                    self.notes.append(f"{key} of type {kind!r} is unknown: its tensors were chosen by name alone")
        return found

    def loader(self, names: Iterable[str]) -> Loader:
        """The renaming on load for a checkpoint with these tensors."""
        steps = [step for group, scope in self._load for step in _transforms(group, scope, self._base)]
        return Loader(steps, self._base, self._roots, names)

    def reason(self, module: str, shape: tuple[int, ...]) -> str:
        """The reason for a 2-D weight of `module`, a name in the model: "linear" or "conv1d" if it is quantized."""
        layer = _LAYER.match(module)
        beyond = layer is not None and isinstance(self._layers, int) and int(layer[1]) >= self._layers
        if self.known and (beyond or _UNUSED.search(module)):
            return "not-in-model"
        if _UNLOADABLE.search(module):
            return "unloadable-name"
        key = (_NUMBER.sub("*", module), shape[0] == self._vocab)
        if key not in self._cache:
            self._cache[key] = self._reason(*key)
        return self._cache[key]

    def _reason(self, module: str, vocabulary: bool) -> str:
        for regex, reason in self._patterns:
            if regex.match(module):
                return reason
        reason = rule_by_name(module)
        if self.known or reason != "linear":
            return reason
        head = vocabulary or _HEAD.fullmatch(module.rpartition(".")[2]) or _TOP_LEVEL_HEAD.fullmatch(module)
        return "output-embedding" if head else "linear"

    def linear_modules(self, loaded: str, parts: Sequence[str], shape: tuple[int, ...], reason: str) -> set[str]:
        """The modules that get the tensor `loaded`, which stays as it is, and that are or may be an nn.Linear."""
        weights = [name for name in parts or (loaded,) if name.endswith(".weight")]
        modules = {name.removesuffix(".weight") for name in weights} if reason not in _NEVER_LINEAR else set()
        if reason in _STAYS_LINEAR or not self.known:
            return modules
        return {module for module in modules if self.reason(module, (1, 1)) in QUANTIZED}


def _wrapped_parts(config: Mapping[str, Any]) -> list[tuple[str, Rules]]:
    """(module, rules) of the models that a wrapper of any two, such as encoder-decoder, is made of."""
    found = []
    for module in ("encoder", "decoder"):
        part = config.get(module)
        kind = str(part.get("model_type")) if isinstance(part, dict) else ""
        for class_name in _table()["types"].get(kind, ())[:1]:
            rules = Rules.of(kind, class_name)
            found.append((module, replace(rules, load=tuple(step for step in rules.load if step[1] is None))))
    return found


@functools.cache
def _table() -> dict[str, Any]:
    """data/architectures.json."""
    table: dict[str, Any] = json.loads(_TABLE.read_bytes())
    return table


@functools.cache
def _transforms(group: str, scope: str | None, base: str) -> tuple[Transform, ...]:
    """The conversion `group` of the table, looking only below the module `scope` where one is given."""
    if scope is None:
        prefixes: tuple[str, ...] = ("",)
    else:
        inner = f"{scope}." if scope else ""
        prefixes = (f"{base}.{inner}" if base else inner, inner)
    found = []
    for step in _table()["conversions"][group]:
        shift = isinstance(step, dict) and "shift" in step
        into = [] if shift or isinstance(step, list) else step["into"]
        pairs = [[source, into[0]] for source in step["from"]] if into else step["shift"] if shift else [step]
        branches = tuple((re.compile(source), target) for source, target in pairs)
        found.append(Transform(branches, tuple(into), prefixes, shift))
    return tuple(found)


def _glob(glob: str) -> re.Pattern[str]:
    """A glob on the end of a dotted name."""
    return re.compile(r"(?:.*\.)?" + re.escape(glob).replace(r"\*", ".*") + "$")


def _inside(scope: str | None, module: str) -> bool:
    return scope is not None and f"{scope}.".startswith(f"{module}.")
