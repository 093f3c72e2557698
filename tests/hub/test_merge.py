"""Merging bases and adapters that are on a hub: fetched by the real client, and named in the report and the card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from qlf.main import main

from qlformat.adapter import BasePin
from qlformat.cards import write_card
from tests.hub.published import fingerprint, make_adapter, make_base, served, upload
from tests.local_hub_fixture import LocalHub

ONLY = ["layers.0.self_attn.q_proj"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with pytest.MonkeyPatch.context() as patch, served(tmp_path_factory.mktemp("merge"), patch) as running:
        yield running


def test_an_adapter_of_the_hub(hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    at = upload(hub, base, "org/base")
    pin = BasePin(fingerprint(base), "org/base", at)
    first = upload(hub, make_adapter(tmp_path / "a", pin, target_modules=ONLY), "org/adapter")
    second = upload(hub, make_adapter(tmp_path / "b", None, target_modules=ONLY, lora_alpha=4), "org/adapter")
    assert first != second
    given = [f"--adapter=org/adapter@{first}:0.5", "--adapter=org/adapter"]
    main(["merge", "org/base", *given, "-o", str(tmp_path / "out"), "--to", "bfloat16", "-q"])
    report = json.loads((tmp_path / "out" / "merge_report.json").read_bytes())
    assert [(entry["repo_id"], entry["revision"], entry["weight"]) for entry in report["adapters"]] == [
        ("org/adapter", first, 0.5), ("org/adapter", second, 1.0),
    ]  # fmt: skip
    assert list(report["applied"]) == [f"org/adapter@{first}", f"org/adapter@{second}"]
    write_card(tmp_path / "out", online=False)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()["base_model"] == ["org/base", "org/adapter"]
    capsys.readouterr()
    assert main(["merge", "org/base", "--adapter=org/none", "-o", str(tmp_path / "no"), "--to", "bfloat16"]) == 1
    said = capsys.readouterr().err
    assert "org/none" in said and "no such repository" in said and said.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_a_local_base_is_described_by_the_model_it_was_made_from(hub: LocalHub, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    source = tmp_path / "base-source"
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    commit = upload(hub, source, "org/original")
    main(["convert", "org/original", str(tmp_path / "nf4"), "-q"])
    adapter = make_adapter(tmp_path / "adapter", BasePin(fingerprint(base)), target_modules=ONLY)
    main(["merge", str(tmp_path / "nf4"), "--adapter", str(adapter), "-o", str(tmp_path / "out"), "--to", "nf4", "-q"])
    report = json.loads((tmp_path / "out" / "merge_report.json").read_bytes())
    assert report["base"]["made_from"] == {"repo_id": "org/original", "revision": commit}
    assert write_card(tmp_path / "out") == ()
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/original", "merge")
    assert data["license"] == "apache-2.0"
    assert HfApi(endpoint=hub.url, token=hub.token).model_info("org/original").sha == commit
