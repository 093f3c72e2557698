"""The error picture of a card: the relative error of every quantized weight against its layer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from qlformat import __version__
from qlformat.errors import QlfError
from qlformat.manifest import WeightEntry

MOST_KINDS = 12
"""Lines that can be told apart."""

# Attention in blues and greens, MLP in warm colours; other names take what is left.
_COLOURS = {
    "q_proj": "#08519c",
    "k_proj": "#4292c6",
    "v_proj": "#1b9e77",
    "o_proj": "#7570b3",
    "gate_proj": "#d95f02",
    "up_proj": "#e6ab02",
    "down_proj": "#b2182b",
}
_OTHER_COLOURS = (
    "#08519c", "#d95f02", "#1b9e77", "#b2182b", "#7570b3", "#e6ab02", "#4292c6", "#66a61e", "#a6761d", "#666666",
    "#e7298a", "#1f78b4",
)  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.(.+)\.weight$")

Errors = Mapping[str, Mapping[int, float]]


def errors_by_kind(weights: Iterable[WeightEntry]) -> dict[str, dict[int, float]]:
    """{kind: {layer: relative error}} of the quantized weights in numbered layers.

    A kind is the last part of a weight's name, or all of it within the layer where the last part is not unique.
    Numbered parts of a layer, such as experts, are one kind; its error is their mean.
    """
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for weight in weights:
        match = _LAYER.search(weight.name)
        if match and weight.relative_error is not None:
            kind = ".".join(part for part in match[2].split(".") if not part.isdecimal())
            found[kind][int(match[1])].append(weight.relative_error)
    last = [kind.rpartition(".")[2] for kind in found]
    named: dict[str, dict[int, float]] = {}
    for kind, layers in found.items():
        short = kind.rpartition(".")[2]
        label = short if last.count(short) == 1 else kind
        most = max(map(len, layers.values()))
        label += f" (mean of {most})" if most > 1 else ""
        named[label] = {layer: sum(errors) / len(errors) for layer, errors in sorted(layers.items())}
    return named


def worth_drawing(errors: Errors) -> bool:
    """Whether there is a line to draw."""
    return any(len(layers) > 1 for layers in errors.values())


def drawable(errors: Errors) -> bool:
    """Whether there is a line to draw, and matplotlib to draw it."""
    return worth_drawing(errors) and importlib.util.find_spec("matplotlib") is not None


def is_current(errors: Errors, title: str, path: Path) -> bool:
    """Whether a file is the picture that `draw` would make, so that a push need not wait a second for matplotlib."""
    try:
        return _stamp(errors, title).encode() in path.read_bytes()
    except OSError:
        return False


def draw(errors: Errors, title: str, path: Path) -> None:
    """Draw one line for each kind over the layers, each named at its right end: a PNG, the same for the same errors.

    Of more than MOST_KINDS the ones with the largest errors are drawn.

    Raises:
        QlfError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise QlfError("drawing needs matplotlib: pip install matplotlib") from None
    worst = sorted(errors, key=lambda kind: -max(errors[kind].values()))[:MOST_KINDS]
    kinds = [kind for kind in errors if kind in worst]
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    known = set(kinds) <= set(_COLOURS)
    ends = []
    for position, kind in enumerate(kinds):
        colour = _COLOURS[kind] if known else _OTHER_COLOURS[position % len(_OTHER_COLOURS)]
        layers, values = zip(*errors[kind].items(), strict=True)
        axes.plot(layers, [100 * value for value in values], color=colour, linewidth=1.8, marker="o", markersize=2)
        ends.append((100 * values[-1], layers[-1], kind, colour))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    first, end = axes.get_xlim()
    height = low
    for value, layer, kind, colour in sorted(ends):
        height = max(value, height + 0.045 * (high - low))  # labels of close lines are moved apart
        axes.annotate(
            kind, (layer, value), (end + 0.02 * (end - first), height), color=colour, va="center", fontsize=10,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=12, pad=12)
    axes.set_xlabel("layer")
    axes.set_ylabel("quantization error, RMS (% of the weights' RMS)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=140, format="png", metadata={"Software": None, "Comment": _stamp(errors, title)})
    except OSError as error:
        raise QlfError(f"{path}: the picture cannot be written: {error.strerror}; choose another place") from None


def _stamp(errors: Errors, title: str) -> str:
    """A name for what is drawn, and by which version, which the picture carries as a comment."""
    drawn = json.dumps([__version__, title, errors])
    return f"drawn from {hashlib.sha256(drawn.encode()).hexdigest()}"
