"""A real hub in a process of its own, a proxy before it, and things to publish."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, close_session, constants

from qlformat.hub import client, upload
from tests.builders import build_checkpoint
from tests.faulty_hub import FaultyHub, faulty
from tests.local_hub_fixture import LocalHub, serve, write_tokens


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """One hub for a module's tests; each uses repositories of its own."""
    place = tmp_path_factory.mktemp("hub")
    with serve(place / "root", token_file=write_tokens(place / "tokens")) as running:
        yield running


@pytest.fixture(params=["lfs", "xet"])
def mode(request: pytest.FixtureRequest) -> str:
    """How the client sends large files."""
    return str(request.param)


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A client that may use the network, with a home of its own and short waits; LFS unless `mode` says xet."""
    sent_by = request.getfixturevalue("mode") if "mode" in request.fixturenames else "lfs"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", sent_by == "lfs")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(upload, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    close_session()
    yield
    close_session()


@pytest.fixture
def proxy(online: None, server: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """The way to the hub, with the right to write."""
    monkeypatch.setenv("HF_TOKEN", server.token)
    with faulty(server.url) as before:
        monkeypatch.setattr(constants, "ENDPOINT", before.url)
        template = before.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield before
        close_session()


@pytest.fixture
def api(server: LocalHub) -> HfApi:
    """The hub itself, past the proxy."""
    return HfApi(endpoint=server.url, token=server.token)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A sound checkpoint in two shards, with what a repository has beside it."""
    build_checkpoint(tmp_path / "base", shards=2)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A model\n")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A peft adapter, with what a run leaves behind."""
    return make_adapter(tmp_path / "adapter")


def make_adapter(path: Path, value: float = 0.5) -> Path:
    """A small adapter whose numbers are all `value`."""
    from safetensors.numpy import save_file

    path.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {"A": (4, 16), "B": (16, 4)}
    tensors = {f"{name}.lora_{half}.weight": np.full(shape, value, np.float32) for half, shape in halves.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "lab/base"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
