"""Why weights are not quantized, in words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qlf import output

EXPERTS = "fused experts"

LABELS: Mapping[str, str] = MappingProxyType(
    {
        "fused-experts": EXPERTS,
        "merged-on-load": "split or merged while loading",
        "embedding": "embeddings",
        "output-embedding": "output embedding",
        "tied": "tied to the embeddings",
        "last-parameter": "last layer",
        "keep-in-fp32": "kept in float32 by the model",
        "skip-pattern": "left out by --skip",
        "skipped": "left out by whoever made it",
        "router": "routers",
        "unloadable-name": "named so that transformers cannot load them in 4 bit",
        "norm": "norms",
        "bias": "biases",
        "scalar": "scalars",
        "not-linear": "not in a linear layer",
        "not-2d": "not a matrix",
        "not-in-model": "not used by the model",
        "empty": "empty",
    }
)
"""Reasons of qlformat.selection and qlformat.summary; one that is missing here is shown as it is."""


def kept(unquantized: Mapping[str, int], total: int) -> list[str]:
    """Label and share of what is not quantized: experts first, then the largest share first.

    Args:
        unquantized: reason -> element count.
        total: element count of the whole model.
    """
    counts = {LABELS.get(reason, reason): count for reason, count in unquantized.items()}
    order = sorted(counts, key=lambda label: (label != EXPERTS, -counts[label]))
    return [f"{label} {output.share(counts[label], total)}" for label in order if counts[label]]
