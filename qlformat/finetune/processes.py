"""One run in several processes: which one this is, what a checkpoint was made by, and FSDP2 over a 4-bit base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat.errors import QlfError

if TYPE_CHECKING:
    import torch


def check_same(checkpoint: Path, now: int) -> None:
    """Refuse a checkpoint of a run with another number of processes.

    Each process has random numbers and rows of its own, so the adapter of the undisturbed run could not be reached.

    Raises:
        QlfError: the number differs.
    """
    before = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if before != now:
        raise QlfError(
            f"found {now} processes, the run to resume has {before}; start as many, or begin anew with --overwrite"
        )


def sharded() -> bool:
    """Whether accelerate was told to shard the model by FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def storage(compute_dtype: torch.dtype) -> str:
    """What the packed weights are to be viewed as: uint8, or with FSDP the compute dtype.

    FSDP's mixed precision casts every weight of another float dtype than its own, which would destroy packed bytes.

    Raises:
        QlfError: FSDP of another version than 2, or its mixed precision is not the compute dtype.
    """
    if not sharded():
        return "uint8"
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise QlfError(f"found FSDP version {version}, needed 2 for a 4-bit base; set fsdp_version: 2 in accelerate's "
                       "configuration, or give --fsdp_version 2")  # fmt: skip
    name = str(compute_dtype).removeprefix("torch.")
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if name == "float32" and mixed != "no":
        raise QlfError(
            f"found accelerate's mixed precision {mixed} with compute_dtype float32, needed 'no': FSDP would cast the "
            "packed weights; give both the same"
        )
    return name


def keep_precision(accelerator: Any) -> None:
    """Let FSDP2 add gradients in float32 and hand the loss on as it is; accelerate rounds both to the compute dtype."""
    import dataclasses

    import torch

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def whole_state(model: Any) -> dict[str, Any] | None:
    """The trained parameters by name, on the CPU, put together from all processes; None where nothing is sharded.

    Every process has to call it.
    """
    from torch.distributed.tensor import DTensor

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(isinstance(p, DTensor) for p in trained.values()):
        return None
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for name, p in trained.items()}
