"""Which tensors of a source checkpoint are quantized, decided from config.json and tensor names and shapes alone.

The choice is the one transformers and bitsandbytes make for the same model (load_in_4bit): modules that are exactly
`nn.Linear`, and GPT-2's `Conv1D`; never the output embedding, tied weights or modules kept in float32. What is known
about the model is in `architectures.py`.

`skip_modules` holds names in the model; decisions are keyed by the names on disk.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlformat.architectures import QUANTIZED, Model, entry_pattern

WITHOUT_MATRIX = frozenset({"scalar", "empty"})
"""Reasons of tensors that no layer can have as its weight."""

UNPACKS_EXPERTS = (
    "transformers replaces the fused experts of this model by one linear layer each when it loads a 4-bit checkpoint, "
    "so it cannot load those that stay fused: use a source that stores its experts one by one"
)
"""Note on a checkpoint that transformers 5.23 cannot load; `qlf export` and other readers of the tensors can."""


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor.

    `name` is its name on disk. `reason` is a stable key: linear, conv1d (quantized); output-embedding, tied,
    last-parameter, keep-in-fp32, skip-pattern, merged-on-load, unloadable-name, fused-experts, embedding, router,
    not-linear, norm, bias, not-2d, not-in-model, scalar, empty (left as they are).
    """

    name: str
    quantize: bool
    transpose: bool
    reason: str


@dataclass(frozen=True)
class Selection:
    """The decisions for one checkpoint.

    `skip_modules` is the value of `quantization_config.llm_int8_skip_modules`: names in the model, sorted; read by
    transformers, vLLM and peft. `known_architecture` is False where only the rules by name could be applied.
    """

    decisions: Mapping[str, Decision]
    skip_modules: list[str]
    known_architecture: bool
    notes: list[str]


def select(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], skip: Sequence[str] = ()) -> Selection:
    """Decide for every tensor of a checkpoint whether it is quantized.

    config: the source's config.json. shapes: tensor name on disk -> shape. skip: globs (fnmatch) of tensors to leave
    alone, tried on the tensor's name, on it without `.weight`, and on its module's name in the model.
    """
    model = Model(config)
    loader = model.loader(shapes)
    globs = {glob: re.compile(fnmatch.translate(glob)) for glob in skip}
    unused = set(globs)
    decisions: dict[str, Decision] = {}
    quantized: list[str] = []
    left: set[str] = set()
    for name, shape in shapes.items():
        loaded, parts = loader.load(name)
        module = loaded.removesuffix(".weight")
        reason = _structural_reason(loaded, parts, shape) or model.reason(module, shape)
        aliases = (name, name.removesuffix(".weight"), module)
        hits = {glob for glob, regex in globs.items() if any(regex.match(alias) for alias in aliases)}
        unused -= hits
        if hits and reason in {*QUANTIZED, *WITHOUT_MATRIX}:
            reason = "skip-pattern"
        decisions[name] = Decision(name, reason in QUANTIZED, reason == "conv1d", reason)
        if reason in QUANTIZED:
            quantized.append(module)
        else:
            left.update(model.linear_modules(loaded, parts, shape, reason))
    notes = model.notes + [f"skip pattern {glob!r} matched no tensor" for glob in skip if glob in unused]
    if model.unpacks_experts and any(decision.reason == "fused-experts" for decision in decisions.values()):
        notes.append(UNPACKS_EXPERTS)
    if not quantized:
        notes.append("no tensor is quantized: this model has no plain linear layer, or all were left out")
    return Selection(decisions, _skip_entries(model.skip, left, quantized), model.known, notes)


def is_conv1d(config: Mapping[str, Any], name: str) -> bool:
    """Whether the tensor `name` (on disk, of a model with this config.json) is the weight of a `Conv1D`.

    The source stores it [in, out]; a 4-bit checkpoint stores it [out, in], so an export transposes it back.
    """
    model = Model(config)
    if not model.has_conv1d or not name.endswith(".weight"):
        return False
    loaded, _ = model.loader((name,)).load(name)
    return model.reason(loaded.removesuffix(".weight"), (1, 1)) == "conv1d"


def _structural_reason(loaded: str, parts: Sequence[str], shape: tuple[int, ...]) -> str | None:
    """The reason why a tensor cannot be quantized whatever its module is, or None."""
    if not shape:
        return "scalar"
    if 0 in shape:
        return "empty"
    if loaded.endswith("bias"):
        return "bias"
    if len(shape) == 1:
        return "norm" if re.search(r"norm|(?:^|[._])ln", loaded, re.IGNORECASE) else "not-2d"
    if parts:
        return "merged-on-load" if parts[0].endswith(".weight") else "fused-experts"
    if len(shape) == 2 and loaded.endswith(".weight"):
        return None
    if "experts" in loaded:
        return "fused-experts"
    return "not-linear" if len(shape) == 2 else "not-2d"


def _skip_entries(fixed: Sequence[str], left: Iterable[str], quantized: Sequence[str]) -> list[str]:
    """Entries for skip_modules that hit every module in `left` and none in `quantized`.

    `fixed` are always listed. An entry that would hit a quantized module as well becomes an anchored, escaped
    expression.
    """
    covered = [entry_pattern(entry) for entry in fixed]
    names = {name for name in left if not any(regex.match(name) for regex in covered)}
    lines = "\n" + "\n".join(quantized) + "\n"
    # One search in one string per name: a list of thousands of modules stays cheap.
    unsafe = {n for n in names if f"{n}\n" in lines or f"\n{n}." in lines or not re.fullmatch(r"[\w.-]+", n)}
    return sorted({*fixed, *(f"^{re.escape(name)}$" if name in unsafe else name for name in names)})
