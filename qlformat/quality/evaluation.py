"""Loss and perplexity of a model on text or on conversations, alone or against another model.

The protocol (windows, strides, which tokens count) is docs/evaluation.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat.errors import QlfError
from qlformat.finetune.metrics import TrainingProgress
from qlformat.quality.inputs import Inputs, data_inputs, text_inputs
from qlformat.quality.models import Loaded, has_tokenizer, load, load_tokenizer
from qlformat.quality.scoring import log_probabilities, vocabulary
from qlformat.quality.windows import Window

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Comparison:
    """A model against another one, over the same tokens.

    Attributes:
        model, adapter: the other one.
        loss, perplexity: of the other one.
        loss_difference: loss of the model minus that of the other: negative where the model is better.
        kl_divergence: mean over the tokens of KL(other || model) of the next-token distributions, in nats.
        top1_agreement: share of the tokens where both find the same one likeliest.
    """

    model: str
    adapter: str | None
    loss: float
    perplexity: float | None
    loss_difference: float
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and how.

    Attributes:
        model, adapter: as they were asked for.
        source: the file or dataset; `kind` is "text" or "data".
        sha256: of the bytes of the text, or of the rows (Rows.sha256).
        loss: mean negative log-likelihood of the counted tokens, in nats.
        perplexity: exp(loss); None where that is no finite number.
        top1_accuracy: share of the counted tokens that the model found likeliest.
        tokens: how many count.
        text_tokens: how many the text or the rows have, those that do not count included.
        windows: how many sequences the model was run on.
        window, stride: in tokens; the stride is None for data, where each row is a sequence.
        bos: whether every window of a text begins with the BOS token.
        max_tokens: limit that was set, or None.
        dtype: that was computed in; `four_bit` whether the layers stayed in 4 bits.
        device, threads: of torch.
        seed: of torch's random numbers, which no known model asks for in evaluation mode.
        versions: of torch and transformers.
        seconds: of the evaluation, loading included.
        against: the comparison that was asked for.
        data: what became of the rows, or None for a text.
        notes: what a user should read.
    """

    model: str
    adapter: str | None
    kind: str
    source: str
    sha256: str
    loss: float
    perplexity: float | None
    top1_accuracy: float
    tokens: int
    text_tokens: int
    windows: int
    window: int
    stride: int | None
    bos: bool
    max_tokens: int | None
    dtype: str
    four_bit: bool
    device: str
    threads: int
    seed: int
    versions: dict[str, str]
    seconds: float
    against: Comparison | None
    data: dict[str, Any] | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "notes": list(self.notes)}


def evaluate(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    text: str | Path | None = None,
    data: str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    max_tokens: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    keep_4bit: bool = False,
    allow_base_mismatch: bool = False,
    against: str | Path | None = None,
    against_adapter: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> Evaluation:
    """Measure a model on a text or on conversations.

    Args:
        model: 4-bit or 16-bit, a directory or a Hub repository. Its tokenizer is used, also for `against`.
        adapter: a peft adapter to put on it.
        text: a UTF-8 file. Exactly one of `text` and `data`.
        data: rows as `qlf finetune` takes them: the tokens that it would train on count.
        window: tokens that the model sees at a time; by default 1,024 or the model's context. Longer rows are cut.
        stride: tokens between the beginnings of two windows of a text; by default half a window.
        bos: whether each window of a text begins with BOS; by default as the tokenizer does by itself.
        max_tokens: use the beginning of the text, or the first rows, up to so many tokens.
        dtype, device, keep_4bit, allow_base_mismatch: as for quality.models.load.
        against: another model of the same vocabulary, with `against_adapter` on it; both are then in memory.
        seed: of torch's random numbers.
        progress: gets reports.

    Raises:
        QlfError: a model, tokenizer or text that cannot be used, a window that does not fit, or vocabularies that
            differ.
    """
    started = time.perf_counter()
    if (text is None) == (data is None):
        raise QlfError("found both a text and data, or neither; give one of them")
    if against is None and against_adapter is not None:
        raise QlfError("found against_adapter without against; give the model that it belongs on")
    report = progress or (lambda now: None)
    options = {
        "dtype": dtype,
        "device": device,
        "keep_4bit": keep_4bit,
        "allow_base_mismatch": allow_base_mismatch,
    }
    with _seeded(seed):
        report(TrainingProgress("loading"))
        loaded = load(model, adapter, **options)  # type: ignore[arg-type]
        tokenizer = load_tokenizer(loaded.directory)
        other = None
        context = loaded.context
        if against is not None:
            other = load(against, against_adapter, **options)  # type: ignore[arg-type]
            _check_vocabularies(loaded, other, tokenizer)
            context = min((c for c in (context, other.context) if c is not None), default=None)
        if text is not None:
            inputs = text_inputs(Path(text), tokenizer, window, stride, context, bos, max_tokens)
        else:
            inputs = data_inputs(str(data), tokenizer, window, stride, context, max_tokens)
        sums = run(loaded, other, inputs.windows, report)
    return _evaluation(loaded, other, inputs, sums, seed, max_tokens, time.perf_counter() - started)


@dataclass
class Sums:
    """Sums over the counted tokens, added in their order.

    Attributes:
        tokens: how many.
        loss, other_loss: negative log-likelihoods.
        kl: of the divergences.
        hits: tokens that the model found likeliest.
        agreed: positions where both models find the same token likeliest.
    """

    tokens: int = 0
    loss: float = 0.0
    other_loss: float = 0.0
    kl: float = 0.0
    hits: int = 0
    agreed: int = 0


def run(
    loaded: Loaded, other: Loaded | None, windows: list[Window], report: Callable[[TrainingProgress], None]
) -> Sums:
    """Run one or two models on every window; memory is bounded by the window and by scoring.LOGITS_BYTES."""
    import torch

    sums = Sums()
    begun = time.perf_counter()
    with torch.inference_mode():
        for number, window in enumerate(windows, 1):
            _score(loaded, other, window, sums)
            took = time.perf_counter() - begun
            left = took / number * (len(windows) - number)
            loss = sums.loss / sums.tokens
            report(TrainingProgress("evaluating", number, len(windows), loss, sums.tokens / max(took, 1e-9), left))
    return sums


def _score(loaded: Loaded, other: Loaded | None, window: Window, sums: Sums) -> None:
    import torch

    targets = torch.from_numpy(window.ids[window.counted])
    parts = log_probabilities(loaded, window)
    others = log_probabilities(other, window) if other is not None else None
    done = 0
    for found in parts:
        wanted = targets[done : done + len(found)].to(found.device)
        best = found.argmax(-1)
        sums.loss += _likelihood(found, wanted)
        sums.hits += int((best == wanted).sum())
        if others is not None:
            reference = next(others).to(found.device)
            sums.other_loss += _likelihood(reference, wanted)
            sums.agreed += int((best == reference.argmax(-1)).sum())
            shares = reference.exp()
            # A token without any probability adds nothing, whatever the difference of the logarithms is.
            terms = torch.where(shares > 0, shares * (reference - found), 0.0)
            sums.kl += float(terms.sum())
        done += len(found)
    sums.tokens += done


def _likelihood(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    """Negative log-likelihood of the targets, summed."""
    return -float(log_probabilities.gather(-1, targets[:, None]).sum())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's random numbers begin at `seed`, and are afterwards as before."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _check_vocabularies(loaded: Loaded, other: Loaded, tokenizer: Any) -> None:
    """Refuse to compare distributions over different tokens."""
    sizes = vocabulary(loaded), vocabulary(other)
    if sizes[0] != sizes[1]:
        raise QlfError(
            f"the vocabularies differ: {loaded.name} predicts one of {sizes[0]} tokens, {other.name} one of "
            f"{sizes[1]}; compare models of one family"
        )
    if not has_tokenizer(other.directory):  # merged weights alone, say: the size fits
        return
    if load_tokenizer(other.directory).get_vocab() != tokenizer.get_vocab():
        raise QlfError(
            f"the vocabularies differ: the tokenizers of {loaded.name} and {other.name} give their {sizes[0]} tokens "
            "different numbers; compare models of one family"
        )


def _evaluation(
    loaded: Loaded,
    other: Loaded | None,
    inputs: Inputs,
    sums: Sums,
    seed: int,
    max_tokens: int | None,
    seconds: float,
) -> Evaluation:
    import torch
    import transformers

    loss = sums.loss / sums.tokens
    notes = [*loaded.notes, *(() if other is None else other.notes), *inputs.notes]
    return Evaluation(
        model=loaded.name,
        adapter=loaded.adapter,
        kind=inputs.kind,
        source=inputs.source,
        sha256=inputs.sha256,
        loss=loss,
        perplexity=_exp(loss),
        top1_accuracy=sums.hits / sums.tokens,
        tokens=sums.tokens,
        text_tokens=inputs.text_tokens,
        windows=len(inputs.windows),
        window=inputs.window,
        stride=inputs.stride,
        bos=inputs.bos,
        max_tokens=max_tokens,
        dtype=loaded.dtype,
        four_bit=loaded.four_bit,
        device=str(loaded.device),
        threads=torch.get_num_threads(),
        seed=seed,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        seconds=round(seconds, 3),
        against=None if other is None else _comparison(other, sums),
        data=inputs.data,
        notes=tuple(dict.fromkeys(notes)),
    )


def _comparison(other: Loaded, sums: Sums) -> Comparison:
    loss = sums.other_loss / sums.tokens
    return Comparison(
        model=other.name,
        adapter=other.adapter,
        loss=loss,
        perplexity=_exp(loss),
        loss_difference=(sums.loss - sums.other_loss) / sums.tokens,
        kl_divergence=sums.kl / sums.tokens,
        top1_agreement=sums.agreed / sums.tokens,
    )


def _exp(loss: float) -> float | None:
    try:
        return math.exp(loss)
    except OverflowError:
        return None
