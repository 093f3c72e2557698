"""`qlf card`: write the model card."""

from __future__ import annotations

from pathlib import Path

import click

from qlf import options, output

EPILOG = """\b
PATH is the directory of a 4-bit checkpoint, an adapter or a merged model.
README.md is made, or where there is one, its marked block is made anew; prose
and metadata that you wrote stay as they are. `qlf push` does it as well.
\b
Examples:
  qlf card my-model-nf4 --license apache-2.0
  qlf card my-adapter --name ORG/my-adapter --base ORG/MODEL-nf4
  qlf card my-model-nf4 --print
"""


@click.command("card", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("path", type=options.Location(path_type=Path))
@click.option("--name", metavar="ORG/NAME", help="What the snippets load; by default the directory's name.")
@click.option("--license", "license_id", metavar="ID", help="Such as apache-2.0; by default that of the source.")
@click.option(
    "--base", metavar="ORG/NAME", help="Of an adapter: its base on the Hub, compared and recorded in its pin."
)
@click.option("--offline", is_flag=True, help="Do not ask the Hub for the card of the source.")
@click.option("--print", "shown", is_flag=True, help="Print the card, and write nothing.")
@options.common
def command(
    path: Path, name: str | None, license_id: str | None, base: str | None, offline: bool, shown: bool, as_json: bool
) -> None:
    """Write the model card of PATH, README.md."""
    from qlformat import pins
    from qlformat.cards.writer import make_card, write_card
    from qlformat.errors import QlfError

    if base is not None and shown:
        raise click.UsageError("--base writes into the adapter, --print writes nothing; drop one of the two")
    if base is not None:
        pins.record_home(path, base)
    if shown:
        card = make_card(path, name=name, license_id=license_id, online=not offline)
        if card is None:
            raise QlfError(f"{path}: found a 16- or 32-bit model, needed a 4-bit, merged or adapter directory")
        if as_json:
            output.emit_json({"path": str(path), "card": card.text, "notes": list(card.notes)})
        else:
            output.lines(card.text.splitlines())
        return
    notes = write_card(path, name=name, license_id=license_id, online=not offline)
    if as_json:
        output.emit_json({"path": str(path), "notes": list(notes)})
        return
    output.line(f"Wrote {path / 'README.md'}", bold=True)
    output.lines(f"  note: {note}" for note in notes)
