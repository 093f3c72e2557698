"""`--dry-run`: what would be trained on, how, and whether it fits, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat.finetune.formats import FORMATS
from qlformat.staging import size_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qlformat.finetune.budget import Budget
    from qlformat.finetune.dataset import Example
    from qlformat.finetune.session import Prepared

_SHOWN = 1500
"""Characters of the example that are shown."""


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        prepared: the run.
        example: a row as the model sees it.
        histogram: PNG of the rows' lengths.
    """

    prepared: Prepared
    example: Example
    histogram: Path

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        held_out = self.prepared.held_out
        return {
            "data": self.prepared.train.as_dict(),
            "held_out": None if held_out is None else held_out.as_dict(),
            "tokenized": dict(self.prepared.stats.as_dict()),
            "options": self.prepared.options.as_dict(),
            "options_from": dict(self.prepared.sources),
            "memory": self.prepared.budget.as_dict(),
            "notes": list(self.prepared.notes),
            "example": [{"text": text, "trained": trained} for text, trained in self.example.pieces],
            "histogram": str(self.histogram),
        }

    def lines(self) -> Iterator[str]:
        """The plan for people; in the example, what is trained stands between >> and <<."""
        data, stats = self.prepared.train, self.prepared.stats
        lengths = stats.as_dict()["lengths"]
        yield f"data      {len(data)} rows in {data.name}; {len(data.skipped)} malformed"
        yield f"format    {data.format}: {FORMATS[data.format].title}"
        if self.prepared.held_out is not None:
            yield f"held      {len(self.prepared.held_out)} rows for evaluation"
        yield (
            f"tokens    {stats.tokens} in {stats.sequences} sequences of up to {stats.seq_len} (filled to "
            f"{stats.fill:.0%}), {stats.trained_tokens} of them trained"
        )
        quantiles = f"median {lengths['p50']}, 90 % {lengths['p90']}, longest {lengths['max']}"
        yield f"lengths   {quantiles}; see {self.histogram}"
        yield f"cut       {stats.truncated_share:.1%} of the rows lose {stats.lost_tokens} tokens at their end"
        yield from _memory(self.prepared.budget)
        yield from (f"note      {note}" for note in self.prepared.notes)
        yield f"example   {self.example.place.file}, {self.example.place.unit} {self.example.place.number}; >>trained<<"
        text = "".join(f">>{text}<<" if trained else text for text, trained in self.example.pieces)
        yield from (f"  | {line}" for line in text[:_SHOWN].splitlines())
        if len(text) > _SHOWN:
            yield f"  | ... ({len(text) - _SHOWN} more characters)"
        yield "options"
        for name, value in self.prepared.options.as_dict().items():
            if value not in (None, []):
                yield f"  {name:16} {value}  ({self.prepared.sources.get(name, 'default')})"


def _memory(found: Budget) -> Iterator[str]:
    """What a process needs, by kind, what there is, and what would help."""
    if found.memory is None:
        yield "memory    not estimated"
        return
    kinds = ("weights", "adapters", "gradients", "optimizer", "activations", "workspace")
    parts = ", ".join(f"{kind} {size_text(getattr(found.memory, kind))}" for kind in kinds)
    yield f"memory    about {size_text(found.memory.total)} in each process, without the libraries' own: {parts}"
    if found.free is not None:
        verdict = "enough" if found.fits else "TOO LITTLE"
        yield f"free      {size_text(found.free.size)} on {found.free.of}: {verdict}"
    yield from (f"  would do: {text} ({size_text(needed)})" for text, needed in found.changes)


def plan(prepared: Prepared, histogram: Path) -> Plan:
    """The plan of a run; writes the histogram of the rows' lengths as a PNG.

    Raises:
        DataError: the first row cannot be rendered.
    """
    from qlformat.finetune.dataset import preview

    _draw(prepared.stats.lengths, prepared.stats.seq_len, histogram)
    return Plan(prepared, preview(prepared.train, prepared.tokenizer), histogram)


def _draw(lengths: npt.NDArray[np.int64], seq_len: int, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.hist(lengths, bins=min(50, max(5, len(lengths) // 4)), color="#1f5fa8")
    axes.axvline(seq_len, color="#c8451b", linewidth=1.5, label=f"seq_len {seq_len}")
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("rows")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
