""".bin sources: the same bytes as from safetensors, and nothing in them is ever run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from qlformat.converter import convert
from qlformat.errors import QlfError
from tests.sources import file_bytes, llama_values, write_source


def torch_source(path: Path, tensors: dict[str, torch.Tensor], *, legacy: bool = False) -> Path:
    write_source(path)
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    return path


def half(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value).half() for name, value in llama_values(seed=seed).items()}


def weights(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in file_bytes(out).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("legacy", [False, True])
def test_the_same_weights_as_from_safetensors(tmp_path: Path, legacy: bool) -> None:
    convert(write_source(tmp_path / "st"), tmp_path / "from_st")
    convert(torch_source(tmp_path / "bin", half(), legacy=legacy), tmp_path / "from_bin")
    assert weights(tmp_path / "from_bin") == weights(tmp_path / "from_st")


def test_bfloat16_and_views(tmp_path: Path) -> None:
    values = llama_values()
    convert(write_source(tmp_path / "st", dtype="bfloat16"), tmp_path / "from_st")
    tensors = {name: torch.from_numpy(value).bfloat16() for name, value in values.items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].t().contiguous().t()  # column-major, as some training scripts leave it
    convert(torch_source(tmp_path / "bin", tensors), tmp_path / "from_bin")
    assert weights(tmp_path / "from_bin") == weights(tmp_path / "from_st")


def test_shards_with_an_index(tmp_path: Path) -> None:
    source = torch_source(tmp_path / "bin", half())
    (source / "pytorch_model.bin").unlink()
    tensors = half()
    names = list(tensors)
    weight_map = {}
    for shard in range(2):
        file = f"pytorch_model-0000{shard + 1}-of-00002.bin"
        torch.save({name: tensors[name] for name in names[shard::2]}, source / file)
        weight_map |= dict.fromkeys(names[shard::2], file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(source, tmp_path / "out")
    convert(write_source(tmp_path / "st"), tmp_path / "from_st")
    assert weights(tmp_path / "out") == weights(tmp_path / "from_st")
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    embedding = half()["model.embed_tokens.weight"]
    tensors = (
        {"lm_head.weight": embedding} | half() | {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    )
    source = torch_source(tmp_path / "bin", tensors)
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    report = convert(source, tmp_path / "out")
    assert any("shares memory" in note for note in report.notes)
    stored = {entry.name for entry in report.manifest.tensors}
    assert stored & {"lm_head.weight", "model.embed_tokens.weight"} == {"model.embed_tokens.weight"}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch evil-was-here",)


def refused(source: Path, out: Path) -> QlfError:
    with pytest.raises(QlfError) as caught:
        convert(source, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return caught.value


@pytest.mark.filterwarnings("error")  # one line is enough; torch would add advice for authors of pickles
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = torch_source(tmp_path / "bin", half())
    torch.save({"w": Evil()}, source / "pytorch_model.bin")
    error = refused(source, tmp_path / "out")
    assert error.rule == "E4"
    assert "weights_only (it calls posix.system)" in str(error)
    for protocol in (2, 4):
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(), protocol=protocol))
        assert refused(source, tmp_path / "out").rule == "E4"
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"not a checkpoint", bytes(1000)])
def test_garbage(tmp_path: Path, data: bytes) -> None:
    source = torch_source(tmp_path / "bin", half())
    (source / "pytorch_model.bin").write_bytes(data)
    assert refused(source, tmp_path / "out").rule == "E4"


def test_something_else_than_tensors(tmp_path: Path) -> None:
    source = torch_source(tmp_path / "bin", half())
    torch.save([1, 2], source / "pytorch_model.bin")
    assert refused(source, tmp_path / "out").rule == "E4"
    torch.save({"a": torch.zeros(2, dtype=torch.complex128)}, source / "pytorch_model.bin")
    assert refused(source, tmp_path / "out").rule == "E3"


def test_truncated_zip(tmp_path: Path) -> None:
    source = torch_source(tmp_path / "bin", half())
    data = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    assert refused(source, tmp_path / "out").rule == "E4"


def test_nan_is_found(tmp_path: Path) -> None:
    tensors = half()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    assert refused(torch_source(tmp_path / "bin", tensors), tmp_path / "out").rule == "E1"
    assert np.isnan(tensors["model.layers.1.mlp.up_proj.weight"].numpy()).any()
