"""Where a process trains, and with what: the choices that "auto" leaves to the machine."""

from __future__ import annotations

import difflib
import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

from qlformat.errors import QlfError, shown
from qlformat.finetune.options import Options


@dataclass(frozen=True)
class Placement:
    """One process's place.

    Attributes:
        device: "cpu" or "cuda:N".
        processes, local_processes: of the run, and of these on this machine.
        rank: of this process; 0 writes the files.
    """

    device: str
    processes: int = 1
    local_processes: int = 1
    rank: int = 0

    @property
    def on_cpu(self) -> bool:
        """Whether there is no GPU."""
        return self.device == "cpu"


def place() -> Placement:
    """The place of this process, from torch and from what torchrun and accelerate set."""
    import torch

    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return Placement(device, world, local, int(os.environ.get("RANK", "0")))


def settle(options: Options, sources: dict[str, str], where: Placement) -> tuple[Options, dict[str, str]]:
    """Replace "auto" by what it means here, so that what is recorded is what was in force.

    Raises:
        QlfError: the optimizer is unknown or needs a GPU, or a package that `report_to` asks for is missing.
    """
    chosen: dict[str, Any] = {}
    if options.compute_dtype == "auto":
        chosen["compute_dtype"] = "float32" if where.on_cpu else "bfloat16"
    if options.optimizer == "auto":
        chosen["optimizer"] = "adamw_torch" if where.on_cpu else "paged_adamw_8bit"
    settled = replace(options, **chosen)
    _check_optimizer(settled.optimizer, where)
    _check_reports(settled.report_to)
    return settled, {**sources, **dict.fromkeys(chosen, f"auto on {'a CPU' if where.on_cpu else 'CUDA'}")}


def _check_optimizer(name: str, where: Placement) -> None:
    from transformers.training_args import OptimizerNames

    known = [str(choice.value) for choice in OptimizerNames]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise QlfError(f"optimizer is {shown(name)}, " + (
            f"did you mean {near[0]}?" if near else "needed one of transformers', such as adamw_torch"))  # fmt: skip
    if where.on_cpu and name.startswith("paged_"):
        raise QlfError(f"optimizer is {name}, which needs CUDA, found a CPU; give --optimizer adamw_torch")


def _check_reports(names: tuple[str, ...]) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise QlfError(f"report_to is {shown(name)}, needed some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if name in ("tensorboard", "wandb", "trackio", "mlflow") and not any(
            importlib.util.find_spec(package) for package in packages
        ):
            raise QlfError(f"report_to is {name!r}, which is not installed; pip install {name}")
