"""`qlf finetune`: a LoRA adapter on a 4-bit base (QLoRA)."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from qlf import errors, launched, options, output
from qlf.training_progress import training_progress

if TYPE_CHECKING:
    from qlformat.finetune.session import FinetuneReport, Prepared

EPILOG = """\b
BASE is a 4-bit checkpoint: a directory or a Hub repository
ORG/MODEL[@revision]. DATA is JSONL, JSON, CSV or Parquet, or a Hub dataset
ORG/NAME[:split]; its format is recognised. The loss is that of the
assistant's tokens alone.
\b
OUT appears when it is complete. Until then the run is in .OUT.qlf-partial
beside it. After a crash or Ctrl-C, the same command with --resume goes on
and ends with the same bytes (on a CPU).
\b
Examples:
  qlf finetune my-model-nf4 --data chats.jsonl -o my-adapter
  qlf finetune my-model-nf4 --data chats.jsonl -o my-adapter --dry-run
  qlf finetune ORG/MODEL --data ORG/CHATS:train -o my-adapter --recipe guanaco
  qlf finetune --config my-adapter/finetune.yaml -o again
"""

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
RECIPES = ("qlora", "guanaco")
INITS = ("default", "loftq", "pissa")
COMPUTE = ("auto", "float32", "bfloat16", "float16")

_INT = click.IntRange(min=1)


def _options(command: Any) -> Any:
    """The options of a run, in the order of the help. What is not given is left to the file and the recipe."""
    table = [
        click.option("--data", type=options.Location(), metavar="DATA", help="What to train on."),
        click.option("-o", "--out", type=options.Location(path_type=Path), required=True, metavar="OUT",
                     help="Where the adapter goes."),
        click.option("--recipe", type=click.Choice(RECIPES), help="Where the defaults come from; qlora if not given."),
        click.option("--config", type=click.Path(path_type=Path), metavar="FILE.yaml", help="Options in YAML."),
        click.option("--rank", type=_INT, metavar="N", help="Rank of LoRA.  [qlora: 16]"),
        click.option("--alpha", type=float, metavar="X", help="Scale of LoRA.  [32]"),
        click.option("--dropout", type=float, metavar="P", help="Dropout in LoRA.  [0.05]"),
        click.option("--target", metavar="NAME,..", help="Layers to adapt.  [all-linear]"),
        click.option("--epochs", type=float, metavar="N", help="Passes over the data.  [1]"),
        click.option("--max-steps", type=_INT, metavar="N", help="Updates; wins over --epochs."),
        click.option("--lr", type=float, metavar="X", help="Learning rate.  [2e-4]"),
        click.option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate.  [cosine]"),
        click.option("--warmup", type=float, metavar="SHARE", help="Share of the steps to warm up in.  [0.03]"),
        click.option("--batch-size", type=_INT, metavar="N", help="Sequences in one pass of a process.  [1]"),
        click.option("--grad-accum", type=_INT, metavar="N", help="Passes before one update.  [16]"),
        click.option("--seq-len", type=_INT, metavar="N", help="Tokens of a sequence.  [1024, or the context]"),
        click.option("--packing/--no-packing", default=None, help="Several rows in a sequence.  [packing]"),
        click.option("--eval-data", type=options.Location(), metavar="DATA", help="Held-out rows."),
        click.option("--eval-split", type=float, metavar="SHARE", help="Share of DATA to hold out."),
        click.option("--eval-steps", type=_INT, metavar="N", help="Updates between evaluations.  [a tenth]"),
        click.option("--save-steps", type=_INT, metavar="N", help="Updates between checkpoints.  [a tenth]"),
        click.option("--optimizer", metavar="NAME", help="[paged_adamw_8bit; CPU: adamw_torch]"),
        click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of everything random.  [0]"),
        click.option("--init", type=click.Choice(INITS), help="How the adapter begins.  [default]"),
        click.option("--source", type=options.Location(), metavar="FP16", help="The 16-bit model, for --init."),
        click.option("--dora", is_flag=True, default=None, help="DoRA: magnitude apart from direction."),
        click.option("--rslora", is_flag=True, default=None, help="Scale by alpha / sqrt(rank)."),
        click.option("--qalora", is_flag=True, default=None, help="QA-LoRA, where peft has it."),
        click.option("--compute-dtype", type=click.Choice(COMPUTE), help="[auto: bfloat16; CPU: float32]"),
        click.option("--skip-bad-rows", is_flag=True, default=None, help="Leave malformed rows out and count them."),
        click.option("--report-to", metavar="NAME,..", help="Also log to tensorboard, wandb, ..."),
    ]  # fmt: skip
    for option in reversed(table):
        command = option(command)
    return command


@click.command("finetune", context_settings=options.CONTEXT, epilog=EPILOG)
@click.argument("base", type=options.Location(), required=False)
@_options
@click.option("--threads", type=_INT, metavar="N", help="CPU threads; all by default. Another number rounds otherwise.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@options.overwrite
@click.option("--dry-run", is_flag=True, help="Show the data, one example and the plan; train nothing.")
@options.quiet
@options.common
def command(
    out: Path,
    config: Path | None,
    threads: int | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Train a LoRA adapter for the 4-bit checkpoint BASE."""
    _give_memory_back()
    _hush()
    launched.end_with_the_others()
    from qlformat.finetune import preview
    from qlformat.finetune.checkpointing import Interrupted
    from qlformat.finetune.trainer import finetune, prepare

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    prepared = prepare({name: value for name, value in given.items() if value is not None}, config)
    if dry_run and not launched.main_process():
        return 0
    if dry_run:
        plan = preview.plan(prepared, histogram=Path(f"{out}-lengths.png"))
        if as_json:
            output.emit_json(plan.as_dict())
        else:
            output.lines(plan.lines())
        return int(prepared.budget.fits is False)
    if not as_json and not quiet and launched.main_process():
        output.lines(_before(prepared))
    try:
        with training_progress(quiet) as listener, _stoppable() as should_stop:
            report = finetune(
                prepared, out, resume=resume, overwrite=overwrite, progress=listener, should_stop=should_stop
            )
    except Interrupted as stopped:
        raise Paused(stopped.step) from None
    if not launched.main_process():
        return 0
    if as_json:
        output.emit_json(report.as_dict())
        return 0
    output.line(f"Wrote {out}", bold=True)
    output.lines(_told(report))
    return 0


class Paused(errors.InterruptedRun):
    """Ctrl-C: what was trained is saved."""

    def __init__(self, step: int) -> None:
        saved = (
            f"saved at step {step}; run the same command with --resume to go on" if step else "nothing was trained yet"
        )
        Exception.__init__(self, f"interrupted; {saved}")


def _hush() -> None:
    """Keep the libraries' bars, advice and warnings off the terminal: they are for programmers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _give_memory_back() -> None:
    """Let glibc return large blocks to the system when they are freed; call it before torch is imported.

    By default it keeps blocks of up to 32 MiB, and training frees thousands of activations of other sizes than the
    next ones. One step over 1024 tokens of a 135M model in float32 on two cores: 3.2 GB and 77 tokens/s by default,
    2.0 GB and 72 with these settings, 1.8 GB and 50 with a threshold of 1 MiB and without huge pages: fresh memory
    costs page faults.
    """
    import ctypes

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_mmap_threshold, m_arena_max = -3, -8
        libc.mallopt(m_mmap_threshold, 8 << 20)
        libc.mallopt(m_arena_max, 2)


@contextmanager
def _stoppable() -> Iterator[Any]:
    """Whether Ctrl-C or SIGTERM came; the second Ctrl-C ends the process at once.

    A launcher hands on the Ctrl-C that the terminal sent to everybody, so in a run of several it comes twice; and it
    sends SIGTERM to the others when one has failed.
    """
    asked = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and launched.another_ended():
            raise SystemExit(1)
        if launched.alone():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            click.echo("qlf: stopping after this pass; Ctrl-C again ends at once", err=True)
        elif number == signal.SIGINT and launched.main_process() and not asked.is_set():
            click.echo("qlf: stopping after this pass", err=True)
        asked.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _before(prepared: Prepared) -> Iterator[str]:
    stats = prepared.stats
    yield (
        f"  data    {len(prepared.train)} rows ({prepared.train.format}), {stats.sequences} sequences of up to "
        f"{stats.seq_len} tokens, {output.share(stats.trained_tokens, stats.tokens)} of {output.number(stats.tokens)} "
        "tokens trained"
    )
    if prepared.held_out is not None:
        yield f"  held    {len(prepared.held_out)} rows for evaluation"


def _told(report: FinetuneReport) -> Iterator[str]:
    """The report in lines, what matters most first."""
    yield from (f"  note: {note}" for note in report.notes)
    if report.eval_loss is not None:
        yield f"  held    loss {report.eval_start:.4f} -> {report.eval_loss:.4f}"
    if report.train_loss is not None:
        yield f"  train   loss {report.train_loss:.4f} at step {report.steps}"
    yield (
        f"  lora    {output.number(report.trainable)} parameters trained and no others, "
        f"{output.share(report.trainable, report.params)} of the base's {output.number(report.params)}"
    )
    yield f"  time    {output.seconds(report.seconds)}, {report.tokens_per_second:.0f} tokens/s"
    yield f"Next: peft.PeftModel.from_pretrained(base, {str(report.out)!r})   # plain peft"
