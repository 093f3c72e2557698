"""What a finished run leaves beside the adapter: qlf.json, the model card, the curves."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qlformat
from qlformat import manifest
from qlformat.adapter import CONFIG_NAME, AdapterManifest, BasePin
from qlformat.finetune import checkpointing, metrics

if TYPE_CHECKING:
    from qlformat.finetune.session import FinetuneReport, Outcome, Prepared

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "numpy",
    "peft",
    "qlformat",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
)


def write(work: Path, model: Any, prepared: Prepared, outcome: Outcome, report: FinetuneReport) -> None:
    """Turn the working directory into what is published.

    Left are adapter_config.json, adapter_model.safetensors, qlf.json, finetune.yaml, metrics.jsonl, loss.png and
    README.md. Tokenizer and chat template are the base's.
    """
    model.save_pretrained(work)
    _sort_targets(work / CONFIG_NAME)
    for _, path in checkpointing.checkpoints(work):
        shutil.rmtree(path)
    for name in (checkpointing.PARTIAL, "runs"):
        shutil.rmtree(work / name, ignore_errors=True)
    metrics.draw(metrics.read(work / metrics.FILE_NAME), work / metrics.CURVES, f"LoRA on {prepared.base.name}")
    fields = _fields(prepared, outcome, report)
    writer = f"qlformat {qlformat.__version__}"
    pin = BasePin(prepared.base.fingerprint, prepared.base.repo_id, prepared.base.revision)
    (work / manifest.FILE_NAME).write_bytes(AdapterManifest(writer, pin).to_json(fields))
    (work / "README.md").write_text(_card(prepared, report), encoding="utf-8")


def _sort_targets(path: Path) -> None:
    """peft writes target_modules in the order of a set, which differs from process to process."""
    config = json.loads(path.read_bytes())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fields(prepared: Prepared, outcome: Outcome, report: FinetuneReport) -> dict[str, Any]:
    held_out = prepared.held_out
    return {
        "base_recipe": prepared.base.recipe,
        "method": {"peft_type": "LORA", "trainable": outcome.trainable.params, "layers": outcome.trainable.layers},
        "options": prepared.options.as_dict(),
        "options_from": dict(prepared.sources),
        "seeds": {"seed": prepared.options.seed},
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
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card(prepared: Prepared, report: FinetuneReport) -> str:
    """The model card: how to load it, what it was trained on, how it went."""
    base, options, data = prepared.base, prepared.options, prepared.train
    head = {
        "library_name": "peft",
        "base_model": base.repo_id or base.name,
        "tags": ["qlora", "lora", "nf4", "qlformat"],
    }
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())
    losses = [f"| training loss at the end | {report.train_loss:.4f} |"] if report.train_loss is not None else []
    if report.eval_loss is not None:
        losses += [f"| held-out loss, before -> after | {report.eval_start:.4f} -> {report.eval_loss:.4f} |"]
    share = 100 * report.trainable / report.params
    used = [f"| {name} | {value} |" for name, value in options.as_dict().items() if value not in (None, [], False)]
    return f"""---
{front}---

# A LoRA adapter for {base.repo_id or base.name}

Trained with `qlf finetune` (QLoRA) on a 4-bit base: {report.trainable:,} parameters,
{share:.2f} % of the base's {report.params:,}.

```python
import transformers, peft

base = transformers.AutoModelForCausalLM.from_pretrained({(base.repo_id or base.name)!r})
model = peft.PeftModel.from_pretrained(base, "this directory or repository")
```

It belongs to the base with fingerprint `{base.fingerprint}`.

## How it went

![loss]({metrics.CURVES})

| | |
|---|---|
| updates | {report.steps} |
{chr(10).join(losses)}

## Data

{len(data)} rows of {data.name} (format {data.format}), {prepared.stats.tokens:,} tokens, of these
{prepared.stats.trained_tokens:,} trained.
Rows sha256 `{data.sha256}`.

## Options

`{checkpointing.OPTIONS_FILE}` replays the run; `qlf.json` has versions and hashes.

| option | value |
|---|---|
{chr(10).join(used)}
"""
