"""`qlf finetune`: train a LoRA adapter on a 4-bit base. TRL, peft, bitsandbytes and accelerate do the work."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat.errors import QlfError
from qlformat.finetune import artifacts, attention, base, budget, checkpointing, layers, metrics, processes
from qlformat.finetune import options as opts
from qlformat.finetune.metrics import Listener, TrainingProgress
from qlformat.finetune.preparation import prepare
from qlformat.finetune.session import FinetuneReport, Outcome, Prepared
from qlformat.staging import Staging

if TYPE_CHECKING:
    import torch

__all__ = ["FinetuneReport", "finetune", "prepare"]


def finetune(
    prepared: Prepared,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Listener | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> FinetuneReport:
    """Train, and leave the adapter in `out`; it appears when it is complete.

    Until then the run lives beside it, in `.OUT.qlf-partial`, with its checkpoints and metrics.jsonl. On a CPU the same
    options, data and versions give the same bytes, also when the run was killed and resumed.

    Args:
        prepared: from `prepare`.
        out: the adapter's directory.
        resume: go on from the newest checkpoint of an interrupted run; begin if there is none.
        overwrite: replace `out`, and forget an interrupted run.
        progress: called with TrainingProgress.
        should_stop: asked between micro-batches; when true, everything is saved and Interrupted raised.

    Raises:
        QlfError: `out` exists; there is too little memory; the options differ from those of the run to resume; the
            loss is not finite; ...
        Interrupted: as `should_stop` asked for.
    """
    target = Path(out)
    main = int(os.environ.get("RANK", "0")) == 0
    budget.check(prepared.budget)
    checkpoint = checkpointing.check_work(target, resume, overwrite)
    if checkpoint is not None:
        _check_same_run(checkpoint.parent, prepared)
        processes.check_same(checkpoint, prepared.placement.processes)
    staging: AbstractContextManager[Any] = (
        Staging(target, overwrite=overwrite, resume=checkpoint is not None) if main else nullcontext()
    )
    with staging as stage:
        if stage is not None:
            stage.keep = True  # a run that failed after hours must be able to go on
            text = prepared.options.to_yaml("What was in force. Replay: qlf finetune --config finetune.yaml -o OUT")
            (stage.path / checkpointing.OPTIONS_FILE).write_text(text, encoding="utf-8")
        run = _Run(prepared, checkpointing.work_directory(target), checkpoint, progress, should_stop)
        try:
            outcome = run.train()
        except BaseException:
            if stage is not None:
                stage.keep = bool(checkpointing.checkpoints(stage.path))  # nothing to go on from is nothing to keep
            raise
        if stage is not None:
            report = run.finish(target, outcome)
            stage.commit()
            return report
    return run.report(target, outcome)


def _check_same_run(work: Path, prepared: Prepared) -> None:
    """Raise QlfError when the interrupted run had other options."""
    path = work / checkpointing.OPTIONS_FILE
    if not path.is_file():
        return
    before, now = opts.read_yaml(path), prepared.options.as_dict()
    changed = [name for name in opts.NAMES if name not in _FREE and before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise QlfError(
            f"{name} is {now[name]!r}, the run to resume has {before.get(name)!r}; give the same options or start anew "
            "with --overwrite"
        )


_FREE = frozenset(("keep", "log_steps", "save_steps", "report_to"))
"""Options that do not change what is learnt."""


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        prepared: Prepared,
        work: Path,
        checkpoint: Path | None,
        progress: Listener | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self._prepared, self._work, self._checkpoint = prepared, work, checkpoint
        self._progress, self._should_stop = progress, should_stop
        self._notes = list(prepared.notes)
        self._trainer: Any = None
        self._state: dict[str, Any] | None = None

    def train(self) -> Outcome:
        """Load the base, train, and leave checkpoints in the working directory."""
        import torch
        import transformers

        from qlformat.finetune import sft

        options = self._prepared.options
        self._tell("loading")
        transformers.set_seed(options.seed)
        device, dtype = self._device()
        model = base.load_for_training(self._prepared.base, device, dtype, processes.storage(dtype))
        tuned = self._adapted(model, device)
        trainable = layers.trainable(tuned)
        main = int(os.environ.get("RANK", "0")) == 0
        step = 0 if self._checkpoint is None else int(self._checkpoint.name.rpartition("-")[2])
        log = metrics.MetricsFile(self._work / metrics.FILE_NAME, step) if main else None
        watch = sft.callback_class()(log, self._progress if main else None, self._should_stop)
        trainer = self._trainer = self._make_trainer(tuned, device, dtype, watch)
        layers.trainable(trainer.model)  # TRL was at it
        try:
            trainer.train(resume_from_checkpoint=None if self._checkpoint is None else str(self._checkpoint))
        except sft.Stop:
            self._save_stopped(watch)
        except torch.OutOfMemoryError as error:
            raise QlfError(
                f"out of GPU memory: {' '.join(str(error).split())[:160]}; try a shorter --seq-len"
            ) from None
        if trainer.state.global_step < trainer.state.max_steps:
            raise checkpointing.Interrupted(trainer.state.global_step, self._work)
        self._state = processes.whole_state(trainer.model)
        return Outcome(trainer.state.global_step, trainable, watch.rate(), watch.seconds())

    def _device(self) -> tuple[torch.device, torch.dtype]:
        import torch

        where, options = self._prepared.placement, self._prepared.options
        if self._prepared.sources.get("optimizer", "").startswith("auto") and where.on_cpu:
            self._notes.append(
                f"on a CPU: {options.compute_dtype} compute and plain AdamW (paged 8-bit AdamW needs CUDA)"
            )
        return torch.device(where.device), getattr(torch, options.compute_dtype)

    def _adapted(self, model: Any, device: torch.device) -> Any:
        options = self._prepared.options
        rows = attention.use_row_attention(model)
        if not rows and options.packing and not getattr(model, "_supports_attention_backend", False):
            raise QlfError(f"{type(model).__name__} cannot keep packed rows apart; give --no-packing")
        self._row_attention = rows
        tuned = layers.add_lora(model, options, self._prepared.base.name)
        if device.type == "cpu":
            layers.use_fast_dropout(tuned)
        if options.init != "default":
            from qlformat.finetune import initialization

            self._tell(options.init)
            directory, source = self._prepared.base.directory, str(options.source)
            self._notes.append(initialization.begin(tuned, directory, source, options.init))
        return tuned

    def _make_trainer(self, tuned: Any, device: torch.device, dtype: torch.dtype, watch: Any) -> Any:
        from transformers import PrinterCallback
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        from qlformat.finetune import sft

        train, held_out = self._prepared.datasets
        tokenizer = self._prepared.tokenizer
        free = self._row_attention or self._prepared.options.packing
        trainer = sft.trainer_class()(
            model=tuned,
            args=self._arguments(device, dtype, len(train)),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=free),
            keep=self._prepared.options.keep,
            callbacks=[watch],
        )
        processes.keep_precision(trainer.accelerator)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self, device: torch.device, dtype: torch.dtype, sequences: int) -> Any:
        import torch
        from trl.trainer.sft_config import SFTConfig

        o = self._prepared.options
        world = int(os.environ.get("WORLD_SIZE", "1"))
        steps = o.max_steps or math.ceil(
            o.epochs * math.ceil(math.ceil(sequences / world / o.batch_size) / o.grad_accum)
        )
        tenth = max(1, steps // 10)
        evaluates = self._prepared.held_out is not None
        # bfloat16 by autocast: the adapter and its optimizer stay float32.
        mixed: dict[str, Any] = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
        try:
            return SFTConfig(
                output_dir=str(self._work),
                num_train_epochs=o.epochs, max_steps=o.max_steps or -1,
                per_device_train_batch_size=o.batch_size, per_device_eval_batch_size=o.batch_size,
                gradient_accumulation_steps=o.grad_accum,
                learning_rate=o.lr, lr_scheduler_type=o.schedule, warmup_steps=o.warmup,
                optim=o.optimizer, adam_beta2=o.beta2, max_grad_norm=o.grad_norm, weight_decay=o.weight_decay,
                gradient_checkpointing=o.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
                train_sampling_strategy="group_by_length" if o.group_by_length else "random",
                logging_steps=o.log_steps, logging_nan_inf_filter=False,
                eval_strategy="steps" if evaluates else "no", eval_steps=o.eval_steps or tenth,
                eval_on_start=evaluates and self._checkpoint is None,
                save_strategy="steps", save_steps=o.save_steps or tenth,
                seed=o.seed, use_cpu=device.type == "cpu", dataloader_pin_memory=device.type == "cuda",
                packing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
                report_to=list(o.report_to) or "none", disable_tqdm=True, log_level="error", log_level_replica="error",
                ddp_find_unused_parameters=False if world > 1 else None,
                **mixed,
            )  # fmt: skip
        except ValueError as error:
            raise QlfError(f"TRL refuses these options: {' '.join(str(error).split())[:300]}") from None

    def _save_stopped(self, watch: Any) -> None:
        """Save what was true after the last update: nothing has changed since but the random state."""
        if self._trainer.state.global_step and watch.state_after_step is not None:
            checkpointing.restore_random_state(watch.state_after_step)
            self._trainer._save_checkpoint(self._trainer.model, None)

    def _tell(self, phase: str) -> None:
        if self._progress is not None and int(os.environ.get("RANK", "0")) == 0:
            self._progress(TrainingProgress(phase))

    def finish(self, out: Path, outcome: Outcome) -> FinetuneReport:
        """Write what is published into the working directory, and remove what is not."""
        self._tell("saving")
        report = self.report(out, outcome)
        artifacts.write(self._work, self._trainer.model, self._prepared, outcome, report, self._state)
        return report

    def report(self, out: Path, outcome: Outcome) -> FinetuneReport:
        """The run in figures."""
        path = self._work / metrics.FILE_NAME
        main = int(os.environ.get("RANK", "0")) == 0
        lines = metrics.read(path) if main else []  # the first process renames the directory at any moment
        losses = [line["loss"] for line in lines if "loss" in line]
        held = [line["eval_loss"] for line in lines if "eval_loss" in line]
        return FinetuneReport(
            out, outcome.steps, losses[-1] if losses else None, held[0] if held else None, held[-1] if held else None,
            outcome.trainable.params, self._prepared.base.params, outcome.tokens_per_second, outcome.seconds,
            tuple(self._notes),
        )  # fmt: skip
