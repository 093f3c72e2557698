"""Write the checkpoint vectors: checkpoints/{valid,invalid,future} and sources/{valid,invalid}.

    python spec/vectors/generate_checkpoints.py [DIRECTORY]

The default is the directory of this file. Output is the same bytes everywhere; a test generates it again and compares.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import numpy as np  # noqa: E402
from case import SHARDS, Case  # noqa: E402
from cases_container import CONTAINER, REPOSITORY  # noqa: E402
from cases_content import COMPANIONS, CONFIG, PLACEMENT, QUANT_STATE  # noqa: E402
from cases_manifest import FUTURE, MANIFESTS, PAIRS, SOURCES, paired  # noqa: E402

from qlformat import reference  # noqa: E402
from qlformat.layout import Recipe  # noqa: E402
from qlformat.manifest import fingerprint  # noqa: E402
from tests import builders  # noqa: E402
from tests.builders import LLAMA_PLAIN, LLAMA_QUANTIZED, Checkpoint, Tensor, make_checkpoint  # noqa: E402

CARRIED = {
    "generation_config.json": b'{\n  "bos_token_id": 1,\n  "eos_token_id": 2\n}\n',
    "chat_template.jinja": b"{{ messages[0]['content'] }}",
}
TINY = np.float32(1e-45)


def nf4_dq() -> Checkpoint:
    """The recipe of the paper, with files that are carried over."""
    return make_checkpoint(carried=CARRIED)


def nf4_dq_two_shards() -> Checkpoint:
    """An index and two shards; every weight has its companions beside it."""
    return make_checkpoint(shards=2)


def header_hashes() -> Checkpoint:
    """Two shards, one listed with the hash of its header, the other with the hash of the file."""
    checkpoint = make_checkpoint(shards=2)
    checkpoint.header_hashed = (SHARDS[0],)
    return checkpoint


def llama() -> Checkpoint:
    """A whole one-layer Llama, which transformers loads."""
    return make_checkpoint(quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN)


def nf4_float32() -> Checkpoint:
    """No double quantization, the smallest blocksize, a float32 source."""
    return make_checkpoint(recipe=Recipe("nf4", 32, False, "float32"), dtype="float32")


def fp4_float16() -> Checkpoint:
    """FP4 without double quantization from a float16 source."""
    return make_checkpoint(recipe=Recipe("fp4", 128, False, "float16"), dtype="float16")


def fp4_dq() -> Checkpoint:
    """FP4 with double quantization and the largest blocksize; both weights are one ragged block."""
    return make_checkpoint(recipe=Recipe("fp4", 4096, True))


def two_nested_blocks() -> Checkpoint:
    """288 blocks: one nested block of 256 and a ragged one of 32."""
    return make_checkpoint(quantized={"model.layers.0.mlp.up_proj.weight": (96, 96)}, recipe=Recipe(blocksize=32))


def odd_elements() -> Checkpoint:
    """One element, odd counts, ragged tails: a pad nibble and sizes that are no multiple of 64."""
    shapes = {"model.a.weight": (1, 1), "model.b.weight": (3, 5), "model.c.weight": (1, 65), "model.d.weight": (7, 37)}
    return make_checkpoint(quantized=shapes)


def zeros_and_subnormals() -> Checkpoint:
    """Zero blocks, a zero tail, a zero tensor, and blocks whose absmax is a subnormal number."""
    values = {
        "model.zero.weight": np.zeros(128, dtype=np.float32),
        "model.zero_tail.weight": np.zeros(70, dtype=np.float32),
        "model.half_zero.weight": np.concatenate([np.zeros(64), np.full(64, 0.5)]).astype(np.float32),
        "model.tiny.weight": (np.arange(130) % 17 - 8).astype(np.float32) * TINY,
    }
    shapes = {name: (1, array.size) for name, array in values.items()}
    return make_checkpoint(quantized=shapes, values=values, dtype="float32", recipe=Recipe(double_quant=False))


def zeros_with_double_quant() -> Checkpoint:
    """All absmax equal, so that nested_absmax is zero: once 0.0, once 0.5."""
    values = {name: np.full(256, value, dtype=np.float32) for name, value in (("a.weight", 0.0), ("b.weight", 0.5))}
    return make_checkpoint(quantized=dict.fromkeys(values, (16, 16)), values=values)


def other_dtypes() -> Checkpoint:
    """Scalars, empty tensors, and every dtype that may stay unquantized."""
    checkpoint = make_checkpoint()
    sizes = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
    sizes.update({"F16": 2, "BF16": 2, "F32": 4, "F64": 8})
    for dtype, size in sizes.items():
        for label, shape, count in (("scalar", (), 1), ("empty", (0, 4), 0), ("three", (3,), 3)):
            name = f"model.buffers.{dtype.lower()}_{label}"
            checkpoint.tensors[name] = Tensor(dtype, shape, bytes(count * size))
            checkpoint.placement[name] = builders.SINGLE
    return checkpoint


def awkward_names() -> Checkpoint:
    """Names that need JSON escapes or sort differently by code point, UTF-16 unit and locale."""
    names = ['model.q"uote.weight', "model.back\\slash.weight", "model.\u00e9\u6c34.weight", "model.\U0001f600.weight"]
    return make_checkpoint(quantized=dict.fromkeys(names, (2, 32)), plain={"model.\uffee.weight": (4,)})


def plain_bitsandbytes() -> Checkpoint:
    """No qlf.json: what another program wrote."""
    return make_checkpoint(manifest=False)


def plain_null_skip() -> Checkpoint:
    """No qlf.json, and the configuration keys that transformers writes today."""
    checkpoint = make_checkpoint(manifest=False, recipe=Recipe(double_quant=False))
    quantization = checkpoint.config["quantization_config"]
    quantization.update(_load_in_4bit=True, _load_in_8bit=False, llm_int8_skip_modules=None)
    return checkpoint


VALID: list[Callable[[], Checkpoint]] = [
    nf4_dq, nf4_dq_two_shards, header_hashes, llama, nf4_float32, fp4_float16, fp4_dq, two_nested_blocks, odd_elements,
    zeros_and_subnormals, zeros_with_double_quant, other_dtypes, awkward_names, plain_bitsandbytes, plain_null_skip,
]  # fmt: skip


def decoded(checkpoint: Checkpoint) -> dict[str, dict[str, object]]:
    """What a decoder must give for each quantized weight: dtype, shape and sha256 of the little-endian elements."""
    found: dict[str, dict[str, object]] = {}
    for weight in checkpoint.weights:
        if weight.encoding == "none":
            continue
        parts = checkpoint.tensors
        state = json.loads(parts[f"{weight.name}.quant_state.bitsandbytes__{weight.encoding}"].data)
        absmax = np.frombuffer(parts[f"{weight.name}.absmax"].data, dtype="u1" if "nested_offset" in state else "<f4")
        if "nested_offset" in state:
            nested = np.frombuffer(parts[f"{weight.name}.nested_absmax"].data, dtype="<f4")
            absmax = reference.double_dequantize(absmax, nested, np.float32(state["nested_offset"]))
        packed = np.frombuffer(parts[weight.name].data, dtype="u1")
        count = int(np.prod(weight.shape))
        values = reference.dequantize(packed, absmax, count, weight.encoding, state["blocksize"])
        data = reference.from_float32(values, weight.dtype).tobytes()
        found[weight.name] = {
            "file": checkpoint.placement[weight.name],
            "dtype": weight.dtype,
            "shape": list(weight.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    return found


def write_valid(root: Path) -> None:
    """checkpoints/valid and sources/valid."""
    for make in VALID:
        case = root / "checkpoints" / "valid" / make.__name__.replace("_", "-")
        checkpoint = make()
        checkpoint.write(case / "repo")
        rows = [(n, t.dtype, t.shape, hashlib.sha256(t.data).hexdigest()) for n, t in checkpoint.tensors.items()]
        write_json(
            case / "expected.json",
            {"about": make.__doc__, "fingerprint": fingerprint(rows), "decoded": decoded(checkpoint)},
        )
    case = root / "checkpoints" / "valid" / "with-source"
    paired()(case)
    write_json(case / "expected.json", {"about": "A checkpoint and the source it was made from."})
    for name, options in (("bfloat16", {}), ("float32-two-shards", {"dtype": "float32", "shards": 2})):
        case = root / "sources" / "valid" / name
        builders.build_source(case / "source", **options)
        write_json(case / "expected.json", {"about": "A source that must be accepted."})


def write_refused(directory: Path, cases: list[Case]) -> None:
    """Cases that must be refused, each with its expected.json."""
    for case in cases:
        case.build(directory / case.name)
        write_json(directory / case.name / "expected.json", case.expected())


def write_json(path: Path, value: object) -> None:
    """One readable JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main(root: Path) -> None:
    """Write everything below `root`, replacing what is there."""
    for part in ("checkpoints/invalid", "checkpoints/future", "sources"):
        shutil.rmtree(root / part, ignore_errors=True)
    for make in VALID:
        shutil.rmtree(root / "checkpoints" / "valid" / make.__name__.replace("_", "-"), ignore_errors=True)
    write_valid(root)
    invalid = [*CONTAINER, *REPOSITORY, *CONFIG, *COMPANIONS, *QUANT_STATE, *PLACEMENT, *MANIFESTS, *PAIRS]
    write_refused(root / "checkpoints" / "invalid", invalid)
    write_refused(root / "checkpoints" / "future", FUTURE)
    write_refused(root / "sources" / "invalid", SOURCES)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
