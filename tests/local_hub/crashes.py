"""Clients that push and pull while the server is killed again and again, and what must be true of the hub afterwards.

Run as a program, it is one of the clients.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.local_hub.client_process import environment
from tests.local_hub_fixture import ROOT, LocalHub


@dataclass(frozen=True)
class Outcome:
    """What a run was: how many commits were acknowledged, how often clients had to try again, and how long it took."""

    acknowledged: int
    retries: int
    pulls: int
    kills: int
    seconds: float


def content(repo: str, number: int) -> bytes:
    """The weights of a repository's commit with this number."""
    noise = random.Random(f"{repo} {number}")
    return noise.randbytes(noise.randrange(1_000, 400_000))


def stress(hub: LocalHub, work: Path, *, clients: int, repos: int, commits: int, kills: int, pause: float) -> Outcome:
    """Let clients push `commits` commits to each of `repos` repositories, and kill the server meanwhile.

    Raises:
        AssertionError: an acknowledged commit is gone, a mixed state was seen, or a client did not finish.
    """
    began, seed = time.monotonic(), random.Random(clients)
    env = environment(hub, work / "home", xet=False)
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    running = []
    for client in range(clients):
        named = [f"ann/repo-{number}" for number in range(client, repos, clients)]
        command = [sys.executable, "-m", "tests.local_hub.crashes", hub.url, str(work), str(client), str(commits)]
        command += named
        with (work / f"client-{client}.log").open("wb") as log:
            own = env | {"HF_HOME": str(work / f"home-{client}")}
            running.append(subprocess.Popen(command, env=own, cwd=ROOT, stderr=log))
    try:
        done = 0
        while not any(log.stat().st_size for log in work.glob("acknowledged-*")):
            assert all(client.poll() is None for client in running), "a client ended before its first commit"
            time.sleep(0.05)
        while done < kills and any(client.poll() is None for client in running):
            time.sleep(seed.uniform(0.2, 2 * pause))
            hub.kill()
            done += 1
            time.sleep(seed.uniform(0, 0.3))
            hub.restart()
        codes = [client.wait(timeout=3000) for client in running]
        logs = [(work / f"client-{client}.log").read_text()[-2000:] for client in range(clients)]
        assert codes == [0] * clients, "\n".join([hub.log(), *logs])
    finally:
        for client in running:
            client.kill()
    hub.kill()
    hub.restart()
    reports = [json.loads((work / f"report-{client}.json").read_text()) for client in range(clients)]
    said = [(work / f"acknowledged-{client}").read_text() for client in range(clients)]
    acknowledged = [tuple(line.split()) for text in said for line in text.splitlines()]
    assert len(acknowledged) == repos * commits
    _check(hub, acknowledged)
    retries, pulls = (sum(report[key] for report in reports) for key in ("retries", "pulls"))
    return Outcome(len(acknowledged), retries, pulls, done, time.monotonic() - began)


def _check(hub: LocalHub, acknowledged: list[tuple[str, ...]]) -> None:
    """Every acknowledged commit is in its branch's history, once, and its files are whole."""
    import urllib.request

    def get(path: str) -> bytes:
        with urllib.request.urlopen(hub.url + path, timeout=60) as found:
            return bytes(found.read())

    histories: dict[str, list[str]] = {}
    for repo, number, commit in acknowledged:
        if repo not in histories:
            pages, found = 0, True
            histories[repo] = []
            while found:
                found = json.loads(get(f"/api/models/{repo}/commits/main?p={pages}"))
                histories[repo] += [item["id"] for item in found]
                pages += 1
        assert histories[repo].count(commit) == 1, f"{repo}: commit {number} is gone"
        assert json.loads(get(f"/{repo}/resolve/{commit}/state.json")) == int(number)
        assert get(f"/{repo}/resolve/{commit}/w.safetensors") == content(repo, int(number)), f"{repo}: commit {number}"
    counts = {repo: len(history) for repo, history in histories.items()}
    expected = {repo: 1 + sum(1 for other, *_ in acknowledged if other == repo) for repo in histories}
    assert counts == expected, "a commit was made twice, or one that nobody was told of is there"


class _Worker:
    """One client. Every call is repeated until it is answered."""

    def __init__(self, url: str, work: Path, number: int) -> None:
        from huggingface_hub import HfApi

        self.api = HfApi(endpoint=url, token=False)
        self.work, self.number = work, number
        self.retries = self.pulls = 0
        self.log = (work / f"acknowledged-{number}").open("w")

    def until_done(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from huggingface_hub.errors import HfHubHTTPError

        for _ in range(600):
            try:
                return call(*args, **kwargs)
            except HfHubHTTPError as error:
                if error.response.status_code < 500:
                    raise
            except Exception as error:
                if type(error) is AssertionError:
                    raise
            self.retries += 1
            time.sleep(0.1)
        raise RuntimeError("the hub did not come back")

    def push(self, repo: str, number: int, parent: str | None) -> str:
        from huggingface_hub import CommitOperationAdd

        def commit() -> str:
            operations = [
                CommitOperationAdd("state.json", json.dumps(number).encode()),
                CommitOperationAdd("w.safetensors", content(repo, number)),
            ]
            return str(self.api.create_commit(repo, operations, commit_message=f"{number}", parent_commit=parent).oid)

        oid = str(self.until_done(commit))
        self.log.write(f"{repo} {number} {oid}\n")
        self.log.flush()
        os.fsync(self.log.fileno())
        return oid

    def pull(self, repo: str, target: Path) -> None:
        """What a reader gets is one commit's files, whole."""
        self.until_done(self.api.snapshot_download, repo, local_dir=target)
        number = json.loads((target / "state.json").read_text())
        found = hashlib.sha256((target / "w.safetensors").read_bytes()).hexdigest()
        assert found == hashlib.sha256(content(repo, number)).hexdigest(), f"{repo}: a mixed state"
        self.pulls += 1

    def run(self, commits: int, repos: list[str]) -> None:
        parents: dict[str, str] = {}
        for repo in repos:
            self.until_done(self.api.create_repo, repo, exist_ok=True)
            parents[repo] = self.until_done(self.api.model_info, repo).sha
        for number in range(commits):
            for at, repo in enumerate(repos):
                parents[repo] = self.push(repo, number, parents[repo])
                if (at + number) % 3 == 0:
                    self.pull(repo, self.work / f"pulled-{self.number}" / repo / str(number))
        report = {"retries": self.retries, "pulls": self.pulls}
        (self.work / f"report-{self.number}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    _Worker(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])).run(int(sys.argv[4]), sys.argv[5:])
