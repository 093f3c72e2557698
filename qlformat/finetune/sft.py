"""TRL's SFTTrainer with what a run of ours adds: whole checkpoints, a clean stop, and no step on a loss of NaN."""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError, TargetError
from qlformat.finetune import checkpointing
from qlformat.finetune.metrics import Listener, MetricsFile, TrainingProgress
from qlformat.staging import free_bytes, target_error


class Stop(Exception):
    """Raised between two micro-batches when the run is to stop."""


@functools.cache
def trainer_class() -> Any:
    """The class, made on first use: importing TRL costs seconds."""
    from transformers import Trainer
    from trl.trainer.sft_trainer import SFTTrainer

    class QlfTrainer(SFTTrainer):  # type: ignore[misc] # untyped
        """SFTTrainer for a frozen 4-bit base with LoRA layers."""

        def __init__(self, *args: Any, keep: int, **kwargs: Any) -> None:
            model = kwargs["model"]
            exact = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
            super().__init__(*args, **kwargs)
            # TRL rounds the adapter of a quantized model to bfloat16. An update of relative size below 2**-9 is then
            # lost, and a LoftQ start is spoilt; peft's own default, float32, costs four bytes for each parameter.
            for name, parameter in self.model.named_parameters():
                if name in exact:
                    parameter.data = exact[name]
            self._keep = keep
            self._watch = next(c for c in self.callback_handler.callbacks if isinstance(c, callback_class()))

        def _send_telemetry(self) -> None:
            """Nothing is sent anywhere."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            inputs = args[1] if len(args) > 1 else kwargs["inputs"]
            mask = inputs.get("attention_mask")
            count = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            loss: Any = super().training_step(*args, **kwargs)
            self._watch.tokens += count * self.args.world_size
            if not math.isfinite(float(loss)):
                self._refuse(f"the loss is {float(loss)}")
            return loss

        def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
            norm = super()._get_grad_norm(*args, **kwargs)
            if norm is not None and not math.isfinite(float(norm)):
                self._refuse(f"the gradient's norm is {float(norm)}")
            return norm

        def _refuse(self, found: str) -> None:
            saved = checkpointing.checkpoints(Path(self.args.output_dir))
            kept = f"the last good checkpoint is {saved[-1][1]}" if saved else "no checkpoint was saved yet"
            raise QlfError(
                f"{found} in step {self.state.global_step + 1}; training stopped, {kept}; try a lower --lr, and look "
                "at the rows of that step"
            )

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            """Write beside, flush, rename. Trainer's own method, so that TRL adds no card for each checkpoint."""
            work = Path(self.args.output_dir)
            partial = work / checkpointing.PARTIAL
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._partial: Path | None = partial
            try:
                Trainer._save_checkpoint(self, model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    name = f"checkpoint-{self.state.global_step}"
                    checkpointing.publish(partial / name, work / name, self._keep)
                    shutil.rmtree(partial, ignore_errors=True)
            except Exception as error:
                failure = _full_disk(error, work)
                shutil.rmtree(partial, ignore_errors=True)
                if failure is None:
                    raise
                raise failure from error
            finally:
                self._partial = None
            self.accelerator.wait_for_everyone()

        def _get_output_dir(self, trial: Any) -> str:
            partial = getattr(self, "_partial", None)
            return str(partial) if partial is not None else str(super()._get_output_dir(trial))

    _score_trained_tokens_only()
    return QlfTrainer


def _score_trained_tokens_only() -> None:
    """Let TRL's fused output layer project only the tokens that have a label, on a CPU as on a GPU.

    Elsewhere than on Triton's devices TRL projects all, to keep shapes constant for compilers; nothing is compiled
    here, and in a chat half of the tokens and more have no label. Where TRL has no such switch, nothing changes.
    """
    from trl.trainer import utils

    if hasattr(utils, "_use_triton"):
        utils._use_triton = lambda device: True


def _full_disk(error: Exception, work: Path) -> TargetError | None:
    """The line for a disk that ran full; torch and safetensors report it in exceptions of their own."""
    import errno

    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        full = error
    elif type(error).__name__ == "SafetensorError" or (isinstance(error, RuntimeError) and "write" in str(error)):
        if free_bytes(work) > 1 << 20 and "No space" not in str(error) and "file write failed" not in str(error):
            return None
        full = OSError(errno.ENOSPC, "No space left on device")
    else:
        return None
    saved = checkpointing.checkpoints(work)
    kept = f"; the checkpoint of step {saved[-1][0]} is whole, --resume goes on from it" if saved else ""
    return TargetError(f"{target_error(full, work)}{kept}")


@functools.cache
def callback_class() -> Any:
    """Reports progress, writes metrics.jsonl, and stops a run that is asked to stop."""
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        """See callback_class."""

        def __init__(
            self, metrics: MetricsFile | None, listener: Listener | None, should_stop: Callable[[], bool] | None
        ) -> None:
            self._metrics, self._listener, self._should_stop = metrics, listener, should_stop
            self.state_after_step: dict[str, Any] | None = None
            self._began = self._away = 0.0
            self._first = self._tokens_before = 0
            self._loss: float | None = None
            self.tokens = 0
            self._evaluating: float | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._began, self._away, self._first = time.monotonic(), 0.0, state.global_step
            self._tell("training", state)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._resume_clock()

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._tell("training", state)
            if self._asked(args):
                raise Stop

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            last = state.global_step >= state.max_steps
            if last:
                control.should_save = True
                control.should_evaluate = control.should_evaluate or args.eval_strategy != "no"
            elif self._asked(args):
                control.should_save = control.should_training_stop = True
            self.state_after_step = checkpointing.random_state()
            self._tell("training", state)

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._evaluating is None:
                self._evaluating = time.monotonic()
            self._tell("evaluating", state)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._resume_clock()
            self.state_after_step = checkpointing.random_state()  # loading the rows draws a number
            if self._asked(args) and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not logs or "train_runtime" in logs:
                return
            self._loss = logs.get("loss", self._loss)
            if self._metrics is None:
                return
            kept = (
                "loss",
                "eval_loss",
                "grad_norm",
                "learning_rate",
                "mean_token_accuracy",
                "eval_mean_token_accuracy",
            )
            line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
            line |= {name: logs[name] for name in kept if name in logs}
            if "loss" in logs:
                line |= {"tokens_per_second": round(self.rate(), 1), "seconds": round(self.seconds(), 3)}
            self._metrics.append(line)

        def seconds(self) -> float:
            """Spent on training by this process, without evaluations."""
            since = 0.0 if self._evaluating is None else time.monotonic() - self._evaluating
            return time.monotonic() - self._began - self._away - since

        def rate(self) -> float:
            """Tokens a second of this process's part of the run."""
            return self.tokens / max(self.seconds(), 1e-9)

        def _resume_clock(self) -> None:
            if self._evaluating is not None:
                self._away += time.monotonic() - self._evaluating
                self._evaluating = None

        def _asked(self, args: Any) -> bool:
            asked = self._should_stop is not None and self._should_stop()
            if args.world_size > 1:  # all processes stop at the same step, or the others wait forever
                flag = torch.tensor(int(asked), device=args.device)
                torch.distributed.all_reduce(flag)
                return bool(flag)
            return asked

        def _tell(self, phase: str, state: Any) -> None:
            if self._listener is None:
                return
            done = state.global_step - self._first
            left = self.seconds() / done * (state.max_steps - state.global_step) if done else None
            self._listener(TrainingProgress(phase, state.global_step, state.max_steps, self._loss, self.rate(), left))

    return Watch
