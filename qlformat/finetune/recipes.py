"""Named sets of hyperparameters, each value with its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_LARGE = 20_000_000_000
"""Parameters from which a model counts as "33B or 65B": half way between LLaMA's 13B and 33B on a logarithmic scale."""

_PAPER = "QLoRA, arXiv 2305.14314"


@dataclass(frozen=True)
class Setting:
    """A hyperparameter of a recipe and where it comes from."""

    value: Any
    source: str


def _qlora(params: int) -> Mapping[str, Setting]:
    return {
        "target": Setting("all-linear", f"{_PAPER}, section 4: LoRA on all linear layers recovers full fine-tuning"),
        "beta2": Setting(0.999, f"{_PAPER}, appendix B.2"),
        "grad_norm": Setting(0.3, f"{_PAPER}, appendix B.2"),
        "dropout": Setting(0.05, f"{_PAPER}, appendix A.1: the best of 0, 0.05 and 0.1 on small models"),
        "lr": Setting(2e-4, f"{_PAPER}, appendix B.2, up to 13B"),
        "grad_accum": Setting(16, f"{_PAPER}, appendix B.2: batches of 16, here as 1 x 16"),
    }


def _guanaco(params: int) -> Mapping[str, Setting]:
    """The paper's OASST1 run; `params` decides where it differs by size."""
    large = params >= _LARGE
    size = "33B and 65B" if large else "up to 13B"
    where = f"{_PAPER}, appendix B.2"
    return {
        "rank": Setting(64, where),
        "alpha": Setting(16, where),
        "dropout": Setting(0.05 if large else 0.1, f"{where}, {size}"),
        "target": Setting("all-linear", f"{_PAPER}, section 4"),
        "lr": Setting(1e-4 if large else 2e-4, f"{where}, table 9, {size}"),
        "batch_size": Setting(1, "the authors' script for Guanaco: micro-batches of 1"),
        "grad_accum": Setting(16, f"{where}, table 9: batches of 16"),
        "max_steps": Setting(1875, f"{where}, table 9, OASST1"),
        "seq_len": Setting(512, f"{where}, table 9: target length 512"),
        "schedule": Setting("constant", where),
        "warmup": Setting(0.03, "the authors' script for Guanaco; a constant schedule does not use it"),
        "beta2": Setting(0.999, where),
        "grad_norm": Setting(0.3, where),
        "packing": Setting(False, f"{where}: examples are grouped by length"),
        "group_by_length": Setting(True, where),
        "weight_decay": Setting(0.0, "the authors' script for Guanaco"),
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
    for origin, chosen in (("config file", in_file), ("command line", given)):
        values.update(chosen)
        sources.update(dict.fromkeys(chosen, origin))
    return {**values, "recipe": recipe}, sources
