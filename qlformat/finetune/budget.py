"""Whether a run fits in memory, said before anything heavy is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlformat import free_memory
from qlformat.causal_models import describe
from qlformat.errors import QlfError
from qlformat.finetune.options import ALL_LINEAR, Options
from qlformat.layout import Recipe
from qlformat.training_memory import OPTIMIZERS, RUNTIME_BYTES, Memory, Run, advice, finetune_memory

if TYPE_CHECKING:
    from qlformat.finetune.base import Base
    from qlformat.finetune.dataset import Stats
    from qlformat.finetune.placement import Placement
    from qlformat.free_memory import FreeMemory

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Budget:
    """What a run needs and what there is.

    Attributes:
        memory: of one process at the peak of a step; None where `why_unknown` says why.
        free: what one process may take; None where the system does not say.
        changes: single changes that would make it fit.
        why_unknown: why there is no estimate.
    """

    memory: Memory | None
    free: FreeMemory | None
    changes: tuple[tuple[str, int], ...] = ()
    why_unknown: str | None = None

    @property
    def least(self) -> int | None:
        """Bytes without which it cannot work: without the allowance for the runtime, and with paged state moved out."""
        if self.memory is None:
            return None
        return self.memory.total - (self.memory.optimizer if self.memory.paged else 0)

    @property
    def fits(self) -> bool | None:
        """Whether there is enough; None where it is not known."""
        return None if self.least is None or self.free is None else self.least <= self.free.size

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "estimate": None if self.memory is None else self.memory.as_dict(),
            "needed": self.least,
            "free": None if self.free is None else {"bytes": self.free.size, "of": self.free.of},
            "fits": self.fits,
            "changes": [{"change": text, "needed": needed} for text, needed in self.changes],
            "unknown_because": self.why_unknown,
        }


def make(options: Options, base: Base, stats: Stats, where: Placement) -> Budget:
    """The budget of one process of a run, from config.json and the lengths of the rows.

    Args:
        options: settled ones, without "auto".
        stats: of the training data; sequences shorter than seq_len need less.
    """
    free = _free(where)
    try:
        model = describe(json.loads((base.directory / "config.json").read_bytes()))
    except QlfError as error:
        return Budget(None, free, why_unknown=error.message)
    run = _run(options, base, stats, where)
    memory = finetune_memory(model, run)
    found = Budget(memory, free)
    if found.fits is not False or free is None:
        return found
    room = free.size + RUNTIME_BYTES  # the libraries are loaded already
    changes = [(text, after.total) for text, after in advice(model, run, room) if _helps(text, where)]
    return Budget(memory, free, tuple(changes))


def check(budget: Budget) -> None:
    """Raise QlfError when there is too little memory: what is needed, what there is, and what would do."""
    if budget.fits is not False or budget.least is None or budget.free is None:
        return
    less = " or ".join(f"{text} ({_gb(needed)})" for text, needed in budget.changes)
    raise QlfError(
        f"found {_gb(budget.free.size)} of memory left on {budget.free.of}, needed about {_gb(budget.least)}; "
        + (
            f"try {less}"
            if less
            else "no single change makes it fit: change several of --seq-len, --batch-size and --rank, or free some"
        )
    )


def _free(where: Placement) -> FreeMemory | None:
    if not where.on_cpu:
        return free_memory.on_gpu(int(where.device.partition(":")[2]))
    found = free_memory.on_host()
    if found is None or where.local_processes == 1:
        return found
    share = f"{found.of}, shared by {where.local_processes} processes"
    return free_memory.FreeMemory(found.size // where.local_processes, share)


def _run(options: Options, base: Base, stats: Stats, where: Placement) -> Run:
    """The run as the estimate knows it; an optimizer that it does not know counts as AdamW."""
    recipe = Recipe() if base.recipe is None else Recipe(
        base.recipe["quant_type"], base.recipe["blocksize"], base.recipe["double_quant"])  # fmt: skip
    compute = _BYTES[options.compute_dtype]
    return Run(
        rank=options.rank,
        dropout=options.dropout,
        seq_len=min(options.seq_len, stats.longest),
        batch_size=min(options.batch_size, stats.sequences),
        recipe=recipe,
        checkpointing=options.checkpointing,
        optimizer=options.optimizer if options.optimizer in OPTIMIZERS else "adamw_torch",
        compute_bytes=compute,
        plain_bytes=compute,
        on_cpu=where.on_cpu,
        target=None if options.target == ALL_LINEAR else tuple(options.target),
    )


def _helps(text: str, where: Placement) -> bool:
    """Paged and 8-bit optimizers need CUDA."""
    return not (where.on_cpu and text.startswith("--optimizer"))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 95_000_000 else f"{size / 1e6:.0f} MB"
