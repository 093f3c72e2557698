"""LoRA on a 4-bit model: which layers, what trains, and a dropout that does not cost a fifth of a CPU's time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlformat.errors import QlfError
from qlformat.finetune.options import ALL_LINEAR, Options


@dataclass(frozen=True)
class Trainable:
    """What trains: so many parameters in so many layers."""

    params: int
    layers: int
    names: tuple[str, ...]


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of the model's linear layers, without the output embedding."""
    import torch

    head = model.get_output_embeddings()
    names = {name.rpartition(".")[2] for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and module is not head}  # fmt: skip
    return sorted(names)


def check_targets(model: Any, target: str | Sequence[str]) -> None:
    """Raise QlfError when a target is no linear layer of the model; the real ones are listed."""
    if target == ALL_LINEAR:
        return
    known = linear_names(model)
    full = [name for name, _ in model.named_modules()]
    unknown = [name for name in target if name not in known and not any(f.endswith(f".{name}") for f in full)]
    if unknown:
        raise QlfError(f"found no layer {', '.join(unknown)} in the model; the linear layers are {', '.join(known)}")


def add_lora(model: Any, options: Options, base_name: str) -> Any:
    """Put LoRA layers on the model with peft.

    Raises:
        QlfError: peft refuses the combination of options, or the targets are unknown.
    """
    import peft

    check_targets(model, options.target)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=options.dropout,
        target_modules=options.target if isinstance(options.target, str) else list(options.target),
        use_dora=options.dora,
        use_rslora=options.rslora,
        use_qalora=options.qalora,
        base_model_name_or_path=base_name,
    )
    model.name_or_path = base_name  # peft writes it into adapter_config.json
    try:
        tuned = peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise QlfError(f"peft {peft.__version__} refuses these options: {reason}") from None
    if options.qalora and not any(hasattr(module, "qalora_group_size") for module in tuned.modules()):
        raise QlfError(
            f"peft {peft.__version__} has QA-LoRA for GPTQ layers alone, not for 4-bit ones; leave out qalora"
        )
    return tuned


def trainable(model: Any) -> Trainable:
    """Count what trains.

    Raises:
        QlfError: something other than LoRA parameters would train, or nothing would.
    """
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    foreign = [name for name, _ in found if ".lora_" not in name]
    if foreign or not found:
        what = foreign[0] if foreign else "nothing"
        raise QlfError(f"found that {what} would train, needed LoRA parameters alone; this is a bug, please report it")
    layers = {name.partition(".lora_")[0] for name, _ in found}
    return Trainable(sum(p.numel() for _, p in found), len(layers), tuple(name for name, _ in found))


def use_fast_dropout(model: Any) -> int:
    """Replace the dropout of LoRA layers by one with cheap random numbers; returns how many were replaced.

    torch draws one float64 for each element on a CPU, on one thread: a fifth of a training step on two cores. Here one
    draw of 64 bits decides about four elements. The mask comes from a generator seeded by torch's, so seeds,
    recomputation and checkpoints work as before; the drop probability is rounded to a multiple of 2**-16.
    """
    import torch

    count = 0
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if not isinstance(dropouts, torch.nn.ModuleDict):
            continue
        for name, dropout in dropouts.items():
            if isinstance(dropout, torch.nn.Dropout) and dropout.p:
                dropouts[name] = _fast_dropout()(dropout.p)
                count += 1
    return count


@functools.cache
def _fast_dropout() -> Any:
    import numpy as np
    import torch

    class Mask(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any, keep: Any, scale: float) -> Any:
            ctx.save_for_backward(keep)  # an attribute would outlive the checkpointed forward pass
            ctx.scale = scale
            return torch.where(keep, x, 0).mul_(scale)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            (keep,) = ctx.saved_tensors
            return torch.where(keep, grad, 0).mul_(ctx.scale), None, None

    class FastDropout(torch.nn.Module):  # type: ignore[misc]
        """Dropout with probability round(p * 65536) / 65536, on a CPU."""

        def __init__(self, p: float) -> None:
            super().__init__()
            self.p = p
            self._drop = round(p * 65536)

        def forward(self, x: Any) -> Any:
            if not self.training or not self._drop:
                return x
            count = x.numel()
            seed = int(torch.randint(1 << 62, ()))
            words = np.random.SFC64(seed).random_raw(-(-count // 4))
            draws = torch.from_numpy(words.view(np.int16)[:count]).view(x.shape)
            return Mask.apply(x, draws >= self._drop - 32768, 65536 / (65536 - self._drop))

        def extra_repr(self) -> str:
            return f"p={self.p}"

    return FastDropout
