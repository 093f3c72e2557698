"""`qlf eval`: how well does a model predict a text, and how far is it from another one?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlf import options, output
from qlf.training_progress import training_progress

if TYPE_CHECKING:
    from qlformat.quality.evaluation import Evaluation

DTYPES = ("bfloat16", "float16", "float32")
_INT = click.IntRange(min=1)

EPILOG = """\b
MODEL and OTHER are directories or Hub repositories ORG/MODEL[@revision], in 4
or 16 bits; A is a peft adapter. FILE of --text is UTF-8 text, that of --data
holds rows as qlf finetune takes them: only what it would train on counts.
\b
Each token of the text counts once, in a window where at least W - S tokens
stand before it, but for the first window; W is --window and S --stride. The
protocol: docs/evaluation.md. The KL divergence is KL(OTHER || MODEL), in nats.
\b
Examples:
  qlf eval my-model-nf4 --text wiki.txt
  qlf eval my-model-nf4 --text wiki.txt --against ORG/MODEL --max-tokens 20000
  qlf eval my-model-nf4 --adapter my-adapter --data held-out.jsonl --json
"""


@click.command("eval", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("model", type=options.Location())
@click.option("--adapter", type=options.Location(), metavar="A", help="A peft adapter to put on MODEL.")
@options.allow_base_mismatch
@click.option("--text", type=options.Location(path_type=Path), metavar="FILE", help="Evaluate on this text.")
@click.option("--data", type=options.Location(), metavar="FILE", help="Evaluate on these rows, or a Hub dataset.")
@click.option("--against", type=options.Location(), metavar="OTHER", help="Compare with this model, token by token.")
@click.option("--against-adapter", type=options.Location(), metavar="A", help="A peft adapter to put on OTHER.")
@click.option("--window", type=_INT, metavar="W", help="Tokens seen at a time; 1024, or what the context allows.")
@click.option("--stride", type=_INT, metavar="S", help="Tokens between two windows of a text; half a window.")
@click.option("--bos/--no-bos", default=None, help="Begin windows of a text with BOS; as the tokenizer does by itself.")
@click.option("--max-tokens", type=_INT, metavar="N", help="Use the first N tokens of the text, or rows with as many.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Compute in this; float32 on a CPU, else the model's.")
@click.option("--device", metavar="D", help="cpu, cuda or cuda:1; by default the GPU, if there is one.")
@click.option("--keep-4bit", is_flag=True, help="Stay in 4 bits on the CPU: least memory, slow.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of torch.")
@options.threads
@options.quiet
@options.common
def command(
    model: str,
    adapter: str | None,
    allow_base_mismatch: bool,
    text: Path | None,
    data: str | None,
    against: str | None,
    against_adapter: str | None,
    window: int | None,
    stride: int | None,
    bos: bool | None,
    max_tokens: int | None,
    dtype: str | None,
    device: str | None,
    keep_4bit: bool,
    seed: int,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure loss and perplexity of MODEL on a text or on conversations."""
    if (text is None) == (data is None):
        raise click.UsageError("give one of --text and --data")
    if against_adapter is not None and against is None:
        raise click.UsageError("--against-adapter needs --against, the model that it goes on")
    if data is not None and (stride is not None or bos is not None):
        raise click.UsageError("--stride and --bos belong to --text: each row of --data is a window of its own")
    import torch
    import transformers

    from qlformat.quality.evaluation import evaluate

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    with training_progress(quiet) as listener:
        found = evaluate(
            model, adapter=adapter, text=text, data=data, window=window, stride=stride, bos=bos,
            max_tokens=max_tokens, dtype=dtype, device=device, keep_4bit=keep_4bit,
            allow_base_mismatch=allow_base_mismatch, against=against, against_adapter=against_adapter, seed=seed,
            progress=listener,
        )  # fmt: skip
    if as_json:
        output.emit_json(found.as_dict())
        return
    output.lines(f"note: {note}" for note in found.notes)
    output.line(_model(found.model, found.adapter), bold=True)
    output.lines(f"  {label:<12} {text}" for label, text in _facts(found))


def _facts(found: Evaluation) -> Iterator[tuple[str, str]]:
    """(label, text) of what was measured."""
    yield "loss", f"{found.loss:.4f} nats a token"
    yield "perplexity", _perplexity(found.perplexity)
    yield "top-1", f"{100 * found.top1_accuracy:.2f} % of the tokens were the likeliest ones"
    yield "counted", f"{found.tokens} of {found.text_tokens} tokens of {found.source}"
    stride = "" if found.stride is None else f", stride {found.stride}"
    begin = ", each begins with BOS" if found.bos else ""
    yield "windows", f"{found.windows} of up to {found.window} tokens{stride}{begin}"
    bits = ", 4 bits" if found.four_bit else ""
    yield "computed", f"in {found.dtype} on {found.device}{bits}, {output.seconds(found.seconds)}"
    other = found.against
    if other is None:
        return
    yield "against", _model(other.model, other.adapter)
    yield "", f"loss {other.loss:.4f}, perplexity {_perplexity(other.perplexity)}"
    yield "difference", f"{other.loss_difference:+.4f} nats a token ({_judged(other.loss_difference)})"
    yield "KL", f"{other.kl_divergence:.4g} nats a token"
    yield "agreement", f"{100 * other.top1_agreement:.2f} % of the likeliest tokens are the same"


def _model(name: str, adapter: str | None) -> str:
    return name if adapter is None else f"{name} with {adapter}"


def _perplexity(value: float | None) -> str:
    return "beyond all numbers" if value is None else f"{value:.4g}" if value >= 1000 else f"{value:.3f}"


def _judged(difference: float) -> str:
    return "equal" if difference == 0 else "worse" if difference > 0 else "better"
