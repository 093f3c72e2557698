"""A transformers model with bitsandbytes' 4-bit layers and no weights yet, made as from_pretrained makes it.

Between the two halves of from_pretrained, building and finishing, transformers spends most of its time on matching
names; whoever knows that the names match can do without. The functions of transformers that both halves need are not
part of its documented interface, so they are looked for first, and `Unfit` sends the caller to from_pretrained.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat import conversions
from qlformat.errors import QlfError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_PARAMETERS = {
    "get_init_context": ["dtype", "is_quantized", "_is_ds_init_called", "allow_all_kernels"],
    "initialize_weights": [],
    "tie_weights": ["missing_keys", "recompute_mapping"],
    "named_non_persistent_buffers": ["recurse", "remove_duplicate"],
    "_get_dtype_plan": ["dtype"],
}
"""Methods of PreTrainedModel that are called, with the parameters that they have in the versions known to fit."""


class Unfit(Exception):
    """The model is not one that this module can build; the message says why."""


def read_config(directory: Path) -> PretrainedConfig:
    """config.json as transformers' configuration class.

    Raises:
        QlfError: transformers does not know the model.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise QlfError(
            f"transformers {transformers.__version__} has no such model ({reason}); upgrade it, or, for a model with "
            "code of its own, call AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True), which reads "
            "this checkpoint as well",
            file="config.json",
        ) from None


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that config.json names, else the causal language model of its kind.

    Raises:
        QlfError: transformers has neither.
    """
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in mapping:
        known: type[PreTrainedModel] = mapping[type(config)]
        return known
    raise QlfError(
        f"architectures {config.architectures} are not in transformers {transformers.__version__}; upgrade it, or call "
        "from_pretrained with trust_remote_code=True, which reads this checkpoint as well",
        file="config.json",
    )


def set_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Make `dtype` that of the configuration and of the configurations in it, as from_pretrained does."""
    config.dtype = dtype
    for key in config.sub_configs:
        inner = getattr(config, key)
        if inner is not None:
            inner.dtype = dtype


@dataclass
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: 4-bit layers where transformers puts them, no weights.
        quantizer: transformers' HfQuantizer of the model.
        dtype: of what is not quantized.
        keys: state_dict key -> meta tensor, of everything that a checkpoint has to provide.
        missing: keys that `place` was not called with yet.
    """

    model: PreTrainedModel
    quantizer: Any
    dtype: torch.dtype
    keys: dict[str, torch.Tensor] = field(init=False)
    missing: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = self.model.state_dict()
        self.missing = set(self.keys)
        self._plan = {
            re.compile(name.replace("*", ".*")): dtype for name, dtype in self.model._get_dtype_plan(self.dtype).items()
        }
        self._kept = self.quantizer.get_weight_conversions()
        self._prefix = f"{self.model.base_model_prefix}."

    def key(self, name: str) -> str | None:
        """The state_dict key of a stored weight, with the base model's prefix added or removed; None when ignored.

        Raises:
            Unfit: the model has no place for it.
        """
        bare = name.removeprefix(self._prefix)
        for candidate in dict.fromkeys((bare, self._prefix + name, name)):
            if candidate in self.keys:
                return candidate
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"position_ids$"]
        if any(re.search(pattern, name) for pattern in ignored):
            return None
        raise Unfit(f"{name} has no place in {type(self.model).__name__}")

    def dtype_of(self, key: str) -> torch.dtype:
        """What a floating-point tensor of this key is to be converted to; the model's dtype but for exceptions."""
        for pattern, dtype in self._plan.items():
            if pattern.search(key):
                return dtype
        return self.keys[key].dtype

    def converts(self, key: str) -> bool:
        """Whether from_pretrained would convert a tensor of this key to the model's dtype.

        transformers 5 leaves every tensor whose name one of the quantizer's own patterns matches as it is stored.
        """
        return all(pattern.rename_source_key(key)[1] is None for pattern in self._kept)

    def place(self, key: str, value: torch.Tensor) -> None:
        """Set a parameter or buffer; `value` is used as it is."""
        import torch

        path, _, name = key.rpartition(".")
        module = self.model.get_submodule(path)
        if name in module._parameters and not isinstance(value, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=value.is_floating_point())
        value._is_hf_initialized = True  # so that initialize_weights leaves it alone
        setattr(module, name, value)
        self.missing.discard(key)

    def finish(self, directory: Path, device: torch.device) -> PreTrainedModel:
        """Compute what no checkpoint stores, tie, and attach what from_pretrained attaches.

        Raises:
            Unfit: a weight is missing.
        """
        import torch

        model = self.model
        for tied in model.all_tied_weights_keys:
            model.get_parameter(tied)._is_hf_initialized = True
        absent = self.missing - set(model.all_tied_weights_keys) - set(model.all_tied_weights_keys.values())
        if absent:
            raise Unfit(f"the checkpoint has no {min(absent)}")
        for key, buffer in list(model.named_non_persistent_buffers()):
            path, _, name = key.rpartition(".")
            setattr(model.get_submodule(path), name, torch.empty_like(buffer, device=device))
        model.initialize_weights()
        model.tie_weights(missing_keys=self.missing, recompute_mapping=False)
        if self.missing:
            raise Unfit(f"the checkpoint has no {min(self.missing)}")
        model.eval()
        model._weight_conversions = []  # none was needed; saving asks
        attach_generation_config(model, directory)
        model.hf_quantizer = self.quantizer
        self.quantizer.postprocess_model(model)
        return model


def build(directory: Path, names: Iterable[str], dtype: torch.dtype | None, device: torch.device) -> Skeleton:
    """Build the model of a 4-bit checkpoint without its weights.

    Args:
        directory: the repository.
        names: of its weights.
        dtype: of what is not quantized; that of config.json by default.
        device: where the weights will be.

    Raises:
        QlfError: transformers does not know the model.
        Unfit: transformers renames or merges weights of this model while loading, or is of another version.
    """
    config = read_config(directory)
    cls = model_class(config)
    _require_known(cls)
    from transformers import initialization
    from transformers.quantizers.auto import get_hf_quantizer

    quantizer, config, placement = get_hf_quantizer(config, None, {"": device}, True, {})
    dtype = dtype or config.dtype
    if dtype is None:
        raise Unfit("config.json names no dtype")
    set_dtype(config, dtype)
    config.name_or_path = str(directory)
    with contextlib.ExitStack() as stack:
        for context in cls.get_init_context(dtype, True, False, False):
            stack.enter_context(context)
        stack.enter_context(initialization.no_init_weights())
        model = cls(config)
        quantizer.preprocess_model(
            model=model, dtype=dtype, device_map=placement, checkpoint_files=None, use_kernels=False
        )
    changed = conversions.first_converted(model, names)
    if changed:
        raise Unfit(f"transformers renames, splits or merges {changed} of {cls.__name__} while loading")
    return Skeleton(model, quantizer, dtype)


def attach_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Set generation_config from generation_config.json, else from config.json."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    name = "generation_config.json"
    if (directory / name).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    else:
        model.generation_config = GenerationConfig.from_pretrained(
            directory, config_file_name="config.json", _from_model_config=True
        )


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers' bars off the terminal: a library prints nothing that was not asked for."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _require_known(cls: type[PreTrainedModel]) -> None:
    """Raise Unfit where transformers has other functions than the ones called here."""
    import transformers

    other = Unfit(f"transformers {transformers.__version__} has another loader than the ones that qlformat knows")
    try:
        from transformers import conversion_mapping, initialization
        from transformers.quantizers import auto
    except ImportError:
        raise other from None
    needed = [
        (initialization, "no_init_weights"),
        (conversion_mapping, "get_model_conversion_mapping"),
        (auto, "get_hf_quantizer"),
    ]
    if not all(hasattr(module, name) for module, name in needed):
        raise other
    for name, parameters in _PARAMETERS.items():
        method = getattr(cls, name, None)
        if method is None or [p for p in inspect.signature(method).parameters if p != "self"] != parameters:
            raise other
