"""`python fsdp_on_cpu.py finetune ...`: qlf with accelerate's FSDP on a CPU, which accelerate keeps for GPUs.

Only accelerate's choice of a strategy by device is replaced; everything after it is its own code, with gloo for nccl.
"""

from __future__ import annotations

import sys
from typing import Any

import accelerate.accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from bitsandbytes.nn.modules import Linear4bit
from qlf.main import main
from torch.distributed.tensor import DTensor

_made = AcceleratorState.__init__
_prepare = accelerate.accelerator.fsdp2_prepare_model


def _make(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


def _prepare_and_tell(*args: Any) -> Any:
    model = _prepare(*args)
    weights = [module.weight for module in model.modules() if isinstance(module, Linear4bit)]
    spread = [weight for weight in weights if isinstance(weight, DTensor)]
    own = sum(weight.to_local().nbytes for weight in spread)
    sys.stderr.write(f"sharded {len(spread)} of {len(weights)}: {own} of {sum(w.nbytes for w in spread)} bytes\n")
    return model


accelerate.accelerator.fsdp2_prepare_model = _prepare_and_tell
AcceleratorState.__init__ = _make  # type: ignore[method-assign]
sys.exit(main())
