"""From stored tensors to the weights of a model: the structural rules T1 to T7, T9 and D1 to D3, from headers alone.

Only the quant_state tensors are read. One walk serves the strict reader, which stops at the first problem, and
verify, which collects them all: problems go to a callback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from qlformat.errors import FormatError
from qlformat.layout import (
    MAX_QUANT_STATE_BYTES,
    QUANT_STATE_PREFIX,
    QUANT_TYPES,
    QuantState,
    parse_quant_state,
    quant_state_name,
    split_companion,
)
from qlformat.shards import TORCH_NAMES, TensorInfo

Severity = Literal["error", "note"]

PLAIN_DTYPES = {dtype: name for dtype, name in TORCH_NAMES.items() if not dtype.startswith(("F8", "C"))}
"""safetensors dtype -> torch name, for the dtypes that a tensor which is not quantized may have (rule T9)."""

_SHAPE_RULES = {"absmax": "T4", "quant_map": "T5", "nested_absmax": "D1", "nested_quant_map": "D2"}


class Report(Protocol):
    """Receives the problems found: raises them, or collects them."""

    def __call__(self, problem: FormatError, severity: Severity = "error") -> None:
        """Take one problem."""


def strict(problem: FormatError, severity: Severity = "error") -> None:
    """Raise errors, pass over notes."""
    if severity == "error":
        raise problem


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it is stored, and the name of the shard that holds it."""

    info: TensorInfo
    shard: str


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of the model.

    Attributes:
        name: its name; the packed bytes are stored under it.
        shape: logical shape, [out, in] for a linear layer.
        dtype: torch name of the dtype that it decodes to.
        quant_state: None for a weight stored as it is.
        transposed: the 16-bit model stores [in, out] (Conv1D of GPT-2).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    quant_state: QuantState | None = None
    transposed: bool = False

    @property
    def elements(self) -> int:
        """Element count."""
        return math.prod(self.shape)


@dataclass
class _Group:
    """The companions of one weight: suffix -> stored name, and the quant_types of its quant_state tensors."""

    names: dict[str, str] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)


def find_weights(
    tensors: Mapping[str, StoredTensor],
    read: Callable[[str], bytes],
    report: Report = strict,
    *,
    complete: bool = True,
) -> dict[str, Weight]:
    """Group stored tensors into weights.

    Args:
        tensors: all stored tensors by name.
        read: gives the bytes of a stored tensor; called for quant_states only.
        report: receives what breaks T1 to T7, T9, D1, D2 (shapes) and D3.
        complete: False when a shard could not be read; missing tensors are then no finding of their own.

    Returns:
        The sound weights by name, in the order of `tensors`.
    """
    finder = _Finder(tensors, read, report, complete)
    found = {}
    for name in tensors:
        weight = finder.weight(name)
        if weight is not None:
            found[name] = weight
    finder.report_orphans()
    return found


class _Finder:
    def __init__(
        self, tensors: Mapping[str, StoredTensor], read: Callable[[str], bytes], report: Report, complete: bool
    ) -> None:
        self._tensors = tensors
        self._read = read
        self._report = report
        self._complete = complete
        self._groups: dict[str, _Group] = {}
        for name in tensors:
            companion = split_companion(name)
            if companion:
                group = self._groups.setdefault(companion[0], _Group())
                group.names[companion[1]] = name
                if companion[1].startswith(QUANT_STATE_PREFIX):
                    group.states.append(companion[1].removeprefix(QUANT_STATE_PREFIX))

    def weight(self, name: str) -> Weight | None:
        """The weight stored under `name`; None for companions and for what is broken."""
        if split_companion(name):
            return None
        if name in self._groups:
            return self._quantized(name, self._groups[name])
        return self._plain(name)

    def _plain(self, name: str) -> Weight | None:
        info = self._tensors[name].info
        owner = self._owner(name)
        if owner:
            self._bad("T2", name, f"found a tensor of an unknown kind below the quantized weight {owner!r}")
            return None
        if info.dtype not in PLAIN_DTYPES:
            allowed = ", ".join(PLAIN_DTYPES)
            self._bad(
                "T9", name, f"found dtype {info.dtype} in a tensor that is not quantized, needed one of {allowed}"
            )
            return None
        if info.dtype == "U8" and name.endswith(".weight") and len(info.shape) == 2 and info.shape[1] == 1:
            if self._complete:
                self._bad("T1", name, "found packed bytes without any companion, needed absmax, quant_map, quant_state")
            return None
        return Weight(name, info.shape, PLAIN_DTYPES[info.dtype])

    def _owner(self, name: str) -> str | None:
        """The quantized weight below whose name this tensor is stored."""
        position = name.rfind(".")
        while position > 0:
            if name[:position] in self._groups:
                return name[:position]
            position = name.rfind(".", 0, position)
        return None

    def _quantized(self, name: str, group: _Group) -> Weight | None:
        state = self._state(name, group)
        if state is None:
            return None
        specs = state.tensor_specs(name)
        state_name = quant_state_name(name, state.quant_type)
        sound = True
        for stored, (dtype, shape) in specs.items():
            if stored not in self._tensors:
                if self._complete:
                    self._bad("T1", name, f"its companion {stored!r} is missing; fetch the checkpoint again")
                sound = False
            elif stored != state_name:
                sound &= self._check_shape(stored, stored[len(name) + 1 :], dtype, shape)
        for suffix, stored in group.names.items():
            if stored in specs:
                continue
            sound = False
            if not suffix.startswith(QUANT_STATE_PREFIX):  # those are reported by _state
                self._bad("T2", stored, f"found {suffix} although the quant_state says there is no double quantization")
        return Weight(name, state.shape, state.dtype, state) if sound else None

    def _state(self, name: str, group: _Group) -> QuantState | None:
        known = [suffix for suffix in group.states if suffix in QUANT_TYPES]
        for suffix in group.states:
            if suffix not in known or suffix != known[0]:
                stored = quant_state_name(name, suffix)
                self._bad("T2", stored, "found a quant_state of an unknown or a second kind, needed one nf4 or fp4")
        if not known:
            if self._complete and not group.states:
                self._bad("T1", name, f"its companion {quant_state_name(name, 'nf4')!r} (or fp4) is missing")
            return None
        stored = quant_state_name(name, known[0])
        info = self._tensors[stored].info
        if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > MAX_QUANT_STATE_BYTES:
            found = f"{info.dtype} {list(info.shape)}"
            self._bad("T6", stored, f"found {found}, needed one dimension of U8, at most {MAX_QUANT_STATE_BYTES} bytes")
            return None
        try:
            return parse_quant_state(self._read(stored), name, known[0])
        except FormatError as problem:
            self._report(FormatError(problem.message, rule=problem.rule, tensor=stored, file=self._shard(stored)))
            return None

    def _check_shape(self, stored: str, suffix: str, dtype: str, shape: tuple[int, ...]) -> bool:
        info = self._tensors[stored].info
        if (info.dtype, info.shape) == (dtype, shape):
            return True
        rule = _SHAPE_RULES.get(suffix, "T3")
        self._bad(rule, stored, f"found {info.dtype} {list(info.shape)}, needed {dtype} {list(shape)}")
        return False

    def report_orphans(self) -> None:
        """Companions whose weight is not stored (rule T2)."""
        if not self._complete:
            return
        for weight, group in self._groups.items():
            if weight not in self._tensors or split_companion(weight):
                suffixes = ", ".join(sorted(group.names))
                first = min(group.names.values())
                self._bad("T2", first, f"its weight {weight[:200]!r} is missing (companions found: {suffixes})")

    def _bad(self, rule: str, tensor: str, message: str) -> None:
        self._report(FormatError(message, rule=rule, tensor=tensor, file=self._shard(tensor)))

    def _shard(self, tensor: str) -> str | None:
        stored = self._tensors.get(tensor)
        return stored.shard if stored else None
