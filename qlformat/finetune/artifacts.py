"""What a finished run leaves beside the adapter: qlf.json, the model card, the curves."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qlformat
from qlformat import cards, manifest
from qlformat.adapter import CONFIG_NAME, AdapterManifest, BasePin, file_entries
from qlformat.file_names import CARD
from qlformat.finetune import checkpointing, fixed_part, metrics

if TYPE_CHECKING:
    from qlformat.finetune.base import Base
    from qlformat.finetune.session import FinetuneReport, Outcome, Prepared

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "numpy",
    "peft",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
)


def write(
    work: Path,
    model: Any,
    prepared: Prepared,
    outcome: Outcome,
    report: FinetuneReport,
    state: dict[str, Any] | None = None,
) -> None:
    """Turn the working directory into what is published.

    Left are adapter_config.json, adapter_model.safetensors, qlf.json, finetune.yaml, metrics.jsonl, loss.png and
    README.md. Tokenizer and chat template are the base's. `state` has the trained parameters where those of the model
    are spread over processes.
    """
    model.save_pretrained(work, state_dict=state)
    fixed_part.publish(work, model)
    _sort_targets(work / CONFIG_NAME)
    for _, path in checkpointing.checkpoints(work):
        shutil.rmtree(path)
    shutil.rmtree(work / checkpointing.PARTIAL, ignore_errors=True)
    if "tensorboard" not in prepared.options.report_to:
        shutil.rmtree(work / "runs", ignore_errors=True)
    _share(work)
    metrics.draw(metrics.read(work / metrics.FILE_NAME), work / metrics.CURVES, f"LoRA on {_title(prepared.base)}")
    fields = _fields(prepared, outcome, report)
    writer = f"qlformat {qlformat.__version__}"
    pin = BasePin(prepared.base.fingerprint, prepared.base.repo_id, prepared.base.revision)
    made = AdapterManifest(writer, pin, files=file_entries(work))
    (work / manifest.FILE_NAME).write_bytes(made.to_json(fields))
    (work / CARD).unlink(missing_ok=True)  # peft's empty form
    cards.write_card(work, name=report.out.resolve().name, online=False)


def _sort_targets(path: Path) -> None:
    """peft writes target_modules in the order of a set, which differs from process to process."""
    config = json.loads(path.read_bytes())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _share(work: Path) -> None:
    """Give every file the permissions of a new one; safetensors leaves its files to their owner alone."""
    mode = (work / checkpointing.OPTIONS_FILE).stat().st_mode & 0o777
    for path in work.iterdir():
        if path.is_file():
            path.chmod(mode)


def _title(base: Base) -> str:
    """The base's name for people; of a local directory, its last part."""
    return base.repo_id or Path(os.path.realpath(base.name)).name


def _fields(prepared: Prepared, outcome: Outcome, report: FinetuneReport) -> dict[str, Any]:
    held_out = prepared.held_out
    return {
        "base_recipe": prepared.base.recipe,
        "base_source": prepared.base.source,
        "method": {
            "peft_type": "LORA",
            "trainable": report.trainable,
            "params": report.params,
            "layers": outcome.trainable.layers,
        },
        "options": prepared.options.as_dict(),
        "options_from": dict(prepared.sources),
        "seeds": {"seed": prepared.options.seed},
        "hardware": {
            "device": prepared.placement.device.partition(":")[0],
            "processes": prepared.placement.processes,
            "sequences_per_update": _global_batch(prepared),
        },
        "data": {
            "train": prepared.train.as_dict(),
            "held_out": None if held_out is None else held_out.as_dict(),
            "tokenized": prepared.stats.as_dict(),
        },
        "result": {
            "steps": report.steps,
            "train_loss": report.train_loss,
            "eval_loss_at_start": report.eval_start,
            "eval_loss": report.eval_loss,
        },
        "versions": {
            "python": sys.version.split()[0],
            "qlformat": qlformat.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
    }


def _global_batch(prepared: Prepared) -> int:
    return prepared.options.batch_size * prepared.options.grad_accum * prepared.placement.processes


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
