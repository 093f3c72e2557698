"""The `qlf` command group. A command's module is imported only when that command is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import click

from qlf import errors, options

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "convert": "Turn a 16- or 32-bit model into a 4-bit checkpoint.",
        "inspect": "Show what a checkpoint holds; reads headers only.",
        "verify": "Check every byte of a checkpoint against the format.",
        "export": "Write a 4-bit checkpoint out as a plain 16- or 32-bit model.",
        "diff": "Compare the weights of two models.",
        "eval": "Measure the loss and perplexity of a model, alone or against another.",
        "generate": "Answer a prompt with a checkpoint.",
        "finetune": "Train a LoRA adapter on a 4-bit checkpoint.",
        "merge": "Put adapters into a base, and measure what was kept of them.",
        "estimate": "Say how much memory fine-tuning a model takes.",
        "push": "Publish a checkpoint, an adapter or a model on a hub, verified, as one commit.",
        "pull": "Fetch a model or an adapter from a hub, verified.",
        "adapters": "List the adapters on a hub for a base, and whether they fit it.",
        "card": "Write the model card.",
        "hub": "Serve a small hub of your own.",
    }
)
"""Command -> its line in `qlf --help`. Each is the `command` of the module qlf.<name>."""

EPILOG = """\b
Examples:
  qlf convert ORG/MODEL my-model-nf4
  qlf verify my-model-nf4
\b
A SRC that exists on disk is read from there; any other ORG/MODEL[@revision]
is a Hugging Face Hub repository.
\b
Shell completion (bash; zsh_source and fish_source work the same way):
  eval "$(_QLF_COMPLETE=bash_source qlf)"
"""


class LazyGroup(click.Group):
    """A group whose commands are the modules that COMMANDS names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"qlf.{cmd_name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"qlf.{cmd_name}.command is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is answered with the nearest name."""
        name = args[0]
        if name in COMMANDS or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        import difflib  # only a mistyped command pays for it

        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        help_ = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise click.UsageError(f"no such command {name!r}; {help_}", ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an interrupt becomes an error that says how to go on."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise errors.InterruptedRun(ctx.invoked_subcommand) from None


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from qlformat import __version__

        click.echo(f"qlf {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings=options.CONTEXT, epilog=EPILOG)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def group(ctx: click.Context) -> None:
    """4-bit NF4 checkpoints that every project can load: convert, check, look inside, export.

    A checkpoint is a Hugging Face model repository in bitsandbytes' 4-bit layout with
    double quantization. Plain transformers loads it; no plugin is needed.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qlf` and return its exit code: 0 done, 1 found something wrong or failed, 2 wrong usage, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    return errors.guard(lambda: group.main(args, prog_name="qlf", standalone_mode=False), args)
