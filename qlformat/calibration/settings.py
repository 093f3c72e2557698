"""How a checkpoint is calibrated, and what its manifest says about it."""

from __future__ import annotations

from dataclasses import dataclass

METHOD = "feedback-1"
"""Name of the algorithm in the manifest; it changes when the bytes do."""


@dataclass(frozen=True)
class CalibrationSettings:
    """Choices that the resulting bytes depend on, beside the text and the number of threads.

    Attributes:
        tokens: most tokens of the calibration text that are used.
        window: tokens the model sees at a time; cut to the model's own longest context.
        damping: share of the mean of the Hessian's diagonal that is added to the diagonal.
        sweeps: passes of coordinate descent after the feedback.
        refits: times that the scales are fitted to the codes again.
        seed: of the choice of windows, where the text has more than are used.
    """

    tokens: int = 32768
    window: int = 512
    damping: float = 0.01
    sweeps: int = 2
    refits: int = 1
    seed: int = 0


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration of a checkpoint, for its manifest.

    Attributes:
        method: METHOD.
        text_sha256: of the bytes of the texts one after another, in order of their names.
        samples, window: windows used, and tokens in each.
        damping, sweeps, refits, seed: of the settings.
        threads: torch's; sums in float32 depend on it.
    """

    method: str
    text_sha256: str
    samples: int
    window: int
    damping: float
    sweeps: int
    refits: int
    seed: int
    threads: int
