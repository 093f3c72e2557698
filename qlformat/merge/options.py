"""What a merge is asked to do, checked before anything is opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlformat.errors import QlfError
from qlformat.merge.combining import DEFAULT_DENSITY, METHODS, SPARSE

TARGETS = ("nf4", "bfloat16", "float16", "float32", "adapter")
ROUNDINGS = ("nearest", "feedback")
DEFAULT_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter on the command line: its directory, or a Hub repository, and its weight."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> AdapterSpec:
        """Read PATH or PATH:WEIGHT; a path that exists as a whole is taken as it is.

        Raises:
            QlfError: the weight is no finite number, or 0.
        """
        path, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(Path(text))
        try:
            value = float(weight)
        except ValueError:
            if not Path(path).is_dir():
                return cls(Path(text))  # its message is about the path
            value = math.nan
        if not math.isfinite(value) or not path:
            raise QlfError(f"found {text!r}, needed PATH or PATH:WEIGHT with a number, such as {path or 'PATH'}:0.5")
        if value == 0:
            raise QlfError(f"{text}: a weight of 0 leaves the adapter out; drop it from the command")
        return cls(Path(path), value)


@dataclass(frozen=True)
class MergeOptions:
    """See `merger.merge`."""

    to: str
    method: str = "linear"
    density: float | None = None
    rank: int | None = None
    onto: str | None = None
    rounding: str | None = None
    seed: int = 0
    min_retention: float | None = None
    allow_base_mismatch: bool = False


def check(
    options: MergeOptions,
    adapters: Sequence[AdapterSpec],
    source: object,
    calibration: object,
    eval_data: object = None,
) -> None:
    """Refuse what does not go together.

    Raises:
        QlfError: one line.
    """
    if options.to not in TARGETS:
        raise QlfError(f"target {options.to!r} is unknown; use one of {', '.join(TARGETS)}")
    if options.method not in METHODS:
        raise QlfError(f"method {options.method!r} is unknown; use one of {', '.join(METHODS)}")
    if not adapters:
        raise QlfError("found no adapter, needed at least one; give --adapter DIRECTORY")
    if len({spec.path.resolve() for spec in adapters}) != len(adapters):
        raise QlfError("the same adapter is given twice; give it once, with the weight you want")
    if options.method not in ("linear", "svd") and len(adapters) < 2:
        raise QlfError(f"--method {options.method} combines adapters, and there is one; give another, or drop --method")
    if options.density is not None and options.method not in SPARSE:
        raise QlfError(f"--density belongs to the methods {', '.join(SPARSE)}; drop it, or choose one of these")
    if options.density is not None and not 0 < options.density <= 1:
        raise QlfError(f"found density {options.density}, needed more than 0 and at most 1")
    if options.rank is not None and options.to != "adapter" and options.method != "svd":
        raise QlfError("--rank belongs to --to adapter and to --method svd; drop it, or choose one of these")
    if options.onto == "source" and source is None:
        raise QlfError("--onto source needs the original model: give it with --source")
    if options.to == "adapter" and (source is not None or calibration is not None):
        raise QlfError("--to adapter needs neither --source nor --calibration: no base is read")
    if options.min_retention is not None and eval_data is None:
        raise QlfError("--min-retention is measured on held-out data: give it with --eval-data")
    if options.to == "adapter" and eval_data is not None:
        raise QlfError("--to adapter reads no base, so it has no --eval-data; evaluate the result with qlf eval")
    _check_rounding(options, calibration)


def _check_rounding(options: MergeOptions, calibration: object) -> None:
    if options.rounding == "feedback" and calibration is None:
        raise QlfError("--rounding feedback looks at activations: give a text with --calibration")
    if calibration is not None and options.to != "nf4":
        raise QlfError(f"--calibration is for --to nf4; {options.to} needs none")
    if calibration is not None and options.rounding == "nearest":
        raise QlfError("--rounding nearest uses no --calibration; drop one of the two")


def density(options: MergeOptions) -> float:
    """The density in force."""
    return DEFAULT_DENSITY if options.density is None else options.density
