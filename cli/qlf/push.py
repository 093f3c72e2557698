"""`qlf push`: a verified directory in, one commit on a hub out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlf import options, output
from qlf.progress import progress

if TYPE_CHECKING:
    from qlformat.hub.push import PushReport

EPILOG = """\b
PATH is the directory of a 4-bit checkpoint, an adapter or a merged model. It is
checked as by `qlf verify`, and only what is sound is published.
\b
The weights are sent first; one commit then shows everything at once, when all
is checked. Files that are there already are not sent again, so an interrupted
push is run again. Where somebody else changed the branch, nothing is
overwritten.
\b
The token is that of HF_TOKEN or of `hf auth login`.
\b
Examples:
  qlf push my-model-nf4 ORG/MODEL-nf4 --dry-run
  qlf push my-model-nf4 ORG/MODEL-nf4 --private --tag v1
  qlf push my-adapter ORG/MODEL-chat --create-pr
  qlf push my-model-nf4 lab/MODEL-nf4 --endpoint http://127.0.0.1:8000
"""


@click.command("push", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("path", type=options.Location(path_type=Path))
@click.argument("repo_id", type=options.Location())
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", default="main", show_default=True, help="Branch; made where needed.")
@click.option("--tag", metavar="T", help="Name for the new commit.")
@click.option("-m", "--message", metavar="M", help="Message of the commit.")
@click.option("--create-pr", is_flag=True, help="Propose the change instead of making it.")
@click.option("--license", "license_id", metavar="ID", help="For the card; by default that of the source.")
@click.option("--card/--no-card", default=True, help="Write the model card, or renew its marked block; the default.")
@click.option("--allow-base-mismatch", is_flag=True, help="Publish an adapter whose base is another one by now.")
@click.option("--endpoint", metavar="URL", help="The hub; that of HF_ENDPOINT by default.")
@click.option("--dry-run", is_flag=True, help="Only say what would be sent.")
@options.threads
@options.quiet
@options.common
def command(
    path: Path,
    repo_id: str,
    private: bool,
    revision: str,
    tag: str | None,
    message: str | None,
    create_pr: bool,
    license_id: str | None,
    card: bool,
    allow_base_mismatch: bool,
    endpoint: str | None,
    dry_run: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Publish the directory PATH as the repository REPO_ID."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads of NumPy's that would only take time to start
    with progress(quiet) as listener:  # before huggingface_hub is imported
        if endpoint:
            os.environ["HF_ENDPOINT"] = endpoint  # an adapter's base is looked for there, too
        from qlformat.hub.push import PushOptions, prepare, send

        asked = PushOptions(
            private=private,
            revision=revision,
            tag=tag,
            message=message,
            create_pr=create_pr,
            endpoint=endpoint,
            card=card,
            license_id=license_id,
            allow_base_mismatch=allow_base_mismatch,
        )
        prepared = prepare(path, repo_id, asked, dry=dry_run, threads=threads, progress=listener)
        report = prepared.report() if dry_run else send(prepared)
    if as_json:
        output.emit_json({**report.as_dict(), "dry_run": dry_run})
        return
    _tell(report, dry_run)


def _tell(report: PushReport, dry_run: bool) -> None:
    sent, files = report.plan.to_send, report.plan.files
    where = f"{report.repo_id}@{report.revision} on {report.host}"
    if dry_run:
        output.line(f"Would publish the {report.kind} to {where}", bold=True)
        output.table(
            ["file", "size", "sha256", ""],
            [
                [file.local.name, output.size(file.local.size), file.sha256[:12], "send" if file.sent else "is there"]
                for file in files
            ],
            frozenset({1}),
        )
    else:
        output.line(f"{'Published' if sent or report.plan.removed else 'Nothing new:'} {where}", bold=True)
    label = "to send" if dry_run else "sent"
    output.line(f"  {label:<8} {len(sent)} of {len(files)} files, {output.size(report.plan.bytes_to_send)}")
    if report.plan.removed:
        output.line(f"  removed  {', '.join(report.plan.removed)}")
    if report.left_out:
        names = [f"{entry['name']} ({entry['reason']})" for entry in report.left_out]
        output.line(f"  left out {', '.join(names)}")
    output.line(f"  parent   {report.plan.parent or 'none: the repository is new'}")
    if not dry_run:
        output.line(f"  commit   {report.commit}")
        if report.tag:
            output.line(f"  tag      {report.tag}")
    output.lines(f"  note: {note}" for note in report.notes)
    output.line(f"  time     {output.seconds(report.seconds)}")
    if report.url and output.interactive(sys.stdout):
        output.line(f"See {report.url}")
