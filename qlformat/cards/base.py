"""The card of a 4-bit base: how to load it, what it was made from and how, its error, what identifies it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlformat import manifest, repository
from qlformat.cards import content, picture, snippets
from qlformat.cards.content import Content, Inherited, code, section, table
from qlformat.file_names import CARD_PICTURE
from qlformat.layout import Recipe
from qlformat.manifest import Manifest
from qlformat.summary import Summary, summarize

LOADERS = ("transformers", "bitsandbytes", "peft", "torch")
_MOST_FILES = 4
"""Source files whose hashes are shown; qlf.json has all."""


def describe(directory: Path, name: str, inherited: Inherited) -> Content:
    """The card of the 4-bit checkpoint in `directory`.

    Args:
        directory: with or without qlf.json.
        name: what the snippets load: a repository, or a directory.
        inherited: from the card of the source.

    Raises:
        FormatError: the checkpoint breaks a structural rule.
    """
    config = content.read_object(directory / "config.json")
    parsed = read_manifest(directory)
    summary = summarize(directory)
    model = snippets.describe(name, directory, config)
    errors = picture.errors_by_kind(parsed.weights) if parsed else {}
    relation = {"base_model": parsed.source.repo_id, "base_model_relation": "quantized"} if parsed else {}
    metadata: dict[str, Any] = {
        **inherited.metadata(),
        **(relation if relation.get("base_model") else {}),
        "library_name": "transformers",
        "pipeline_tag": inherited.pipeline_tag or snippets.pipeline_tag(config),
        "tags": tags(summary.recipe),
        "quantization": quantization(summary.recipe),
    }
    sections = content.join(
        introduction(parsed, summary),
        section(
            "Load it",
            "With transformers and bitsandbytes alone:",
            snippets.transformers(model),
            "To train LoRA layers on it, with peft:",
            snippets.peft_training(model),
            "With [qlformat](https://pypi.org/project/qlformat/), which maps the file instead of reading it:",
            snippets.qlformat(model),
        ),
        section("How it was made", recipe_table(parsed, summary), _as_is(summary)),
        error_section(errors, drawn=picture.drawable(errors)),
        section("What identifies it", identity_table(parsed, summary), _verify(name, parsed)),
    )
    return Content(name.rpartition("/")[2], metadata, sections, inherited.notes)


def read_manifest(directory: Path) -> Manifest | None:
    """qlf.json; None in a plain repository."""
    if not (directory / manifest.FILE_NAME).is_file():
        return None
    return manifest.parse(repository.read_file(directory, manifest.FILE_NAME))


def tags(recipe: Recipe | None) -> list[str]:
    """Tags of a 4-bit model."""
    found = ["qlformat", "4-bit", "bitsandbytes"]
    return found if recipe is None else [*found, recipe.quant_type, *(["double-quantization"] * recipe.double_quant)]


def quantization(recipe: Recipe | None) -> dict[str, Any] | None:
    """The recipe as metadata."""
    if recipe is None:
        return None
    return {
        "quant_method": "bitsandbytes",
        "quant_type": recipe.quant_type,
        "bits": 4,
        "blocksize": recipe.blocksize,
        "double_quant": recipe.double_quant,
        "compute_dtype": recipe.compute_dtype,
    }


def introduction(parsed: Manifest | None, summary: Summary) -> str:
    """The first paragraph."""
    made = "Quantized"
    if parsed is not None and parsed.source.repo_id:
        made = f"{content.place(parsed.source.repo_id, parsed.source.revision)}, quantized"
    recipe = summary.recipe
    scales = " with double quantization" if recipe and recipe.double_quant else ""
    kind = recipe.quant_type.upper() if recipe else "4 bits"
    return (
        f"{made} to {kind}{scales} ([QLoRA](https://arxiv.org/abs/2305.14314)) in the layout of bitsandbytes: "
        "transformers loads it as it is, and peft trains on it."
    )


def recipe_table(parsed: Manifest | None, summary: Summary) -> str:
    """Source, recipe and sizes."""
    rows: list[tuple[str, object]] = []
    if parsed is not None:
        rows.append(("source", content.place(parsed.source.repo_id, parsed.source.revision)))
        files = parsed.source.files
        shown = files if len(files) <= _MOST_FILES else ()
        rows += [(f"its {code(file.name)}", f"sha256 {code(file.sha256)}") for file in shown]
    recipe = summary.recipe
    if recipe is not None:
        scales = "8 bits (double quantization)" if recipe.double_quant else "float32"
        rows.append(("codes", f"{recipe.quant_type}, one scale for {recipe.blocksize} weights, in {scales}"))
        rows.append(("computes in", recipe.compute_dtype))
    if parsed is not None:
        rows.append(("rounding", _rounding(parsed.calibration)))
    share = 100 * summary.quantized_params / summary.total_params if summary.total_params else 0.0
    bits = f", {summary.bits_per_weight:.3f} bits each" if summary.bits_per_weight else ""
    rows.append(("in 4 bits", f"{share:.1f} % of {content.number(summary.total_params)} weights{bits}"))
    before = sum(file.size for file in parsed.source.files) if parsed is not None else 0
    after = content.size(summary.stored_bytes)
    rows.append(("size", f"{content.size(before)} -> {after}" if before else after))
    return table(["", ""], rows)


def error_section(errors: picture.Errors, *, drawn: bool) -> str:
    """Picture and table of the quantization error."""
    if not errors:
        return ""
    rows = []
    for kind, layers in errors.items():
        worst = max(layers, key=lambda layer: layers[layer])
        mean = sum(layers.values()) / len(layers)
        rows.append((code(kind), len(layers), f"{100 * mean:.2f} %", f"{100 * layers[worst]:.2f} %", worst))
    return section(
        "Quantization error",
        "Root mean square of the decoded weight minus the source's, relative to the source's own, measured while "
        "quantizing; `qlf.json` has it for every weight.",
        f"![relative error of every layer]({CARD_PICTURE})" if drawn else "",
        table(["weight", "layers", "mean", "largest", "in layer"], rows, frozenset({1, 2, 3, 4})),
    )


def identity_table(parsed: Manifest | None, summary: Summary) -> str:
    """Fingerprint and versions."""
    rows: list[tuple[str, object]] = []
    if parsed is not None:
        rows.append(("fingerprint of the tensors", code(parsed.fingerprint)))
        rows.append(("written by", f"{parsed.writer}, format version {parsed.format_version}"))
    else:
        rows.append(("format", summary.format))
    loaders = ", ".join(f"{name} {version}" for name, version in content.installed(*LOADERS))
    rows.append(("loads with", loaders))
    return table(["", ""], rows)


def _as_is(summary: Summary) -> str:
    if not summary.unquantized:
        return ""
    shares = [
        f"{reason.replace('-', ' ')} {100 * count / summary.total_params:.2g} %"
        for reason, count in summary.unquantized.items()
        if count
    ]
    return f"As in the source: {', '.join(shares)} of the weights."


def _rounding(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "to the nearest code"
    method, samples, window = (calibration.get(key) for key in ("method", "samples", "window"))
    text = f", text sha256 {code(calibration['text_sha256'])}" if "text_sha256" in calibration else ""
    return f"calibrated ({method}) on {samples} windows of {window} tokens{text}"


def _verify(name: str, parsed: Manifest | None) -> str:
    if parsed is None:
        return ""
    text = (
        "The fingerprint is a hash of all tensors, however they are split into files; adapters are pinned to it. "
        "Every byte is checked by"
    )
    return f"{text}\n\n{snippets.shell(f'qlf verify {name}')}"
