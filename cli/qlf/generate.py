"""`qlf generate`: ask a checkpoint something, and watch the answer come."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unicodedata import category

import click

from qlf import options, output

if TYPE_CHECKING:
    from qlformat.generator import Answer

DTYPES = ("bfloat16", "float16", "float32")
MAX_PROMPT_BYTES = 16 << 20

EPILOG = """\b
BASE is a directory or a Hub repository ORG/MODEL[@revision], A a peft adapter.
The prompt goes through the model's chat template, if it has one; --raw gives
it to the model as it is.
\b
The answer is streamed to stdout, its speed is told on stderr. On a GPU the
model stays in 4 bits. On a CPU its weights are dequantized first, which takes
as much memory as the 16-bit model and is several times faster for each token;
--keep-4bit goes without.
\b
Examples:
  qlf generate my-model-nf4 --prompt Hello
  qlf generate ORG/MODEL --adapter my-adapter --prompt Hello --temperature 0.7
  cat question.txt | qlf generate my-model-nf4 --prompt - --json
"""


@click.command("generate", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("base", type=options.Location())
@click.option("--adapter", type=options.Location(), metavar="A", help="A peft adapter to put on top.")
@options.allow_base_mismatch
@click.option("--prompt", required=True, metavar="TEXT", help="What to ask; - reads it from stdin.")
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="No chat template: continue the prompt as text.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N", help="Stop after N."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="T",
    help="0 takes the likeliest token each time.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    default=1.0,
    show_default=True,
    metavar="P",
    help="Sample from the likeliest tokens that make up P.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="For sampling.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Compute in this; by default what the model names.")
@click.option("--device", metavar="D", help="cpu, cuda, cuda:1 or auto; by default the GPU, if there is one.")
@click.option("--keep-4bit", is_flag=True, help="Stay in 4 bits on the CPU: least memory, slow.")
@options.threads
@options.common
def command(
    base: str,
    adapter: str | None,
    allow_base_mismatch: bool,
    prompt: str,
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    dtype: str | None,
    device: str | None,
    keep_4bit: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Answer a prompt with the checkpoint BASE."""
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template; leave out --raw, or put the text into the prompt")
    text = _read(prompt)
    _quiet()
    from qlformat.generator import Generator, Sampling

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    generator = Generator(
        base, adapter, dtype=dtype, device=device, keep_4bit=keep_4bit, allow_base_mismatch=allow_base_mismatch
    )
    answer = generator.answer(
        text,
        system=system,
        raw=raw,
        sampling=Sampling(max_new_tokens, temperature, top_p, seed),
        on_text=None if as_json else _show,
    )
    if as_json:
        output.emit_json(answer.as_dict())
        return
    click.echo()
    for line in _told(answer):
        click.echo(output.clean(line), err=True)


def _read(prompt: str) -> str:
    """The prompt, from stdin where it is -."""
    if prompt != "-":
        text = prompt
    else:
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise click.UsageError(f"stdin has more than {MAX_PROMPT_BYTES} bytes, which is no prompt")
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise click.UsageError("stdin is not UTF-8 text") from None
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    return text


def _quiet() -> None:
    """Keep transformers' bars, advice and deprecations off the terminal: they are for programmers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _show(piece: str) -> None:
    """Print a piece of the answer. A model may write control characters; they must not reach the terminal."""
    shown = "".join(char if char in "\n\t" or category(char) != "Cc" else output.clean(char) for char in piece)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(shown.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _told(answer: Answer) -> Iterator[str]:
    """How it went, in lines."""
    yield from (f"  note: {note}" for note in answer.notes)
    speed = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    end = ", cut at --max-new-tokens" if answer.finish == "length" else ""
    yield (
        f"  {answer.new_tokens} tokens{speed}, the first after {output.seconds(answer.first_token_seconds)}{end} "
        f"(load {output.seconds(answer.load_seconds)}; {answer.device}, {answer.dtype}"
        f"{', 4 bits' if answer.four_bit else ''})"
    )
