"""`qlf export`: a 4-bit checkpoint in, a plain 16- or 32-bit model out."""

from __future__ import annotations

from pathlib import Path

import click

from qlf import options, output
from qlf.progress import progress

DTYPES = ("bfloat16", "float16", "float32")

EPILOG = """\b
BASE is a directory or a Hub repository ORG/MODEL[@revision], which is
downloaded. OUT appears only when it is complete.
\b
The result is an ordinary model that transformers loads without bitsandbytes.
It holds the quantized values: the rounding of the 4-bit weights stays in it.
\b
Examples:
  qlf export my-model-nf4 my-model-bf16 --dtype bfloat16
  qlf export my-model-nf4 my-model-f32 --dtype float32 --shard-size 2GB
"""


@click.command("export", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("base", type=options.Location())
@click.argument("out", type=options.Location(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), required=True, help="dtype of the written weights.")
@options.shard_size
@options.threads
@options.overwrite
@options.quiet
@options.common
def command(
    base: str,
    out: Path,
    dtype: str,
    shard_size: int,
    threads: int | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the 4-bit checkpoint BASE to OUT with dequantized weights."""
    from qlformat import export

    with progress(quiet) as listener:
        report = export(
            base, out, dtype=dtype, shard_size=shard_size, threads=threads, overwrite=overwrite, progress=listener
        )
    if as_json:
        output.emit_json(report.as_dict())
        return
    output.line(f"Wrote {out}", bold=True)
    output.lines(f"  note: {note}" for note in report.notes)
    files = f"{len(report.files)} file{'s'[: len(report.files) > 1]}"
    output.line(f"  size    {output.size(report.base_bytes)} -> {output.size(report.output_bytes)} in {files}")
    output.line(f"  weights {output.number(report.params)} in {report.dtype}")
    output.line(f"  time    {output.seconds(report.seconds)}, {output.speed(report.output_bytes, report.seconds)}")
    output.line(f"Next: AutoModelForCausalLM.from_pretrained({str(out)!r})")
