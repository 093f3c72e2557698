"""Which weights transformers changes while it loads them: its table of renamings, splits and merges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import CodeType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def first_converted(model: PreTrainedModel, names: Iterable[str]) -> str | None:
    """The first of these weights that transformers would rename, split, merge or transform while loading.

    Args:
        model: of transformers.
        names: of stored weights, each of which is also a name in the model or has no place in it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not may_convert(model):
        return None
    transforms = get_model_conversion_mapping(model)
    for name in names:
        for transform in transforms:
            renamed, pattern = transform.rename_source_key(name)
            if renamed != name or (pattern is not None and hasattr(transform, "operations")):
                return name
    return None


def may_convert(model: PreTrainedModel) -> bool:
    """Whether transformers' table of conversions could have an entry for a part of the model.

    The table costs a third of the time of a load, since it compiles hundreds of patterns when it is first asked. Its
    keys are string constants of the function that makes it: what is none of these is no key. (Its entries for every
    model only rename what is no name of the model any more, so they cannot concern names that have a place.)
    """
    from transformers import PreTrainedModel as Base
    from transformers import conversion_mapping as table

    names = {type(part).__name__ for part in model.modules() if isinstance(part, Base)}
    names |= {part.config.model_type for part in model.modules() if isinstance(part, Base)}
    maker = getattr(table, "_build_checkpoint_conversion_mapping", None)
    aliases = getattr(table, "_MODEL_TO_CONVERSION_PATTERN", None)
    registered = getattr(table, "USER_REGISTERED_MAPPINGS", None)
    if maker is None or aliases is None or registered is None:
        return True
    return bool(names & {*string_constants(maker.__code__.co_consts), *aliases, *registered})


def string_constants(values: Iterable[object]) -> Iterator[str]:
    """The strings among the constants of a code object, and of those in it."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple | frozenset):
            yield from string_constants(value)
        elif isinstance(value, CodeType):
            yield from string_constants(value.co_consts)
