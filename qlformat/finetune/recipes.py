"""Named sets of hyperparameters, each value with its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_LARGE = 20_000_000_000
"""Parameters from which a model counts as "33B or 65B": half way between LLaMA's 13B and 33B on a logarithmic scale."""

_PAPER = "QLoRA, arXiv 2305.14314"
_SCRIPTS = "the authors' scripts/finetune_guanaco_{7b,13b,33b,65b}.sh (github.com/artidoro/qlora)"


@dataclass(frozen=True)
class Setting:
    """A hyperparameter of a recipe and where it comes from."""

    value: Any
    source: str


def _qlora(params: int) -> Mapping[str, Setting]:
    """QLoRA's method with settings for everyday data; what is this project's own choice says so."""
    ours = "chosen for this command"
    return {
        "rank": Setting(16, f"{ours}: {_PAPER} found no effect of the rank once all layers are adapted (appendix A.1)"),
        "alpha": Setting(32, f"{ours}: twice the rank"),
        "target": Setting("all-linear", f"{_PAPER}, section 4: LoRA on all linear layers recovers full fine-tuning"),
        "dropout": Setting(0.05, f"{_PAPER}, Guanaco above 13B"),
        "lr": Setting(2e-4, f"{_PAPER}, Guanaco up to 13B"),
        "schedule": Setting("cosine", ours),
        "warmup": Setting(0.03, _SCRIPTS),
        "batch_size": Setting(1, f"{ours}: the least memory"),
        "grad_accum": Setting(16, f"{_PAPER}, Guanaco: batches of 16"),
        "seq_len": Setting(1024, ours),
        "beta2": Setting(0.999, f"{_PAPER}, Guanaco"),
        "grad_norm": Setting(0.3, f"{_PAPER}, Guanaco"),
        "optimizer": Setting("auto", f"{_PAPER}, section 3: paged optimizers, where there is CUDA"),
        "checkpointing": Setting(True, f"{_PAPER}, section 2: activations, not the adapter, take the memory"),
    }


def _guanaco(params: int) -> Mapping[str, Setting]:
    """The paper's OASST1 run; `params` decides where it differs by size."""
    large = params >= _LARGE
    size = "33B and 65B" if large else "up to 13B"
    where = f"{_PAPER}, Guanaco on OASST1 (section 5 and appendix B)"
    return {
        "rank": Setting(64, where),
        "alpha": Setting(16, where),
        # The script for 13B has 0.05, unlike the paper.
        "dropout": Setting(0.05 if large else 0.1, f"{where}, {size}"),
        "target": Setting("all-linear", f"{_PAPER}, section 4"),
        "lr": Setting(1e-4 if large else 2e-4, f"{where}, {size}"),
        "batch_size": Setting(1, _SCRIPTS),
        "grad_accum": Setting(16, f"{where}: batches of 16"),
        "max_steps": Setting(1875, where),
        "seq_len": Setting(512, f"{where}: target length 512"),
        "schedule": Setting("constant", where),
        "warmup": Setting(0.03, f"{_SCRIPTS}; transformers' constant schedule does not warm up"),
        "beta2": Setting(0.999, where),
        "grad_norm": Setting(0.3, where),
        "packing": Setting(False, f"{where}: examples are grouped by length"),
        "group_by_length": Setting(True, where),
        "weight_decay": Setting(0.0, _SCRIPTS),
        "optimizer": Setting("auto", "this command's paged 8-bit AdamW on CUDA; the authors' qlora.py has 32 bits"),
        "checkpointing": Setting(True, _SCRIPTS),
    }


RECIPES: Mapping[str, Callable[[int], Mapping[str, Setting]]] = MappingProxyType({"qlora": _qlora, "guanaco": _guanaco})
"""Name -> settings for a model of so many parameters."""


def resolve(
    recipe: str, params: int, in_file: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values in force: a recipe's, over them a file's, over them the caller's.

    Returns:
        Values by option, and for each where it comes from. Options that none of the three names keep their default.
    """
    settings = RECIPES[recipe](params)
    values = {name: setting.value for name, setting in settings.items()}
    sources = {name: f"recipe {recipe}: {setting.source}" for name, setting in settings.items()}
    if {**in_file, **given}.get("init") == "pissa":
        values["dropout"] = 0.0
        sources["dropout"] = "init pissa: as peft's PiSSA example; the adapter holds principal parts of the model"
    for origin, chosen in (("config file", in_file), ("command line", given)):
        values.update(chosen)
        sources.update(dict.fromkeys(chosen, origin))
    return {**values, "recipe": recipe}, sources
