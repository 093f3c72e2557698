"""The card of a merged model: how to load it, what was merged into what, and what was kept of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlformat.cards import base, content, picture, snippets
from qlformat.cards.content import Content, Inherited, code, section, table
from qlformat.file_names import MERGE_PICTURE, MERGE_REPORT
from qlformat.source import is_repo_id
from qlformat.summary import summarize

_MOST_BARS = 40
"""The picture of more weights is too tall for a card, which then links to it."""


def home(report: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(repository, commit) of what was merged onto, where the report names one: the base, or what that comes from."""
    base, source = _mapping(report, "base"), _mapping(report, "source")
    origin = _mapping(base, "made_from")
    for name, revision in (
        (base.get("name"), base.get("revision")),
        (source.get("name"), source.get("revision")),
        (origin.get("repo_id"), origin.get("revision")),
    ):
        if is_repo_id(str(name)):
            return str(name), revision
    return None, None


def describe(directory: Path, name: str, inherited: Inherited) -> Content:
    """The card of the merged model in `directory`; see cards.base.describe."""
    report = content.read_object(directory / MERGE_REPORT)
    config = content.read_object(directory / "config.json")
    parsed = base.read_manifest(directory)
    summary = summarize(directory)
    model = snippets.describe(name, directory, config)
    errors = picture.errors_by_kind(parsed.weights) if parsed else {}
    four_bit = parsed is not None
    parents = [home(report)[0], *(entry.get("repo_id") for entry in _adapters(report))]
    named = list(dict.fromkeys(parent for parent in parents if parent))
    metadata: dict[str, Any] = {
        **inherited.metadata(),
        **({"base_model": named if len(named) > 1 else named[0], "base_model_relation": "merge"} if named else {}),
        "library_name": "transformers",
        "pipeline_tag": inherited.pipeline_tag or snippets.pipeline_tag(config),
        "tags": ["merge", *(base.tags(summary.recipe) if four_bit else ["qlformat"])],
        "quantization": base.quantization(summary.recipe) if four_bit else None,
    }
    loads = ["With transformers:", snippets.transformers(model)]
    if four_bit:
        loads += ["To train LoRA layers on it, with peft:", snippets.peft_training(model)]
        loads += ["With [qlformat](https://pypi.org/project/qlformat/):", snippets.qlformat(model)]
    sections = content.join(
        _introduction(report),
        section("Load it", *loads),
        section("How it was made", _made(report, summary.stored_bytes), _adapter_table(report)),
        _kept(directory, report),
        base.error_section(errors, drawn=picture.drawable(errors)),
        section("What identifies it", base.identity_table(parsed, summary)),
    )
    return Content(name.rpartition("/")[2], metadata, sections, inherited.notes)


def _introduction(report: Mapping[str, Any]) -> str:
    names = [code(entry["name"]) for entry in _adapters(report)]
    adapters = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "adapters"
    found = code(_mapping(report, "base").get("name", "a model"))
    what = "the adapter" if len(names) == 1 else "adapters"
    return (
        f"{found} with {what} {adapters} merged into its weights by `qlf merge`, in {report.get('to')}. peft is not "
        "needed to load it."
    )


def _made(report: Mapping[str, Any], stored_bytes: int) -> str:
    rows: list[tuple[str, object]] = [("base", _named(_mapping(report, "base")))]
    if report.get("source"):
        rows.append(("merged onto its source", _named(_mapping(report, "source"))))
    density = f", density {report['density']}" if report.get("density") is not None else ""
    rows.append(("method", f"{report.get('method')}{density}"))
    rows.append(("stored as", f"{report.get('to')}, rounded {_rounding(report)}"))
    rows.append(("size", content.size(stored_bytes)))
    rows.append(("written by", report.get("writer", "")))
    return table(["", ""], rows)


def _adapter_table(report: Mapping[str, Any]) -> str:
    rows = [
        (
            code(entry.get("name", "")),
            entry.get("weight", 1.0),
            code(entry["pinned_to"]) if entry.get("pinned_to") else "not pinned",
            code(entry.get("sha256", "")),
        )
        for entry in _adapters(report)
    ]
    return table(["adapter", "weight", "pinned to the base", "sha256"], rows, frozenset({1}))


def _kept(directory: Path, report: Mapping[str, Any]) -> str:
    summary, retention = _mapping(report, "summary"), _mapping(report, "retention")
    rows: list[tuple[str, object]] = []
    if summary.get("share_median") is not None:
        rows.append(("share of a weight's change that is stored, median", f"{summary['share_median']:.3f}"))
        rows.append(("the same, least", f"{summary['share_least']:.3f}"))
        rows.append(("weights changed", summary.get("weights", 0)))
    for key, label in (("base", "of the base"), ("adapter", "with the adapter"), ("merged", "merged")):
        if isinstance(retention.get(key), float):
            rows.append((f"held-out loss {label} (nats per token)", f"{retention[key]:.4f}"))
    if isinstance(retention.get("retention"), float):
        rows.append(("share of the held-out gain that was kept", f"{retention['retention']:.3f}"))
    drawn = ""
    if (directory / MERGE_PICTURE).is_file():  # a bar for each weight
        link = f"[share of each change that was kept]({MERGE_PICTURE})"
        drawn = f"!{link}" if summary.get("weights", 0) <= _MOST_BARS else f"Weight by weight: {link}."
    return section("What was kept of the adapters", table(["", ""], rows), drawn) if rows else ""


def _rounding(report: Mapping[str, Any]) -> str:
    return "to the nearest" if report.get("rounding") != "feedback" else "by calibration (feedback)"


def _named(found: Mapping[str, Any]) -> str:
    where = code(found.get("name", "?"))
    where += f" at commit {code(found['revision'])}" if found.get("revision") else ""
    return where + (f", fingerprint {code(found['fingerprint'])}" if found.get("fingerprint") else "")


def _adapters(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: Iterable[Any] = report.get("adapters") or ()
    return [entry for entry in found if isinstance(entry, dict) and "name" in entry]


def _mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = parent.get(key)
    return found if isinstance(found, dict) else {}
