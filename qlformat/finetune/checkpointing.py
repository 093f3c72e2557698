"""Checkpoints of a run: written whole or not at all, found again, and what an interrupted run needs to go on."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError
from qlformat.staging import flush_tree

_NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = ".checkpoint-partial"
"""Where a checkpoint is written before it gets its name."""
OPTIONS_FILE = "finetune.yaml"


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and did, at `step`, with everything saved in `work`."""

    def __init__(self, step: int, work: Path) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step
        self.work = work


def work_directory(out: Path) -> Path:
    """Where a run that will become `out` keeps its checkpoints: the directory of Staging."""
    real = Path(os.path.realpath(out))
    return real.parent / f".{real.name}.qlf-partial"


def checkpoints(work: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every whole checkpoint, the oldest first."""
    if not work.is_dir():
        return []
    found = [(int(match[1]), path) for path in work.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def check_work(out: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from; None to begin at the beginning.

    Raises:
        QlfError: there is an interrupted run and neither `resume` nor `overwrite` says what is to become of it.
    """
    found = checkpoints(work_directory(out))
    if resume:
        return found[-1][1] if found else None
    if found and not overwrite:
        raise QlfError(
            f"{out}: found an interrupted run that was saved at step {found[-1][0]}; go on with --resume, or begin "
            "anew with --overwrite"
        )
    return None


def publish(partial: Path, final: Path, keep: int) -> None:
    """Give a finished checkpoint its name, then remove the oldest beyond `keep`.

    Everything is on the disk before the rename, so what is called checkpoint-N is whole whatever happens.
    """
    flush_tree(partial)
    if final.exists():
        shutil.rmtree(final)  # of a run that went on from an older one; the same step has the same content
    partial.rename(final)
    for _, old in checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """The state of all random generators of this process."""
    import random

    import numpy as np
    import torch

    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state()}
    state["cpu"] = torch.random.get_rng_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Go back to a state of `random_state`."""
    import random

    import numpy as np
    import torch

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
