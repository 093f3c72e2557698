"""`qlf inspect`: what is in this checkpoint?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from qlf import options, output, reasons

if TYPE_CHECKING:
    from qlformat import Summary

EPILOG = """\b
PATH is a directory or a Hub repository ORG/MODEL[@revision]. Only headers are
read, from the Hub by a few range requests. For a model that is not quantized
yet, it says what `qlf convert` would do.
\b
Examples:
  qlf inspect my-model-nf4
  qlf inspect ORG/MODEL
  qlf inspect my-model-nf4 --tensors
  qlf inspect my-model-nf4 --json | jq .bits_per_weight
"""


@click.command("inspect", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("path", type=options.Location())
@click.option("--tensors", is_flag=True, help="List every weight.")
@options.common
def command(path: str, tensors: bool, as_json: bool) -> None:
    """Show what the model PATH holds: size, recipe, what is quantized and what is not."""
    from qlformat import summarize

    summary = summarize(path)
    if as_json:
        output.emit_json(summary.as_dict(tensors=tensors))
        return
    output.line(summary.name, bold=True)
    output.lines(f"  {label:<12} {text}" for label, text in _facts(summary))
    output.lines(f"  note: {note}" for note in summary.notes)
    if tensors:
        output.line()
        _list(summary)


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    """(label, text) of what is known."""
    if summary.architecture or summary.model_type:
        yield "model", summary.architecture or summary.model_type or ""
    converted = summary.converted_bytes
    yield "format", summary.format
    if summary.recipe:
        recipe = summary.recipe
        scales = "double quantization" if recipe.double_quant else "float32 scales"
        label = "recipe" if converted is None else "would be"
        yield label, f"{recipe.quant_type}, blocksize {recipe.blocksize}, {scales}, computes in {recipe.compute_dtype}"
    bits = f", {summary.bits_per_weight:.3f} bits each" if summary.bits_per_weight else ""
    quantized = output.share(summary.quantized_params, summary.total_params)
    yield "4 bit", f"{quantized} of the {output.number(summary.total_params)} weights{bits}"
    kept = reasons.kept(summary.unquantized, summary.total_params)
    if kept:
        yield "as is", ", ".join(kept)
    files = f"{len(summary.shards)} file{'s'[: len(summary.shards) > 1]}"
    after = f", about {output.size(converted)} after qlf convert" if converted is not None else ""
    yield "size", f"{output.size(summary.stored_bytes)} in {files}{after}"
    if summary.revision:
        yield "revision", summary.revision
    if summary.source:
        yield "source", summary.source
    if summary.writer:
        yield "written by", summary.writer
    if summary.fingerprint:
        yield "fingerprint", summary.fingerprint
    if summary.fetched_bytes is not None:
        yield "fetched", f"{output.size(summary.fetched_bytes)}: headers only"


def _list(summary: Summary) -> None:
    from qlformat.plan import natural_key

    rows = [
        [
            row.name,
            row.dtype if row.encoding == "none" else row.encoding,
            "x".join(map(str, row.shape)) or "scalar",
            output.size(row.nbytes),
            f"{row.relative_error:.4f}" if row.relative_error is not None else "",
            reasons.LABELS.get(row.reason, row.reason) if row.encoding == "none" else "",
        ]
        for row in sorted(summary.tensors, key=lambda row: natural_key(row.name))
    ]
    output.table(["weight", "as", "shape", "stored", "rel. error", "why not"], rows, frozenset({3, 4}))
