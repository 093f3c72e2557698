"""Whether adapters, base and source belong together: pins, names, shapes and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlformat import pins
from qlformat.errors import QlfError
from qlformat.merge.adapter_files import AdapterFiles
from qlformat.merge.base import Base
from qlformat.merge.changes import LowRank
from qlformat.merge.matching import Matched

_SOURCE_ERROR = 0.5
"""Most relative difference between a 4-bit weight and the source it was made from; NF4 has 0.08 to 0.1."""


def check_pins(base: Base, adapters: Sequence[AdapterFiles], allowed: bool) -> list[str]:
    """Compare the pins of the adapters with the base and with each other; returns notes.

    Raises:
        QlfError: an adapter belongs to another base, unless that is `allowed`.
    """
    notes = differing_pins(adapters, allowed)
    found = pins.FoundBase("", base.fingerprint)
    compared = [pins.compare(adapter.name, adapter.pin, found, allowed=allowed) for adapter in adapters]
    return [*notes, *(note for note in compared if note)]


def differing_pins(adapters: Sequence[AdapterFiles], allowed: bool) -> list[str]:
    """Refuse adapters of different bases together, unless that is allowed; returns notes."""
    return pins.check_together([(adapter.name, adapter.pin) for adapter in adapters], allowed=allowed)


def check_source(base: Base, original: Base) -> None:
    """Make sure that `original` is what the 4-bit base was made from.

    Raises:
        QlfError: names, shapes or values differ too much.
    """
    if original.recipe is not None:
        raise QlfError(f"{original.path}: found a 4-bit checkpoint, needed the original 16-bit model as --source")
    if base.recipe is None:
        raise QlfError("--source is for a 4-bit base; this base is in 16 bits already, so drop --source")
    for name, weight in base.weights.items():
        other = original.weights.get(name)
        if other is None or other.shape != weight.shape:
            found = "nothing" if other is None else f"shape {list(other.shape)}"
            raise QlfError(f"found {found} in the source, the base has shape {list(weight.shape)}", tensor=name)
    extra = [name for name in original.weights if name not in base.weights]
    if extra:
        raise QlfError("found in the source and not in the base: is it the original of this base?", tensor=extra[0])
    quantized = [weight for weight in base.weights.values() if weight.quantized]
    for weight in quantized[:: max(len(quantized) // 8, 1)]:
        count = min(weight.elements, 1 << 16)
        ours = base.read(weight, 0, count).astype(np.float64)
        theirs = original.read(original.weights[weight.name], 0, count).astype(np.float64)
        size = float(np.linalg.norm(theirs))
        if float(np.linalg.norm(ours - theirs)) > _SOURCE_ERROR * size:
            raise QlfError(
                "the source's values are far from the base's: it is not the model that the base was made from",
                tensor=weight.name,
            )


def check_combinable(matched: Matched) -> None:
    """Refuse what the methods other than linear are not made for.

    Raises:
        QlfError: an adapter uses DoRA.
    """
    for name, changes in matched.changes.items():
        if any(isinstance(change, LowRank) and change.magnitude for change in changes):
            raise QlfError("DoRA can only be merged with --method linear", tensor=name)
