"""A hub in this process, with a token that may write and one that may read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.local_hub.asgi import Client
from tests.local_hub_fixture import write_tokens


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path / "hub", token_file=write_tokens(tmp_path / "tokens"))
