"""A server that is killed at random points loses no acknowledged commit and shows no half one."""

from __future__ import annotations

from pathlib import Path

from tests.local_hub.crashes import stress
from tests.local_hub_fixture import serve


def test_kills_while_clients_push_and_pull(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with serve(tmp_path / "root") as hub:
        outcome = stress(hub, work, clients=2, repos=4, commits=5, kills=4, pause=0.4)
        assert "Traceback" not in hub.log()
    assert outcome.acknowledged == 20
    assert outcome.kills > 0
    assert outcome.pulls > 0
