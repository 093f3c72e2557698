"""Help, version, and what a mistyped command line gets."""

from __future__ import annotations

import importlib
from pathlib import Path

import click
import pytest
from qlf import convert as convert_command
from qlf import export as export_command
from qlf import reasons
from qlf.main import COMMANDS

import qlformat
from qlformat import layout
from tests.cli.conftest import Run

HEAVY = ("numpy", "torch", "rich", "transformers", "huggingface_hub", "bitsandbytes", "peft")


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["convert", "--help"], ["verify", "-h"]])
def test_help_imports_nothing_heavy(child: Run, args: list[str]) -> None:
    code = f"import sys; from qlf.main import main; code = main({args!r}); print(code, *sys.modules)"
    result = child("-c", code)
    code_, *modules = result.out.splitlines()[-1].split()
    assert code_ == "0"
    assert "click" in modules and "qlf.main" in modules
    assert not {name.partition(".")[0] for name in modules} & set(HEAVY)


def test_help_lists_the_commands_without_importing_them(child: Run) -> None:
    code = "import sys; from qlf.main import main; main(['--help']); print(*sys.modules)"
    result = child("-c", code)
    text, modules = result.out.rsplit("\n", 2)[0], result.out.splitlines()[-1].split()
    for name, summary in COMMANDS.items():
        assert name in text and summary in text
        assert f"qlf.{name}" not in modules


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_examples(qlf: Run, name: str) -> None:
    for flag in ("--help", "-h"):
        result = qlf(name, flag)
        assert result.code == 0 and result.err == ""
        assert f"Usage: qlf {name}" in result.out
        assert f"  qlf {name} " in result.out.partition("Examples:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = importlib.import_module(f"qlf.{name}").command
    leaves = command.commands.values() if isinstance(command, click.Group) else [command]
    options = [param for leaf in leaves for param in leaf.params if isinstance(param, click.Option)]
    assert options
    assert max(map(len, command.epilog.splitlines())) <= 80  # it is not wrapped
    assert [option.name for option in options if not option.help] == []


def test_examples_are_valid_command_lines(qlf: Run) -> None:
    for name in COMMANDS:
        command = importlib.import_module(f"qlf.{name}").command
        examples = [line.split("|")[0].split() for line in command.epilog.splitlines() if line.startswith("  qlf ")]
        assert examples
        for words in examples:
            assert words[1] == name
            args = [word.strip("'") for word in words[2:]]
            leaf = command.commands[args.pop(0)] if isinstance(command, click.Group) else command
            context = leaf.make_context(name, args)
            assert context.params


def test_no_command_is_wrong_usage_and_shows_help(qlf: Run) -> None:
    result = qlf()
    assert result.code == 2 and result.out == "" and "Commands:" in result.err


def test_version(qlf: Run) -> None:
    assert qlf("--version").out == f"qlf {qlformat.__version__}\n"


def test_choices_are_those_of_the_library() -> None:
    assert convert_command.QUANT_TYPES == layout.QUANT_TYPES
    assert tuple(map(int, convert_command.BLOCKSIZES)) == layout.BLOCKSIZES
    assert sorted(convert_command.COMPUTE_DTYPES) == sorted(layout.SOURCE_DTYPES)
    assert sorted(export_command.DTYPES) == sorted(layout.SOURCE_DTYPES)


def test_every_reason_has_a_label() -> None:
    """selection.py names the reasons in the docstring of Decision; the report must put each in words."""
    from qlformat.selection import Decision

    text = " ".join((Decision.__doc__ or "").partition("linear, conv1d (quantized);")[2].split())
    found = [word.strip() for word in text.partition("(left")[0].split(",")]
    assert len(found) > 10
    assert set(found) <= set(reasons.LABELS)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["convrt"], "did you mean 'convert'?"),
        (["verfy", "x"], "did you mean 'verify'?"),
        (["quux"], "the commands are convert, inspect, verify, export"),
        (["convert"], "missing argument 'SRC'"),
        (["convert", "a"], "missing argument 'OUT'"),
        (["convert", "a", "b", "c"], "unexpected extra argument"),
        (["convert", "a", "b", "--bloksize", "64"], "Did you mean '--blocksize'?"),
        (["convert", "a", "b", "--blocksize", "65"], "'65' is not one of"),
        (["convert", "a", "b", "--quant-type", "int4"], "'int4' is not one of"),
        (["convert", "a", "b", "--threads", "0"], "0 is not in the range"),
        (["convert", "a", "b", "--threads", "two"], "'two' is not a valid whole number"),
        (["convert", "a", "b", "--shard-size", "5XB"], "'5XB' is not a size; write 5GB, 500MB or 2GiB"),
        (["convert", "a", "b", "--shard-size", "0"], "'0' is out of range"),
        (["convert", "a", "b", "--shard-size", "5"], "'5' has no unit and would be bytes; write 5GB or 5B"),
        (["convert", "", "b"], "invalid value for 'SRC': it is empty; is a shell variable unset?"),
        (["convert", "a", ""], "invalid value for 'OUT': it is empty"),
        (["export", "a", "", "--dtype", "float32"], "invalid value for 'OUT': it is empty"),
        (["verify", "a", "--source", ""], "invalid value for '--source': it is empty"),
        (["inspect", ""], "invalid value for 'PATH': it is empty"),
        (["export", "a", "b"], "missing option '--dtype'"),
        (["export", "a", "b", "--dtype", "int8"], "'int8' is not one of"),
        (["verify"], "missing argument 'PATH'"),
        (["--bogus"], "no such option '--bogus'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(qlf: Run, args: list[str], expected: str) -> None:
    result = qlf(*args)
    assert result.code == 2 and result.out == ""
    assert expected in result.error
    assert result.error.startswith("qlf: error: ") and "--help')" in result.error


def test_wrong_usage_with_json(qlf: Run) -> None:
    result = qlf("convert", "a", "--json")
    assert result.code == 2
    assert result.json == {"error": {"rule": None, "message": result.error.removeprefix("qlf: error: ")}}


def test_flags_after_two_dashes_are_paths(qlf: Run, tmp_path: Path) -> None:
    result = qlf("verify", "--", "--json")
    assert result.code == 1 and result.out == "" and "--json" in result.error


def test_completion_of_commands(child: Run) -> None:
    variables = {"_QLF_COMPLETE": "bash_complete", "COMP_WORDS": "qlf ver", "COMP_CWORD": "1"}
    result = child("-c", "from qlf.main import main; main()", env=variables)
    assert result.out.split() == ["plain,verify"]
