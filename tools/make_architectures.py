"""Write qlformat/data/architectures.json: what transformers does per architecture when it loads and quantizes.

Every architecture is built on the meta device in many configurations; what transformers' own `replace_with_bnb_linear`
replaces is compared with the rules by name in `qlformat/architectures.py`, and only the differences are written. Run it
after an update of transformers (five minutes of one core), then tests/interop/test_selection_transformers.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import conversion_mapping  # noqa: E402
from transformers.core_model_loading import (  # noqa: E402
    GroupWeightRename,
    Inkling2IndexOffsetWeightRename,
    WeightConverter,
    WeightTransform,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402
from transformers.quantizers.base import (  # noqa: E402
    MODULES_TO_PATCH_FOR_QUANTIZATION,
    HfQuantizer,
    get_keys_to_not_convert,
)
from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: E402
from transformers.utils import ContextManagers  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qlformat.architectures import rule_by_name  # noqa: E402

# Models with hundreds of tied weights make transformers match as many patterns against every module.
re._MAXCACHE = 1 << 16  # type: ignore[attr-defined]

TARGET = ROOT / "qlformat" / "data" / "architectures.json"
TASKS = ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM")
# Wrappers of any two models: no entry could describe them.
GENERIC_WRAPPERS = ("encoder-decoder", "vision-encoder-decoder")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_COMPASS = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64}
_QWEN4 |= {"indexer_compress_ratio": 4}
# Settings without which the architecture's default configuration cannot be instantiated.
REQUIRED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config": {"num_hidden_layers": 12, "mlp_layer_types": ["dense"] + ["sparse"] * 11}},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 4, "<image>": 5}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 6}},
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "downsample_rate": "4/8"},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 64}}
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True},
}
# Blocks shared by layers are tied only where there are enough layers.
TIED_LAYERS = ("zamba", "zamba2")
LAYER_COUNTS = frozenset(
    {
        "num_hidden_layers",
        "n_layer",
        "num_layers",
        "n_layers",
        "depth",
        "encoder_layers",
        "decoder_layers",
        "num_encoder_layers",
        "num_decoder_layers",
    }
)
QUANTIZED = frozenset({"linear", "conv1d"})
# Switches that change no module; toggling them would only cost time.
BORING = re.compile(
    r"output_|use_cache|return_dict|is_encoder_decoder|torchscript|chunk|gradient|_is|early_stopping|do_sample|"
    r"remove_|tf_|use_bfloat16|scale_|apply_|norm_topk|.*dropout"
)


def architectures() -> dict[tuple[str, str], str]:
    """(model type, class name) -> task, for every language model that an Auto class of transformers knows."""
    found: dict[tuple[str, str], str] = {}
    for task in TASKS:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            for name in names if isinstance(names, (tuple, list)) else [names]:
                if model_type not in GENERIC_WRAPPERS:
                    found.setdefault((model_type, name), task)
    return found


def default_config(model_type: str, class_name: str) -> Any:
    """The configuration of `model_type`, or the part of it that the class takes."""
    wanted = getattr(transformers, class_name).config_class
    config = CONFIG_MAPPING[model_type](**REQUIRED.get(model_type, {}))
    if isinstance(config, wanted):
        return config
    text = config.get_text_config() if "text_config" in config.sub_configs else None
    return text if isinstance(text, wanted) else wanted()


def shrink(config: dict[str, Any], layers: int = 6, experts: int = 16) -> dict[str, Any]:
    """The same configuration with few layers and experts; lists with one entry a layer keep one of each kind."""
    counts = {config[key] for key in LAYER_COUNTS if isinstance(config.get(key), int)}
    small = dict(config)
    for key, value in config.items():
        if key == "per_layer_config" and value:
            small[key] = {layer: settings for layer, settings in value.items() if int(layer) < layers}
        elif isinstance(value, dict):
            small[key] = shrink(value, layers, experts)
        elif key in LAYER_COUNTS and isinstance(value, int):
            small[key] = min(value, layers)
        elif isinstance(value, list) and len(value) in counts and len(value) > layers:
            first_of_kind = sorted(range(len(value)), key=lambda i: (value.index(value[i]) != i, i))
            small[key] = [value[i] for i in sorted(first_of_kind[:layers])]
        elif key in ("first_k_dense_replace", "num_dense_layers") and value:
            small[key] = 1
        elif re.fullmatch(r"(?:num|n)_\w*experts|moe_num_experts", str(key)) and isinstance(value, int):
            small[key] = min(value, experts)
    return small


def build(class_name: str, config: Any) -> Any:
    """The model on the meta device, in the contexts from_pretrained builds it in."""
    cls = getattr(transformers, class_name)
    with ContextManagers(cls.get_init_context(torch.bfloat16, True, False, None)):
        return cls(config)


def small_model(class_name: str, config: Any) -> Any:
    """A model of `config` with few layers, or of `config` itself where it cannot be shrunk."""
    if config.model_type in TIED_LAYERS:
        return build(class_name, config)
    try:
        return build(class_name, type(config).from_dict(shrink(config.to_dict())))
    except Exception:
        return build(class_name, config)


def variants(class_name: str, config: Any) -> Iterator[Any]:
    """Models of the default configuration, and of the small one with each of its switches flipped."""
    yield build(class_name, config)
    base = config.to_dict() if config.model_type in TIED_LAYERS else shrink(config.to_dict())
    for path, key, value in _switches(base):
        changed = json.loads(json.dumps(base, default=str))
        place = changed
        for step in path:
            place = place[step]
        place[key] = value
        try:
            yield build(class_name, type(config).from_dict(changed))
        except Exception:  # Many combinations are refused, and any may be: those say nothing about the names.
            continue


def _switches(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _switches(value, (*path, key))
        elif isinstance(value, bool) and not BORING.match(key):
            yield path, key, not value
        elif re.search(r"rank$|expert", str(key)) and (value is None or isinstance(value, int)):
            yield from ((path, key, other) for other in ((8,) if value is None else (None, 0)))


def general(name: str) -> str:
    """A module's name with its numbers written `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def replaced_modules(model: Any, skip: list[str] | None, pre_quantized: bool) -> set[str]:
    """Replace modules as from_pretrained does; the names of those replaced. skip: llm_int8_skip_modules."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    if pre_quantized:
        transformers.quantizers.AutoHfQuantizer.from_config(config)._convert_model_for_quantization(model)
    entries = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, entries, config, pre_quantized=pre_quantized)
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


class Facts:
    """What was seen of one architecture, over all its variants."""

    def __init__(self) -> None:
        self.reasons: dict[str, set[str]] = {}
        self.skip: dict[str, str] = {}

    def add(self, model: Any) -> None:
        """Record why each module with a 2-D weight is or is not quantized; of modules seen before, the first counts."""
        known = frozenset(self.reasons)
        last = list(model.named_parameters())[-1][0]
        keys = sorted(get_keys_to_not_convert(model))
        kept = sorted(model._keep_in_fp32_modules or ())
        output = model.get_output_embeddings()
        outputs = {id(module) for module in output.modules()} if output is not None else set()
        tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
        modules = {
            name: module
            for name, module in model.named_modules()
            if getattr(module._parameters.get("weight"), "ndim", 0) == 2
        }
        quantized = replaced_modules(model, None, pre_quantized=False)
        for name, module in modules.items():
            if general(name) in known:
                continue
            if name in quantized:
                reason = "conv1d" if isinstance(module, Conv1D) else "linear"
            elif isinstance(module, nn.Embedding):
                reason = "embedding"
            elif type(module) is not nn.Linear and id(module) not in outputs:
                reason = "not-linear"
            elif not should_convert_module(name, kept):
                reason = "keep-in-fp32"
            else:
                head = id(module) in outputs or name.endswith("lm_head")
                only_tied = name in tied and last != f"{name}.weight"
                reason = "output-embedding" if head else "tied" if only_tied else "last-parameter"
                for key in keys:
                    if name == key or name.endswith(key) or name.startswith(f"{key}."):
                        # The bare name also serves the text-only class, whose lm_head is not below language_model.
                        self.skip["lm_head" if key.endswith(".lm_head") else general(key)] = reason
            self.reasons.setdefault(general(name), set()).add(reason)


def corrections(facts: Facts) -> dict[str, Any]:
    """The table entry's `keep`, `linear`, `conv1d` and `skip`: where the rules by name are wrong."""
    quantized = {name for name, why in facts.reasons.items() if why & QUANTIZED}
    entry: dict[str, Any] = {}
    for name, why in sorted(facts.reasons.items()):
        if name in quantized and why - QUANTIZED:
            print(f"    depends on the configuration: {name} {sorted(why)}", file=sys.stderr)
        guess = rule_by_name(name)
        others = set(facts.reasons) - quantized if name in quantized else quantized
        if "conv1d" in why:
            entry.setdefault("conv1d", set()).add(_ending(name, set(facts.reasons) - {name}))
        elif "linear" in why and guess != "linear":
            entry.setdefault("linear", set()).add(_ending(name, others))
        elif "keep-in-fp32" in why or (why <= {"embedding", "not-linear"} and guess == "linear"):
            entry.setdefault("keep", {})[_subtree(name, facts.reasons, others, 6) or _ending(name, others)] = min(why)
    skip: dict[str, str] = {}
    for name, reason in sorted(facts.skip.items(), key=lambda item: (item[0].count("."), item[0])):
        top = _subtree(name, facts.reasons, quantized, 2) if reason == "tied" else None
        if not any(name == known or name.startswith(f"{known}.") for known in skip):
            skip[(top or name).removesuffix(".*")] = reason
    if skip != {"lm_head": "output-embedding"}:
        entry["skip"] = dict(sorted(skip.items()))
    return {key: sorted(value) if isinstance(value, set) else value for key, value in entry.items()}


def _ending(name: str, others: set[str]) -> str:
    """The shortest ending of a dotted name, not a bare number, that none of the others has."""
    parts = name.split(".")
    endings = (".".join(parts[start:]) for start in reversed(range(len(parts))))
    return next(e for e in endings if e.strip("*.") and not any(f".{other}".endswith(f".{e}") for other in others))


def _subtree(name: str, names: Iterable[str], others: set[str], least: int) -> str | None:
    """A glob for all below the highest ancestor of `name` that holds `least` names and none of the others, or None."""
    parts = name.split(".")
    for top in (".".join(parts[:depth]) for depth in range(1, len(parts))):
        if not any(other.startswith(f"{top}.") for other in others) and not top.endswith("*"):
            return f"{top}.*" if sum(n.startswith(f"{top}.") for n in names) >= least else None
    return None


class Conversions:
    """The renaming on load: which groups of transforms a model uses, and the groups themselves."""

    def __init__(self) -> None:
        self.groups: dict[str, list[Any]] = {}

    def of(self, model: Any) -> list[list[str | None]]:
        """[group, scope] in the order transformers applies them to `model`; groups are recorded."""
        origin: dict[int, str] = {}
        original = conversion_mapping.get_checkpoint_conversion_mapping

        def recorded(key: str) -> list[WeightTransform] | None:
            found: list[WeightTransform] | None = original(key)
            origin.update((id(transform), key) for transform in found or ())
            return found

        conversion_mapping.get_checkpoint_conversion_mapping = recorded
        try:
            transforms = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
        finally:
            conversion_mapping.get_checkpoint_conversion_mapping = original
        used: dict[tuple[str, str | None], list[WeightTransform]] = {}
        for transform in transforms:
            used.setdefault((origin[id(transform)], transform.scope_prefix), []).append(transform)
        for (key, _), group in used.items():
            self.groups[key] = [step for transform in group for step in _steps(transform)]
        return [[key, scope] for key, scope in used]


def _steps(transform: WeightTransform) -> Iterator[Any]:
    """A transform as the table has it: [expression, target], {"shift": [pairs]} or {"from": [...], "into": [...]}."""
    pairs = []
    for source in sorted(transform.source_patterns, key=len, reverse=True):
        expression = source.replace("*.", r".*\.")
        expression += r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", expression) else ""
        index = transform.source_patterns.index(source)
        target = transform.target_patterns[index if isinstance(transform, GroupWeightRename) else 0]
        pairs.append((index, expression, target))
    compiled = "|".join(f"(?P<g{index}>{expression})" for index, expression, _ in pairs)
    if compiled != transform.compiled_sources.pattern:
        raise ValueError(f"transformers compiles {transform} differently: {transform.compiled_sources.pattern}")
    if isinstance(transform, Inkling2IndexOffsetWeightRename):
        return  # Renames a vector per layer; no module has such a weight.
    if isinstance(transform, WeightConverter):
        yield {"from": [expression for _, expression, _ in pairs], "into": transform.target_patterns}
    elif isinstance(transform, GroupWeightRename):
        yield {"shift": [[expression, target] for _, expression, target in sorted(pairs)]}
    else:
        yield from ([expression, target] for _, expression, target in pairs)


def structure(model: Any, conversions: Conversions) -> dict[str, Any]:
    """The table entry's `base`, `roots`, `load` and `parts`."""
    children = [name for name, _ in model.named_children()]
    base = model.base_model_prefix if model.base_model_prefix in children else ""
    entry: dict[str, Any] = {}
    if base != "model":
        entry["base"] = base
    if base and set(children) - {base, "lm_head"}:
        entry["roots"] = sorted(children)
    if load := conversions.of(model):
        entry["load"] = load
    if any("bitsandbytes" in _patched(module) for module in model.modules()):
        entry["unpacks_experts"] = True
    parts = {}
    for key in model.config.sub_configs:
        config = getattr(model.config, key, None)
        names = (n for n, m in model.named_modules() if n and getattr(m, "config", None) is config)
        if config is not None and (name := next(names, None)) is not None:
            parts[key] = [config.model_type, name.removeprefix(base).removeprefix(".")]
    if parts:
        entry["parts"] = parts
    return entry


def _patched(module: nn.Module) -> list[str]:
    """The quantization methods for which transformers replaces this module before it loads a quantized checkpoint."""
    methods = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__, {}).get("quantization_methods", ())
    return [method.value for method in methods]


def make(wanted: Sequence[str]) -> dict[str, Any]:
    """The whole table; with `wanted`, only these model types."""
    conversions = Conversions()
    types: dict[str, list[str]] = {}
    rules: dict[str, dict[str, dict[str, Any]]] = {}
    for model_type, class_name in architectures():
        if wanted and model_type not in wanted:
            continue
        try:
            config = default_config(model_type, class_name)
            model = build(class_name, config)
        except Exception as error:
            print(f"{model_type} {class_name}: {type(error).__name__}: {str(error).strip()[:200]}", file=sys.stderr)
            continue
        print(model_type, class_name, file=sys.stderr, flush=True)
        entry = structure(model, conversions)
        facts = Facts()
        for variant in variants(class_name, config):
            facts.add(variant)
        known = types.setdefault(model.config.model_type, [])
        if class_name not in known:
            known.append(class_name)
        rules.setdefault(class_name, {})[model.config.model_type] = entry | corrections(facts)
    flat: dict[str, dict[str, Any]] = {}
    for class_name, by_type in rules.items():
        same = len({json.dumps(entry, sort_keys=True) for entry in by_type.values()}) == 1
        for model_type, entry in by_type.items():
            flat[class_name if same else f"{model_type}/{class_name}"] = entry
    # Dozens of types share a conversion with the type it was written for.
    names = {key: _origin(key, conversions.groups) for key in conversions.groups}
    for entry in flat.values():
        entry["load"] = [[names[group], scope] for group, scope in entry.get("load", ())]
        if not entry["load"]:
            del entry["load"]
    return {
        "transformers": transformers.__version__,
        "types": dict(sorted(types.items())),
        "rules": {key: entry for key, entry in sorted(flat.items()) if entry},
        "conversions": {key: conversions.groups[key] for key in sorted(set(names.values()))},
    }


def _origin(key: str, groups: dict[str, list[Any]]) -> str:
    """The first group with the same steps."""
    return next(other for other in sorted(groups) if groups[other] == groups[key])


def render(table: dict[str, Any]) -> str:
    """JSON with one line an entry: small, and readable in a diff."""
    blocks = []
    for key, value in table.items():
        if isinstance(value, dict):
            lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            blocks.append(f"{json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n}")
        else:
            blocks.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=(), metavar="TYPE", help="model types; prints instead of writing")
    arguments = parser.parse_args()
    text = render(make(arguments.only))
    if arguments.only:
        print(text)
    else:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text)
