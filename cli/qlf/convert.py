"""`qlf convert`: a 16- or 32-bit model in, a 4-bit checkpoint out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlf import options, output, reasons
from qlf.progress import progress

if TYPE_CHECKING:
    from qlformat import Report

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = ("32", "64", "128", "256", "512", "1024", "2048", "4096")
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")

EPILOG = """\b
SRC is a directory, a .safetensors or .bin file with its config.json beside it,
or a Hub repository ORG/MODEL[@revision], which is downloaded. What exists on
disk wins over the Hub. The source is never changed.
\b
OUT appears only when it is complete. After a crash or Ctrl-C, the same command
with --resume goes on and ends with the same bytes.
\b
Examples:
  qlf convert ORG/MODEL my-model-nf4
  qlf convert ORG/MODEL@v1.0 my-model-nf4 --shard-size 2GB
  qlf convert ./my-model my-model-nf4 --skip 'model.layers.0.*'
"""

_MOST_NOTES = 5
_CAUSAL = ("ForCausalLM", "LMHeadModel")


@click.command("convert", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("src", type=options.Location())
@click.argument("out", type=options.Location(path_type=Path))
@click.option(
    "--skip", multiple=True, metavar="GLOB", help="Leave matching tensors or modules unquantized; may be repeated."
)
@click.option("--quant-type", type=click.Choice(QUANT_TYPES), default="nf4", show_default=True, help="Code table.")
@click.option(
    "--blocksize",
    type=click.Choice(BLOCKSIZES),
    default="64",
    show_default=True,
    metavar="N",
    help="Weights that share one scale: 32, 64, 128 ... 4096.",
)
@click.option("--no-double-quant", is_flag=True, help="Keep the scales in float32 (0.37 bits more at blocksize 64).")
@click.option(
    "--compute-dtype",
    type=click.Choice(COMPUTE_DTYPES),
    default="bfloat16",
    show_default=True,
    help="What readers compute in; the stored weights do not depend on it.",
)
@options.shard_size
@options.threads
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@options.overwrite
@click.option("--hash-source", is_flag=True, help="Record the sha256 of the source's files; doubles the time.")
@click.option(
    "--calibration",
    type=options.Location(path_type=Path),
    metavar="TEXT|DIR",
    help="Choose codes and scales by the layers' outputs on this text: better, and minutes rather than seconds.",
)
@options.quiet
@options.common
def command(
    src: str,
    out: Path,
    skip: tuple[str, ...],
    quant_type: str,
    blocksize: str,
    no_double_quant: bool,
    compute_dtype: str,
    shard_size: int,
    threads: int | None,
    resume: bool,
    overwrite: bool,
    hash_source: bool,
    calibration: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Quantize the model SRC to a new 4-bit checkpoint in the directory OUT."""
    from qlformat import Recipe, convert

    recipe = Recipe(quant_type, int(blocksize), not no_double_quant, compute_dtype)
    with progress(quiet) as listener:
        report = convert(
            src,
            out,
            recipe=recipe,
            skip=skip,
            shard_size=shard_size,
            threads=threads,
            resume=resume,
            overwrite=overwrite,
            hash_source=hash_source,
            calibration=calibration,
            progress=listener,
        )
    if as_json:
        output.emit_json(report.as_dict())
        return
    output.line(f"Wrote {out}", bold=True)
    output.lines(_told(report))


def _told(report: Report) -> Iterator[str]:
    """The report in lines, what matters most first."""
    yield from (f"  note: {note}" for note in report.notes[:_MOST_NOTES])
    if len(report.notes) > _MOST_NOTES:
        yield f"  and {len(report.notes) - _MOST_NOTES} more notes, see --json"
    recipe = report.manifest.recipe
    scales = "double quantization" if recipe.double_quant else "float32 scales"
    yield f"  size    {output.size(report.source_bytes)} -> {output.size(report.output_bytes)}"
    yield (
        f"  4 bit   {output.share(report.quantized_params, report.total_params)} of the "
        f"{output.number(report.total_params)} weights, {report.bits_per_weight:.3f} bits each "
        f"({recipe.quant_type}, blocksize {recipe.blocksize}, {scales})"
    )
    kept = reasons.kept(report.unquantized, report.total_params)
    if kept:
        yield f"  as is   {', '.join(kept)}"
    yield f"  time    {output.seconds(report.seconds)}, {output.speed(report.source_bytes, report.seconds)}"
    yield f"Next: qlf verify {shlex.quote(str(report.out))}"
    from qlformat.selection import UNPACKS_EXPERTS

    if UNPACKS_EXPERTS not in report.notes:
        yield f"      {_loader(report.out)}.from_pretrained({str(report.out)!r})   # plain transformers"


def _loader(out: Path) -> str:
    """The class of transformers that loads the checkpoint: the Auto class of causal models, or its own."""
    names = json.loads((out / "config.json").read_bytes()).get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    return name if name.isidentifier() and not name.endswith(_CAUSAL) else "AutoModelForCausalLM"
