"""The kit, the C decoder that passes it, and what broken files do to that decoder."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlformat.codebook import CODEBOOKS
from qlformat.errors import QlfError
from qlformat.layout import QuantState
from tests import builders
from tests.builders import DEFAULT_QUANTIZED

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "spec" / "kit"
CC = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
STRICT = ["-std=c11", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
SANITIZED = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CRASH_STATUS = 150  # what the sanitizers exit with; the kit takes 128 and above for a crash
needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler to build the C decoder with")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


kit: Any = load(KIT / "run.py")
reference_decoder: Any = load(Path(__file__).parent / "reference_decoder.py")


def compiled(target: Path, flags: list[str]) -> Path:
    subprocess.run([str(CC), *STRICT, *flags, str(KIT / "decoder.c"), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("decoder") / "decoder", [])


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sanitized")
    require_sanitizers(place)
    return compiled(place / "decoder", SANITIZED)


def require_sanitizers(place: Path) -> None:
    """Skip where a program of one line cannot be built with them; any other failure to build is a failure."""
    (place / "one.c").write_text("int main(void) { return 0; }\n")
    built = subprocess.run([str(CC), *SANITIZED, str(place / "one.c"), "-o", str(place / "one")], check=False)
    if built.returncode:
        pytest.skip("the C compiler has no address and undefined-behaviour sanitizers")


def run_kit(*command: str, only: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(KIT / "run.py"), "--only", only, "--", *command],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **(env or {})},
    )  # fmt: skip


def sanitizer_options() -> dict[str, str]:
    # Memory is left to the end of the process, so leaks mean nothing; calloc may fail like anywhere else.
    options = f"exitcode={CRASH_STATUS}:detect_leaks=0:allocator_may_return_null=1:halt_on_error=1"
    return {"ASAN_OPTIONS": options, "UBSAN_OPTIONS": f"{options}:print_stacktrace=1"}


@needs_compiler
def test_the_c_decoder_passes(decoder: Path) -> None:
    result = run_kit(str(decoder))
    assert result.returncode == 0, result.stdout[-3000:]
    passed = int(result.stdout.splitlines()[-1].split()[0])
    assert passed > 180
    assert " 0 failed" in result.stdout.splitlines()[-1]


@needs_compiler
def test_the_c_decoder_passes_under_sanitizers(sanitized: Path) -> None:
    result = run_kit(str(sanitized), env=sanitizer_options())
    assert result.returncode == 0, result.stdout[-3000:]


@needs_compiler
def test_the_sanitizers_would_be_noticed(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("#include <stdlib.h>\nint main(void) { char *p = malloc(1); free(p); return p[0]; }\n")
    require_sanitizers(tmp_path)
    subprocess.run([str(CC), "-w", *SANITIZED, str(source), "-o", str(tmp_path / "bad")], check=True)
    result = run_kit(str(tmp_path / "bad"), only="invalid/S1", env=sanitizer_options())
    assert result.returncode == 1
    assert "crashed (status 150)" in result.stdout


def test_the_reference_passes(tmp_path: Path) -> None:
    """In this process, for starting Python 350 times takes a minute."""
    requests = list(kit.requests(kit.VECTORS, tmp_path))
    assert len(requests) > 350
    for request in requests:
        data, status, message = b"", 0, ""
        try:
            data = reference_decoder.answer(list(request.lines))
        except QlfError as error:
            status, message = 1, str(error)
        problem = kit.refusal_problem(request, status, message)
        if problem is None and request.sha256 is not None:
            problem = kit.data_problem(request, data)
        assert problem is None, f"{request.name}: {problem}"


def test_a_decoder_in_another_language_is_asked_through_its_command_line() -> None:
    command = (sys.executable, str(Path(__file__).parent / "reference_decoder.py"))
    for only, passed in (("decode/nf4-elements", 3), ("invalid/D3-half", 2)):
        result = run_kit(*command, only=only)
        assert result.returncode == 0, result.stdout
        assert result.stdout.splitlines()[-1] == f"{passed} passed, 0 failed, 0 not supported by the decoder"


@pytest.mark.parametrize(
    ("program", "only", "complaint"),
    [
        ("pass", "decode/nf4-elements-1", "found 0 bytes, needed 4"),
        ("pass", "invalid/T3-flat decode", "status 0, needed a refusal by rule T3"),
        ("print('wrong', end='')", "decode/nf4-elements-1", "found 5 bytes, needed 4"),
        ("print('four', end='')", "decode/nf4-elements-1", "found bytes with sha256"),
        ("import sys; sys.exit(1)", "decode/nf4-elements-1", "refused (status 1), needed acceptance"),
        ("import sys; sys.exit(3)", "decode/nf4-elements-1", "refused (status 3), needed acceptance"),
        ("import sys; sys.exit(3)", "invalid/T3-flat decode", "status 3, needed a refusal by rule T3"),
        ("import sys; sys.exit('[T4] no')", "invalid/T3-flat decode", "refused by T4, needed T3"),
        ("import os; os.abort()", "invalid/T3-flat decode", "the decoder crashed"),
    ],
)
def test_the_kit_notices_what_is_wrong(program: str, only: str, complaint: str) -> None:
    result = run_kit(sys.executable, "-c", program, only=only)
    assert result.returncode == 1
    assert f"FAIL {kit_name(only)}" in result.stdout
    assert complaint in result.stdout


def kit_name(only: str) -> str:
    return f"checkpoints/{only}" if only.startswith("invalid") else only


def test_the_kit_accepts_a_refusal_without_a_rule() -> None:
    result = run_kit(sys.executable, "-c", "import sys; sys.exit(1)", only="invalid/T3-flat")
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "2 passed, 0 failed, 0 not supported by the decoder"


def test_nothing_run_is_no_success() -> None:
    assert run_kit(sys.executable, "-c", "pass", only="no such case").returncode == 1


def ask(command: Path, path: Path, weight: str) -> tuple[int, bytes, str]:
    question = f"qlf-kit 1\ndecode\n{path}\n{weight}\n".encode()
    env = {**os.environ, **sanitizer_options()}
    result = subprocess.run([str(command)], input=question, capture_output=True, timeout=60, check=False, env=env)
    return result.returncode, result.stdout, result.stderr.decode("utf-8", "replace")


def mutants(seed: int) -> Callable[[bytes], bytes]:
    """A random change of a file: bytes of the header or the quant_state, a JSON token, or its length."""
    chance = random.Random(seed)
    tokens = [
        b"0", b"-1", b"18446744073709551616", b"9223372036854775807", b"1e5", b'"', b"[", b"{", b"null", b"\\u0000",
        b"\\ud800", b"\xff", b"\xc3\xa9", b",", b"}",
    ]  # fmt: skip

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            (length,) = struct.unpack("<Q", changed[:8])
            last = min(8 + length, len(changed))
            place = chance.randrange(8, last) if chance.random() < 0.6 else chance.randrange(last, len(changed))
            kind = chance.random()
            if kind < 0.4:
                changed[place] = chance.randrange(256)
            elif kind < 0.8:
                token = chance.choice(tokens)[: len(changed) - place]
                changed[place : place + len(token)] = token
            elif kind < 0.9 and place < last:
                token = chance.choice(tokens)
                changed[place:place] = token
                changed[:8] = struct.pack("<Q", length + len(token))
        return bytes(changed[: chance.randrange(len(changed))] if chance.random() < 0.05 else changed)

    return change


@needs_compiler
def test_the_c_decoder_and_the_reference_agree_on_mutated_files(sanitized: Path, tmp_path: Path) -> None:
    weight = min(DEFAULT_QUANTIZED)
    original = builders.shard_bytes(builders.make_checkpoint(quantized={weight: (16, 24)}, plain={}).tensors)
    accepted = refused = 0
    for seed in range(400):
        path = tmp_path / "mutant.safetensors"
        path.write_bytes(mutants(seed)(original))
        status, data, message = ask(sanitized, path, weight)
        assert status in (0, 1), f"seed {seed}: status {status}\n{message}"
        try:
            needed: bytes | None = reference_decoder.decode(path, weight)
        except (QlfError, KeyError):
            needed = None
        if needed is not None and status == 0:
            assert data == needed, f"seed {seed}"
            accepted += 1
        else:
            # The C decoder looks at one weight, the reference at all tensors: it may refuse more (T2, T9), never less.
            assert needed is None, f"seed {seed}: the C decoder refused what the reference takes: {message}"
            refused += 1
    assert accepted > 20
    assert refused > 200


@needs_compiler
def test_float16_and_bfloat16_are_rounded_to_nearest_even(decoder: Path, tmp_path: Path) -> None:
    """Every float16 neighbour and midpoint, subnormals included, through the C decoder and NumPy."""
    import numpy as np

    from qlformat import reference

    halves = np.arange(0, 0x7C00, 7, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    scales = np.concatenate(
        [halves, middles, np.nextafter(middles, np.float32(9e9)), np.float32([65519.9, 65520, 7e4])]
    )
    scales = np.resize(scales, scales.size - scales.size % 2).astype(np.float32)
    for dtype in ("float16", "bfloat16"):
        shape = (scales.size, 32)
        packed = np.full(scales.size * 16, 0xF0, dtype=np.uint8)  # +1 and -1 in turn
        state = QuantState("nf4", 32, dtype, shape, None)
        parts = {"w": packed, "w.absmax": scales, "w.quant_map": CODEBOOKS["nf4"].values}
        parts["w.quant_state.bitsandbytes__nf4"] = np.frombuffer(state.to_json(), dtype=np.uint8)
        specs = state.tensor_specs("w")
        tensors = {name: builders.Tensor(*specs[name], array.tobytes()) for name, array in parts.items()}
        path = tmp_path / "scales.safetensors"
        path.write_bytes(builders.shard_bytes(tensors))
        status, data, message = ask(decoder, path, "w")
        assert status == 0, message
        needed = reference.from_float32(np.repeat(scales, 32) * np.tile(np.float32([1, -1]), scales.size * 16), dtype)
        assert data == needed.tobytes()


def test_the_protocol_of_the_readme_is_that_of_the_kit() -> None:
    text = (KIT / "README.md").read_text()
    for word in ("qlf-kit 1", "decode", "verify", "exit status", "stdin", "stdout", "stderr", str(kit.UNSUPPORTED)):
        assert word in text
    assert json.dumps(["--only", "--jobs", "--quiet"])[1:-1].replace('"', "").split(", ") == [
        flag for flag in ("--only", "--jobs", "--quiet") if flag in text
    ]
