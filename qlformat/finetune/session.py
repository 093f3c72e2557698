"""A run as values: what was prepared, what training came to, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat.finetune import base, budget, layers, placement
from qlformat.finetune.options import Options

if TYPE_CHECKING:
    from qlformat.finetune.dataset import Stats
    from qlformat.finetune.rows import Rows


@dataclass(frozen=True)
class Prepared:
    """A run before anything heavy is loaded: what is in force, the base, and the data.

    Attributes:
        options: every value in force. sources: of each, where it comes from.
        train, held_out: rows; held_out is None without evaluation.
        datasets: tokenized rows, of the same order; stats say what became of the training rows.
        packed: whether rows share sequences.
        placement: where this process trains. budget: the memory it needs and has.
        notes: what the user should read.
    """

    options: Options
    sources: Mapping[str, str]
    base: base.Base
    tokenizer: Any
    train: Rows
    held_out: Rows | None
    datasets: tuple[Any, Any]
    stats: Stats
    placement: placement.Placement
    budget: budget.Budget
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FinetuneReport:
    """What a finished run left.

    Attributes:
        out: the adapter's directory.
        steps: updates, all processes and resumed parts together.
        train_loss, eval_loss: the last ones; eval_start is before the first update.
        trainable, params: parameters that trained, and of the base.
        tokens_per_second, seconds: of this process's part, without evaluations.
        notes: what the user should read.
    """

    out: Path
    steps: int
    train_loss: float | None
    eval_start: float | None
    eval_loss: float | None
    trainable: int
    params: int
    tokens_per_second: float
    seconds: float
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**self.__dict__, "out": str(self.out), "notes": list(self.notes)}


@dataclass(frozen=True)
class Outcome:
    """What training came to."""

    steps: int
    trainable: layers.Trainable
    tokens_per_second: float
    seconds: float
