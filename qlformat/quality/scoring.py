"""Run a model on a window and give its next-token distributions a few positions at a time.

The logits of a whole window would be its largest tensor by far: 1.2 GB in float64 for 1,024 tokens of a vocabulary of
150,000. So the output layer is run on slices of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlformat.errors import QlfError
from qlformat.quality.models import Loaded
from qlformat.quality.windows import Window

if TYPE_CHECKING:
    import torch

LOGITS_BYTES = 32 << 20
"""Of the float64 logits that are held at a time."""


def log_probabilities(loaded: Loaded, window: Window) -> Iterator[torch.Tensor]:
    """Logarithms of the probabilities of every token at each counted position: float64 [some positions, vocabulary].

    In float32 torch's log_softmax on a CPU is 5e-6 too small, the same way for every token. How many positions come at
    a time depends on the size of the vocabulary alone.

    Raises:
        QlfError: the model is no causal language model, or its logits are not finite.
    """
    import torch

    ids = torch.from_numpy(window.ids).to(loaded.device)
    before = torch.from_numpy(window.counted - 1).to(loaded.device)
    hidden, logits = _run(loaded, ids)
    head = _head(loaded.model)
    step = max(1, LOGITS_BYTES // (8 * logits.shape[-1]))
    for first in range(0, len(before), step):
        positions = before[first : first + step]
        part = logits[positions] if hidden is None else head(hidden[positions][None])[0]
        part = part.cpu() if part.device.type == "mps" else part  # which has no float64
        found = torch.log_softmax(part.double(), dim=-1)
        if torch.isnan(found).any():
            raise QlfError(
                f"{loaded.name}: the logits are not finite in {loaded.dtype}; compute in another dtype, or verify it"
            )
        yield found


def vocabulary(loaded: Loaded) -> int:
    """How many tokens the model's distributions are over."""
    head = _head(loaded.model)
    size = getattr(head, "out_features", None) or loaded.model.config.get_text_config().vocab_size
    return int(size)


def _head(model: Any) -> Any:
    """The output layer, or None."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.get_output_embeddings()


def _run(loaded: Loaded, ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(hidden states [tokens, width] that the output layer makes the logits of, None if it does not alone; logits).

    The output layer is run on the last position alone. If the model's logits are not what it gives (some models scale
    or cap them), the model is run again for all of them.
    """
    import torch

    caught: list[torch.Tensor] = []

    def keep_last(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(arguments[0])
        return arguments[0][:, -1:], *arguments[1:]

    head = _head(loaded.model)
    if head is not None:
        handle = head.register_forward_pre_hook(keep_last)
        try:
            last = _logits(loaded, ids)
        finally:
            handle.remove()
        if len(caught) == 1 and last.shape[1] == 1 and torch.equal(head(caught[0][:, -1:]).float(), last.float()):
            return caught[0][0, -len(ids) :], last[0]
    return None, _logits(loaded, ids)[0, -len(ids) :]


def _logits(loaded: Loaded, ids: torch.Tensor) -> torch.Tensor:
    try:
        found = loaded.model(input_ids=ids[None], use_cache=False)
    except (TypeError, ValueError) as error:  # such as an encoder and decoder, which needs inputs for both
        reason = " ".join(str(error).split())[:200]
        raise QlfError(f"{loaded.name}: the model cannot be run on text alone ({reason})") from None
    logits: torch.Tensor | None = getattr(found, "logits", None)
    if logits is None or logits.dim() != 3:
        kind = type(loaded.model).__name__
        raise QlfError(f"{loaded.name}: found a {kind}, needed a causal language model, which predicts the next token")
    return logits
