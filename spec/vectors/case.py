"""What the generators of checkpoint vectors share: a case, and the small checkpoint that most of them start from."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlformat.layout import Recipe
from tests import builders
from tests.builders import Checkpoint, Tensor

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
SINGLE = builders.SINGLE
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Case:
    """One vector: a directory with expected.json beside repo/ (a checkpoint), source/ (a 16-bit model), or both.

    Attributes:
        name: "<rule>-<what is wrong>", or for a sound checkpoint what it shows.
        build: writes repo/ and source/ into the directory of the case.
        tensor, file: what the finding is about, where that is one thing.
        decode: tensor that a decoder of single files must refuse, too (in `file`).
        also: rules that the same defect breaks as well.
        setup: what a version control system cannot hold; the test or the kit makes it in a copy.
    """

    name: str
    build: Callable[[Path], None]
    tensor: str | None = None
    file: str | None = None
    decode: str | None = None
    also: tuple[str, ...] = ()
    setup: dict[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """Id of the broken rule."""
        return self.name.partition("-")[0]

    def expected(self) -> dict[str, Any]:
        """Content of expected.json for a case that must be refused."""
        found: dict[str, Any] = {"rule": self.rule}
        for key in ("tensor", "file", "decode", "setup"):
            if getattr(self, key):
                found[key] = getattr(self, key)
        if self.also:
            found["also"] = list(self.also)
        return found


def small(recipe: Recipe | None = None, **options: Any) -> Checkpoint:
    """One quantized weight and two plain ones; about 7 kB."""
    options.setdefault("quantized", {WEIGHT: (16, 16)})
    options.setdefault("plain", {EMBEDDING: (8, 16), NORM: (16,)})
    return builders.make_checkpoint(recipe=recipe, **options)


def in_memory(
    change: Callable[[Checkpoint], None], recipe: Recipe | None = None, **options: Any
) -> Callable[..., None]:
    """A builder that alters the checkpoint before it is written, so that qlf.json agrees with the result."""

    def build(path: Path) -> None:
        checkpoint = small(recipe, **options)
        change(checkpoint)
        checkpoint.write(path / "repo")

    return build


def on_disk(
    change: Callable[[Path], None], *, reseal: str = "files", recipe: Recipe | None = None, **options: Any
) -> Callable[..., None]:
    """A builder that alters the written files.

    Args:
        change: gets the directory repo/.
        reseal: what of qlf.json to bring up to date after it: "tensors" (and files), "files" or "nothing".
    """

    def build(path: Path) -> None:
        small(recipe, **options).write(path / "repo")
        change(path / "repo")
        if reseal != "nothing":
            builders.reseal(path / "repo", tensors=reseal == "tensors")

    return build


def put(
    name: str, dtype: str, shape: tuple[int, ...], data: bytes, shard: str = SINGLE
) -> Callable[[Checkpoint], None]:
    """A change that sets one stored tensor."""

    def change(checkpoint: Checkpoint) -> None:
        checkpoint.tensors[name] = Tensor(dtype, shape, data)
        checkpoint.placement.setdefault(name, shard)

    return change


def drop(name: str) -> Callable[[Checkpoint], None]:
    """A change that removes one stored tensor."""

    def change(checkpoint: Checkpoint) -> None:
        del checkpoint.tensors[name], checkpoint.placement[name]

    return change


def state(change: Callable[[dict[str, Any]], None]) -> Callable[[Checkpoint], None]:
    """A change of the quant_state of WEIGHT."""

    def apply(checkpoint: Checkpoint) -> None:
        fields = json.loads(checkpoint.tensors[STATE].data)
        change(fields)
        text = json.dumps(fields).encode()
        checkpoint.tensors[STATE] = Tensor("U8", (len(text),), text)

    return apply


def state_text(change: Callable[[bytes], bytes]) -> Callable[[Checkpoint], None]:
    """A change of the bytes of the quant_state of WEIGHT."""

    def apply(checkpoint: Checkpoint) -> None:
        text = change(checkpoint.tensors[STATE].data)
        checkpoint.tensors[STATE] = Tensor("U8", (len(text),), text)

    return apply


def header(change: Callable[[dict[str, Any]], None], file: str = SINGLE) -> Callable[[Path], None]:
    """A change of the header of a shard; the data section stays."""
    return lambda repo: builders.edit_header(repo / file, change)


def header_text(change: Callable[[bytes], bytes], file: str = SINGLE) -> Callable[[Path], None]:
    """A change of the header's bytes; the length prefix follows, the data section stays."""

    def apply(repo: Path) -> None:
        raw = (repo / file).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        text = change(raw[8 : 8 + length])
        (repo / file).write_bytes(builders.container_bytes(text, raw[8 + length :]))

    return apply


def raw_file(change: Callable[[bytes], bytes], file: str = SINGLE) -> Callable[[Path], None]:
    """A change of the bytes of a file."""

    def apply(repo: Path) -> None:
        (repo / file).write_bytes(change((repo / file).read_bytes()))

    return apply


def json_file(file: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A change of config.json, the index or qlf.json."""
    return lambda repo: builders.edit_json(repo / file, change)
