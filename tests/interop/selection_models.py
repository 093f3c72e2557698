"""Small models of transformers on the meta device, transformers' renaming of their tensors, and what is excepted.

The exceptions are those that spec/format.md lists in appendix D; tests/interop/test_selection_transformers.py shows
that each is needed, and compares the two.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers import AutoHfQuantizer

ROOT = Path(__file__).resolve().parents[2]

# Architectures of transformers that no model can be built of here. Stale entries fail test_exceptions_are_needed.
NOT_BUILT = {
    ("gemma3n", "Gemma3nForConditionalGeneration"): "timm",
    ("fast_vlm", "FastVlmForConditionalGeneration"): "timm",
    ("perception_lm", "PerceptionLMForConditionalGeneration"): "timm",
    # Its configuration demands what its own kv_sharing_modes refuses (transformers 5.23).
    ("gemma4_assistant", "Gemma4AssistantForCausalLM"): "set of layer types producing a cache",
}

# nn.Linear modules that transformers quantizes on the fly and select() leaves alone, by class: endings of their names.
QKV = frozenset({"q_proj", "k_proj", "v_proj"})
LEFT_ALONE: dict[str, frozenset[str]] = {
    # Split, merged or permuted on load: packed weights cannot be.
    "HrmTextForCausalLM": QKV | {"self_attn.gate_proj", "mlp.gate_proj", "mlp.up_proj"},
    "Kimi_K25ForConditionalGeneration": QKV,
    "MiniMaxM3SparseForConditionalGeneration": frozenset({"shared_experts.gate_up_proj"}),
    "MistralLarge4ForConditionalGeneration": frozenset({"attention.q_proj", "attention.k_proj"}),
    "Molmo2ForConditionalGeneration": QKV | {"mlp.gate_proj", "mlp.up_proj"},
    "NemotronH_Omni_Reasoning_V3": QKV,
    "Nemotron3_5TranscribeForConditionalGeneration": QKV,
    "QianfanOCRForConditionalGeneration": QKV,
    "Step3p7ForConditionalGeneration": QKV,
    "UnlimitedOcrForConditionalGeneration": QKV,
    # The loader takes the name of the module for that of its weight.
    "Qwen4ExpForCausalLM": frozenset({"block_inject_weight"}),
    "Qwen4ExpForConditionalGeneration": frozenset({"block_inject_weight"}),
}
# The same for a checkpoint whose tensors have the names of the modules.
LEFT_ALONE_IN_MODULE_NAMES: dict[str, frozenset[str]] = {
    "Inkling2ForCausalLM": frozenset({"weight_proj"}),
    "Inkling2ForConditionalGeneration": frozenset({"weight_proj"}),
    "Qwen4ExpForCausalLM": frozenset({"block_inject_weight"}),
    "Qwen4ExpForConditionalGeneration": frozenset({"block_inject_weight"}),
}
# Classes whose 4-bit layers transformers cannot load from a checkpoint in the names of the modules, which only
# save_pretrained(save_original_format=False) writes: it renames them once more. Plain tensors have a second chance
# there under their own name, the companions of a packed one have not.
RENAMED_TWICE = frozenset(
    {
        "DeepseekOcr2ForConditionalGeneration",
        "LagunaForCausalLM",
        "MistralLarge4ForConditionalGeneration",
        "PI0ForConditionalGeneration",
        "UnlimitedOcrForConditionalGeneration",
    }
)
# Classes whose fused experts transformers replaces by linear layers before it loads a 4-bit checkpoint: it cannot load
# those that are still fused.
UNPACKS_EXPERTS = frozenset({"Llama4ForCausalLM", "Llama4ForConditionalGeneration"})
# Classes all of whose layers are a subclass of nn.Linear, of which transformers replaces none.
NO_LINEAR = {"FalconForCausalLM": "FalconLinear"}
# Output embeddings that transformers quantizes, for these classes do not tell it which they are.
QUANTIZED_HEADS = {
    "NemotronH_Omni_Reasoning_V3": "language_model.lm_head",
    "Qwen2_5OmniForConditionalGeneration": "thinker.lm_head",
    "Qwen3OmniMoeForConditionalGeneration": "thinker.lm_head",
}
# nn.Linear modules that transformers keeps in float32.
_INDEXER = frozenset({"indexer.weights_proj"})
_QFORMER = frozenset({"query", "key", "value", "output.dense", "intermediate_query.dense", "output_query.dense"})
_WO = frozenset({"DenseReluDense.wo"})
KEPT_IN_FP32: dict[str, frozenset[str]] = {
    "AXK2ForCausalLM": _INDEXER,
    "Blip2ForConditionalGeneration": _QFORMER,
    "DeepseekV32ForCausalLM": _INDEXER,
    "DeepseekV4ForCausalLM": _INDEXER | {"compressor.wgate", "compressor.wkv"},
    "GlmMoeDsaForCausalLM": _INDEXER,
    "MistralLarge4ForConditionalGeneration": _INDEXER,
    "MT5ForConditionalGeneration": _WO,
    "T5ForConditionalGeneration": _WO,
    "UdopForConditionalGeneration": _WO,
    "UMT5ForConditionalGeneration": _WO,
}


@functools.cache
def maker() -> ModuleType:
    """tools/make_architectures.py: it builds the models."""
    spec = importlib.util.spec_from_file_location("make_architectures", ROOT / "tools" / "make_architectures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "qlformat" / "data" / "architectures.json").read_text())
    return loaded


def described() -> list[tuple[str, str]]:
    return [(model_type, name) for model_type, names in table()["types"].items() for name in names]


def as_json(config: Any, class_name: str) -> dict[str, Any]:
    """The config.json of a model of this class."""
    written: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return written | {"architectures": [class_name]}


class Renaming:
    """transformers' renaming of a checkpoint on load: name on disk -> (name in the model, operations) in `targets`.

    quantizer: given for a 4-bit checkpoint.
    """

    def __init__(self, model: Any, names: Iterable[str], quantizer: Any = None) -> None:
        steps = get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self._converters = [step for step in steps if isinstance(step, WeightConverter)]
        self._base, self._tensors = model.base_model_prefix, model.state_dict()
        # Some steps remember what they saw: names come in the order in which transformers sorts them.
        self.targets = {name: self._load(name) for name in sorted(names, key=dot_natural_key)}

    def _load(self, name: str) -> tuple[str, str]:
        loaded, source = rename_source_key(name, self._renamings, self._converters, self._base, self._tensors)
        if loaded not in self._tensors and name in self._tensors:
            loaded, source = rename_source_key(name, [], [], self._base, self._tensors)
        found = (repr(step.operations) for step in self._converters if source in step.source_patterns)
        return loaded, next(found, "")


def written_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that save_pretrained writes."""
    model.tie_weights()
    state = {k: v for k, v in model.state_dict().items() if k not in (model._keys_to_ignore_on_save or ())}
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def quantizer(skip_modules: list[str]) -> Any:
    return AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip_modules))
