"""How a checkpoint is calibrated, and what its manifest says about it."""

from __future__ import annotations

from dataclasses import dataclass

METHOD = "feedback-2"
"""Name of the algorithm in the manifest; it changes when the bytes do."""


@dataclass(frozen=True)
class CalibrationSettings:
    """Choices that the resulting bytes depend on, beside the text and the number of threads.

    Attributes:
        tokens: most tokens of the calibration text that are used.
        own_tokens: tokens that the model writes itself, to calibrate on as well.
        own_limit: parameters of the largest model that does so; it has all its weights in memory then.
        window: tokens the model sees at a time; cut to the model's own longest context.
        damping: share of the mean of the Hessian's diagonal that is added to the diagonal.
        correction: how much of the error that comes in from the layers before is made up for, 0 to 1.
        sweeps: passes of coordinate descent after the feedback.
        seed: of the choice of windows, where the text has more than are used, and of what the model writes.
    """

    tokens: int = 8192
    own_tokens: int = 8192
    own_limit: int = 1_000_000_000
    window: int = 256
    damping: float = 0.05
    correction: float = 0.5
    sweeps: int = 3
    seed: int = 0


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration of a checkpoint, for its manifest.

    Attributes:
        method: METHOD.
        text_sha256: of the bytes of the texts one after another, in order of their names.
        samples, window: windows used, and tokens in each.
        own_samples: how many of the windows the model wrote itself.
        damping, correction, sweeps, seed: of the settings.
        threads: torch's; sums in float32 depend on it.
    """

    method: str
    text_sha256: str
    samples: int
    own_samples: int
    window: int
    damping: float
    correction: float
    sweeps: int
    seed: int
    threads: int
