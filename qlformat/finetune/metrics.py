"""What a run measures: metrics.jsonl, one line for each log, and the curves in loss.png."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"
CURVES = "loss.png"


@dataclass(frozen=True)
class TrainingProgress:
    """How far a run is.

    Attributes:
        phase: "loading", "training", "evaluating" ...
        step, steps: updates done, and of the whole run.
        loss: of the last log, or None before the first.
        tokens_per_second: since this process began to train, without evaluations; 0 before the first update.
        seconds_left: of training; None while unknown.
    """

    phase: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0
    seconds_left: float | None = None


Listener = Callable[[TrainingProgress], None]


class MetricsFile:
    """metrics.jsonl, appended to line by line; a resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in read(path) if line["step"] <= step] if step and path.is_file() else []
        beside = path.with_suffix(".new")
        beside.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        os.replace(beside, path)

    def append(self, line: dict[str, Any]) -> None:
        """Write one line; what is not finite becomes null, since JSON has no NaN."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(clean)}\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that a crash cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def draw(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw train and eval loss against the step, the learning rate below. PNG, the same bytes for the same lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    rates = [(line["step"], line["learning_rate"]) for line in lines if line.get("learning_rate") is not None]
    if train:
        steps, losses = zip(*train, strict=True)
        upper.plot(steps, losses, color="#9db8d2", linewidth=1, label="train")
        upper.plot(steps, _smooth(losses), color="#1f5fa8", linewidth=2, label="train, smoothed")
    if held:
        upper.plot(*zip(*held, strict=True), color="#c8451b", marker="o", markersize=4, linewidth=2, label="held out")
    if rates:
        lower.plot(*zip(*rates, strict=True), color="#555555")
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(title, fontsize=11)
    upper.legend(frameon=False)
    upper.grid(alpha=0.25)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.grid(alpha=0.25)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential mean over about a tenth of the curve."""
    weight = 1 / max(1.0, len(values) / 10)
    smoothed, mean = [], values[0]
    for value in values:
        mean += weight * (value - mean)
        smoothed.append(mean)
    return smoothed
