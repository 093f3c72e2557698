"""select() against transformers + bitsandbytes themselves, for every language model that transformers knows.

A small model of each architecture is built on the meta device. The modules that transformers' own code replaces by
4-bit layers are compared with select()'s decisions for the names that `save_pretrained` writes, and with what
transformers replaces when it is given select()'s skip_modules; and every name of a quantized tensor and of its
companions is sent through transformers' renaming on load. test_selection_loading.py loads some for real.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import transformers
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from qlformat import selection
from tests.interop.selection_models import (
    KEPT_IN_FP32,
    LEFT_ALONE,
    LEFT_ALONE_IN_MODULE_NAMES,
    NO_LINEAR,
    NOT_BUILT,
    QUANTIZED_HEADS,
    RENAMED_TWICE,
    ROOT,
    UNPACKS_EXPERTS,
    Renaming,
    as_json,
    described,
    maker,
    quantizer,
    table,
    written_shapes,
)

COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
NOTHING = "no tensor is quantized: this model has no plain linear layer, or all were left out"
# Model types that a Llava of transformers can be made of, besides the usual Llama and CLIP.
PARTS = (
    ("mixtral", "siglip_vision_model"),
    ("qwen3_moe", "pixtral"),
    ("mistral", "siglip2_vision_model"),
    ("deepseek_v32", "clip_vision_model"),
)


def modules_of(tensors: Iterable[str]) -> set[str]:
    return {name.removesuffix(".weight") for name in tensors}


def endings(modules: set[str], expected: frozenset[str]) -> set[str]:
    """Which expected endings the modules have; a module with none of them is returned as it is."""
    return {next((e for e in expected if f".{module}".endswith(f".{e}")), module) for module in modules}


def check(class_name: str, build: Callable[[], Any], text_class: str | None = None) -> None:
    """All that the text at the top promises, for one architecture; text_class: the class that its text model is of."""
    make = maker()
    model = build()
    config = as_json(model.config, class_name)
    # Before the weights are tied, as in from_pretrained.
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    shapes = written_shapes(model)
    module_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    loaded = Renaming(model, shapes).targets
    outputs = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    replace_with_bnb_linear(model, skipped, quantizer([]).quantization_config)
    on_the_fly = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}

    chosen = selection.select(config, shapes)
    assert chosen.known_architecture, chosen.notes
    assert chosen.skip_modules == sorted(set(chosen.skip_modules))
    quantized = [name for name, decision in chosen.decisions.items() if decision.quantize]
    modules = modules_of(loaded[name][0] for name in quantized)
    assert not modules - on_the_fly, "quantized, but not by transformers"
    exceptions = LEFT_ALONE.get(class_name, frozenset())
    assert endings(on_the_fly - modules, exceptions) == exceptions, "quantized by transformers, but not by select()"
    turned = modules_of(loaded[name][0] for name in quantized if chosen.decisions[name].transpose)
    assert turned == transposed & modules
    assert (not on_the_fly) == (class_name in NO_LINEAR)
    heads = {name for name in on_the_fly if name in outputs or name.endswith("lm_head")}
    assert heads == {QUANTIZED_HEADS[name] for name in {class_name} & set(QUANTIZED_HEADS)}
    kept = modules_of(name for name, decision in chosen.decisions.items() if decision.reason == "keep-in-fp32")
    exceptions = KEPT_IN_FP32.get(text_class or class_name, frozenset())
    assert endings(kept, exceptions) == exceptions

    # The list that goes into config.json makes transformers build the same 4-bit layers, and no others.
    reloaded = build()
    unpacks_experts = any("bitsandbytes" in make._patched(module) for module in reloaded.modules())
    assert unpacks_experts == (class_name in UNPACKS_EXPERTS)
    assert chosen.notes == ([selection.UNPACKS_EXPERTS] if unpacks_experts else []) + (
        [NOTHING] if not quantized else []
    )
    built = make.replaced_modules(reloaded, chosen.skip_modules, pre_quantized=True)
    assert {name for name in built if not (unpacks_experts and ".experts." in name)} == modules

    # Every tensor of the 4-bit checkpoint finds its place.
    assert misplaced(reloaded, chosen, {name: loaded[name][0] for name in quantized}) == []

    # The same for a checkpoint whose tensors have the names of the modules.
    renamed = selection.select(config, module_shapes)
    targets = {name: name for name, decision in renamed.decisions.items() if decision.quantize}
    exceptions = LEFT_ALONE_IN_MODULE_NAMES.get(class_name, frozenset())
    assert not modules_of(targets) - on_the_fly
    assert endings(on_the_fly - modules_of(targets), exceptions) == exceptions
    assert (misplaced(reloaded, renamed, targets) != []) == (class_name in RENAMED_TWICE)


def misplaced(model: Any, chosen: selection.Selection, targets: dict[str, str]) -> list[str]:
    """The tensors of `targets` and their companions that do not reach their module in a model with 4-bit layers."""
    companions = {f"{name}.{suffix}": name for name in targets for suffix in COMPANIONS} | {n: n for n in targets}
    renaming = Renaming(model, [*chosen.decisions, *companions], quantizer(chosen.skip_modules))
    found = {companion: renaming.targets[companion] for companion in companions}
    return [
        companion
        for companion, name in companions.items()
        if found[companion][0] != targets[name] or "Bnb4bitDeserialize" not in found[companion][1]
    ]


@pytest.mark.parametrize(("model_type", "class_name"), described())
def test_same_choice_as_transformers(model_type: str, class_name: str) -> None:
    make = maker()
    found = next(
        config
        for key, name in make.architectures()
        if name == class_name and (key, name) not in NOT_BUILT
        for config in [make.default_config(key, name)]
        if config.model_type == model_type
    )
    check(class_name, lambda: make.small_model(class_name, found))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "gemma2", "bert", "opt", "t5", "zamba"])
def test_same_choice_whether_embeddings_are_tied(model_type: str, tied: bool) -> None:
    make = maker()
    class_name = table()["types"][model_type][0]
    config = make.default_config(model_type, class_name)
    config.tie_word_embeddings = tied
    check(class_name, lambda: make.small_model(class_name, config))


@pytest.mark.parametrize(("text", "vision"), PARTS)
def test_same_choice_for_other_parts(text: str, vision: str) -> None:
    """A model made of parts that its table entry was not made with."""
    config = transformers.LlavaConfig(text_config={"model_type": text}, vision_config={"model_type": vision})
    name = "LlavaForConditionalGeneration"
    check(name, lambda: maker().small_model(name, config), table()["types"][text][0])


def test_every_architecture_is_described() -> None:
    make = maker()
    types = table()["types"]
    missing = [
        (model_type, name)
        for model_type, name in make.architectures()
        if (model_type, name) not in NOT_BUILT
        and name not in types.get(make.default_config(model_type, name).model_type, [])
    ]
    assert not missing


@pytest.mark.parametrize(("model_type", "class_name"), NOT_BUILT)
def test_exceptions_are_needed(model_type: str, class_name: str) -> None:
    make = maker()
    assert (model_type, class_name) in make.architectures()
    with pytest.raises((ImportError, ValueError), match=NOT_BUILT[model_type, class_name]):
        make.build(class_name, make.default_config(model_type, class_name))


def appendix(number: str) -> str:
    """The text of a section of appendix D of spec/format.md, on one line a paragraph."""
    text = (ROOT / "spec" / "format.md").read_text(encoding="utf-8")
    found = re.search(rf"^### {re.escape(number)} .*?\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, number
    return found[1]


def rows(number: str) -> list[list[str]]:
    """The cells of the tables in a section, without their headings."""
    lines = [line for line in appendix(number).splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("class", "model type")]


def listed(number: str) -> dict[str, set[str]]:
    """Class -> what its row says, in a table whose first two columns hold lists."""
    return {name: set(what.split(", ")) for row in rows(number) for name in row[0].split(", ") for what in [row[1]]}


def test_the_spec_lists_what_was_not_compared() -> None:
    tasks = maker().architectures()
    compared = [pair for pair in tasks if pair not in NOT_BUILT]
    causal = [pair for pair, task in tasks.items() if task == "CAUSAL_LM"]
    text = " ".join(appendix("D.1").split())
    assert f"transformers {transformers.__version__.rpartition('.')[0]}" in text
    assert f"has {len(tasks)} pairs of model type and class" in text
    assert f"{len(compared)} of them are compared" in text
    assert f"of the {len(causal)} causal ones {len(set(causal) & set(compared))}" in text
    assert {(model_type, name) for model_type, name, *_ in rows("D.1")} == set(NOT_BUILT)
    assert all(wrapper in text for wrapper in maker().GENERIC_WRAPPERS)


def test_the_spec_lists_the_exceptions() -> None:
    left = {name: set(ends) for name, ends in LEFT_ALONE.items()}
    assert listed("D.2") == left | {name: set(ends) for name, ends in LEFT_ALONE_IN_MODULE_NAMES.items()}
    assert set(listed("D.3")) == UNPACKS_EXPERTS | RENAMED_TWICE
    kept = {name: set(ends) for name, ends in KEPT_IN_FP32.items()}
    heads = {name: {module} for name, module in QUANTIZED_HEADS.items()}
    assert listed("D.4") == kept | heads | {name: {kind} for name, kind in NO_LINEAR.items()}
