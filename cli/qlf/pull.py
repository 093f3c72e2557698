"""`qlf pull`: a repository on a hub in, a verified directory out."""

from __future__ import annotations

from pathlib import Path

import click

from qlf import options, output
from qlf.progress import progress

EPILOG = """\b
REPO_ID is ORG/NAME[@revision] on the hub of HF_ENDPOINT. OUT appears only when
everything is there and sound. Run an interrupted pull again: what was fetched
is checked and kept.
\b
Examples:
  qlf pull ORG/MODEL-nf4 my-model-nf4
  qlf pull ORG/MODEL-nf4 my-model-nf4 --revision v1
  qlf pull lab/MODEL-nf4 my-model-nf4 --endpoint http://127.0.0.1:8000
"""


@click.command("pull", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("repo_id", type=options.Location())
@click.argument("out", type=options.Location(path_type=Path))
@click.option("--revision", metavar="R", help="Branch, tag or commit.")
@click.option("--endpoint", metavar="URL", help="The hub; that of HF_ENDPOINT by default.")
@options.threads
@options.overwrite
@options.quiet
@options.common
def command(
    repo_id: str,
    out: Path,
    revision: str | None,
    endpoint: str | None,
    threads: int | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fetch the repository REPO_ID to OUT, and verify it."""
    with progress(quiet) as listener:  # before huggingface_hub is imported
        from qlformat.hub.pull import pull

        report = pull(
            repo_id, out, revision=revision, endpoint=endpoint, overwrite=overwrite, threads=threads, progress=listener
        )
    if as_json:
        output.emit_json(report.as_dict())
        return
    output.line(f"Wrote {out}", bold=True)
    kept = f", of these {output.size(report.kept)} from an interrupted run" if report.kept else ""
    output.line(f"  fetched  {len(report.files)} files, {output.size(report.size)}{kept}")
    output.line(f"  from     {report.repo_id} on {report.host}, commit {report.commit}")
    if report.left_out:
        output.line(f"  left out {', '.join(report.left_out)}")
    output.lines(f"  note: {note}" for note in report.notes)
    output.line(f"  time     {output.seconds(report.seconds)}, {output.speed(report.size, report.seconds)}")
