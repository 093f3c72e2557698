"""Attention over rows laid end to end: each row attends to itself alone, with no mask and no padding.

TRL's padding-free collator tells where each row begins (cu_seq_lens_q). Flash attention takes that; for scaled dot
product attention transformers makes one mask of all tokens by all tokens, so that the time is that of one long row.
Here each row is a call of its own to transformers' own function.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

NAME = "qlf_rows"


def use_row_attention(model: Any) -> bool:
    """Let the model attend row by row, where transformers' sdpa is what it uses; returns whether it does now.

    Layers with a sliding window are left alone: their mask is not the causal one.
    """
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or windows or kinds != {"full_attention"}:
        return False
    if not getattr(model, "_supports_attention_backend", False):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """query [batch, heads, tokens, dim] -> ([batch, tokens, heads, dim], None)."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds = kwargs.pop("cu_seq_lens_q", None)
    if bounds is None or len(bounds) <= 2 or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    edges = bounds.tolist()
    rows = [
        sdpa_attention_forward(module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, **kwargs)[0]
        for a, b in pairwise(edges)
    ]
    return torch.cat(rows, dim=1), None
