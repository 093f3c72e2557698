"""Load a checkpoint as a transformers model: 4-bit layers over the mapped file, or plain 16-bit layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qlformat import adapter as adapters
from qlformat import pins, remote, skeleton
from qlformat import quant_storage as storage
from qlformat.checkpoint import Checkpoint, dtype_name
from qlformat.errors import QlfError
from qlformat.mapped import MappedTensors
from qlformat.skeleton import Skeleton, Unfit
from qlformat.weights import Weight

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    DeviceMap: TypeAlias = str | int | torch.device | dict[str, Any] | None

_LOG = logging.getLogger("qlformat")


def load_model(
    path_or_repo: str | Path,
    adapter: str | Path | None = None,
    device_map: DeviceMap = None,
    dtype: str | torch.dtype | None = None,
    dequantize: bool = False,
    quant_storage: str | torch.dtype = "uint8",
    allow_base_mismatch: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a 4-bit checkpoint, of qlformat or of bitsandbytes, as a transformers model in evaluation mode.

    The model is the one that `from_pretrained` gives: bitsandbytes' Linear4bit layers, ready for peft and `generate`.
    On the CPU its weights are the pages of the file, mapped copy-on-write, so nothing is read before it is used.
    Architectures whose weights transformers renames or merges while loading are left to `from_pretrained`.

    Args:
        path_or_repo: a directory, or a Hub repository "ORG/NAME[@revision]".
        adapter: a peft adapter to put on top, a directory or a Hub repository. An adapter with a qlf.json must be
            pinned to this base.
        device_map: a device ("cpu", "cuda:1"), "auto", or what `from_pretrained` takes. By default the GPU, if any.
        dtype: of what is not quantized: "float32", "float16", "bfloat16" or the torch.dtype. By default each tensor
            keeps its own. What 4-bit layers compute in is `bnb_4bit_compute_dtype` in config.json.
        dequantize: give plain `nn.Linear` layers in `dtype`, by default that of config.json; bitsandbytes is not used.
        quant_storage: dtype that the packed weights are viewed as: "uint8" as stored, or "bfloat16", "float16",
            "float32" for FSDP, which shards no integers. The bytes stay the same.
        allow_base_mismatch: put an adapter that is pinned to another base on this one all the same, with a note.

    Returns:
        The model; with an adapter, peft's PeftModel around it. `model.qlf_notes` is a tuple of lines that a user
        should read: an adapter without a pin, or why `from_pretrained` was used.

    Raises:
        FormatError: the checkpoint breaks a rule; the adapter's qlf.json does; or a file changed while loading.
        QlfError: no such repository, model class, device or dtype; a weight that `quant_storage` does not fit; or the
            adapter belongs to another base.
    """
    directory = base_directory(path_or_repo)
    wanted, stored = _dtype(dtype), storage.resolve(quant_storage)
    if dequantize and stored.is_floating_point:
        raise QlfError(f"found quant_storage {quant_storage!r} with dequantize, which leaves no packed weights")
    device = _device(device_map)
    notes: list[str] = []
    adapter_directory = None if adapter is None else remote.local_directory(adapter)
    with Checkpoint(directory) as checkpoint:
        if adapter_directory is not None:
            note = pins.check_opened(adapter_directory, checkpoint, allowed=allow_base_mismatch)
            notes += [note] if note else []
        if dequantize:
            model = _dense(checkpoint, device, device_map, wanted)
        else:
            model = _four_bit(checkpoint, device, device_map, wanted, notes)
            storage.view(model, stored)
    if adapter_directory is not None:
        model = with_adapter(model, adapter_directory)
    for note in notes:
        _LOG.info("%s: %s", directory, note)
    model.qlf_notes = tuple(notes)
    return model


def base_directory(path_or_repo: str | Path) -> Path:
    """The directory of a base, downloaded if need be.

    Raises:
        QlfError: there is none, or it is that of an adapter.
    """
    directory = remote.local_directory(path_or_repo)
    if (directory / adapters.CONFIG_NAME).is_file() and not (directory / "config.json").is_file():
        raise QlfError(f"{path_or_repo}: found an adapter, needed a base; give its base here and it as adapter=")
    return directory


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    import torch

    found: torch.dtype = getattr(torch, dtype_name(dtype))
    return found


def _device(device_map: DeviceMap) -> torch.device | None:
    """The one device that everything goes to; None when transformers has to distribute the model."""
    import torch

    value: Any = device_map
    if isinstance(value, dict):
        if not value:
            raise QlfError("found an empty device_map, needed a device for each module, or 'cpu', 'cuda' or 'auto'")
        if set(value) != {""}:
            return None
        value = value[""]
    if value in ("balanced", "balanced_low_0", "sequential"):
        return None
    if value is None or value == "auto":
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        return None if value == "auto" else torch.accelerator.current_accelerator()
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        raise QlfError(f"device {value!r} is unknown; use 'cpu', 'cuda', 'cuda:0' or 'auto'") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise QlfError(f"device {str(device)!r} was asked for, found {count} CUDA devices; use 'cpu'")
    elif device.type != "cpu":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None or accelerator.type != device.type:
            here = f"cpu and {accelerator.type}" if accelerator else "cpu"
            raise QlfError(f"device {str(device)!r} was asked for, found only {here}; use one of them")
    return device


def _four_bit(
    checkpoint: Checkpoint,
    device: torch.device | None,
    device_map: DeviceMap,
    dtype: torch.dtype | None,
    notes: list[str],
) -> Any:
    try:
        if device is None:
            raise Unfit(f"device_map {device_map!r} is planned by transformers")
        return _mapped(checkpoint, device, dtype)
    except Unfit as reason:
        notes.append(f"loaded by transformers' from_pretrained: {reason}")
        return _by_transformers(checkpoint, device if device is not None else device_map, dtype, str(reason))


def _mapped(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model with its weights mapped from the file, on another device copied from there."""
    frame = skeleton.build(checkpoint.path, checkpoint.weights, dtype, device)
    stored = MappedTensors(checkpoint)
    for weight in checkpoint.weights.values():
        key = frame.key(weight.name)
        if key is None:
            continue
        if weight.quant_state is not None:
            _place_packed(frame, key, weight, stored, device)
            continue
        if tuple(frame.keys[key].shape) != weight.shape:
            raise Unfit(f"{weight.name} is {list(weight.shape)}, its place {list(frame.keys[key].shape)}")
        value = stored.tensor(weight.name)
        if value.is_floating_point() and (dtype is not None or frame.converts(key)):
            value = value.to(frame.dtype_of(key))
        frame.place(key, value.to(device))
    model = frame.finish(checkpoint.path, device)
    stored.check_unchanged()
    return model


def _place_packed(frame: Skeleton, key: str, weight: Weight, stored: MappedTensors, device: torch.device) -> None:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    path, _, name = key.rpartition(".")
    module = frame.model.get_submodule(path)
    if not isinstance(module, Linear4bit) or name != "weight":
        raise Unfit(f"{weight.name} is quantized, its place is no 4-bit layer")
    if (module.out_features, module.in_features) != weight.shape:
        # transformers compares no shapes of packed weights: it would load them, and compute something else.
        raise QlfError(
            f"found shape {list(weight.shape)}, needed {[module.out_features, module.in_features]} for this layer of "
            f"{type(frame.model).__name__}; config.json is that of another model, fetch both again",
            tensor=weight.name,
        )
    parts = stored.companions(weight)
    value = Params4bit.from_prequantized(stored.tensor(weight.name), parts, device=device, module=module)
    module._is_hf_initialized = True
    frame.place(key, value)


def _by_transformers(checkpoint: Checkpoint, device_map: Any, dtype: torch.dtype | None, unfit: str) -> PreTrainedModel:
    """The model as from_pretrained loads it; what is not quantized is converted to `dtype` where one is given."""
    from bitsandbytes.nn.modules import Params4bit

    cls = skeleton.model_class(skeleton.read_config(checkpoint.path))
    place = device_map if isinstance(device_map, dict | str) else {"": device_map}
    model = _from_pretrained(cls, checkpoint.path, f"in 4 bits ({unfit})", device_map=place, dtype=dtype or "auto")
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
                parameter.data = parameter.data.to(dtype)
    return model


def _dense(
    checkpoint: Checkpoint, device: torch.device | None, device_map: DeviceMap, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model with 16- or 32-bit layers in place of the 4-bit ones."""
    import torch

    from qlformat.loader import load_state_dict

    config = skeleton.read_config(checkpoint.path)
    cls = skeleton.model_class(config)
    del config.quantization_config
    dtype = dtype or config.dtype or torch.bfloat16
    state = load_state_dict(checkpoint.path, dtype=dtype, device=device or "cpu")
    place = {"": device} if device is not None else device_map
    # A state_dict has no repository, so transformers looks for no file: generation_config.json is added after.
    model = _from_pretrained(
        cls, None, "from this checkpoint", config=config, state_dict=state, dtype=dtype, device_map=place,
        ignore_mismatched_sizes=True,  # they are refused below, with their shapes
    )  # fmt: skip
    model.config.name_or_path = model.name_or_path = str(checkpoint.path)
    skeleton.attach_generation_config(model, checkpoint.path)
    return model


def _from_pretrained(cls: type[PreTrainedModel], path: Path | None, what: str, **options: Any) -> PreTrainedModel:
    """transformers' from_pretrained, without its progress bar, and with every weight from the checkpoint.

    Raises:
        QlfError: transformers refuses, or would fill up what the checkpoint lacks with random numbers.
    """
    with skeleton.no_progress_bar():
        try:
            model, loaded = cls.from_pretrained(path, output_loading_info=True, **options)
        except (ValueError, RuntimeError, OSError, ImportError) as error:  # NotImplementedError is a RuntimeError
            reason = " ".join(str(error).split())[:200]
            raise QlfError(
                f"transformers cannot load a {cls.__name__} {what}: {reason}; see whether config.json fits the "
                "weights, or load them with load_state_dict"
            ) from error
    for name, stored, needed in sorted(loaded["mismatched_keys"])[:1]:
        raise QlfError(
            f"found shape {list(stored)}, needed {list(needed)} for {cls.__name__}; config.json is that of another "
            "model, fetch both again",
            tensor=name,
        )
    lost = sorted(loaded["missing_keys"])
    if lost:
        more = f" and {len(lost) - 1} other weights" if len(lost) > 1 else ""
        raise QlfError(
            f"the checkpoint has no {lost[0]}{more}, which {cls.__name__} needs; config.json is that of another "
            "model, or weights are missing: fetch both again"
        )
    found: PreTrainedModel = model
    return found


def with_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """peft's model around `model`, on its device.

    Raises:
        QlfError: peft refuses the adapter: another peft_type, modules that the base lacks, other shapes.
    """
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, directory, torch_device=str(model.device))
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise QlfError(
            f"{directory}: peft {peft.__version__} cannot put this adapter on {type(model).__name__} ({reason}); "
            "give the base that it was trained on"
        ) from None
