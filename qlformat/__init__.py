"""qlformat: NF4 + double-quantized checkpoints that every project can load.

The public names below are imported on first use, so that `import qlformat` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qlformat.checkpoint import Checkpoint
    from qlformat.checkpoint import open_checkpoint as open  # noqa: A004 (qlformat.open reads like gzip.open)
    from qlformat.converter import Report, convert
    from qlformat.errors import FormatError, NativeError, QlfError, SourceError, TargetError
    from qlformat.exporter import ExportReport, export
    from qlformat.layout import QuantState, Recipe
    from qlformat.loader import load_state_dict
    from qlformat.merge.merger import MergeReport
    from qlformat.merge.merger import merge as merge_adapters  # qlformat.merge is the package
    from qlformat.merge.options import AdapterSpec, MergeOptions
    from qlformat.model_loader import load_model
    from qlformat.summary import Summary, summarize
    from qlformat.verifier import Finding, verify

_HOME = {
    "AdapterSpec": "merge.options",
    "Checkpoint": "checkpoint",
    "ExportReport": "exporter",
    "Finding": "verifier",
    "FormatError": "errors",
    "MergeOptions": "merge.options",
    "MergeReport": "merge.merger",
    "NativeError": "errors",
    "QlfError": "errors",
    "QuantState": "layout",
    "Recipe": "layout",
    "Report": "converter",
    "SourceError": "errors",
    "Summary": "summary",
    "TargetError": "errors",
    "convert": "converter",
    "export": "exporter",
    "load_model": "model_loader",
    "load_state_dict": "loader",
    "merge_adapters": "merge.merger",
    "open": "checkpoint",
    "summarize": "summary",
    "verify": "verifier",
}

_NAMED = {"merge_adapters": "merge", "open": "open_checkpoint"}
"""Names that are others in their modules."""

__all__ = [
    "AdapterSpec", "Checkpoint", "ExportReport", "Finding", "FormatError", "MergeOptions", "MergeReport", "NativeError",
    "QlfError", "QuantState", "Recipe", "Report", "SourceError", "Summary", "TargetError", "convert", "export",
    "load_model", "load_state_dict", "merge_adapters", "open", "summarize", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qlformat' has no attribute {name!r}")
    module = import_module(f"qlformat.{_HOME[name]}")
    value = getattr(module, _NAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
