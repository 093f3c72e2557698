"""31,000 mutated headers, files, quant_states, indexes and manifests: a sound result or a named rule, nothing else.

Seeds are fixed, so a failure repeats; QLF_FUZZ_ROUNDS multiplies the counts for a longer search.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlformat.errors import FormatError
from qlformat.layout import BLOCKSIZES, QuantState, Recipe, parse_quant_state
from qlformat.manifest import FileEntry, Manifest, Source, TensorEntry, WeightEntry, is_plain_path, parse
from qlformat.repository import parse_index
from qlformat.rules import RULES
from qlformat.shards import DTYPE_BITS, ShardReader, TensorSpec, file_order, parse_header

ROUNDS = int(os.environ.get("QLF_FUZZ_ROUNDS", "1"))
DIGEST = "ab" * 32
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 63, 64, 255, 256, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 10**400, 0.5,
    -0.0, 1e308, "", "U8", "F32", "BF16", "nf4", "fp4", "..", "/etc/passwd", "a/../b", "\x00", "\x1b[2J", "\ud800", [],
    [0], ["stacked_experts"], [1, 1], [-1, 8], [[]], {}, {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    "9" * 5000, [1] * 3000,
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys:
        found.append((value, key))
        found += places(value[key])
    return found


def mutate_tree(rng: random.Random, root: Any) -> bytes:
    """Change one to three values, keys or entries of a JSON value."""
    root = json.loads(json.dumps(root))
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(root))
        action = rng.randrange(6)
        if key not in container and not isinstance(container, list):
            continue
        if isinstance(container, list) and key >= len(container):
            continue
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[str(rng.choice(STRANGE))[:50]] = container.pop(key)
        elif action == 2 and type(container[key]) is int:
            container[key] += rng.choice([-64, -1, 1, 2, 64, 1 << 40])
        elif action == 3:
            other_container, other = rng.choice(places(root))
            container[key] = json.loads(json.dumps(other_container[other]))
        else:
            container[key] = copy.deepcopy(rng.choice(STRANGE))
        if not places(root):
            break
    return json.dumps(root, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        action = rng.randrange(5)
        if action == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del out[at : at + rng.randint(1, 20)]
        elif action == 2:
            out[at:at] = bytes(rng.choice(b'{}[],:"\\0123456789eE-+.ntf\x00\xff ') for _ in range(rng.randint(1, 5)))
        elif action == 3:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.randint(1, 60)]
        else:
            del out[at:]
    return bytes(out)


def mutations(seed: int, root: Any, count: int) -> list[bytes]:
    rng = random.Random(seed)
    text = json.dumps(root).encode()
    return [mutate_tree(rng, root) if i % 2 else mutate_bytes(rng, text) for i in range(count * ROUNDS)]


def outcomes(cases: list[bytes], judge: Callable[[bytes], None], allowed: set[str]) -> Counter[str]:
    """Run all cases; anything but a FormatError with an allowed rule and a one-line text propagates."""
    seen: Counter[str] = Counter()
    for case in cases:
        try:
            judge(case)
            seen["sound"] += 1
        except FormatError as error:
            assert error.rule in RULES
            assert error.rule in allowed, f"{error.rule}: {case!r}"
            text = str(error)
            assert text.isprintable()
            assert len(text) < 1000, text
            seen[error.rule or ""] += 1
    return seen


def header_entries() -> dict[str, Any]:
    states = [QuantState("nf4", 64, "float16", (64, 64), 0.5), QuantState("fp4", 128, "bfloat16", (3, 33), None)]
    specs = [TensorSpec("embed", "F16", (10, 3)), TensorSpec("scalar", "F32", ()), TensorSpec("empty", "I64", (0, 2))]
    for number, state in enumerate(states):
        for name, (dtype, shape) in state.tensor_specs(f"layers.{number}.weight").items():
            specs.append(TensorSpec(name, dtype, shape, packed=name.endswith("weight")))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in file_order(specs):
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    return entries


def check_header(data: bytes, size: int) -> None:
    """An accepted header describes disjoint tensors that fill the file, with sizes that fit their shapes."""
    header = parse_header(data, size, "fuzzed")
    covered = 0
    for info in sorted(header.tensors.values(), key=lambda info: (info.begin, info.end)):
        assert info.begin == covered
        assert info.nbytes * 8 == math.prod(info.shape) * DTYPE_BITS[info.dtype]
        covered = info.end
    assert header.data_start + covered == size


def test_headers() -> None:
    entries = header_entries()
    payload = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    cases = mutations(1, entries, 12_000)
    seen = outcomes(cases, lambda data: check_header(data, 8 + len(data) + payload), {f"S{i}" for i in range(2, 8)})
    assert set(seen) >= {"sound", "S2", "S3", "S4", "S5", "S6", "S7"}


def test_whole_files(tmp_path: Path) -> None:
    text = json.dumps(header_entries()).encode()
    payload = max(e["data_offsets"][1] for name, e in header_entries().items() if name != "__metadata__")
    whole = len(text).to_bytes(8, "little") + text + bytes(payload)
    rng = random.Random(2)
    path = tmp_path / "fuzzed.safetensors"

    def judge(data: bytes) -> None:
        path.write_bytes(data)
        with ShardReader(path) as reader:
            check_header(data[8 : reader.header.data_start], len(data))
            for info in reader.header.tensors.values():
                assert len(reader.read(info)) == info.nbytes

    cases = [mutate_bytes(rng, whole[: 8 + len(text)]) + bytes(payload) for _ in range(1500 * ROUNDS)]
    cases += [mutate_bytes(rng, whole) for _ in range(500 * ROUNDS)]
    seen = outcomes(cases, judge, {f"S{i}" for i in range(1, 8)})
    assert set(seen) >= {"S1", "S2", "S5"}


def test_quant_states() -> None:
    for seed, offset in ((3, 0.5), (4, None)):
        state = json.loads(QuantState("nf4", 64, "bfloat16", (64, 64), offset).to_json())

        def judge(data: bytes) -> None:
            found = parse_quant_state(data, "weight", "nf4")
            assert found.quant_type == "nf4"
            assert found.blocksize in BLOCKSIZES
            assert 0 < found.elements < 1 << 48
            assert parse_quant_state(found.to_json(), "weight", "nf4") == found

        seen = outcomes(mutations(seed, state, 3000), judge, {"T6", "T7", "D3"})
        assert set(seen) >= {"sound", "T6", "T7"}


def test_manifests() -> None:
    manifest = Manifest(
        writer="qlformat 0.1.0",
        source=Source("org/model", "abc", (FileEntry("model.safetensors", 10, DIGEST),)),
        recipe=Recipe(),
        skip=("*.head",),
        tensors=(TensorEntry("a.weight", "U8", (8, 1), "model.safetensors", DIGEST),),
        weights=(WeightEntry("a.weight", "nf4", "float16", (4, 4), "linear", False, 0.5, 0.25),),
        files=(FileEntry("model.safetensors", 10, DIGEST),),
        fingerprint=DIGEST,
    )

    def judge(data: bytes) -> None:
        found = parse(data)
        assert parse(found.to_json()) == found
        assert all(is_plain_path(entry.name) for entry in found.files)

    seen = outcomes(mutations(5, json.loads(manifest.to_json()), 8000), judge, {"M1", "M2", "M3", "M9"})
    assert set(seen) >= {"sound", "M1", "M2", "M3", "M9"}


def test_indexes() -> None:
    index = {"metadata": {"total_size": 10}, "weight_map": {f"w{i}": f"model-{i}.safetensors" for i in range(4)}}

    def judge(data: bytes) -> None:
        for name in parse_index(data, "index").values():
            assert is_plain_path(name)
            assert "/" not in name
            assert name.endswith(".safetensors")

    seen = outcomes(mutations(6, index, 3000), judge, {"R2", "R3"})
    assert set(seen) == {"sound", "R2", "R3"}
