"""The low-rank part that a PiSSA run takes out of the base for good, while training and in what is published.

The base on disk is shared and pinned, so the part is no change of it. While training, each 4-bit layer subtracts it
from its output. When the adapter is saved, it becomes further ranks beside the trained ones: scale (BA - DC) is
scale [B, -D] [A; C]. So peft loads one LoRA of twice the rank on the base as it is, and computes what was trained.
peft converts its own PiSSA adapters alike (`path_initial_model_for_weight_conversion`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat.adapter import CONFIG_NAME

if TYPE_CHECKING:
    import torch

_WEIGHTS = "adapter_model.safetensors"


def attach(module: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    """Let the base layer under peft's `module` subtract scale * b @ a from now on.

    Args:
        module: peft's LoRA layer; its adapter "default" gives the scale and the device.
        a: [rank, in], b: [out, rank], float32. They become buffers: they move with the model and do not train.
    """
    layer = module.get_base_layer()
    device = module.lora_A["default"].weight.device
    scale = float(module.scaling["default"])
    layer.register_buffer("fixed_a", a.contiguous().to(device), persistent=False)
    layer.register_buffer("fixed_b", b.contiguous().to(device), persistent=False)

    def subtract(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        import torch

        x = inputs[0].to(layer.fixed_a.dtype)
        part = torch.nn.functional.linear(torch.nn.functional.linear(x, layer.fixed_a), layer.fixed_b)
        return output - (scale * part).to(output.dtype)

    layer.register_forward_hook(subtract)


def publish(directory: Path, model: Any) -> None:
    """Put the parts of `model` into the adapter that peft saved in `directory`; without any, nothing is done."""
    import torch
    from safetensors.torch import load_file, save_file

    fixed = {name: module.get_base_layer() for name, module in model.named_modules()
             if hasattr(module, "lora_A") and hasattr(module.get_base_layer(), "fixed_a")}  # fmt: skip
    if not fixed:
        return
    state = load_file(directory / _WEIGHTS)
    for key, value in state.items():
        name, _, kind = key.removesuffix(".weight").rpartition(".")
        layer = fixed.get(name)
        if kind == "lora_A":
            more = torch.zeros_like(value) if layer is None else layer.fixed_a.cpu().to(value.dtype)
            state[key] = torch.cat([value, more])
        elif kind == "lora_B":
            more = torch.zeros_like(value) if layer is None else -layer.fixed_b.cpu().to(value.dtype)
            state[key] = torch.cat([value, more], dim=1)
    save_file(state, directory / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((directory / CONFIG_NAME).read_bytes())
    config["r"] *= 2
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2  # the scale stays
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
