"""`qlf merge`: adapters into a base, with a proof of what was kept."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlf import options, output
from qlf.progress import progress

if TYPE_CHECKING:
    from qlformat.merge.merger import MergeReport

TARGETS = ("nf4", "bfloat16", "float16", "float32", "adapter")
METHODS = ("linear", "ties", "dare-linear", "dare-ties", "magnitude-prune", "svd", "cat")

EPILOG = """\b
BASE is a 4-bit checkpoint or a 16-bit model, a directory or a Hub repository;
A is a peft LoRA adapter, likewise, and WEIGHT its factor, 1 by default.
With --to adapter there is no BASE. Details: docs/merging.md.
\b
Every tensor of every adapter is applied exactly once, or nothing is written.
OUT/merge_report.json and .svg say for each weight which share of the change is
in the stored values: 4-bit rounding of a 4-bit base erases small ones, so give
the original model with --source, or merge to bfloat16.
\b
Examples:
  qlf merge my-model-nf4 --adapter my-adapter -o merged --to bfloat16
  qlf merge my-model-nf4 --adapter a -o merged --to nf4 --source ORG/MODEL
  qlf merge my-model-nf4 --adapter a:0.7 --adapter b:0.3 -o both --to float16
  qlf merge --adapter a --adapter b -o both --to adapter --rank 16
"""


@click.command("merge", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("base", type=options.Location(), required=False)
@click.option("--adapter", "adapters", multiple=True, required=True, metavar="A[:WEIGHT]", help="May be repeated.")
@click.option("-o", "--out", type=options.Location(path_type=Path), required=True, help="Directory to write.")
@click.option("--to", type=click.Choice(TARGETS), required=True, help="What to write.")
@click.option(
    "--method", type=click.Choice(METHODS), default="linear", show_default=True, help="How adapters are combined."
)
@click.option("--density", type=float, metavar="D", help="Share of the values that the sparse methods keep; 0.5.")
@click.option("--rank", type=click.IntRange(min=1), metavar="R", help="Of --to adapter and --method svd.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of dare.")
@click.option("--source", type=options.Location(), metavar="MODEL", help="The 16-bit model that BASE was made from.")
@click.option("--onto", type=click.Choice(("base", "source")), help="What to add to; the source where it is given.")
@click.option("--rounding", type=click.Choice(("nearest", "feedback")), help="To 4 bits; feedback with --calibration.")
@click.option(
    "--calibration", type=options.Location(path_type=Path), metavar="TEXT", help="Choose codes by activations on it."
)
@click.option(
    "--eval-data", type=options.Location(path_type=Path), metavar="FILE", help="Held-out rows, or text: the retention."
)
@click.option("--min-retention", type=float, metavar="R", help="Below it nothing is written, and the exit code is 1.")
@click.option("--allow-base-mismatch", is_flag=True, help="Merge adapters that belong to another base all the same.")
@options.shard_size
@options.threads
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@options.overwrite
@options.quiet
@options.common
def command(base: str | None, adapters: tuple[str, ...], out: Path, quiet: bool, as_json: bool, **given: Any) -> None:
    """Merge adapters into BASE."""
    # Workers call BLAS at the same time: threads of its own would only get in their way. Read when NumPy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from qlformat.merge.merger import merge
    from qlformat.merge.options import AdapterSpec, MergeOptions

    to = given["to"]
    if (base is None) != (to == "adapter"):
        needed = "no BASE: it combines adapters" if to == "adapter" else "a BASE"
        raise click.UsageError(f"--to {to} needs {needed}")
    if given["threads"] and (given["calibration"] or given["eval_data"]):
        import torch

        torch.set_num_threads(given["threads"])
    names = ("to", "method", "density", "rank", "onto", "rounding", "seed", "min_retention", "allow_base_mismatch")
    asked = MergeOptions(**{name: given[name] for name in names})
    with progress(quiet) as listener:
        report = merge(
            base or "",
            [AdapterSpec.parse(text) for text in adapters],
            out,
            asked,
            source=given["source"],
            calibration=given["calibration"],
            eval_data=given["eval_data"],
            shard_size=given["shard_size"],
            threads=given["threads"],
            resume=given["resume"],
            overwrite=given["overwrite"],
            progress=listener,
        )
    if as_json:
        output.emit_json(report.as_dict())
        return
    output.line(f"Wrote {out}", bold=True)
    output.lines(_told(report))


def _told(report: MergeReport) -> Iterator[str]:
    """The report in lines, what matters most first."""
    yield from (f"  note: {note}" for note in report.notes)
    content = report.content
    for adapter in content["adapters"]:
        weight = "" if adapter["weight"] == 1 else f" times {adapter['weight']:g}"
        yield f"  applied {adapter['tensors']} tensors of {adapter['name']}{weight}, each once"
    if content["to"] == "adapter":
        yield f"  rank    {content['rank']}, largest relative error of a delta {content['relative_error_most']:.2g}"
    else:
        found = content["summary"]
        if found["share_median"] is not None:
            yield (
                f"  kept    {found['share_median']:.3f} of the change in the median of {found['weights']} weights, "
                f"{found['share_least']:.3f} at least"
            )
    measured = content.get("retention")
    if measured is not None:
        kept = "none: the adapter gains nothing" if measured["retention"] is None else f"{measured['retention']:.3f}"
        yield (
            f"  retention {kept} (held-out loss {measured['base']:.4f} base, {measured['adapter']:.4f} adapter, "
            f"{measured['merged']:.4f} merged; {measured['tokens']} tokens)"
        )
    yield f"  size    {output.size(report.output_bytes)}"
    yield f"  time    {output.seconds(report.seconds)}, {output.speed(report.output_bytes, report.seconds)}"
    if content["to"] == "nf4":
        yield f"Next: qlf verify {shlex.quote(str(report.out))}"
