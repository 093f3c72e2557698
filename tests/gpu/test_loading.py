"""Loading to a real device: `make gpu-check`. tests/unit/test_loader_device.py has the state dicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qlformat
from qlformat.errors import QlfError
from tests import builders
from tests.builders import build_checkpoint

pytestmark = pytest.mark.gpu


def test_out_of_memory_half_way(tmp_path: Path) -> None:
    """What was decoded before is let go of, also while the error is held."""
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(4)]
    values = np.tile(builders.example_values("pattern", (4096,)), 512)
    shapes = dict.fromkeys(names, (2048, 1024))
    build_checkpoint(tmp_path, quantized=shapes, plain={}, values=dict.fromkeys(names, values))
    torch.cuda.empty_cache()
    before, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (30 << 20)) / total)
    try:
        with pytest.raises(
            QlfError, match=r"out of memory on cuda:0: 8388608 bytes .* all of them need 33554432"
        ) as caught:
            qlformat.load_state_dict(tmp_path, dtype="float32", device="cuda:0")
        assert torch.cuda.memory_allocated() == before, caught.value
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(qlformat.load_state_dict(tmp_path, dtype="float32", device="cuda:0")) == 4


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_model_is_the_one_of_from_pretrained(tmp_path: Path, dequantize: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="gpu-check runs without transformers too")
    pytest.importorskip("accelerate", reason="gpu-check runs without accelerate too")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    qlformat.convert(tmp_path / "source", tmp_path / "out")
    found = qlformat.load_model(tmp_path / "out", device_map="cuda", dequantize=dequantize)
    assert found.qlf_notes == ()
    assert {parameter.device.type for parameter in found.parameters()} == {"cuda"}
    if dequantize:
        qlformat.export(tmp_path / "out", tmp_path / "plain", dtype="bfloat16")
    needed = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / ("plain" if dequantize else "out"), device_map="cuda"
    )
    tokens = torch.arange(1, 9, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, needed(tokens).logits)
