"""Datasets on the Hub, read by the real client from a hub on the loopback interface."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from qlformat.finetune.dataset import load_rows
from qlformat.finetune.rows import DataError, Place
from tests import hub_server
from tests.hub_server import COMMIT, Handler, Hub, serve_hub


class DatasetHandler(Handler):
    """The endpoints of datasets, which are those of models under another name."""

    def do_GET(self) -> None:
        self.path = re.sub(r"^/api/datasets/", "/api/models/", self.path)
        self.path = re.sub(r"^/datasets/", "/", self.path)
        if re.match(r"/api/models/[^/]+/[^/]+/tree/[^/]+/", self.path):  # there are no folders
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        super().do_GET()

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", self.path)
        if not match:
            self._answer(404, b"", {})
            return
        asked = json.loads(body)["paths"] if body.startswith(b"{") else re.findall(r"paths=([^&]+)", body.decode())
        files = [self.hub.root / match[1] / name for name in asked]
        items = [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in files if p.is_file()
        ]
        self._post_answer(json.dumps(items).encode())

    def _post_answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def dataset_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_server, "Handler", DatasetHandler)
    with serve_hub(tmp_path, monkeypatch) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
        url = constants.ENDPOINT + "/datasets/{repo_id}/resolve/{revision}/{path}"
        monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        folder = hub.root / "org" / "chats"
        folder.mkdir(parents=True)
        for name, count in (("train", 3), ("test", 2)):
            lines = [json.dumps({"prompt": f"{name} {i}", "completion": "x"}) for i in range(count)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        yield hub


def test_a_dataset_and_its_splits(dataset_hub: Hub) -> None:
    rows = load_rows("org/chats")
    assert [row["prompt"] for row in rows.rows] == ["train 0", "train 1", "train 2"]
    assert (rows.repo_id, rows.revision, rows.split, rows.files) == ("org/chats", COMMIT, "train", ())
    assert rows.places[2] == Place("org/chats:train", 3, "row") and rows.format == "prompt-completion"
    assert [row["prompt"] for row in load_rows("org/chats:test").rows] == ["test 0", "test 1"]
    assert len(load_rows("org/chats@v1:train[:1]")) == 1
    assert len(load_rows("org/chats", split="test")) == 2


def test_what_the_hub_does_not_have(dataset_hub: Hub) -> None:
    for spec, what in {
        "org/nothing": "no such dataset",
        "org/chats:validation": "cannot read split 'validation' of org/chats",
        "org/chats@v9": "has no such revision",
    }.items():
        with pytest.raises(DataError) as caught:
            load_rows(spec)
        assert what in str(caught.value), str(caught.value)
