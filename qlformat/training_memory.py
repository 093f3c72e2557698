"""Memory of fine-tuning LoRA adapters, from the shape of a model.

Bytes of parameters are exact: they follow from the shapes. Activations are what autograd keeps in transformers' models
with peft's LoRA layers on top, added up operation by operation as in arXiv 2205.05198, section 4.1 (which does it for
full fine-tuning); the interop tests compare them with what autograd keeps in real models. The runtime's own memory is
an allowance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlformat.causal_models import CausalModel, Linear, describe
from qlformat.errors import QlfError, shown
from qlformat.layout import NESTED_BLOCKSIZE, Recipe

RUNTIME_BYTES = 700_000_000
"""Allowance for the CUDA context, its libraries and fragmentation of the allocator."""

FULL_BYTES_PER_PARAM = 12
"""Full 16-bit fine-tuning with Adam: weight 2, gradient 2, two float32 moments 8 (paper, section 1: 65B > 780 GB)."""

# Bytes of optimizer state for one parameter in float32. bitsandbytes' 8-bit Adam keeps two moments in 8 bits, each with
# one float32 scale for 256 of them (arXiv 2110.02861, section 2.1); it keeps tensors below 4,096 elements in float32.
_STATE_BYTES: Mapping[str, float] = {
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_32bit": 8,
    "adamw_torch": 8,
    "sgd": 0,
}
OPTIMIZERS = tuple(_STATE_BYTES)

_TILE_TOKENS, _TILE_VOCAB = 4096, 32768
"""TRL's fused output layer computes the logits in tiles of this size at most."""

_TILES_ON_CPU = 8
"""float32 tiles that exist at once where TRL has no Triton kernel: one for each step of the softmax's gradient."""


_DEFAULT_RECIPE = Recipe()


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the peak of a training step.

    Attributes:
        weights: the base: packed weights with their constants, and the rest in 16 bits.
        adapters, gradients, optimizer: of the LoRA parameters; the optimizer's can be moved out where `paged`.
        activations: kept from the forward pass for the backward pass.
        workspace: of the step's largest operations: a dequantized weight, one layer's gradients, a tile of logits.
        trainable: LoRA parameters.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    trainable: int
    paged: bool

    @property
    def total(self) -> int:
        """All of it, without the runtime's own memory."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations + self.workspace

    @property
    def needed(self) -> int:
        """What a GPU must have: all of it and RUNTIME_BYTES."""
        return self.total + RUNTIME_BYTES

    def fits(self, gpu: int) -> bool:
        """Whether a GPU of so many bytes holds it."""
        return self.needed <= gpu

    def fits_paged(self, gpu: int) -> bool:
        """Whether it fits once the optimizer's state is evicted to CPU memory (paper, section 3)."""
        return self.paged and self.needed - self.optimizer <= gpu

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "total": self.total, "needed": self.needed}


@dataclass(frozen=True)
class Run:
    """What decides about the memory of a run, apart from the model.

    Attributes:
        rank, dropout: of LoRA, on all linear layers.
        seq_len, batch_size: tokens of a sequence, sequences in one forward pass.
        recipe: how the base is quantized; None for a base in 16 bits.
        checkpointing: keep only the inputs of the layers, and compute each layer again in the backward pass.
        optimizer: one of OPTIMIZERS.
        compute_bytes, adapter_bytes, plain_bytes: of one activation, of one LoRA parameter, and of one weight that
            is not quantized: where a CPU computes in float32, those are float32 too.
        on_cpu: the output layer's gradient is made by torch operations, on a GPU by one Triton kernel.
        target: last parts of the names of the layers to adapt; None for all linear layers.
    """

    rank: int = 16
    dropout: float = 0.05
    seq_len: int = 1024
    batch_size: int = 1
    recipe: Recipe | None = _DEFAULT_RECIPE
    checkpointing: bool = True
    optimizer: str = "paged_adamw_8bit"
    compute_bytes: int = 2
    adapter_bytes: int = 4
    plain_bytes: int = 2
    on_cpu: bool = False
    target: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise QlfError(f"{name} is {getattr(self, name)}, needed 1 or more")
        if self.optimizer not in _STATE_BYTES:
            raise QlfError(
                f"optimizer {shown(self.optimizer)} is not known here, needed one of {', '.join(OPTIMIZERS)}"
            )


def finetune_memory(model: CausalModel | Mapping[str, Any], run: Run | None = None, **options: Any) -> Memory:
    """Memory of fine-tuning LoRA adapters on all linear layers.

    Args:
        model: its shape, or its config.json.
        run: the run; `options` are fields of Run, which replace those of `run`.

    Raises:
        QlfError: the architecture is unknown, or an option is out of range.
    """
    shape = model if isinstance(model, CausalModel) else describe(model)
    run = replace(run or Run(), **options)
    trainable = lora_parameters(shape, run.rank, run.target)
    return Memory(
        weights=weight_bytes(shape, run.recipe, run.plain_bytes),
        adapters=trainable * run.adapter_bytes,
        gradients=trainable * run.adapter_bytes,
        optimizer=math.ceil(trainable * _STATE_BYTES[run.optimizer]),
        activations=activation_bytes(shape, run),
        workspace=_workspace_bytes(shape, run),
        trainable=trainable,
        paged=run.optimizer.startswith("paged_"),
    )


def full_memory(model: CausalModel) -> int:
    """Bytes of weights, gradients and optimizer of full 16-bit fine-tuning, without activations."""
    return model.total * FULL_BYTES_PER_PARAM


def lora_parameters(model: CausalModel, rank: int, target: tuple[str, ...] | None = None) -> int:
    """r (d + k) for every linear layer [d, k] but the output embedding (paper, section 2), or for the named ones."""
    return sum(rank * (layer.inputs + layer.outputs) for layer in _adapted(model.all_linears, target))


def _adapted(layers: Sequence[Linear], target: tuple[str, ...] | None) -> list[Linear]:
    """The layers that get a LoRA; all where the names are none that the family is known to have."""
    names = {name.rpartition(".")[2] for name in target or ()}
    return [layer for layer in layers if layer.name in names] or list(layers)


def weight_bytes(model: CausalModel, recipe: Recipe | None, plain_bytes: int = 2) -> int:
    """Bytes of the base: linear layers as spec/format.md stores them, the rest (without a recipe, all) unquantized."""
    if recipe is None or not model.quantized:
        return plain_bytes * model.total
    packed = 0
    for layer in model.all_linears:
        blocks = math.ceil(layer.weights / recipe.blocksize)
        scales = blocks + 4 * math.ceil(blocks / NESTED_BLOCKSIZE) + 4 * 256 if recipe.double_quant else 4 * blocks
        packed += math.ceil(layer.weights / 2) + scales + 4 * 16
    return packed + plain_bytes * (model.total - model.linear)


def activation_bytes(model: CausalModel, run: Run) -> int:
    """Bytes that autograd keeps of one forward pass, the layers' inputs alone with checkpointing."""
    tokens = run.seq_len * run.batch_size
    whole = layer_bytes(model, run)
    # The last norm and the input of the output layer are kept in either case.
    last = (4 + run.compute_bytes) * model.hidden
    if not run.checkpointing:
        casts = run.adapter_bytes != run.compute_bytes
        cast = run.compute_bytes * lora_parameters(model, run.rank, run.target) if casts else 0
        return tokens * (model.layers * whole + last) + cast
    # The backward pass computes one layer at a time again: its activations are there beside the inputs of all.
    return tokens * (model.layers * run.compute_bytes * model.hidden + whole + last)


def layer_bytes(model: CausalModel, run: Run) -> int:
    """Bytes that autograd keeps of one layer for one token.

    Frozen weights need no input of theirs, so that of a linear layer only what LoRA needs is kept: its own copy of the
    input (a cast or a dropout makes one), the dropout's mask of one byte, and the rank's worth between A and B.
    """
    size = run.compute_bytes
    norms = (4 if model.rms else size) * model.normed  # transformers' RMSNorm computes in float32
    attention = size * (2 * model.attention + 2 * model.kv)  # q and the output, k and v: flash attention's inputs
    attention += size * (model.attention + model.kv) if model.fused else 0
    feed_forward = (model.kept + (2 if model.gated else 0)) * size * model.inner
    lora = 0
    for layer in _adapted(model.linears, run.target):
        copies = size if run.dropout or run.adapter_bytes != size else 0
        lora += layer.inputs * (copies + (1 if run.dropout else 0)) + size * run.rank
    # Without fused attention: the scores, and their softmax in float32 and in the compute dtype.
    attention += run.seq_len * model.scores * (size + 4)
    return norms + attention + feed_forward + lora


def _workspace_bytes(model: CausalModel, run: Run) -> int:
    """Bytes of the largest short-lived tensors: they follow one another, and the largest step counts."""
    tokens = run.seq_len * run.batch_size
    largest = max(layer.weights for layer in model.all_linears)
    dequantized = run.compute_bytes * largest if run.recipe and model.quantized else 0
    # Gradients of the feed-forward part: of its inner width, of what was multiplied, and of its input.
    backward = dequantized + tokens * run.compute_bytes * (3 * model.inner + 2 * model.hidden)
    tile = min(tokens, _TILE_TOKENS) * min(model.vocab, _TILE_VOCAB)
    logits = tile * (4 * _TILES_ON_CPU if run.on_cpu else run.compute_bytes + 4) + tokens * model.hidden * 4
    return max(backward, logits)


def advice(model: CausalModel, run: Run, gpu: int) -> list[tuple[str, Memory]]:
    """Single changes that make a run fit on a GPU of so many bytes, the least harmful first; none where none does.

    Returns:
        (what to change, in terms of `qlf finetune`; memory after it).
    """
    options: list[tuple[str, dict[str, Any]]] = []
    if run.recipe is None:
        options.append(("quantize the base: qlf convert", {"recipe": Recipe()}))
    elif not run.recipe.double_quant:
        options.append(("convert the base with double quantization", {"recipe": Recipe()}))
    if not run.checkpointing:
        options.append(("gradient checkpointing", {"checkpointing": True}))
    if _STATE_BYTES[run.optimizer] > _STATE_BYTES["adamw_8bit"]:
        options.append(("--optimizer paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}))
    options += [(f"--batch-size {size}", {"batch_size": size}) for size in _halves(run.batch_size, 1)]
    options += [(f"--seq-len {length}", {"seq_len": length}) for length in _halves(run.seq_len, 256)]
    options += [(f"--rank {rank}", {"rank": rank}) for rank in _halves(run.rank, 4)]
    found: dict[str, tuple[str, Memory]] = {}
    for text, changed in options:
        memory = finetune_memory(model, run, **changed)
        if memory.fits(gpu):
            found.setdefault(next(iter(changed)), (text, memory))  # the smallest step of each kind
    return list(found.values())


def smallest(model: CausalModel) -> Memory:
    """The least that QLoRA can take for this model: rank 4, 256 tokens, checkpointing, paged 8-bit optimizer."""
    return finetune_memory(model, rank=4, seq_len=256)


def _halves(value: int, least: int) -> list[int]:
    """value/2, value/4 ... down to `least`."""
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found
