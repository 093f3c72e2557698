"""Generate text with a checkpoint: load it in the way that is fast on the device, apply the chat template, stream."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat import free_memory
from qlformat.checkpoint import NUMPY_DTYPES, Checkpoint
from qlformat.errors import QlfError
from qlformat.model_loader import base_directory, load_model

if TYPE_CHECKING:
    import torch

_MEMORY_SHARE = 0.8
"""Of the available memory that dequantized weights may take; the rest is for activations and the key-value cache."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: stop after this many.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that make up this probability.
        seed: of the random numbers.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Arguments of transformers' generate; None takes back what the repository's generation_config sets."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Answer:
    """What was generated.

    Attributes:
        text: without special tokens.
        prompt_tokens, new_tokens: token counts, special tokens included.
        finish: "stop" when the model ended, "length" at max_new_tokens.
        load_seconds: to load model and tokenizer.
        first_token_seconds: from the start of the generation to its first token.
        tokens_per_second: of the tokens after the first; None for a single one.
        device, dtype: where and in what was computed.
        four_bit: whether the layers stayed in 4 bits.
        notes: what a user should read.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: str
    load_seconds: float
    first_token_seconds: float
    tokens_per_second: float | None
    device: str
    dtype: str
    four_bit: bool
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "notes": list(self.notes)}


class Generator:
    """A loaded model with its tokenizer.

    Args:
        base, adapter: as for load_model.
        dtype: to compute in. By default that of the model; in 4 bits on the CPU, the compute dtype of its layers.
        device: as device_map of load_model.
        keep_4bit: stay in 4 bits on the CPU too, where bitsandbytes decodes every layer again for each token.
        allow_base_mismatch: as for load_model.

    Attributes:
        model, tokenizer: of transformers.
        four_bit: whether the layers are in 4 bits.
        notes: what a user should read.

    Raises:
        QlfError: as load_model; or there is no tokenizer.
    """

    def __init__(
        self,
        base: str | Path,
        adapter: str | Path | None = None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        keep_4bit: bool = False,
        allow_base_mismatch: bool = False,
    ) -> None:
        start = time.perf_counter()
        directory = base_directory(base)
        # Opens the checkpoint, so what is wrong with it is said before anything about its tokenizer.
        self.four_bit, note = _stays_packed(directory, dtype, device, keep_4bit)
        self.tokenizer = _tokenizer(directory)
        if self.four_bit and dtype is None and _on_cpu(device):
            # In another dtype than the layers compute in, every layer converts its input and output: 3 times slower.
            dtype = _compute_dtype(directory)
        self.model: Any = load_model(
            directory,
            adapter,
            device_map=device,
            dtype=dtype,
            dequantize=not self.four_bit,
            allow_base_mismatch=allow_base_mismatch,
        )
        if self.four_bit and dtype is not None:
            _compute_in(self.model, dtype)
        self.notes = (*((note,) if note else ()), *self.model.qlf_notes)
        self.load_seconds = time.perf_counter() - start

    def encode(self, prompt: str, system: str | None = None, raw: bool = False) -> Any:
        """The model's inputs for a prompt, through the chat template where there is one.

        Raises:
            QlfError: no chat template for a system message, one that refuses it, or a prompt of no tokens.
        """
        if raw or not self.tokenizer.chat_template:
            if system is not None:
                raise QlfError("the model has no chat template, so no system message; put it into the prompt")
            inputs = self.tokenizer(prompt, return_tensors="pt")
        else:
            roles = [("system", system), ("user", prompt)]
            messages = [{"role": role, "content": text} for role, text in roles if text is not None]
            try:
                inputs = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except Exception as error:  # a template raises what its author likes
                reason = " ".join(str(error).split())[:200]
                raise QlfError(f"the model's chat template refuses the messages ({reason}); try without them") from None
        if not inputs["input_ids"].shape[1]:
            raise QlfError("the prompt has no tokens; write something")
        return inputs.to(self.model.device)

    def answer(
        self,
        prompt: str,
        *,
        system: str | None = None,
        raw: bool = False,
        sampling: Sampling = Sampling(),  # frozen, so shared safely
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Generate; `on_text` gets the text piece by piece as it comes.

        Raises:
            QlfError: as encode; or the prompt is longer than the model's context.
        """
        import torch
        import transformers

        inputs = self.encode(prompt, system, raw)
        count = inputs["input_ids"].shape[1]
        limit, notes = self._room(count, sampling.max_new_tokens)
        transformers.set_seed(sampling.seed)
        stream = _streamer(self.tokenizer, on_text or (lambda text: None))
        start = time.perf_counter()
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                **sampling.settings(),
                max_new_tokens=limit,
                pad_token_id=_pad(self.tokenizer, self.model),
                streamer=stream,
            )[0, count:]
        times = stream.times
        return Answer(
            text=self.tokenizer.decode(tokens, skip_special_tokens=True),
            prompt_tokens=count,
            new_tokens=len(tokens),
            finish="length" if len(tokens) >= limit and tokens[-1].item() not in _ends(self.model) else "stop",
            load_seconds=self.load_seconds,
            first_token_seconds=times[0] - start,
            tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            four_bit=self.four_bit,
            notes=(*self.notes, *notes),
        )

    def _room(self, prompt_tokens: int, wanted: int) -> tuple[int, list[str]]:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(context, int) or context <= 0:
            return wanted, []
        if prompt_tokens >= context:
            raise QlfError(f"the prompt has {prompt_tokens} tokens, the model's context {context}; shorten the prompt")
        if prompt_tokens + wanted <= context:
            return wanted, []
        room = context - prompt_tokens
        return room, [f"stops after {room} tokens, where the context of {context} ends"]


def _tokenizer(directory: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # each tokenizer class has errors of its own for a missing or broken file
        reason = " ".join(str(error).split())[:200]
        raise QlfError(
            f"{directory}: found no tokenizer that loads ({reason}); copy the source model's files"
        ) from None


def _stays_packed(directory: Path, dtype: str | None, device: str | None, keep_4bit: bool) -> tuple[bool, str | None]:
    """Whether the layers stay in 4 bits, and why against expectation.

    On a GPU yes. On a CPU bitsandbytes decodes a layer anew for each token (SmolLM2 on two cores without AVX-512: 5
    tokens/s, dequantized 22), so the weights are dequantized once, where there is memory.
    """
    with Checkpoint(directory) as checkpoint:
        if keep_4bit or not _on_cpu(device):
            return True, None
        named = dtype or checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16"
        itemsize = NUMPY_DTYPES[named].itemsize if named in NUMPY_DTYPES else 2
        needed = sum(math.prod(weight.shape) for weight in checkpoint.weights.values()) * itemsize
    available = _available_memory()
    if available is None or needed <= _MEMORY_SHARE * available:
        return False, None
    return True, (
        f"kept in 4 bits, which is slow on a CPU: dequantized it needs {needed / 1e9:.1f} GB, "
        f"{available / 1e9:.1f} GB of memory are available"
    )


def _on_cpu(device: str | None) -> bool:
    import torch

    return device == "cpu" or (device in (None, "auto") and not torch.accelerator.is_available())


def _available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not say."""
    free = free_memory.on_host()
    return free.size if free else None


def _compute_dtype(directory: Path) -> str | None:
    with Checkpoint(directory) as checkpoint:
        found = checkpoint.config["quantization_config"].get("bnb_4bit_compute_dtype")
    return found if isinstance(found, str) and found in NUMPY_DTYPES else None


def _compute_in(model: Any, dtype: str) -> None:
    import torch
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = getattr(torch, dtype), True


def _ends(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found} - {None}


def _pad(tokenizer: Any, model: Any) -> int | None:
    found = model.generation_config.pad_token_id
    if found is None:
        found = tokenizer.pad_token_id
    return found if found is not None else min(_ends(model), default=None)


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Stream(TextStreamer):  # type: ignore[misc]  # transformers' classes are Any here
        """Hands text on as soon as whole words are there, and notes when each token came."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Stream()
