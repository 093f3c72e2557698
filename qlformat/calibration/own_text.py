"""Text that a model writes itself, to calibrate on: what it reads and says, whatever text it is given by the user.

The activations of a model on a text of another kind than it was trained on say little about those that count. Its own
samples need no data and come from where it spends its probability (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlformat.errors import QlfError

if TYPE_CHECKING:
    import torch


def own_windows(model: Any, begin: int, count: int, size: int, seed: int) -> torch.Tensor:
    """Windows drawn token by token from the model's own distribution, int64 [count, size].

    Args:
        model: a causal language model of transformers.
        begin: token that each window begins with.
        seed: of the draws.

    Raises:
        QlfError: the model does not keep what it has read, so each token would cost as much as the whole window.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    latest = torch.full((count, 1), begin)
    windows, cache = [latest], None
    while len(windows) < size:
        output = model(input_ids=latest, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise QlfError(
                f"{type(model).__name__} keeps no cache of keys and values to write its own calibration text with; "
                "set own_tokens=0"
            )
        latest = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        windows.append(latest)
    return torch.cat(windows, 1)
