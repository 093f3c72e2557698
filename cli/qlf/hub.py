"""`qlf hub`: a hub of your own."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlf import options, output
from qlformat.errors import QlfError

if TYPE_CHECKING:
    from qlformat.hub_server.blobs import Blobs

EPILOG = """\b
Examples:
  qlf hub serve --root ./hub
  qlf hub serve --root ./hub --host 0.0.0.0 --token-file tokens
  qlf hub gc --root ./hub --dry-run
"""

SERVE_EPILOG = """\b
The clients are the usual ones; tell them where the hub is:
  export HF_ENDPOINT=http://127.0.0.1:8000
  hf upload me/my-model ./my-model
  qlf push ./my-model-nf4 me/my-model-nf4
\b
Without --token-file everyone who reaches the hub may read, write and delete.
A line of the file is ROLE NAME TOKEN [NAMESPACE,...]; ROLE is read or write,
TOKEN a text of 16 characters or more, or sha256:HEX of one:
  write alice hf_0123456789abcdef
"""

_root = click.option(
    "--root", type=options.Location(path_type=Path), required=True, metavar="DIR", help="Where everything is kept."
)
_s3 = click.option("--s3", metavar="s3://BUCKET/PREFIX", help="Keep contents in this bucket rather than below DIR.")


@click.group("hub", context_settings=options.CONTEXT, epilog=EPILOG)
def command() -> None:
    """A small hub that huggingface_hub, transformers, peft and `hf` work with."""


@command.command("serve", context_settings=options.CONTEXT, epilog=SERVE_EPILOG)
@_root
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--token-file", type=options.Location(path_type=Path), metavar="FILE", help="Who may read and write.")
@_s3
@click.option("--s3-redirect", is_flag=True, help="Send clients to the bucket for downloads.")
@click.option("--no-xet", is_flag=True, help="No local xet store for clients here; they need HF_HUB_DISABLE_XET=1.")
@click.option(
    "--part-size",
    metavar="SIZE",
    default="1GiB",
    show_default=True,
    help="Larger files are received in parts of this size.",
)
@options.common
def serve(
    root: Path,
    host: str,
    port: int,
    token_file: Path | None,
    s3: str | None,
    s3_redirect: bool,
    no_xet: bool,
    part_size: str,
    as_json: bool,
) -> None:
    """Serve a hub from a directory, until Ctrl-C."""
    with _installed():
        from qlformat.hub_server import server
        from qlformat.hub_server.asking import is_loopback
        from qlformat.hub_server.limits import Limits
    try:
        limits = Limits(part=options.parse_size(part_size))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--part-size") from None
    if token_file is None and not is_loopback(host):
        output.error("warning: ", f"everyone who reaches {host} may read, write and delete; give --token-file")

    def started(url: str) -> None:
        if as_json:
            output.emit_json({"url": url, "root": str(root)})
        else:
            output.line(f"Serving {url}")
        sys.stdout.flush()

    server.serve(
        root,
        host=host,
        port=port,
        token_file=token_file,
        xet=not no_xet,
        limits=limits,
        blobs=_bucket(s3, redirect=s3_redirect),
        started=started,
    )


@command.command("gc", context_settings=options.CONTEXT)
@_root
@_s3
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=24,
    show_default=True,
    metavar="HOURS",
    help="Keep what came in later: a commit may be about to name it.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@options.common
def collect_garbage(root: Path, s3: str | None, older_than: float, dry_run: bool, as_json: bool) -> None:
    """Remove contents that no commit has; the hub may be running."""
    with _installed():
        from qlformat.hub_server import collecting, service
    if not (root / "index.sqlite").is_file():
        raise QlfError("no hub here; give --root the directory that `qlf hub serve` got", file=str(root))
    hub = service.open_hub(root, blobs=_bucket(s3))
    found = collecting.collect(hub, older_than=older_than * 3600, dry_run=dry_run)
    if as_json:
        output.emit_json({**dataclasses.asdict(found), "dry_run": dry_run})
        return
    verb = "Would remove" if dry_run else "Removed"
    output.line(f"{verb} {found.removed} contents, {output.size(found.removed_bytes)}")
    output.line(f"  left    {found.kept} contents, {output.size(found.kept_bytes)}")


def _bucket(location: str | None, *, redirect: bool = False) -> Blobs | None:
    """The store of contents in a bucket."""
    if location is None:
        return None
    from qlformat.hub_server.s3_blobs import S3Blobs

    return S3Blobs(location, redirect=redirect)


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """Say what to install when something of the server's is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise QlfError(f"{error.name} is missing; pip install 'qlformat[hub]'") from None
