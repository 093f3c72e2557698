"""`qlf adapters`: which adapters are there for this base?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qlf import options, output

if TYPE_CHECKING:
    from qlformat.adapter_search import AdapterList, ListedAdapter

_SHORT = 12
"""Digits of a fingerprint or commit in the table; --json has all."""

EPILOG = """\b
BASE is a Hub repository ORG/NAME[@revision] or a directory. Adapters are found
by the base that their cards name, and compared by their pins: "fits" says that
an adapter was trained on exactly the tensors of this base.
\b
Examples:
  qlf adapters ORG/MODEL-nf4
  qlf adapters ORG/MODEL-nf4@v1
  qlf adapters my-model-nf4 --repo-id ORG/MODEL-nf4
  qlf adapters ORG/MODEL-nf4 --json | jq '.adapters[] | select(.fit == "fits")'
"""


@click.command("adapters", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("base", type=options.Location())
@click.option("--repo-id", metavar="ORG/NAME", help="Where BASE is on the Hub, if it is a directory.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Look at N at most."
)
@options.common
def command(base: str, repo_id: str | None, limit: int, as_json: bool) -> None:
    """List the adapters on the Hub for BASE, and whether each was trained on it."""
    from qlformat.adapter_search import find_adapters

    found = find_adapters(base, repo_id=repo_id, limit=limit)
    if as_json:
        output.emit_json(found.as_dict())
        return
    _tell(base, found)


def _tell(base: str, found: AdapterList) -> None:
    at = f" at commit {found.base.revision[:_SHORT]}" if found.base.revision else ""
    fingerprint = f"fingerprint {found.base.fingerprint}" if found.base.fingerprint else "not in 4 bits"
    output.line(f"{base}{at}: {fingerprint}", bold=True)
    if not found.adapters:
        output.line(f"no adapter on the Hub names {' or '.join(found.searched)}")
        return
    rows = [
        [
            entry.repo_id,
            (entry.revision or "")[:_SHORT],
            entry.fit,
            _pinned_to(entry),
            (entry.peft_type or "").lower(),
            str(entry.rank or ""),
        ]
        for entry in found.adapters
    ]
    output.table(["adapter", "commit", "pin", "pinned to", "kind", "rank"], rows, frozenset({5}))
    if found.cut:
        output.line("there are more; see them with a larger --limit")


def _pinned_to(entry: ListedAdapter) -> str:
    if entry.pin is None:
        return entry.reason or ""
    home = entry.pin.repo_id or ""
    commit = f"@{entry.pin.revision[:_SHORT]}" if entry.pin.revision else ""
    return f"{home}{commit} {entry.pin.fingerprint[:_SHORT]}".strip()
