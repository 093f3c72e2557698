"""Another dtype for the packed weights of a loaded 4-bit model: the same bytes, viewed.

On disk the packed weights are uint8, which vLLM needs. FSDP2 as accelerate drives it shards weights of a float dtype:
4-bit weights of an integer dtype are left out, and every process keeps all of them. A view serves both with one
checkpoint. bitsandbytes computes from the bytes whatever the dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlformat.errors import QlfError

if TYPE_CHECKING:
    import torch

DTYPES = ("uint8", "bfloat16", "float16", "float32")


def resolve(dtype: str | torch.dtype) -> torch.dtype:
    """The torch.dtype of a name.

    Raises:
        QlfError: it is none of DTYPES.
    """
    import torch

    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise QlfError(f"quant_storage {str(dtype)!r} is not supported; use one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def view(model: Any, dtype: torch.dtype) -> None:
    """Let every 4-bit weight of `model` be `dtype` [n, 1], with the memory, the bytes and the scales that it has.

    Raises:
        QlfError: the bytes of a weight are no whole number of elements; nothing is changed then.
    """
    from bitsandbytes.nn.modules import Linear4bit

    layers = [(name, module) for name, module in model.named_modules()
              if isinstance(module, Linear4bit) and module.weight.dtype != dtype]  # fmt: skip
    for name, module in layers:
        size = module.weight.nbytes
        if size % dtype.itemsize:
            raise QlfError(
                f"{name}.weight has {size} packed bytes, which are no whole number of {dtype} elements of "
                f"{dtype.itemsize} bytes; load it with quant_storage='uint8'"
            )
    for _, module in layers:
        module.weight = _viewed(module, dtype)
        module.quant_storage = dtype
    quantizer = getattr(model, "hf_quantizer", None)
    if layers and quantizer is not None:  # transformers and peft ask there, not the weights
        quantizer.quantization_config.bnb_4bit_quant_storage = dtype


def _viewed(module: Any, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn.modules import Params4bit

    weight = module.weight
    flat = weight.data.reshape(-1)
    if flat.storage_offset() * flat.element_size() % dtype.itemsize:
        flat = flat.clone()  # of a foreign writer's file, in which tensors start anywhere
    return Params4bit(
        flat.view(dtype).unsqueeze(1),
        requires_grad=False,
        quant_state=weight.quant_state,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=dtype,
        module=module,
        bnb_quantized=True,
    )
