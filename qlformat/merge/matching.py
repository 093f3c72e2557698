"""Find for every tensor of an adapter the one weight of the base that it changes, or say which have none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlformat.architectures import Model
from qlformat.errors import QlfError, shown
from qlformat.merge.adapter_files import AdapterFiles
from qlformat.merge.base import Base, BaseWeight, sizes
from qlformat.merge.changes import BiasDelta, Change, LowRank, Replaced, Tokens
from qlformat.selection import is_conv1d, select

_PREFIX = "base_model.model."
_PARTS = (
    (re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight"), ""),
    (re.compile(r"(.+)\.lora_B(?:\.default)?\.(bias)"), ""),
    (re.compile(r"(.+)\.lora_(embedding_A|embedding_B)(?:\.default)?"), ""),
    (re.compile(r"(.+)\.lora_(magnitude)_vector(?:\.default)?(?:\.weight)?"), ""),
    (re.compile(r"(.+)\.token_adapter\.trainable_(tokens)_delta(?:\.default)?"), ""),
)
_SAVED = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?(?:\.base_layer)?\.(weight|bias)")
_SHOWN = 6


@dataclass
class Matched:
    """The changes of all adapters.

    Attributes:
        changes: weight -> what happens to it, in the order of the adapters.
        applied: adapter -> number of its tensors.
        idle: adapter -> modules whose delta is zero.
        notes: what the user should hear.
    """

    changes: dict[str, list[Change]] = field(default_factory=dict)
    applied: list[int] = field(default_factory=list)
    idle: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def match(base: Base, adapters: Sequence[AdapterFiles]) -> Matched:
    """Give every tensor of every adapter its place.

    Raises:
        QlfError: tensors without a weight in the base, of another shape, or without their other half; modules that
            the configuration names and the file lacks; two adapters that replace the same weight.
    """
    finder = _Finder(base)
    found = Matched()
    for position, adapter in enumerate(adapters):
        _Match(finder, adapter, position, found).run()
    _check_conflicts(found, adapters)
    _untie(finder, found)
    return found


class _Finder:
    """The names that weights of the base have in the model."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._loader = Model(base.config).loader(base.weights)
        self._in_model: dict[str, str] = {}
        self.merged: set[str] = set()
        for name in base.weights:
            loaded, parts = self._loader.load(name)
            if parts:
                self.merged.update(parts)
            else:
                self._in_model[loaded] = name

    def find(self, name: str) -> BaseWeight | None:
        """The weight that `name`, of this or of an older transformers, is stored as."""
        for candidate in (name, self._loader.load(name)[0]):
            stored = self._in_model.get(candidate) or (candidate if candidate in self.base.weights else None)
            if stored is not None:
                return self.base.weights[stored]
        return None

    def model_name(self, name: str) -> str:
        """Name in the model of a weight on disk."""
        return self._loader.load(name)[0]

    def modules(self) -> Iterator[tuple[str, BaseWeight]]:
        """(name in the model, weight) of all matrices."""
        for loaded, stored in self._in_model.items():
            weight = self.base.weights[stored]
            if loaded.endswith(".weight") and len(weight.shape) == 2:
                yield loaded.removesuffix(".weight"), weight


class _Match:
    """One adapter and the base."""

    def __init__(self, finder: _Finder, adapter: AdapterFiles, position: int, found: Matched) -> None:
        self._finder, self._adapter, self._position, self._found = finder, adapter, position, found
        self._problems: list[str] = []
        self._used: dict[str, int] = dict.fromkeys(adapter.tensors, 0)
        self._idle: list[str] = []
        self._changed: set[str] = set()

    def run(self) -> None:
        groups: dict[str, dict[str, str]] = {}
        saved: dict[str, str] = {}
        for name in self._adapter.tensors:
            plain = name.removeprefix(_PREFIX)
            for pattern, _ in _PARTS:
                if hit := pattern.fullmatch(plain):
                    parts = groups.setdefault(hit[1].removesuffix(".base_layer"), {})
                    if hit[2] in parts:
                        self._problems.append(f"{name} (a second tensor of this kind for {hit[1]})")
                    parts[hit[2]] = name
                    break
            else:
                saved[plain] = name
        for plain, name in saved.items():
            self._replacement(plain, name)
        for module, parts in groups.items():
            self._module(module, parts)
        self._missing(set(groups))
        unused = [name for name, count in self._used.items() if count != 1]
        listed = {problem.partition(" ")[0] for problem in self._problems}
        self._problems += [f"{name} (not applied)" for name in unused if name not in listed]
        if self._problems:
            raise QlfError(self._message())
        self._found.applied.append(len(self._used))
        self._found.idle.append(self._idle)

    def _message(self) -> str:
        count = len(self._problems)
        more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
        return (
            f"the adapter {self._adapter.name} does not fit this base: {'; '.join(self._problems[:_SHOWN])}{more}; "
            "give the base it was trained on"
        )

    def _add(self, weight: BaseWeight, change: Change, *names: str) -> None:
        self._found.changes.setdefault(weight.name, []).append(change)
        self._changed.add(weight.name)
        for name in names:
            self._used[name] += 1

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._adapter.tensors[name].shape

    def _replacement(self, plain: str, name: str) -> None:
        hit = _SAVED.fullmatch(plain)
        stored = f"{hit[1]}.{hit[2]}" if hit else plain
        weight = self._finder.find(stored)
        if weight is None and stored == "lm_head.weight":
            weight = self._tied_head(stored)
        if weight is None:
            self._problems.append(f"{name} (no such weight in the base)")
        elif self._shape(name) != weight.shape:
            self._problems.append(f"{name} (shape {list(self._shape(name))}, the base has {list(weight.shape)})")
        else:
            self._plain_weight("a weight that replaces the base's", name)
            self._add(weight, Replaced(self._position, name), name)

    def _plain_weight(self, what: str, name: str) -> None:
        if self._adapter.weight != 1:
            raise QlfError(
                f"the adapter {self._adapter.name} holds {what}, which cannot be weighted by {self._adapter.weight:g}; "
                "use weight 1",
                tensor=name,
            )

    def _module(self, module: str, parts: dict[str, str]) -> None:
        if "tokens" in parts:
            self._tokens(module, parts.pop("tokens"))
        if not parts:
            return
        pair = ("embedding_A", "embedding_B") if "embedding_A" in parts or "embedding_B" in parts else ("A", "B")
        missing = [part for part in pair if part not in parts]
        if missing:
            names = ", ".join(parts.values())
            self._problems.append(f"{names} (lora_{missing[0]} of this module is missing)")
            return
        weight = self._finder.find(f"{module}.weight")
        if weight is None and module == "lm_head":
            weight = self._tied_head("lm_head.weight")
        if weight is None:
            kind = "assembled from several while loading" if f"{module}.weight" in self._finder.merged else "not in it"
            self._problems.append(f"{parts[pair[0]]} (weight {module}.weight is {kind})")
            return
        self._low_rank(module, parts, pair, weight)

    def _low_rank(self, module: str, parts: dict[str, str], pair: tuple[str, str], weight: BaseWeight) -> None:
        a, b = parts[pair[0]], parts[pair[1]]
        turned = pair[0] == "embedding_A" or is_conv1d(self._finder.base.config, weight.name)
        left, right = self._shape(b), self._shape(a)
        if len(left) != 2 or len(right) != 2:
            self._problems.append(f"{a} (shape {list(right)}: only matrices can be merged)")
            return
        if left[1] != right[0] or (left[0], right[1]) != (weight.shape[::-1] if turned else weight.shape):
            self._problems.append(
                f"{a} and lora_B (shapes {list(right)} and {list(left)}, the base's weight has {list(weight.shape)})"
            )
            return
        scale = self._adapter.rank(module, right[0]) * self._adapter.weight
        magnitude = parts.get("magnitude")
        if magnitude is not None:
            self._magnitude(magnitude, left[0])
        elif self._adapter.config.get("use_dora"):
            self._problems.append(f"{a} (use_dora is set and its lora_magnitude_vector is missing)")
            return
        change = LowRank(
            self._position,
            a if turned else b,
            b if turned else a,
            turned,
            right[0],
            scale,
            magnitude,
            0 if turned else 1,
        )
        self._add(weight, change, *([a, b] if magnitude is None else [a, b, magnitude]))
        if magnitude is None and not (self._adapter.read(b).any() and self._adapter.read(a).any()):
            self._idle.append(module)
        if "bias" in parts:
            self._bias(module, parts["bias"], scale)

    def _magnitude(self, name: str, outputs: int) -> None:
        self._plain_weight("DoRA's magnitudes", name)
        if int(np.prod(self._shape(name))) != outputs:
            self._problems.append(f"{name} (shape {list(self._shape(name))}, needed {outputs} values)")

    def _bias(self, module: str, name: str, scale: float) -> None:
        weight = self._finder.find(f"{module}.bias")
        if weight is None or weight.shape != self._shape(name):
            self._problems.append(f"{name} (the base has no bias of this shape for {module})")
        else:
            self._add(weight, BiasDelta(self._position, name, scale), name)

    def _tokens(self, module: str, name: str) -> None:
        weight = self._finder.find(f"{module}.weight")
        indices = _token_indices(self._adapter.config, module)
        shape = self._shape(name)
        if weight is None or len(weight.shape) != 2:
            self._problems.append(f"{name} (no such embedding in the base)")
        elif indices is None or len(set(indices)) != len(indices) or shape != (len(indices), weight.shape[1]):
            self._problems.append(f"{name} (shape {list(shape)} does not fit trainable_token_indices)")
        elif any(not 0 <= index < weight.shape[0] for index in indices):
            self._problems.append(f"{name} (a token index is beyond the vocabulary of {weight.shape[0]})")
        else:
            self._plain_weight("trained tokens, which replace the base's", name)
            self._add(weight, Tokens(self._position, name, tuple(indices)), name)

    def _tied_head(self, name: str) -> BaseWeight | None:
        """The output embedding of a model that ties it, given a weight of its own."""
        embedding = tied_embedding(self._finder.base)
        if embedding is None:
            return None
        self._finder.base.untie(name, embedding)
        self._found.notes.append(_untied_note(name))
        return self._finder.base.weights[name]

    def _missing(self, adapted: set[str]) -> None:
        """Modules that the configuration targets and the file does not have."""
        config = self._adapter.config
        targets = config.get("target_modules")
        narrowed = any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
        if narrowed or not isinstance(targets, list) or not adapted:
            return
        names = {self._finder.model_name(f"{module}.weight").removesuffix(".weight") for module in adapted} | adapted
        for module, weight in self._finder.modules():
            hit = any(module == target or module.endswith(f".{target}") for target in targets)
            if hit and module not in names and weight.name not in self._changed:
                self._problems.append(f"{module} (a target module, and the adapter has no tensors for it)")


def tied_embedding(base: Base) -> str | None:
    """The stored weight that serves as input and output embedding, or None when they are two."""
    if base.config.get("tie_word_embeddings") is False or "lm_head.weight" in base.weights:
        return None
    decisions = select(base.config, sizes(base.weights)).decisions
    vocabulary = base.config.get("vocab_size")
    found = [name for name, decision in decisions.items() if decision.reason in ("embedding", "tied")]
    found = [name for name in found if base.weights[name].shape[:1] == (vocabulary,)]
    return found[0] if len(found) == 1 else None


def _untie(finder: _Finder, found: Matched) -> None:
    """Keep the output embedding as it was where the input embedding of a tied pair changes, as in training."""
    embedding = tied_embedding(finder.base)
    if embedding is None:
        return
    changes = found.changes.get(embedding, [])
    if not any(isinstance(change, LowRank | Replaced) for change in changes):
        return
    if any(isinstance(change, Tokens) for change in changes):
        raise QlfError(
            "the adapters train single tokens and the whole of an embedding that the model uses twice; merge them one "
            "after the other",
            tensor=embedding,
        )
    finder.base.untie("lm_head.weight", embedding)
    found.notes.append(_untied_note("lm_head.weight"))


def _untied_note(head: str) -> str:
    return (
        f"the base ties its input and output embedding and the adapter changes one of them: {head} is stored on its "
        "own and tie_word_embeddings is false, as in training"
    )


def _token_indices(config: Mapping[str, Any], module: str) -> Sequence[int] | None:
    value = config.get("trainable_token_indices")
    if isinstance(value, dict):
        hits = [found for key, found in value.items() if module == key or module.endswith(f".{key}")]
        value = hits[0] if len(hits) == 1 else None
    fits = isinstance(value, list) and all(type(index) is int for index in value)
    return value if fits else None


def _check_conflicts(found: Matched, adapters: Sequence[AdapterFiles]) -> None:
    for name, changes in found.changes.items():
        owners = [change.adapter for change in changes if isinstance(change, Replaced)]
        taken: set[int] = set()
        for change in changes:
            if isinstance(change, Tokens):
                both = sorted(taken & set(change.indices))
                if both:
                    raise QlfError(f"two adapters train the tokens {shown(both)}; merge one of them", tensor=name)
                taken |= set(change.indices)
        if len(owners) > 1:
            names = " and ".join(adapters[owner].name for owner in owners)
            raise QlfError(f"{names} both replace this weight; merge one of them", tensor=name)
        if len({type(change) for change in changes if isinstance(change, Replaced | Tokens)}) > 1:
            raise QlfError("one adapter replaces this weight and another trains tokens of it", tensor=name)
