"""`qlf adapters` against a real hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from qlf.main import main

from qlformat import QlfError
from qlformat.adapter import BasePin
from qlformat.adapter_search import find_adapters
from tests.hub.published import fingerprint, make_adapter, make_base, served, upload, write_card
from tests.local_hub_fixture import LocalHub

CARD = "---\nbase_model: {}\nbase_model_relation: adapter\nlibrary_name: peft\n---\n\n# An adapter\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with pytest.MonkeyPatch.context() as patch, served(tmp_path_factory.mktemp("adapters"), patch) as running:
        yield running


@pytest.fixture(scope="module")
def published(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A base with two commits that differ, and adapters for it: (first base, its commit, the second commit)."""
    root = tmp_path_factory.mktemp("published")
    one, two = make_base(root / "one", seed=1), make_base(root / "two", seed=2)
    first = upload(hub, one, "org/base")
    second = upload(hub, two, "org/base")

    def publish(name: str, pin: BasePin | None, base: str = "org/base", card: str = CARD) -> Path:
        made = write_card(make_adapter(root / name, pin), card.format(base))
        upload(hub, made, f"org/{name}")
        return made

    publish("on-first", BasePin(fingerprint(one), "org/base", first))
    publish("on-second", BasePin(fingerprint(two), "org/base", second), card="---\nbase_model: {}\ntags: [peft]\n---\n")
    publish("by-peft", None)
    broken = publish("broken", BasePin(fingerprint(one)))
    (broken / "qlf.json").write_text("{")
    upload(hub, broken, "org/broken")
    publish("stranger", BasePin(fingerprint(one)), base="org/other")
    return one, first, second


def fits(base: str | Path, **more: str) -> dict[str, str]:
    return {entry.repo_id: entry.fit for entry in find_adapters(base, **more).adapters}


def test_the_pins_are_compared_with_the_revision_at_hand(published: tuple[Path, str, str]) -> None:
    one, first, second = published
    on_first = {
        "org/on-first": "fits",
        "org/on-second": "differs",
        "org/by-peft": "not pinned",
        "org/broken": "unreadable",
    }
    on_second = {**on_first, "org/on-first": "differs", "org/on-second": "fits"}
    assert fits(f"org/base@{first}") == fits(one, repo_id="org/base") == on_first
    assert fits("org/base") == fits(f"org/base@{second}") == on_second
    found = find_adapters("org/base")
    assert found.base.revision == second and found.adapters[0].fit == "fits"
    assert (found.adapters[0].peft_type, found.adapters[0].rank) == ("LORA", 4)
    (broken,) = [entry for entry in found.adapters if entry.fit == "unreadable"]
    assert "[M1]" in str(broken.reason) and "\n" not in str(broken.reason)


def test_the_command(published: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    _, first, _ = published
    assert main(["adapters", f"org/base@{first}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fingerprint" in lines[0] and first[:12] in lines[0]
    assert lines[2].split()[0] == "org/on-first" and lines[2].split()[2] == "fits"
    assert main(["adapters", "org/base", "--json"]) == 0
    root = json.loads(capsys.readouterr().out)
    assert {entry["repo_id"] for entry in root["adapters"]} == {
        "org/on-first",
        "org/on-second",
        "org/by-peft",
        "org/broken",
    }
    assert main(["adapters", "org/base", "--limit", "2"]) == 0
    assert "there are more" in capsys.readouterr().out
    assert main(["adapters", "org/stranger"]) == 1
    assert "found an adapter, needed its base" in capsys.readouterr().err


def test_a_directory_does_not_tell_where_it_is(published: tuple[Path, str, str]) -> None:
    with pytest.raises(QlfError, match="--repo-id"):
        find_adapters(published[0])


def test_a_base_that_nobody_names(
    hub: LocalHub, published: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    upload(hub, published[0], "org/lonely")
    assert main(["adapters", "org/lonely"]) == 0
    assert "no adapter on the Hub names org/lonely" in capsys.readouterr().out
    assert main(["adapters", "org/nowhere"]) == 1
    assert "no such repository" in capsys.readouterr().err
