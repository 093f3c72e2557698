"""`qlf verify`: is this checkpoint sound?"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from qlf import options, output
from qlf.progress import progress

if TYPE_CHECKING:
    from qlformat import Finding

_FEW = 3
_MOST_ON_A_TERMINAL = 40

EPILOG = """\b
PATH is a directory or a Hub repository ORG/MODEL[@revision], which is
downloaded.
\b
Checks the structure, every rule of the format, every hash and that each tensor
decodes. With --source the weights are quantized again and compared bit by bit.
4-bit repositories that bitsandbytes wrote itself are checked as far as they go.
Of an adapter, the base that it is pinned to is looked up and compared.
\b
Exit code: 0 sound, 1 findings, 2 wrong usage.
\b
Examples:
  qlf verify my-model-nf4
  qlf verify my-model-nf4 --source ORG/MODEL
  qlf verify ORG/MODEL-nf4 --headers
  qlf verify my-adapter --base my-model-nf4
  qlf verify my-model-nf4 --json | jq '.findings[].rule'
"""


@click.command("verify", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("path", type=options.Location())
@click.option("--source", metavar="SRC", type=options.Location(), help="The 16- or 32-bit model that it was made from.")
@click.option("--headers", is_flag=True, help="Read headers only; of a repository, by range requests.")
@click.option(
    "--base", metavar="BASE", type=options.Location(), help="Of an adapter; by default the one it is pinned to."
)
@options.allow_base_mismatch
@options.threads
@options.quiet
@options.common
def command(
    path: str,
    source: str | None,
    headers: bool,
    base: str | None,
    allow_base_mismatch: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Check every byte of the checkpoint or adapter PATH against the format."""
    if headers and source is not None:
        raise click.UsageError("--headers reads no weights, so there is nothing to compare with --source")
    started = time.monotonic()
    fetched: int | None = None
    with progress(quiet) as listener:
        if _is_adapter(path, source, headers, base):
            from qlformat.adapter_verifier import verify_adapter

            found = verify_adapter(path, base, allow_base_mismatch=allow_base_mismatch)
        elif headers:
            from qlformat.hub.headers import verify_headers

            checked = verify_headers(path)
            found, fetched = list(checked.findings), checked.fetched
        else:
            from qlformat import verify

            found = verify(path, source=source, threads=threads, progress=listener)
    took = time.monotonic() - started
    findings = [finding for finding in found if finding.severity == "error"]
    notes = [finding for finding in found if finding.severity != "error"]
    if as_json:
        output.emit_json(
            {
                "path": path,
                "sound": not findings,
                "findings": [asdict(finding) for finding in findings],
                "notes": [asdict(finding) for finding in notes],
                "headers_only": headers,
                "fetched_bytes": fetched,
                "seconds": round(took, 3),
            }
        )
    else:
        different = sum(finding.rule == "E5" for finding in findings)
        if different > _FEW:
            output.line(
                f"{different} weights differ from {source}: is it the model that this checkpoint was made from?"
            )
        _tell(path, findings, notes, took)
        if headers:
            amount = f"; {output.size(fetched)} were fetched" if fetched is not None else ""
            output.line(f"only headers were read, no weights{amount}")
    return 1 if findings else 0


def _is_adapter(path: str, source: str | None, headers: bool, base: str | None) -> bool:
    """Whether PATH is an adapter; options that do not fit it are wrong usage."""
    from qlformat.adapter_verifier import is_adapter

    found = is_adapter(path)
    if found and (source is not None or headers):
        raise click.UsageError(f"{'--headers' if headers else '--source'} is for models, and {path} is an adapter")
    if not found and base is not None:
        raise click.UsageError(f"--base is for adapters, and {path} is none; did you mean --source?")
    return found


def _tell(path: str, findings: Sequence[Finding], notes: Sequence[Finding], took: float) -> None:
    rows = [f"{found.rule}  {_where(found)}{found.message}" for found in findings]
    rows += [f"note: {_where(note)}{note.message} ({note.rule})" for note in notes]
    most = _MOST_ON_A_TERMINAL if output.interactive(sys.stdout) else len(rows)
    output.lines(rows[:most])
    if len(rows) > most:
        output.line(f"... and {len(rows) - most} more; send them to a file or use --json to see all")
    verdict = f"{len(findings)} finding{'s'[: len(findings) > 1]}" if findings else "sound"
    output.line(f"{path}: {verdict} ({output.seconds(took)})", bold=True)


def _where(finding: Finding) -> str:
    place = finding.tensor or finding.file
    return f"{place}  " if place else ""
