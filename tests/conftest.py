"""What all tests share: the real models and texts, and no look for a hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub, serve_hub

ROOT = Path(__file__).resolve().parents[1]

# Before any import of transformers or bitsandbytes, which would ask a hub at import time.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several tests at once would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def fetched(name: str) -> Path:
    """The directory of a model or text that tools/fetch_models.py provides, fetched on first use.

    A failure to fetch is a failure of the test: QLF_OFFLINE=1 is how a person without a network says to skip.
    A process of its own, so that building a model leaves no trace in this one.
    """
    command = [sys.executable, str(ROOT / "tools" / "fetch_models.py"), name]
    if os.environ.get("QLF_OFFLINE") == "1":
        command.append("--offline")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Path(done.stdout.splitlines()[-1])
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    if os.environ.get("QLF_OFFLINE") == "1":
        pytest.skip(f"QLF_OFFLINE=1: {reason}")
    pytest.fail(reason, pytrace=False)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct, float16, with tokenizer and chat template. Read only."""
    return fetched("smollm2")


@pytest.fixture(scope="session")
def stories_dir() -> Path:
    """stories15M, a float32 Llama that was never quantized, with its tokenizer. Read only."""
    return fetched("stories15m")


@pytest.fixture(scope="session")
def texts_dir() -> Path:
    """c4, code, multilingual, technical, tiny and wiki .utf8 files. Read only."""
    return fetched("texts")


@pytest.fixture(scope="session")
def chats_file() -> Path:
    """4,017 real conversations, one a line, as chat messages. Read only."""
    return fetched("chitchat") / "chat.jsonl"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves the repositories below tmp_path/hub to the real client of this process."""
    with serve_hub(tmp_path, monkeypatch) as served:
        yield served


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
