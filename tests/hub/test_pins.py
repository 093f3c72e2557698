"""Pins against a real hub: the base is found by repository and commit, and its fingerprint alone decides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from qlf.main import main

from qlformat import QlfError, export, load_model, pins
from qlformat.adapter import BasePin, read_pin
from qlformat.adapter_verifier import is_adapter, verify_adapter
from qlformat.errors import PinError
from qlformat.finetune.base import open_base
from qlformat.merge.base import open_base as open_merge_base
from tests.hub.published import fingerprint, make_adapter, make_base, served, upload
from tests.local_hub_fixture import LocalHub

OTHER = "0" * 64


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with pytest.MonkeyPatch.context() as patch, served(tmp_path_factory.mktemp("pins"), patch) as running:
        yield running


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bases with the same shapes."""
    root = tmp_path_factory.mktemp("bases")
    return make_base(root / "one", seed=1), make_base(root / "two", seed=2)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_the_pinned_commit_fits(hub: LocalHub, bases: tuple[Path, Path], tmp_path: Path) -> None:
    commit = upload(hub, bases[0], "org/steady")
    made = make_adapter(tmp_path / "made", BasePin(fingerprint(bases[0]), "org/steady", commit))
    found = pins.check(made)
    assert found.notes == () and found.base is not None
    assert (found.base.repo_id, found.base.revision) == ("org/steady", commit)
    assert verify_adapter(made) == []


def test_fine_tuning_and_merging_record_the_commit(hub: LocalHub, bases: tuple[Path, Path]) -> None:
    commit = upload(hub, bases[0], "org/trained-on")
    for name in ("org/trained-on", "org/trained-on@main", f"org/trained-on@{commit}"):
        found = open_base(name)
        assert (found.repo_id, found.revision, found.fingerprint) == ("org/trained-on", commit, fingerprint(bases[0]))
        with open_merge_base(name) as onto:
            assert (onto.repo_id, onto.revision) == ("org/trained-on", commit)
    assert open_base(str(bases[0])).repo_id is None


def test_new_commits_with_the_same_tensors_fit(hub: LocalHub, bases: tuple[Path, Path], tmp_path: Path) -> None:
    first = upload(hub, bases[0], "org/described")
    described = shutil.copytree(bases[0], tmp_path / "described")
    (described / "README.md").write_text("# A card\n")
    second = upload(hub, described, "org/described")
    assert first != second
    for revision in (first, second, "main", None):
        made = make_adapter(tmp_path / f"made-{revision}", BasePin(fingerprint(bases[0]), "org/described", revision))
        assert pins.check(made).notes == ()


def test_a_repository_that_holds_another_base_by_now(hub: LocalHub, bases: tuple[Path, Path], tmp_path: Path) -> None:
    commit = upload(hub, bases[0], "org/moved-on")
    upload(hub, bases[1], "org/moved-on")
    made = make_adapter(tmp_path / "made", BasePin(fingerprint(bases[0]), "org/moved-on", commit))
    (note,) = pins.check(made).notes
    assert fingerprint(bases[1]) in note and f"load the base with revision {commit}" in note
    unnamed = make_adapter(tmp_path / "unnamed", BasePin(fingerprint(bases[0]), "org/moved-on"))
    with pytest.raises(PinError) as caught:
        pins.check(unnamed)
    assert fingerprint(bases[0]) in one_line(caught.value) and fingerprint(bases[1]) in str(caught.value)
    assert "--allow-base-mismatch" in str(caught.value)
    (note,) = pins.check(unnamed, allowed=True).notes
    assert "trained on another base; used all the same" in note


def test_a_renamed_repository_fits(hub: LocalHub, bases: tuple[Path, Path], tmp_path: Path) -> None:
    commit = upload(hub, bases[0], "org/before")
    HfApi(endpoint=hub.url, token=hub.token).move_repo("org/before", "org/after")
    made = make_adapter(tmp_path / "made", BasePin(fingerprint(bases[0]), "org/before", commit))
    assert pins.check(made).notes == ()


def test_a_commit_that_is_gone(hub: LocalHub, bases: tuple[Path, Path], tmp_path: Path) -> None:
    upload(hub, bases[0], "org/rewritten")
    gone = "1234567890" * 4
    made = make_adapter(tmp_path / "made", BasePin(fingerprint(bases[0]), "org/rewritten", gone))
    (note,) = pins.check(made).notes
    assert f"the commit {gone} that it names is gone" in note
    other = make_adapter(tmp_path / "other", BasePin(OTHER, "org/rewritten", gone))
    with pytest.raises(PinError, match="belongs to the base with fingerprint 0000"):
        pins.check(other)


def test_a_base_that_is_gone_is_a_note_for_verify(hub: LocalHub, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "made", BasePin(OTHER, "org/nowhere", "a" * 40))
    with pytest.raises(QlfError, match="no such repository") as caught:
        pins.check(made)
    one_line(caught.value)
    (note,) = verify_adapter(made)
    assert note.severity == "note" and "its base could not be looked at" in note.message


def test_a_plain_base_is_compared_once_it_is_given(hub: LocalHub, bases: tuple[Path, Path], tmp_path: Path) -> None:
    plain = shutil.copytree(bases[0], tmp_path / "plain", ignore=shutil.ignore_patterns("qlf.json"))
    commit = upload(hub, plain, "org/plain")
    made = make_adapter(tmp_path / "made", BasePin(fingerprint(bases[0]), "org/plain", commit))
    (note,) = pins.check(made).notes
    assert "has no qlf.json: give it with --base" in note
    assert pins.check(made, "org/plain").notes == () and pins.check(made, plain).notes == ()
    with pytest.raises(PinError):
        pins.check(make_adapter(tmp_path / "other", BasePin(OTHER)), "org/plain")


def test_a_manifest_that_contradicts_itself(hub: LocalHub, bases: tuple[Path, Path], tmp_path: Path) -> None:
    """Whoever changes the recorded fingerprint alone deceives nobody."""
    forged = shutil.copytree(bases[1], tmp_path / "forged")
    text = (forged / "qlf.json").read_text()
    (forged / "qlf.json").write_text(text.replace(fingerprint(bases[1]), fingerprint(bases[0])))
    commit = upload(hub, forged, "org/forged")
    made = make_adapter(tmp_path / "made", BasePin(fingerprint(bases[0]), "org/forged", commit))
    (finding,) = verify_adapter(made)
    assert finding.rule == "M7" and finding.severity == "error"


def test_a_base_in_16_bits(bases: tuple[Path, Path], tmp_path: Path) -> None:
    export(bases[0], tmp_path / "float32", dtype="float32")
    made = make_adapter(tmp_path / "made", BasePin(fingerprint(bases[0])))
    with pytest.raises(PinError, match="found a model that is not in 4 bits"):
        pins.check(made, tmp_path / "float32")


def test_loading_checks_the_pin(bases: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # bitsandbytes asks for a kernel when it is imported
    made = make_adapter(tmp_path / "made", BasePin(fingerprint(bases[0]), "org/base"))
    assert load_model(bases[0], adapter=made).qlf_notes == ()
    with pytest.raises(PinError, match="--allow-base-mismatch"):
        load_model(bases[1], adapter=made)
    (note,) = load_model(bases[1], adapter=made, allow_base_mismatch=True).qlf_notes
    assert "used all the same" in note


def test_the_home_of_a_base_is_recorded_later(hub: LocalHub, bases: tuple[Path, Path], tmp_path: Path) -> None:
    commit = upload(hub, bases[0], "org/later")
    made = make_adapter(tmp_path / "made", BasePin(fingerprint(bases[0])), base_model=str(bases[0]))
    (note,) = pins.check(made).notes
    assert "give its base with --base" in note
    upload(hub, bases[1], "org/not-it")
    with pytest.raises(PinError):
        pins.record_home(made, "org/not-it")
    with pytest.raises(QlfError, match="needed the Hub repository"):
        pins.record_home(made, str(bases[0]))
    pins.record_home(made, "org/later")
    assert read_pin(made) == BasePin(fingerprint(bases[0]), "org/later", commit)
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/later"
    assert verify_adapter(made) == []


def test_the_command(
    hub: LocalHub, bases: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = upload(hub, bases[0], "org/commanded")
    good = make_adapter(tmp_path / "good", BasePin(fingerprint(bases[0]), "org/commanded", commit))
    upload(hub, good, "org/good")
    assert is_adapter("org/good") and is_adapter(good) and not is_adapter(bases[0]) and not is_adapter("org/commanded")
    assert main(["verify", str(good)]) == 0 and main(["verify", "org/good"]) == 0
    assert "good: sound" in capsys.readouterr().out
    assert main(["verify", str(good), "--base", str(bases[1]), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["rule"] == "M7" and fingerprint(bases[0]) in finding["message"]
    assert fingerprint(bases[1]) in finding["message"]
    assert main(["verify", str(good), "--base", str(bases[1]), "--allow-base-mismatch"]) == 0
    assert "note: qlf.json  the adapter good was trained on another base" in capsys.readouterr().out
    assert main(["verify", str(bases[0]), "--base", "x"]) == 2 and main(["verify", str(good), "--source", "x"]) == 2


def test_every_byte_of_an_adapter_is_checked(tmp_path: Path) -> None:
    def findings(name: str) -> list[tuple[str, str | None]]:
        return [(found.rule, found.file) for found in verify_adapter(tmp_path / name) if found.severity == "error"]

    pin = BasePin("a" * 64)
    for name in ("sound", "flipped", "config", "short", "nan", "lost", "listed", "plain"):
        make_adapter(tmp_path / name, pin)
    weights = tmp_path / "flipped" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    (tmp_path / "config" / "adapter_config.json").write_text("{")
    (tmp_path / "short" / "adapter_model.safetensors").write_bytes(bytes(data)[:-8])
    (tmp_path / "nan" / "adapter_model.safetensors").write_bytes(bytes(data[:-4]) + b"\x00\x00\xc0\x7f")
    (tmp_path / "lost" / "adapter_model.safetensors").unlink()
    root = json.loads((tmp_path / "listed" / "qlf.json").read_text())
    root["files"][0]["name"] = "../../etc/passwd"
    (tmp_path / "listed" / "qlf.json").write_text(json.dumps(root))
    (tmp_path / "plain" / "qlf.json").unlink()
    assert findings("sound") == findings("plain") == []
    assert findings("flipped") == [("M6", "adapter_model.safetensors")]
    assert findings("config") == [("C1", "adapter_config.json"), ("M6", "adapter_config.json")]
    assert ("S5", "adapter_model.safetensors") in findings("short")
    assert ("E1", "adapter_model.safetensors") in findings("nan")
    assert ("R4", "adapter_model.safetensors") in findings("lost")
    assert findings("listed") == [("M9", "qlf.json")]
