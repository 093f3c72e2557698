"""verify and convert against the checkpoint and source vectors: sound ones pass, each broken one names its rule."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file

from qlformat.converter import convert
from qlformat.errors import QlfError
from qlformat.layout import QuantState, parse_quant_state
from qlformat.manifest import fingerprint
from qlformat.shards import ShardReader, ShardWriter, TensorSpec
from qlformat.verifier import verify
from tests import builders

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "spec" / "vectors"


def cases(folder: str) -> list[Path]:
    return sorted((VECTORS / folder).iterdir())


def expected(case: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((case / "expected.json").read_text())
    return found


def prepared(case: Path, tmp_path: Path) -> Path:
    """A copy of the case with the links and directories that its setup asks for."""
    copy = tmp_path / case.name
    shutil.copytree(case, copy)
    setup = expected(case).get("setup", {})
    for link, target in setup.get("links", {}).items():
        (copy / "repo" / link).symlink_to(target)
    for directory in setup.get("directories", ()):
        (copy / "repo" / directory).mkdir()
    return copy


def broken_rules(case: Path) -> tuple[set[str], list[str]]:
    """(ids of the broken rules, all findings as text)."""
    source = case / "source"
    try:
        findings = verify(case / "repo", source=source if source.exists() else None, threads=1)
    except QlfError as error:
        return {error.rule or "none"}, [str(error)]
    return {f.rule for f in findings if f.severity == "error"}, [str(f) for f in findings]


@pytest.mark.parametrize("case", cases("checkpoints/valid"), ids=lambda case: case.name)
def test_valid(case: Path) -> None:
    rules, findings = broken_rules(case)
    assert not rules, findings


@pytest.mark.parametrize(
    "case", [*cases("checkpoints/invalid"), *cases("checkpoints/future")], ids=lambda case: case.name
)
def test_invalid(case: Path, tmp_path: Path) -> None:
    wanted = expected(case)
    rules, findings = broken_rules(prepared(case, tmp_path))
    assert wanted["rule"] in rules, findings
    # One thing and one thing only: further rules are broken only where the case says that they cannot be kept.
    assert rules <= {wanted["rule"], *wanted.get("also", ())}, findings
    about = [text for text in findings if text.startswith(f"[{wanted['rule']}]")]
    for key in ("tensor", "file"):
        if wanted.get(key):
            escaped = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in wanted[key])
            assert any(escaped in text for text in about), about


@pytest.mark.parametrize("case", cases("sources/valid"), ids=lambda case: case.name)
def test_valid_sources(case: Path, tmp_path: Path) -> None:
    convert(case / "source", tmp_path / "out", threads=1)
    assert broken_rules_of(tmp_path / "out", case / "source") == set()


def broken_rules_of(repo: Path, source: Path) -> set[str]:
    return {f.rule for f in verify(repo, source=source, threads=1) if f.severity == "error"}


@pytest.mark.parametrize("case", cases("sources/invalid"), ids=lambda case: case.name)
def test_invalid_sources(case: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = expected(case)
    before = tree(case)
    with pytest.raises(QlfError) as caught:
        convert(case / "source", tmp_path / "out", threads=1)
    assert caught.value.rule == wanted["rule"], str(caught.value)
    assert "\n" not in str(caught.value)
    if "tensor" in wanted:
        assert caught.value.tensor == wanted["tensor"]
    assert not (tmp_path / "out").exists()
    assert tree(case) == before
    assert "EXECUTED" not in capfd.readouterr().out  # the function that the pickle calls


def tree(directory: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file."""
    files = [path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_generator_gives_the_committed_bytes(tmp_path: Path) -> None:
    script = VECTORS / "generate_checkpoints.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=300)
    committed = {**under("checkpoints"), **under("sources")}
    generated = {**under("checkpoints", tmp_path), **under("sources", tmp_path)}
    assert len(generated) > 400
    assert generated == committed


def under(folder: str, root: Path = VECTORS) -> dict[str, str]:
    """The files of a folder of vectors; without those that bitsandbytes made."""
    found = tree(root / folder)
    return {f"{folder}/{name}": digest for name, digest in found.items() if "plain-from-transformers" not in name}


def test_the_vectors_stay_small() -> None:
    sizes = [path.stat().st_size for path in VECTORS.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(sizes) < 5 << 19


def manifests() -> list[Path]:
    return [case / "repo" for case in cases("checkpoints/valid") if (case / "repo" / "qlf.json").exists()]


@pytest.mark.parametrize("repo", manifests(), ids=lambda repo: repo.parent.name)
def test_the_shard_writer_gives_the_bytes_of_the_builder(repo: Path, tmp_path: Path) -> None:
    """Two independent writers agree on order, alignment and header length (format.md, section 10)."""
    for shard in sorted(repo.glob("*.safetensors")):
        tensors = builders.read_tensors(shard)
        writer = ShardWriter(tmp_path / shard.name, [spec(name, tensors) for name in tensors])
        for name, tensor in tensors.items():
            if ".quant_state." in name:
                writer.write_late(name, tensor.data)
            else:
                writer.write(name, 0, tensor.data)
        writer.finish()
        writer.close()
        assert (tmp_path / shard.name).read_bytes() == shard.read_bytes()
        with ShardReader(shard) as reader:
            assert reader.header.data_start % 64 == 0


def spec(name: str, tensors: dict[str, builders.Tensor]) -> TensorSpec:
    """How the converter announces a tensor before it knows the nested_offset."""
    weight, mark, quant_type = name.partition(".quant_state.bitsandbytes__")
    if not mark:
        return TensorSpec(name, tensors[name].dtype, tensors[name].shape, f"{name}.absmax" in tensors)
    state = parse_quant_state(tensors[name].data, weight, quant_type)
    start = QuantState(state.quant_type, state.blocksize, state.dtype, state.shape, 0.0 if state.nested else None)
    return TensorSpec(name, "U8", (len(start.to_json()) + (24 if state.nested else 0),), late=True)


@pytest.mark.parametrize("repo", manifests(), ids=lambda repo: repo.parent.name)
def test_the_fingerprint_is_that_of_the_stored_tensors(repo: Path) -> None:
    rows = []
    for shard in repo.glob("*.safetensors"):
        for name, tensor in builders.read_tensors(shard).items():
            rows.append((name, tensor.dtype, tensor.shape, hashlib.sha256(tensor.data).hexdigest()))
    found = json.loads((repo / "qlf.json").read_text())["fingerprint"]
    assert fingerprint(rows) == found
    assert expected(repo.parent).get("fingerprint", found) == found


def test_the_converter_gives_the_bytes_of_the_builder(tmp_path: Path) -> None:
    """converter.py and the reference builder share no writing code, and make the same shard and the same manifest."""
    case = VECTORS / "sources" / "valid" / "bfloat16"
    convert(case / "source", tmp_path / "out", threads=1)
    built = VECTORS / "checkpoints" / "valid" / "llama" / "repo"
    assert (tmp_path / "out" / builders.SINGLE).read_bytes() == (built / builders.SINGLE).read_bytes()
    written, needed = (json.loads((path / "qlf.json").read_text()) for path in (tmp_path / "out", built))
    assert written["fingerprint"] == needed["fingerprint"]
    assert written["recipe"] == needed["recipe"]
    for key in ("weights", "tensors"):
        assert sorted(written[key], key=lambda e: e["name"]) == sorted(needed[key], key=lambda e: e["name"])


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    """A snapshot in the Hub cache consists of links into blobs; the same links elsewhere break R4."""
    repo = VECTORS / "checkpoints" / "valid" / "nf4-dq" / "repo"
    for place, sound in ((tmp_path / "models--org--name", True), (tmp_path / "elsewhere", False)):
        snapshot = place / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (place / "blobs").mkdir()
        for path in repo.iterdir():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, place / "blobs" / digest)
            (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
        try:
            errors = [f.rule for f in verify(snapshot, threads=1) if f.severity == "error"]
        except QlfError as error:
            errors = [error.rule or "none"]
        assert (not errors) == sound, errors


def test_bitsandbytes_decodes_the_valid_checkpoints() -> None:
    """What expected.json says of the decoded weights is what bitsandbytes gives, but for the sign of fp4's zeros."""
    compared = 0
    for case in cases("checkpoints/valid"):
        for name, entry in expected(case).get("decoded", {}).items():
            stored = load_file(case / "repo" / entry["file"])
            parts = {key[len(name) + 1 :]: stored[key] for key in stored if key.startswith(f"{name}.")}
            state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            with torch.compiler.set_stance("force_eager"):  # odd shapes would be compiled, which takes half a minute
                decoded = functional.dequantize_4bit(stored[name], state).contiguous()
            if state.quant_type == "fp4":
                decoded = decoded + 0.0  # -0.0 becomes +0.0
            data = decoded.view(-1).view(torch.uint8).numpy().tobytes()
            assert list(decoded.shape) == entry["shape"]
            assert hashlib.sha256(data).hexdigest() == entry["sha256"], (case.name, name)
            compared += 1
    assert compared > 40


def test_example_values_do_not_depend_on_numpys_generators() -> None:
    values = builders.example_values("model.norm.weight", (16,))
    assert values.dtype == np.float32
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    assert digest == "7345f69c85300b5c1eaf57c80e95a0370f1a67ce431101889d1e4e75e5817436"
