"""`qlf diff`: how far apart are the weights of two models?"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlf import options, output
from qlf.progress import progress

if TYPE_CHECKING:
    from qlformat.quality.comparison import Differences, TensorDifference

_FEW = 10

EPILOG = """\b
A and B are 4-bit or 16-bit models: directories, or Hub repositories
ORG/MODEL[@revision], which are downloaded. A is what errors are relative to.
Their weights are compared by name, whatever their shards and encodings, each in
the dtype that it is stored in or decodes to.
\b
Exit code: 0 equal (or each tensor within --tolerance), 1 different,
2 wrong usage. Weights that only one model has, and other shapes, are
differences.
\b
Examples:
  qlf diff ORG/MODEL my-model-nf4
  qlf diff my-model-nf4 my-merged-nf4 --tensors --picture layers.png
  qlf diff my-model-bf16 my-model-nf4 --tolerance 0.1 --json
"""


@click.command("diff", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("a", type=options.Location())
@click.argument("b", type=options.Location())
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="E",
    help="Relative error up to which a tensor counts as equal.",
)
@click.option("--tensors", is_flag=True, help="List every weight, in the order of A; else the most different ones.")
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the error of each layer.")
@options.threads
@options.quiet
@options.common
def command(
    a: str,
    b: str,
    tolerance: float,
    tensors: bool,
    picture: Path | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare the weights of the models A and B: relative error, largest error, share of equal codes."""
    from qlformat.quality.comparison import diff

    started = time.monotonic()
    with progress(quiet) as listener:
        found = diff(a, b, tolerance=tolerance, threads=threads, progress=listener)
    took = time.monotonic() - started
    if picture is not None:
        from qlformat.quality.picture import draw

        draw(found, picture)
    if as_json:
        output.emit_json({**found.as_dict(), "seconds": round(took, 3)})
    else:
        _tell(found, tensors, took)
    return int(not found.equal)


def _tell(found: Differences, every: bool, took: float) -> None:
    shown = found.tensors if every else found.different[:_FEW]
    if shown:
        _table(shown)
        if not every and len(found.different) > len(shown):
            output.line(f"... and {len(found.different) - len(shown)} more; --tensors or --json shows all")
    for names, where, lacking in ((found.only_a, found.a, found.b), (found.only_b, found.b, found.a)):
        most = _FEW if output.interactive(sys.stdout) and not every else len(names)
        output.lines(f"only in {where}: {name}" for name in names[:most])
        if len(names) > most:
            output.line(f"... and {len(names) - most} more that {lacking} lacks")
    output.lines(f"note: {note}" for note in found.notes)
    output.line(f"{'; '.join(_verdict(found))} ({output.seconds(took)})", bold=True)


def _verdict(found: Differences) -> Iterator[str]:
    """What to remember of it, in pieces."""
    count = len(found.tensors)
    if found.equal:
        within = f" within the tolerance {found.tolerance:g}" if found.tolerance else ""
        yield f"{found.a} and {found.b}: {count} weights, all equal{within}"
    elif not count:
        yield f"{found.a} and {found.b} have no weight of the same name: are they of one architecture?"
        return
    else:
        yield f"{found.a} and {found.b}: {len(found.different)} of {count} weights differ"
        alone = len(found.only_a) + len(found.only_b)
        if alone:
            yield f"{alone} are in one of them alone"
    if found.relative_error is None:
        yield f"largest error {found.max_error:.3g}"
    elif found.relative_error or found.max_error:
        yield f"relative error {found.relative_error:.4g}, largest error {found.max_error:.3g}"
    if found.equal_codes is not None:
        yield f"equal codes {_share(found.equal_codes)}"


def _table(tensors: Sequence[TensorDifference]) -> None:
    coded = any(tensor.equal_codes is not None for tensor in tensors)
    headers = ["weight", "A", "B", "shape", "rel. error", "max error", "equal values"]
    rows = []
    for tensor in tensors:
        shape = "x".join(map(str, tensor.shape_a)) or "scalar"
        if not tensor.compared:
            shape += " and " + ("x".join(map(str, tensor.shape_b)) or "scalar")
        row = [tensor.name, tensor.encoding_a, tensor.encoding_b, shape, *_figures(tensor)]
        rows.append([*row, _share(tensor.equal_codes)] if coded else row)
    right = frozenset(range(4, 8))
    output.table([*headers, "equal codes"] if coded else headers, rows, right if coded else right - {7})


def _figures(tensor: TensorDifference) -> list[str]:
    if not tensor.compared:
        return ["", "", ""]
    error = "A is zero" if tensor.relative_error is None else f"{tensor.relative_error:.4g}"
    if tensor.not_finite:
        error = f"{tensor.not_finite} not finite"
    return [error, f"{tensor.max_error:.3g}", _share(tensor.equal_values)]


def _share(value: float | None) -> str:
    """A percentage that says 100 % only where all are equal."""
    if value is None:
        return ""
    return "100 %" if value == 1 else f"{min(100 * value, 99.99):.2f} %"
