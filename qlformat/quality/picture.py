"""A picture of how far two models are apart: the relative error of each layer's weights."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError
from qlformat.quality.comparison import Differences, TensorDifference

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.(.+?)(?:\.weight)?$")
_MOST_KINDS = 20
"""Colors that can be told apart."""

Series = dict[str, list[tuple[int, TensorDifference]]]


def draw(found: Differences, path: str | Path) -> None:
    """Draw the relative error, and the share of equal codes where there is one, against the layer, as a PNG.

    Raises:
        QlfError: there is nothing to draw, matplotlib is missing, or the file cannot be written.
    """
    series = kinds(found)
    if not series:
        raise QlfError("found no weights with a relative error in numbered layers, so there is nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise QlfError("drawing needs matplotlib: pip install matplotlib") from None
    coded = any(tensor.equal_codes is not None for points in series.values() for _, tensor in points)
    figure = Figure(figsize=(10, 7.5 if coded else 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Any] = list(figure.subplots(1 + coded, 1, sharex=True, squeeze=False)[:, 0])
    for position, (kind, points) in enumerate(series.items()):
        style = {"color": f"C{position % 10}", "marker": "o" if position < 10 else "s", "markersize": 3.5}
        errors = [(layer, t.relative_error) for layer, t in points if t.relative_error is not None]
        axes[0].plot(*zip(*errors, strict=True), label=kind, linewidth=1.2, **style)
        codes = [(layer, 100 * t.equal_codes) for layer, t in points if t.equal_codes is not None]
        if codes:
            axes[1].plot(*zip(*codes, strict=True), linewidth=1.2, **style)
    _label(axes, found)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    except OSError as error:
        raise QlfError(f"{path}: the picture cannot be written: {error.strerror}; choose another place") from None


def kinds(found: Differences) -> Series:
    """The weights with a relative error by what they are in their layer.

    Kinds that are equal in all layers are left out, unless all are; of many, the most different ones are kept.
    """
    series: Series = defaultdict(list)
    for tensor in found.tensors:
        match = _LAYER.search(tensor.name)
        if match and tensor.relative_error is not None:
            series[match[2]].append((int(match[1]), tensor))
    worst = {kind: max(tensor.relative_error or 0.0 for _, tensor in points) for kind, points in series.items()}
    changed = [kind for kind in series if worst[kind]] or list(series)
    shown = set(sorted(changed, key=lambda kind: -worst[kind])[:_MOST_KINDS])
    return {kind: sorted(series[kind], key=lambda point: point[0]) for kind in series if kind in shown}


def _label(axes: list[Any], found: Differences) -> None:
    total = "" if found.relative_error is None else f"; all weights together {found.relative_error:.3g}"
    axes[0].set_title(f"{_short(found.b)} against {_short(found.a)}{total}", fontsize=11)
    axes[0].set_ylabel("relative error |B − A| / |A|")
    if len(axes) > 1:
        axes[1].set_ylabel("equal 4-bit codes (%)")
        axes[1].set_ylim(-3, 103)
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.grid(alpha=0.25)


def _short(name: str) -> str:
    """The end of a path, so that a title fits; without what matplotlib would read as a formula."""
    return Path(name).name.replace("$", r"\$")[:60]
