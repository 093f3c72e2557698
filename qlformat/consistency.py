"""Rules between the files of a checkpoint, checked from headers and JSON alone: R6, C2 to C4, M4, M8, P1 to P3."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from qlformat import manifest, repository
from qlformat.errors import FormatError
from qlformat.layout import QUANT_STATE_PREFIX, QuantState, split_companion, strict_json
from qlformat.shards import ALIGNMENT
from qlformat.stored import CONFIG_NAME, StoredCheckpoint
from qlformat.weights import Report, Severity, Weight

_ANCHORED = re.compile(r"\^(?P<name>(?:\\[^A-Za-z0-9]|[^\\^$.*+?()|{}\[\]])*)\$", re.DOTALL)
_PLAIN_ENTRY = re.compile(r"[\w.-]*")


def check_consistency(checkpoint: StoredCheckpoint, report: Report) -> None:
    """Report what breaks R6, C2 to C4, M1 (unknown keys), M4, M8 and P1 to P3."""
    _check_strays(checkpoint, report)
    declared = checkpoint.config.get("quantization_config")
    if isinstance(declared, dict):
        _check_config(checkpoint, declared, report)
    if checkpoint.manifest is not None:
        _check_keys(checkpoint, checkpoint.manifest, report)
        _check_tensor_list(checkpoint, checkpoint.manifest, report)
        _check_weight_list(checkpoint, checkpoint.manifest, report)
        _check_recipe(checkpoint, checkpoint.manifest, report)
    if checkpoint.has_manifest:
        _check_placement(checkpoint, report)


def quantized(checkpoint: StoredCheckpoint) -> Iterator[tuple[Weight, QuantState]]:
    """The sound quantized weights with their quant_state."""
    for weight in checkpoint.weights.values():
        if weight.quant_state is not None:
            yield weight, weight.quant_state


def _check_strays(checkpoint: StoredCheckpoint, report: Report) -> None:
    if checkpoint.weight_files is None:
        return
    for name in repository.stray_weights(checkpoint.path, checkpoint.weight_files.names):
        report(FormatError("this file belongs to no tensor of the checkpoint; move it elsewhere", rule="R6", file=name))


def _check_config(checkpoint: StoredCheckpoint, declared: dict[str, Any], report: Report) -> None:
    def bad(rule: str, message: str, severity: Severity = "error") -> None:
        report(FormatError(message, rule=rule, file=CONFIG_NAME), severity)

    for key, attribute in (("bnb_4bit_quant_type", "quant_type"), ("bnb_4bit_use_double_quant", "nested")):
        # What is absent means what transformers takes for it.
        said = declared.get(key, "fp4" if attribute == "quant_type" else False)
        others = [(w, value) for w, s in quantized(checkpoint) if (value := getattr(s, attribute)) != said]
        if others:
            weight, value = others[0]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            bad("C2", f"{key} is {said!r}, the tensors say {value!r} ({weight.name}{more})")
    storage = declared.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        bad("C2", f"bnb_4bit_quant_storage is {storage!r}, needed 'uint8', which is how the tensors are stored")
    _check_skip_modules(checkpoint, declared, bad)


def _check_skip_modules(checkpoint: StoredCheckpoint, declared: dict[str, Any], bad: Any) -> None:
    severity: Severity = "error" if checkpoint.has_manifest else "note"
    entries = declared.get("llm_int8_skip_modules")
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        bad("C3", f"llm_int8_skip_modules is {entries!r}, needed a list of module names", severity)
        entries = []
    leftover = sorted(key for key in declared if key.startswith("_load_in_"))
    if leftover:
        bad("C3", f"found {', '.join(leftover)}, which other readers refuse; needed load_in_4bit only", severity)
    modules = [weight.name.removesuffix(".weight") for weight, _ in quantized(checkpoint)]
    for entry in entries:
        exact = _ANCHORED.fullmatch(entry)
        if exact:
            literal = re.sub(r"\\(.)", r"\1", exact["name"])
            hit = next((module for module in modules if module == literal), None)
        elif _PLAIN_ENTRY.fullmatch(entry):
            start = entry + "."
            hit = next((m for m in modules if m.startswith(start) or m.endswith(entry)), None)
        else:  # an expression from a file that nobody vouches for is not run: it may never end
            bad("C4", f"the entry {entry[:100]!r} is a regular expression, which was not checked", "note")
            continue
        if hit is not None:
            bad("C4", f"llm_int8_skip_modules names {entry[:100]!r}, but {hit}.weight is quantized")


def _check_keys(checkpoint: StoredCheckpoint, parsed: manifest.Manifest, report: Report) -> None:
    """Rule M1: qlf.json says what its parsed form says, no more and no less. Rule M6: its own hash is right."""
    data = repository.read_file(checkpoint.path, manifest.FILE_NAME)
    found, needed = strict_json(data), json.loads(parsed.to_json())
    said, digest = found.pop("self_sha256"), manifest.self_sha256(data)
    if said != digest:
        message = f"its own sha256 is {digest}, it says {said}; fetch it again"
        report(FormatError(message, rule="M6", file=manifest.FILE_NAME))
    del needed["self_sha256"]
    difference = _difference("", found, needed)
    if difference:
        report(FormatError(difference, rule="M1", file=manifest.FILE_NAME))


def _difference(where: str, found: Any, needed: Any) -> str | None:
    """The first place where two JSON values differ, in words."""
    if found == needed:
        return None
    if isinstance(found, dict) and isinstance(needed, dict):
        for key in [*found, *needed]:
            place = f"{where}.{key}" if where else key
            if key not in needed:
                return f"found the unknown key {place[:200]!r}"
            if key not in found:
                return f"the key {place!r} is missing"
            deeper = _difference(place, found[key], needed[key])
            if deeper:
                return deeper
        return None
    if isinstance(found, list) and isinstance(needed, list) and len(found) == len(needed):
        pairs = enumerate(zip(found, needed, strict=True))
        return next((d for i, (f, n) in pairs if (d := _difference(f"{where}[{i}]", f, n))), None)
    return f"{where} is {str(found)[:80]}, needed {str(needed)[:80]}"


def _check_tensor_list(checkpoint: StoredCheckpoint, parsed: manifest.Manifest, report: Report) -> None:
    listed = {entry.name: entry for entry in parsed.tensors}
    if checkpoint.weight_files is None:
        message = f"none of the {len(listed)} tensors that it lists can be found"
        report(FormatError(message, rule="M4", file=manifest.FILE_NAME))
        return
    unreadable = set(checkpoint.weight_files.names) - checkpoint.shards.keys()
    for name, entry in listed.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            if entry.shard not in unreadable:
                report(FormatError("qlf.json lists it, no shard holds it", rule="M4", tensor=name, file=entry.shard))
            continue
        found = (stored.info.dtype, list(stored.info.shape), stored.shard)
        needed = (entry.dtype, list(entry.shape), entry.shard)
        if found != needed:
            message = "found {} {} in {}, qlf.json says {} {} in {}".format(*found, *needed)
            report(FormatError(message, rule="M4", tensor=name, file=stored.shard))
    for name, stored in checkpoint.tensors.items():
        if name not in listed:
            report(FormatError("qlf.json does not list it", rule="M4", tensor=name, file=stored.shard))


def _check_weight_list(checkpoint: StoredCheckpoint, parsed: manifest.Manifest, report: Report) -> None:
    """Rule M4 for the weights: encoding, dtype and logical shape agree with the tensors."""
    listed = {entry.name: entry for entry in parsed.weights}
    for name, weight in checkpoint.weights.items():
        entry = listed.get(name)
        encoding = weight.quant_state.quant_type if weight.quant_state else "none"
        if entry is None:
            problem = "qlf.json does not list this weight"
        elif (entry.encoding, entry.dtype, entry.shape) != (encoding, weight.dtype, weight.shape):
            said = f"{entry.encoding} {entry.dtype} {list(entry.shape)}"
            problem = f"found {encoding} {weight.dtype} {list(weight.shape)}, qlf.json says {said}"
        else:
            continue
        report(FormatError(problem, rule="M4", tensor=name, file=manifest.FILE_NAME))
    listed_tensors = {entry.name for entry in parsed.tensors}
    for name in listed:
        # A tensor of that name that is stored but not sound, or listed but not stored, has a finding of its own.
        if name not in checkpoint.tensors and name not in listed_tensors:
            report(FormatError("qlf.json lists a weight that no shard holds", rule="M4", tensor=name))


def _check_recipe(checkpoint: StoredCheckpoint, parsed: manifest.Manifest, report: Report) -> None:
    recipe = parsed.recipe
    needed = f"{recipe.quant_type}, blocksize {recipe.blocksize}, double quantization {recipe.double_quant}"
    for weight, state in quantized(checkpoint):
        if (state.quant_type, state.blocksize, state.nested) != (
            recipe.quant_type,
            recipe.blocksize,
            recipe.double_quant,
        ):
            found = f"{state.quant_type}, blocksize {state.blocksize}, double quantization {state.nested}"
            message = f"found {found}, the recipe in qlf.json says {needed}"
            report(FormatError(message, rule="M8", tensor=weight.name, file=checkpoint.tensors[weight.name].shard))
    declared = checkpoint.config.get("quantization_config")
    said = declared.get("bnb_4bit_compute_dtype") if isinstance(declared, dict) else None
    if said is not None and said != recipe.compute_dtype:
        message = f"the recipe says compute dtype {recipe.compute_dtype}, config.json says {said!r}"
        report(FormatError(message, rule="M8", file=manifest.FILE_NAME))


def _check_placement(checkpoint: StoredCheckpoint, report: Report) -> None:
    for weight, state in quantized(checkpoint):
        home = checkpoint.tensors[weight.name].shard
        elsewhere = [name for name in state.tensor_specs(weight.name) if checkpoint.tensors[name].shard != home]
        if elsewhere:
            message = f"its companion {elsewhere[0]!r} is in {checkpoint.tensors[elsewhere[0]].shard}"
            report(FormatError(message, rule="P1", tensor=weight.name, file=home))
    packed = {weight.name for weight, _ in quantized(checkpoint)}
    for shard, reader in checkpoint.shards.items():
        _check_alignment(shard, reader.header.data_start, packed, checkpoint, report)
        _check_order(shard, reader.header.tensors, report)


def _check_alignment(
    shard: str, data_start: int, packed: set[str], checkpoint: StoredCheckpoint, report: Report
) -> None:
    if data_start % ALIGNMENT:
        message = f"the data starts at byte {data_start}, needed a multiple of {ALIGNMENT}"
        report(FormatError(message, rule="P2", file=shard))
        return
    for info in checkpoint.shards[shard].header.tensors.values():
        if info.name in packed and info.nbytes % ALIGNMENT == 0 and info.begin % ALIGNMENT:
            message = f"starts at byte {info.begin} of the data, needed a multiple of {ALIGNMENT}"
            report(FormatError(message, rule="P2", tensor=info.name, file=shard))


def _check_order(shard: str, names: Iterable[str], report: Report) -> None:
    last_state = None
    for name in names:
        companion = split_companion(name)
        if companion and companion[1].startswith(QUANT_STATE_PREFIX):
            last_state = name
        elif last_state:
            message = f"comes after {last_state!r}, needed all quant_states last"
            report(FormatError(message, rule="P3", tensor=name, file=shard))
            return
