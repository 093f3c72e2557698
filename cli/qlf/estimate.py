"""`qlf estimate`: will this model fit, before anything is downloaded?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from qlf import options, output

if TYPE_CHECKING:
    from qlformat.estimate import Estimate

OPTIMIZERS = ("paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "sgd")
_COMMON_GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 141)

EPILOG = """\b
MODEL is a directory, a config.json, or a Hub repository ORG/MODEL[@revision],
16-bit or 4-bit; nothing but its config.json is read.
\b
Bytes of parameters are exact. Activations are added up operation by operation
and were compared with real models; the runtime's own memory is an allowance.
Exit code 1 when it does not fit on the GPU of --gpu.
\b
Examples:
  qlf estimate ORG/MODEL
  qlf estimate ORG/MODEL --rank 64 --seq-len 512 --gpu 24GB
  qlf estimate my-model-nf4 --batch-size 4 --json
"""

_INT = click.IntRange(min=1)


def _gpu(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else options.parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error).replace("5GB, 500MB or 2GiB", "24GB or 24GiB"), ctx, param) from None


@click.command("estimate", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("model", type=options.Location())
@click.option("--rank", type=_INT, default=16, show_default=True, metavar="N", help="Rank of LoRA.")
@click.option("--seq-len", type=_INT, default=1024, show_default=True, metavar="N", help="Tokens of a sequence.")
@click.option("--batch-size", type=_INT, default=1, show_default=True, metavar="N", help="Sequences in one pass.")
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), default=OPTIMIZERS[0], show_default=True, help="Whose state is held."
)
@click.option("--gpu", callback=_gpu, metavar="SIZE", help="Say whether it fits, and what to change: 24GB.")
@options.common
def command(
    model: str, rank: int, seq_len: int, batch_size: int, optimizer: str, gpu: int | None, as_json: bool
) -> int:
    """Estimate the memory that fine-tuning MODEL takes."""
    from qlformat.estimate import estimate

    found = estimate(model, gpu=gpu, rank=rank, seq_len=seq_len, batch_size=batch_size, optimizer=optimizer)
    if as_json:
        output.emit_json(found.as_dict())
        return int(found.fits is False)
    output.line(f"{found.name} ({found.model.model_type})", bold=True)
    output.lines(f"  {label:<12} {text}" for label, text in _facts(found))
    output.line()
    _table(found)
    output.line()
    output.lines(f"  {line}" for line in _verdict(found))
    output.lines(f"  note: {note}" for note in found.notes)
    return int(found.fits is False)


def _facts(found: Estimate) -> Iterator[tuple[str, str]]:
    """(label, text) of the model and what would train."""
    model = found.model
    kinds = {
        "linear": model.linear,
        "embedding": model.embedding,
        "positions": model.positions,
        "output": model.head,
        "norms and biases": model.others,
    }
    parts = ", ".join(f"{name} {output.number(count)}" for name, count in kinds.items() if count)
    tied = "" if model.head else ", output tied to the embedding"
    yield "parameters", f"{output.number(model.total)}: {parts}{tied}"
    share = output.share(found.memory.trainable, model.total)
    layers = len(model.all_linears)
    yield (
        "trainable",
        f"{output.number(found.memory.trainable)} ({share}), LoRA of rank {found.run.rank} on {layers} layers",
    )
    yield "step", f"{found.run.batch_size} x {found.run.seq_len} tokens, {found.run.optimizer}"


def _table(found: Estimate) -> None:
    """Bytes by kind: QLoRA, and with one thing changed in each further column."""
    columns = {
        "QLoRA": found.memory,
        "no DQ": found.single_quant,
        "16-bit base": found.unquantized,
        "no checkpointing": found.unchecked,
        "plain AdamW": found.plain_adam,
    }
    kinds = ("weights", "adapters", "gradients", "optimizer", "activations", "workspace")
    rows = [[f"  {kind}", *(output.size(getattr(memory, kind)) for memory in columns.values())] for kind in kinds]
    rows.append(["  with runtime", *(output.size(memory.needed) for memory in columns.values())])
    output.table(["  bytes of", *columns], rows, frozenset(range(1, len(columns) + 1)))


def _verdict(found: Estimate) -> Iterator[str]:
    """Whether it fits, what to change, and what full fine-tuning would take."""
    memory, needed = found.memory, output.size(found.memory.needed)
    if found.gpu is None:
        fitting = next((size for size in _COMMON_GPUS if memory.fits(size * 10**9)), None)
        yield f"QLoRA needs {needed}" + (
            f": it fits on a GPU of {fitting} GB" if fitting else ", more than one GPU has"
        )
    elif memory.fits(found.gpu):
        left = output.size(found.gpu - memory.needed)
        yield f"fits on {output.size(found.gpu)}: QLoRA needs {needed}, {left} are left"
    elif found.fits:
        yield f"fits on {output.size(found.gpu)} only while the optimizer's state is paged out: QLoRA needs {needed}"
    else:
        yield f"does not fit on {output.size(found.gpu)}: QLoRA needs {needed}"
    if found.gpu is not None and not memory.fits(found.gpu):
        yield from (f"would fit with {text}: {output.size(after.needed)}" for text, after in found.advice)
        if not found.advice:
            least = output.size(found.least.needed)
            more = "; change several, or take a larger GPU" if found.least.fits(found.gpu) else ": take a larger GPU"
            yield f"no single change makes it fit, and rank 4 with 256 tokens needs {least}{more}"
    yield f"full 16-bit fine-tuning needs {output.size(found.full)} and its activations"
