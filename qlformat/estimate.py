"""How much memory fine-tuning takes, from config.json alone, before anything is downloaded or loaded.

found = estimate("ORG/MODEL", rank=64, seq_len=512, gpu=24_000_000_000)
found.memory.needed, found.fits, found.advice
finetune_memory(read_config("ORG/MODEL"), batch_size=4).total
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlformat import remote
from qlformat.causal_models import CausalModel, describe
from qlformat.errors import QlfError
from qlformat.layout import Recipe, strict_json
from qlformat.training_memory import RUNTIME_BYTES, Memory, Run, advice, finetune_memory, full_memory, smallest

__all__ = ["Estimate", "Memory", "Run", "estimate", "finetune_memory", "read_config"]


@dataclass(frozen=True)
class Estimate:
    """What fine-tuning a model takes.

    Attributes:
        name: the model as it was asked for.
        model, run: its shape, and the run.
        memory: of QLoRA as the run asks for it; the others change one thing of it: the base's recipe, no checkpointing,
            plain AdamW.
        least: the least that QLoRA can take for this model.
        full: weights, gradients and optimizer of full 16-bit fine-tuning.
        gpu: bytes of the GPU that was asked about, or None.
        advice: what would make it fit, where it does not.
        notes: what the numbers do not cover.
    """

    name: str
    model: CausalModel
    run: Run
    memory: Memory
    single_quant: Memory
    unquantized: Memory
    unchecked: Memory
    plain_adam: Memory
    least: Memory
    full: int
    gpu: int | None
    advice: list[tuple[str, Memory]]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether it fits on the GPU, with the optimizer paged out if need be; None where none was named."""
        return None if self.gpu is None else self.memory.fits(self.gpu) or self.memory.fits_paged(self.gpu)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        model = self.model
        kinds = ("linear", "embedding", "positions", "head", "others", "total")
        return {
            "name": self.name,
            "model_type": model.model_type,
            "parameters": {kind: getattr(model, kind) for kind in kinds},
            "trainable": self.memory.trainable,
            "run": asdict(self.run),
            "memory": self.memory.as_dict(),
            "single_quantization": self.single_quant.as_dict(),
            "unquantized": self.unquantized.as_dict(),
            "without_checkpointing": self.unchecked.as_dict(),
            "plain_adam": self.plain_adam.as_dict(),
            "least": self.least.as_dict(),
            "full_finetuning": self.full,
            "runtime": RUNTIME_BYTES,
            "gpu": self.gpu,
            "fits": self.fits,
            "advice": [{"change": text, "needed": memory.needed} for text, memory in self.advice],
            "notes": list(self.notes),
        }


def estimate(name: str | Path, *, gpu: int | None = None, **options: Any) -> Estimate:
    """What fine-tuning a model takes, from its config.json alone.

    Args:
        name: a directory, a config.json, or a Hub repository ORG/MODEL[@revision].
        gpu: bytes of the GPU that it should fit on.
        options: fields of Run.

    Raises:
        QlfError: there is no config.json, its architecture is unknown, or an option is out of range.
    """
    model, run = describe(read_config(name)), Run(**options)
    memory = finetune_memory(model, run)
    notes = []
    if model.context is not None and run.seq_len > model.context:
        notes.append(f"{run.seq_len} tokens are more than the model's context of {model.context}")
    if model.scores:
        notes.append(f"{model.model_type} has no fused attention: activations grow with the square of the length")
    if not model.quantized:
        notes.append(f"bitsandbytes does not quantize the linear layers of {model.model_type}: they stay in 16 bits")
    return Estimate(
        str(name),
        model,
        run,
        memory,
        single_quant=finetune_memory(model, run, recipe=Recipe(double_quant=False)),
        unquantized=finetune_memory(model, run, recipe=None),
        unchecked=finetune_memory(model, run, checkpointing=False),
        plain_adam=finetune_memory(model, run, optimizer="adamw_torch"),
        least=smallest(model),
        full=full_memory(model),
        gpu=gpu,
        advice=advice(model, run, gpu) if gpu is not None and not memory.fits(gpu) else [],
        notes=tuple(notes),
    )


def read_config(model: str | Path) -> Mapping[str, Any]:
    """The config.json of a directory, of a file, or of a Hub repository, from which nothing else is fetched.

    Raises:
        QlfError: there is none, it is no JSON object, or the Hub does not deliver it.
    """
    path = Path(model)
    if path.is_file():
        try:
            data = path.read_bytes()
        except OSError as error:
            raise QlfError(f"{path}: cannot be read: {error.strerror}") from None
    else:
        files = remote.open_files(model)
        if "config.json" not in files.sizes:
            raise QlfError(f"{files.name}: found no config.json, which says what the model is")
        data = files.read("config.json")
    try:
        config = strict_json(data)
    except ValueError as error:
        raise QlfError(f"not valid JSON: {error}", file="config.json") from None
    if not isinstance(config, dict):
        raise QlfError(f"found a JSON {type(config).__name__}, needed an object", file="config.json")
    return config
