"""Whether adapters, base and source belong together: pins, names, shapes and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    for adapter in adapters:
        if adapter.pin is None:
            notes.append(f"the adapter {adapter.name} is not pinned to a base; only names and shapes were compared")
        elif adapter.pin.fingerprint != base.fingerprint:
            found = f"found {base.fingerprint}" if base.fingerprint else "found a model that is not in 4 bits"
            if not allowed:
                raise QlfError(
                    f"the adapter {adapter.name} belongs to the base with fingerprint {adapter.pin.fingerprint}, "
                    f"{found}; give that base (and this one as --source if it was made from it), or use "
                    "--allow-base-mismatch"
                )
            notes.append(f"the adapter {adapter.name} was trained on another base; merged all the same, as asked")
    return notes


def differing_pins(adapters: Sequence[AdapterFiles], allowed: bool) -> list[str]:
    """Refuse adapters of different bases together, unless that is allowed; returns notes."""
    pins = {adapter.pin.fingerprint: adapter for adapter in adapters if adapter.pin is not None}
    if len(pins) < 2:
        return []
    names = " and ".join(adapter.name for adapter in pins.values())
    if not allowed:
        raise QlfError(
            f"the adapters {names} were trained on different bases; merge those of one base, or use "
            "--allow-base-mismatch"
        )
    return [f"the adapters {names} were trained on different bases; merged all the same, as asked"]


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
