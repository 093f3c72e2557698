"""Bases and adapters as files, and their upload to `qlf hub serve` by the unmodified client."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlformat import convert
from qlformat.adapter import AdapterManifest, BasePin, file_entries
from tests.hub_server import use_endpoint
from tests.local_hub_fixture import LocalHub, serve
from tests.sources import encoded, llama_values, write_source


@contextlib.contextmanager
def served(root: Path, patch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub of its own, which the client of this process asks."""
    import huggingface_hub
    from huggingface_hub import constants

    with serve(root / "hub") as hub:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        use_endpoint(patch, hub.url, root / "cache")
        patch.setenv("HF_TOKEN", hub.token)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


def make_base(out: Path, seed: int = 0) -> Path:
    """A tiny 4-bit base; its fingerprint depends on the seed."""
    source = write_source(out.with_name(f"{out.name}-source"), encoded(llama_values(seed=seed), "float16"))
    convert(source, out)
    return out


def fingerprint(base: Path) -> str:
    found: str = json.loads((base / "qlf.json").read_bytes())["fingerprint"]
    return found


def make_adapter(out: Path, pin: BasePin | None, base_model: str = "base", **config: Any) -> Path:
    """An adapter of one layer for the tiny base, with the files that peft and qlformat read."""
    out.mkdir()
    values = np.random.default_rng(0)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.lora_A.weight": values.standard_normal((4, 64), dtype=np.float32),
        f"{stem}.lora_B.weight": values.standard_normal((64, 4), dtype=np.float32),
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    found = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (out / "adapter_config.json").write_text(json.dumps({**found, "base_model_name_or_path": base_model, **config}))
    if pin is not None:
        (out / "qlf.json").write_bytes(AdapterManifest("qlformat tests", pin, files=file_entries(out)).to_json())
    return out


def upload(hub: LocalHub, directory: Path, repo_id: str) -> str:
    """Publish all files of a directory, with what was there removed; returns the commit."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=directory, delete_patterns="*")
    return str(api.model_info(repo_id).sha)


def write_card(directory: Path, text: str) -> Path:
    (directory / "README.md").write_text(text, encoding="utf-8")
    return directory
