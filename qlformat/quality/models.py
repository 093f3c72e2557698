"""Load the models and tokenizers to evaluate: 4-bit or 16-bit, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat import adapter as adapters
from qlformat import remote, skeleton
from qlformat.checkpoint import dtype_name
from qlformat.errors import QlfError
from qlformat.model_loader import base_directory, load_model, with_adapter
from qlformat.quality.sides import is_four_bit

if TYPE_CHECKING:
    import torch

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode.

    Attributes:
        name, adapter: as they were asked for.
        directory: of the base.
        model: of transformers, or peft's around it.
        dtype: torch name of what is computed in.
        four_bit: whether the layers stayed in 4 bits.
        notes: what a user should read.
    """

    name: str
    adapter: str | None
    directory: Path
    model: Any
    dtype: str
    four_bit: bool
    notes: tuple[str, ...]

    @property
    def context(self) -> int | None:
        """Most tokens that the model takes; None when config.json does not say."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        found: torch.device = self.model.device
        return found


def load(
    name: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    keep_4bit: bool = False,
    allow_base_mismatch: bool = False,
) -> Loaded:
    """Load a model to run it.

    On a CPU 4-bit weights are dequantized once, each to the dtype that it decodes to, and computed with in `dtype`.

    Args:
        name: a 4-bit or 16-bit model: a directory, or a Hub repository.
        adapter: a peft adapter to put on top.
        dtype: to compute in. By default float32 on a CPU, elsewhere the model's own.
        device: "cpu", "cuda" ...; by default the accelerator, if there is one.
        keep_4bit: stay in 4 bits on a CPU too, which is slow.
        allow_base_mismatch: as for load_model.

    Raises:
        QlfError: as load_model; or transformers cannot load the 16-bit model.
    """
    directory, place = base_directory(name), _device(device)
    wanted = dtype_name(dtype) if dtype is not None else ("float32" if place.type == "cpu" else None)
    packed = is_four_bit(directory)
    stays = packed and (keep_4bit or place.type != "cpu")
    if packed:
        model: Any = load_model(
            directory,
            adapter,
            device_map=str(place),
            dequantize=not stays,
            allow_base_mismatch=allow_base_mismatch,
        )
        notes: tuple[str, ...] = model.qlf_notes
    else:
        model, notes = _plain(directory, adapter, place)
    if wanted is not None:
        _compute_in(model, wanted, stays)
    model.eval()
    used = wanted or str(model.dtype).removeprefix("torch.")
    return Loaded(str(name), None if adapter is None else str(adapter), directory, model, used, stays, notes)


def has_tokenizer(directory: Path) -> bool:
    """Whether there are files of a tokenizer, sound or not."""
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model.

    Raises:
        QlfError: there is none that transformers can read.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # each tokenizer class has errors of its own for a missing or broken file
        reason = " ".join(str(error).split())[:200]
        raise QlfError(f"{directory}: found no tokenizer that loads ({reason}); copy the model's files there") from None


def _device(name: str | None) -> torch.device:
    import torch

    if name is None or name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise QlfError(f"device {name!r} is unknown; use 'cpu', 'cuda' or 'cuda:0'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QlfError(f"device {name!r} was asked for, found {torch.cuda.device_count()} CUDA devices; use 'cpu'")
    return device


def _compute_in(model: Any, dtype: str, packed: bool) -> None:
    """Make a loaded model compute in `dtype`; packed weights stay as they are."""
    import torch

    target = getattr(torch, dtype)
    if not packed:
        model.to(target)
        return
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = target, True
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(target)


def _plain(directory: Path, adapter: str | Path | None, device: torch.device) -> tuple[Any, tuple[str, ...]]:
    """A 16- or 32-bit model in the dtype it is stored in, with every weight from its files; and notes."""
    found = None if adapter is None else remote.local_directory(adapter)
    pin = None if found is None else adapters.read_pin(found)  # before the model: it refuses what is no adapter
    cls = skeleton.model_class(skeleton.read_config(directory))
    with skeleton.no_progress_bar():
        try:
            model, report = cls.from_pretrained(
                directory, dtype="auto", device_map={"": device}, output_loading_info=True
            )
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise QlfError(f"{directory}: transformers cannot load a {cls.__name__} from it: {reason}") from error
    lost = sorted(report["missing_keys"])
    if lost:
        raise QlfError(f"{directory}: found no {lost[0]}, which {cls.__name__} needs; fetch the model again")
    if found is None:
        return model, ()
    note = "pinned to a base in 4 bits, this one is not quantized" if pin else "not pinned to a base"
    return with_adapter(model, found), (f"the adapter {found.name} is {note}; only names and shapes were compared",)
