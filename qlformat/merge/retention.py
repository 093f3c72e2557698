"""How much of the fine-tune's gain on held-out data the merged model keeps, measured with quality.evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError
from qlformat.merge.options import AdapterSpec

_ROWS = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Retention:
    """Held-out losses in nats a token, and what is kept.

    Attributes:
        base: of the base without the adapters.
        adapter: of the base with the adapters, nothing rounded.
        merged: of the result.
        retention: (base - merged) / (base - adapter); None where the adapters gain nothing.
        tokens: how many counted.
        sha256: of the data.
        reference: how `adapter` was measured: "live adapter" or "merged in float32".
    """

    base: float
    adapter: float
    merged: float
    retention: float | None
    tokens: int
    sha256: str
    reference: str

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return dict(vars(self))


def measure(
    base: Path,
    adapters: Sequence[AdapterSpec],
    merged: Path,
    data: Path,
    method: str,
    exact: Callable[[Path], None],
    *,
    progress: Callable[[Any], None] | None = None,
) -> Retention:
    """Evaluate the base, the base with the adapters, and the merged model on the same tokens.

    One adapter of weight 1 is measured live. Several, or weighted ones, are measured as `exact` merges them: in
    float32, into a directory that is removed again.

    Args:
        base: directory of the base.
        adapters: that were merged.
        merged: directory of the result.
        data: rows as `qlf finetune` takes them, or a text when the name ends otherwise.
        method: of the combination.
        exact: writes the float32 merge to a directory.
        progress: as for quality.evaluation.evaluate.

    Raises:
        QlfError: the data or a model cannot be evaluated.
    """
    from qlformat.quality.evaluation import evaluate

    if not data.exists():
        raise QlfError(f"{data}: found no such file, needed the held-out data")
    given: dict[str, Any] = {"data" if data.suffix in _ROWS else "text": data, "progress": progress}
    plain = evaluate(base, **given)
    if len(adapters) == 1 and adapters[0].weight == 1 and method == "linear":
        # The merge has compared the pin already, and was allowed another base if need be.
        live = evaluate(base, adapter=adapters[0].path, allow_base_mismatch=True, **given)
        reference = "live adapter"
    else:
        reference = "merged in float32"
        with tempfile.TemporaryDirectory(dir=merged.parent, prefix=".qlf-retention-") as scratch:
            exact(Path(scratch) / "exact")
            live = evaluate(Path(scratch) / "exact", **given)
    result = evaluate(merged, **given)
    gain = plain.loss - live.loss
    kept = (plain.loss - result.loss) / gain if gain > 0 else None
    return Retention(plain.loss, live.loss, result.loss, kept, plain.tokens, plain.sha256, reference)
