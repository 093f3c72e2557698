"""Calibration texts: read, hashed, cut into windows of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat.calibration.settings import CalibrationSettings
from qlformat.errors import QlfError

if TYPE_CHECKING:
    import torch

LEAST_TOKENS = 1024
"""Below this the second moments of the activations say more about the text than about the model."""
_SHORTEST_WINDOW = 64
_SUFFIXES = {".txt", ".utf8", ".md"}


@dataclass(frozen=True)
class Texts:
    """Calibration texts.

    Attributes:
        parts: their contents, in order of the files' names.
        sha256: of the bytes of all files, one after another.
    """

    parts: tuple[str, ...]
    sha256: str


def read_texts(path: Path) -> Texts:
    """Read one text file, or the .txt, .utf8 and .md files of a directory.

    Raises:
        QlfError: there is none, or one is empty or no UTF-8.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise QlfError(f"{path}: found no .txt, .utf8 or .md file, needed a calibration text")
    else:
        files = [path]
    digest, parts = hashlib.sha256(), []
    for file in files:
        try:
            data = file.read_bytes()
            text = data.decode()
        except OSError as error:
            raise QlfError(f"{file}: the calibration text cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise QlfError(
                f"{file}: byte {error.start} is not UTF-8, needed a plain text for the calibration; convert the file"
            ) from None
        if not text.strip():
            raise QlfError(f"{file}: the calibration text is empty, needed some pages of what the model will read")
        digest.update(data)
        parts.append(text)
    return Texts(tuple(parts), digest.hexdigest())


def windows(texts: Texts, directory: Path, context: int | None, settings: CalibrationSettings) -> torch.Tensor:
    """Windows of tokens, int64 [windows, tokens], as many from each text as can be; each begins with the BOS token.

    Args:
        directory: of the model's tokenizer.
        context: most tokens the model sees, if it says so.

    Raises:
        QlfError: no tokenizer, or too little text.
    """
    import torch

    tokenizer = _tokenizer(directory)
    size = min(settings.window, context or settings.window)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts.parts]
    total = sum(map(len, tokens))
    if total < LEAST_TOKENS:
        raise QlfError(
            f"the calibration text has {total} tokens, needed at least {LEAST_TOKENS}, better {settings.tokens}; "
            "give a longer text"
        )
    size = max(_SHORTEST_WINDOW, min(size, max(map(len, tokens))))
    step = size - len(begin)
    share = max(1, settings.tokens // size // len(tokens))
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = []
    for part in tokens:
        count = len(part) // step
        picked = sorted(torch.randperm(count, generator=generator)[:share].tolist())
        chosen += [begin + part[index * step : (index + 1) * step] for index in picked]
    return torch.tensor(chosen)


def begin_token(directory: Path) -> int | None:
    """The token that a text begins with, or the one that ends the text before it."""
    tokenizer = _tokenizer(directory)
    begin: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return begin


def _tokenizer(directory: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:150]
        raise QlfError(
            f"{directory}: the calibration needs the model's tokenizer, which does not load ({reason}); put "
            "tokenizer.json and tokenizer_config.json beside config.json"
        ) from None
