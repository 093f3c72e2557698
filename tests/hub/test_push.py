"""`qlformat.hub.push` with the real client against a real hub, which fails where a proxy before it says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, close_session, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import get_session

from qlformat.adapter import AdapterManifest, BasePin
from qlformat.checkpoint import open_checkpoint
from qlformat.errors import QlfError
from qlformat.hub import examination
from qlformat.hub.pull import pull
from qlformat.hub.push import PushOptions, prepare, push, send
from qlformat.hub.refusals import Conflict
from qlformat.hub.sending import SentFile
from qlformat.progress import Progress, ProgressMeter
from qlformat.workers import Stopped
from tests.builders import build_checkpoint, flip_bit
from tests.faulty_hub import Answer, FaultyHub, Lost, Request
from tests.hub.conftest import make_adapter
from tests.local_hub_fixture import READ_TOKEN
from tests.sources import file_bytes

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def remote_bytes(api: HfApi, repo_id: str, place: Path, revision: str | None = None) -> dict[str, bytes]:
    """What a plain client downloads."""
    path = api.snapshot_download(repo_id, revision=revision, local_dir=place)
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".")}


def head(api: HfApi, repo_id: str) -> str:
    return str(api.model_info(repo_id).sha)


def in_weight(shard: Path) -> int:
    """Where in a shard the values of a quantized weight are."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    name = next(name for name, entry in header.items() if name.endswith("proj.weight") and entry["dtype"] == "U8")
    return 8 + length + int(header[name]["data_offsets"][0])


def refusal(path: Path, repo_id: str, options: PushOptions | None = None) -> str:
    """The one line with which a push ends."""
    with pytest.raises(QlfError) as caught:
        push(path, repo_id, options)
    text = str(caught.value)
    assert "\n" not in text and "hf_" not in text
    return text


def test_a_base_becomes_one_commit_and_comes_back(
    proxy: FaultyHub, mode: str, base: Path, api: HfApi, tmp_path: Path
) -> None:
    repo = f"lab/base-{mode}"
    report = push(base, repo, PushOptions(message="First", tag="v1"))
    assert (report.kind, report.created, report.plan.bytes_to_send) == (
        "base", True, sum(len(data) for data in file_bytes(base).values()),
    )  # fmt: skip
    assert report.commit == head(api, repo) and proxy.commits() == 1
    commits = api.list_repo_commits(repo)
    assert [commit.title for commit in commits].count("First") == 1 and len(commits) == 2  # and the one that made it
    assert remote_bytes(api, repo, tmp_path / "plain", "v1") == file_bytes(base)
    fetched = pull(repo, tmp_path / "out")
    assert file_bytes(tmp_path / "out") == file_bytes(base)
    assert (fetched.commit, fetched.kept) == (report.commit, 0)


def test_a_hub_without_xet_is_sent_lfs(
    proxy: FaultyHub, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "own"  # of a content that no other test has put there
    build_checkpoint(base, shards=2, plain={"model.embed_tokens.weight": (48, 16), "model.norm.weight": (48,)})
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    proxy.before = lambda request: Answer(404) if "xet-write-token" in request.path else None
    push(base, "lab/no-xet")
    assert len(proxy.puts()) == len(SHARDS)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert remote_bytes(api, "lab/no-xet", tmp_path / "plain") == file_bytes(base)


def test_files_go_in_pieces_larger_than_the_librarys(
    proxy: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_checkpoint(tmp_path, plain={"model.embed_tokens.weight": (44, 16), "model.norm.weight": (44,)})
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    asked: set[int | None] = set()
    read = SentFile.read

    def noted(self: SentFile, size: int | None = -1, /) -> bytes:
        asked.add(size)
        return read(self, size)

    monkeypatch.setattr(SentFile, "read", noted)
    hooks = get_session().event_hooks
    push(tmp_path, "lab/pieces")
    assert 256 << 10 in asked and 64 << 10 not in asked
    assert get_session().event_hooks == hooks


def test_a_dry_run_says_what_would_be_done_and_does_nothing(proxy: FaultyHub, base: Path, api: HfApi) -> None:
    report = prepare(base, "lab/dry").report().as_dict()
    assert report["commit"] is None and report["parent"] is None and report["created"]
    assert [file["name"] for file in report["files"]][:2] == SHARDS  # weights first
    assert all(file["sent"] and len(file["sha256"]) == 64 for file in report["files"])
    assert {method for method, _ in proxy.requests} <= {"GET", "HEAD"}
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("lab/dry")
    push(base, "lab/dry")
    report = prepare(base, "lab/dry").report().as_dict()
    assert report["parent"] == head(api, "lab/dry") and report["bytes_to_send"] == 0


def test_what_is_there_is_not_sent_again(proxy: FaultyHub, base: Path, api: HfApi) -> None:
    push(base, "lab/again")
    first = head(api, "lab/again")
    proxy.clear()
    report = push(base, "lab/again")
    assert report.commit == first == head(api, "lab/again")
    assert (proxy.puts(), proxy.commits(), proxy.received) == ([], 0, 0)


def test_one_changed_shard_is_all_that_is_sent(proxy: FaultyHub, tmp_path: Path, api: HfApi) -> None:
    weights = {"model.embed_tokens.weight": (512, 64), "model.norm.weight": (64,)}
    build_checkpoint(tmp_path / "one", shards=2, plain=weights)
    as_it_is = PushOptions(card=False)
    push(tmp_path / "one", "lab/changed", as_it_is)
    changed = build_checkpoint(tmp_path / "two", shards=2, plain={**weights, "model.norm.weight": (65,)})
    assert changed is not None
    before, after = file_bytes(tmp_path / "one"), file_bytes(tmp_path / "two")
    different = {name for name in after if before.get(name) != after[name]}
    assert SHARDS[1] in different and SHARDS[0] not in different
    proxy.clear()
    report = push(tmp_path / "two", "lab/changed", as_it_is)
    assert {file.local.name for file in report.plan.to_send} == different
    assert len(proxy.puts()) == 1
    size = sum(len(after[name]) for name in different)
    assert size <= proxy.received < 1.5 * size + 10_000  # base64 for the small ones, and the questions
    assert proxy.received < len(after[SHARDS[0]])
    assert api.model_info("lab/changed").sha == report.commit


def test_files_of_the_old_state_go_in_the_same_commit(proxy: FaultyHub, base: Path, api: HfApi, tmp_path: Path) -> None:
    push(base, "lab/old")
    notes = CommitOperationAdd("notes.txt", b"mine")
    api.create_commit("lab/old", [notes], commit_message="A note")
    build_checkpoint(tmp_path / "whole")
    proxy.clear()
    report = push(tmp_path / "whole", "lab/old")
    assert report.plan.removed == (*SHARDS, "model.safetensors.index.json")
    assert proxy.commits() == 1
    expected = {**file_bytes(tmp_path / "whole"), "notes.txt": b"mine"}
    assert remote_bytes(api, "lab/old", tmp_path / "plain") == expected
    assert b"\n# A model\n" in expected["README.md"]  # the prose was on the hub alone


def test_an_adapter_without_what_its_run_left(proxy: FaultyHub, adapter: Path, api: HfApi, tmp_path: Path) -> None:
    for name in (
        "runs/host-17/events.out.tfevents.1.host", "checkpoint-5/adapter_model.safetensors", ".git/config", ".env",
        "adapter_model.safetensors.partial", "optimizer.pt", "training_args.bin", "trainer_state.json",
    ):  # fmt: skip
        (adapter / name).parent.mkdir(parents=True, exist_ok=True)
        (adapter / name).write_bytes(b"private")
    (adapter / "loss.png").write_bytes(b"a picture")
    report = push(adapter, "lab/adapter")
    assert report.kind == "adapter" and any("not pinned" in note for note in report.notes)
    assert set(remote_bytes(api, "lab/adapter", tmp_path / "plain")) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png",
    }  # fmt: skip
    assert {entry["name"] for entry in report.left_out} == {
        "runs/", "checkpoint-5/", ".git/", ".env", "adapter_model.safetensors.partial", "optimizer.pt",
        "training_args.bin", "trainer_state.json",
    }  # fmt: skip


def test_an_adapter_of_another_base(proxy: FaultyHub, base: Path, adapter: Path, api: HfApi) -> None:
    report = push(base, "lab/pinned-base")
    assert report.commit is not None
    own = open_checkpoint(base).manifest
    assert own is not None
    for fingerprint in ("0" * 64, own.fingerprint):
        pin = BasePin(fingerprint, "lab/pinned-base", report.commit)
        (adapter / "qlf.json").write_bytes(AdapterManifest("test", pin).to_json())
        if fingerprint != own.fingerprint:
            text = refusal(adapter, "lab/pinned")
            assert fingerprint in text and own.fingerprint in text
            with pytest.raises(RepositoryNotFoundError):
                api.model_info("lab/pinned")
            allowed = push(adapter, "lab/pinned", PushOptions(allow_base_mismatch=True))
            assert any("trained on another base" in note for note in allowed.notes)
        else:
            assert push(adapter, "lab/pinned").commit == head(api, "lab/pinned")


def test_a_concurrent_change_is_a_conflict_and_nothing_is_overwritten(
    proxy: FaultyHub, base: Path, api: HfApi, tmp_path: Path
) -> None:
    push(base, "lab/race")
    build_checkpoint(tmp_path / "mine")
    prepared = prepare(tmp_path / "mine", "lab/race")
    theirs = api.create_commit("lab/race", [CommitOperationAdd("README.md", b"theirs")], commit_message="Theirs")
    with pytest.raises(Conflict, match=r"changed by somebody else.*nothing was overwritten") as caught:
        send(prepared)
    assert theirs.oid in str(caught.value) and "\n" not in str(caught.value)
    assert head(api, "lab/race") == theirs.oid
    assert send(prepare(tmp_path / "mine", "lab/race")).commit == head(api, "lab/race")


@pytest.mark.parametrize("times", [1, 2])
def test_the_lost_answer_of_a_commit_makes_no_second_one(proxy: FaultyHub, base: Path, api: HfApi, times: int) -> None:
    lost = iter(range(times))

    def lose(request: Request, answer: Answer) -> Answer:
        if request.is_commit() and next(lost, None) is not None:
            raise Lost
        return answer

    proxy.after = lose
    report = push(base, f"lab/lost-{times}", PushOptions(message="Once"))
    assert report.commit == head(api, f"lab/lost-{times}")
    assert [commit.title for commit in api.list_repo_commits(f"lab/lost-{times}")].count("Once") == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(proxy: FaultyHub, base: Path, api: HfApi, status: int) -> None:
    left = {"model_info": 2, "commit": 2}

    def busy(request: Request) -> Answer | None:
        kind = "commit" if request.is_commit() else "model_info" if request.path.startswith("/api/models/lab") else ""
        if left.get(kind, 0):
            left[kind] -= 1
            return Answer(status)
        return None

    proxy.before = busy
    assert push(base, f"lab/busy-{status}").commit == head(api, f"lab/busy-{status}")
    assert proxy.commits() == 3


def test_a_hub_that_stays_busy_is_given_up(proxy: FaultyHub, base: Path) -> None:
    proxy.before = lambda request: Answer(503)
    assert "answers 503, also after 5 tries" in refusal(base, "lab/away")
    assert len(proxy.requests) == 5
    proxy.before = lambda request: Answer(429, headers={"Retry-After": "600"})
    proxy.clear()
    assert "asks for fewer requests (429); run it again in 600 s" in refusal(base, "lab/away")
    assert len(proxy.requests) == 1  # nobody waits ten minutes for an answer


def test_a_commit_that_is_refused_for_good(proxy: FaultyHub, base: Path, api: HfApi) -> None:
    push(base, "lab/refused")
    first = head(api, "lab/refused")
    (base / "README.md").write_text("new\n")
    proxy.before = lambda request: Answer(507, b'{"error": "disk full"}') if request.is_commit() else None
    assert "the disk of http://127.0.0.1" in refusal(base, "lab/refused")
    proxy.before = lambda request: Answer(500) if request.is_commit() else None
    assert "answers 500, also after 5 tries" in refusal(base, "lab/refused")
    assert head(api, "lab/refused") == first


def test_an_unreachable_hub(online: None, base: Path) -> None:
    text = refusal(base, "lab/none", PushOptions(endpoint="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9 cannot be reached" in text and "after 5 tries" in text


def test_tokens(proxy: FaultyHub, base: Path, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    push(base, "lab/tokens")
    (base / "README.md").write_text("new\n")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "the token has no right to do this" in refusal(base, "lab/tokens")
    assert "the token has no right to do this" in refusal(base, "lab/new-one")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong0123456789")
    assert "does not accept the token" in refusal(base, "lab/tokens")
    monkeypatch.delenv("HF_TOKEN")
    assert "wants a token and none was found; run `hf auth login`" in refusal(base, "lab/tokens")


def test_a_wrong_hash_after_the_upload_is_taken_back(proxy: FaultyHub, base: Path, api: HfApi, tmp_path: Path) -> None:
    push(base, "lab/damaged")
    before = remote_bytes(api, "lab/damaged", tmp_path / "before")
    build_checkpoint(
        tmp_path / "new", shards=2, plain={"model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,)}
    )
    (tmp_path / "new" / "extra.json").write_text("{}")
    bad: list[str] = []

    def damage(request: Request, answer: Answer) -> Answer:
        if request.is_commit() and not bad:
            bad.append(json.loads(answer.body)["commitOid"])
        if bad and "/tree/" in request.path and bad[0] in request.path:
            files = json.loads(answer.body)
            entry = next(file for file in files if file["path"] == SHARDS[0])
            entry["lfs"]["oid"] = "0" * 64
            return replace(answer, body=json.dumps(files).encode())
        return answer

    proxy.after = damage
    text = refusal(tmp_path / "new", "lab/damaged")
    assert f"after the upload {SHARDS[0]} has" in text and "0" * 64 in text and "the commit was taken back" in text
    assert remote_bytes(api, "lab/damaged", tmp_path / "after") == before


def test_what_verify_refuses_is_not_published(proxy: FaultyHub, base: Path, tmp_path: Path, api: HfApi) -> None:
    flip_bit(base / SHARDS[1], (base / SHARDS[1]).stat().st_size - 300)
    assert "is not sound: [" in refusal(base, "lab/unsound")
    assert "found NaN or infinity" in refusal(make_adapter(tmp_path / "nan", float("nan")), "lab/unsound")
    assert "found neither config.json nor adapter_config.json" in refusal(tmp_path, "lab/unsound")
    assert "found nothing, needed the directory" in refusal(tmp_path / "gone", "lab/unsound")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("lab/unsound")
    assert proxy.commits() == 0


def test_values_that_turn_out_unsound_while_files_are_sent(
    proxy: FaultyHub, base: Path, tmp_path: Path, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_its_way, real = threading.Event(), examination.require_sound

    def late(*args: Any, structure_is_sound: Callable[[], None], **more: Any) -> tuple[str, ...]:
        def then() -> None:
            structure_is_sound()
            assert on_its_way.wait(60)

        return real(*args, structure_is_sound=then, **more)

    def sent(request: Request) -> None:
        if request.method == "PUT":
            on_its_way.set()

    flip_bit(base / SHARDS[0], in_weight(base / SHARDS[0]))
    with monkeypatch.context() as patch:
        patch.setattr(examination, "require_sound", late)
        proxy.before = sent
        assert "is not sound: [" in refusal(base, "lab/late")
        assert proxy.puts() != [] and proxy.commits() == 0
        with pytest.raises(RepositoryNotFoundError):  # it had been made for this push
            api.model_info("lab/late")
    build_checkpoint(tmp_path / "sound")
    push(tmp_path / "sound", "lab/late")
    first = head(api, "lab/late")
    assert "is not sound: [" in refusal(base, "lab/late")
    assert head(api, "lab/late") == first


def test_a_repository_that_a_hub_keeps_does_not_hide_what_is_wrong(
    proxy: FaultyHub, base: Path, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_bit(base / SHARDS[0], in_weight(base / SHARDS[0]))
    real = examination.require_sound

    def late(*args: Any, structure_is_sound: Callable[[], None], **more: Any) -> tuple[str, ...]:
        def then() -> None:
            structure_is_sound()
            assert made.wait(60)

        return real(*args, structure_is_sound=then, **more)

    def refuse(request: Request) -> Answer | None:
        if request.path.startswith("/objects/batch") or "/info/lfs/" in request.path:  # the next thing after making it
            made.set()
        return Answer(403) if request.method == "DELETE" else None

    made = threading.Event()
    monkeypatch.setattr(examination, "require_sound", late)
    proxy.before = refuse
    assert "is not sound: [" in refusal(base, "lab/kept")
    assert any(method == "DELETE" for method, _ in proxy.requests)
    assert set(api.list_repo_files("lab/kept")) <= {".gitattributes"}


def test_a_repository_that_somebody_made_meanwhile_is_used(proxy: FaultyHub, base: Path, api: HfApi) -> None:
    prepared = prepare(base, "lab/meanwhile")
    api.create_repo("lab/meanwhile")
    report = send(prepared)
    assert report.commit == head(api, "lab/meanwhile") and proxy.commits() == 1


def test_a_file_is_read_until_it_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(200)))
    seen: list[Progress] = []
    given_up = False
    with SentFile(tmp_path / "file", lambda: given_up, ProgressMeter(seen.append, 1, 200, "sending", "files")) as file:
        assert file.read(150) == bytes(range(150))
        file.seek(0)  # a further try
        assert file.read(100) + file.read(1000) == bytes(range(200))
        assert (seen[-1].bytes_done, seen[-1].tensors_done, seen[-1].unit) == (200, 1, "files")
        given_up = True
        file.seek(0)
        with pytest.raises(Stopped):
            file.read(1)


def test_a_16_bit_model_and_its_index(proxy: FaultyHub, tmp_path: Path) -> None:
    from tests.sources import write_source

    model = write_source(tmp_path / "model", shards=2)
    report = push(model, "lab/plain")
    assert report.kind == "model" and "not its values" in report.notes[0]
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = sorted(content["weight_map"])[0]
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    assert f"{name!r}: found it in" in refusal(model, "lab/plain")


def test_branches_and_tags(proxy: FaultyHub, base: Path, api: HfApi) -> None:
    first = push(base, "lab/refs", PushOptions(tag="v1")).commit
    (base / "README.md").write_text("new\n")
    assert "has a tag 'v1' already" in refusal(base, "lab/refs", PushOptions(tag="v1"))
    assert "is a tag of lab/refs, needed a branch" in refusal(base, "lab/refs", PushOptions(revision="v1"))
    report = push(base, "lab/refs", PushOptions(revision="trial"))
    assert head(api, "lab/refs") == first
    assert [file.local.name for file in report.plan.to_send] == ["README.md"]
    refs = {branch.name: branch.target_commit for branch in api.list_repo_refs("lab/refs").branches}
    assert refs == {"main": first, "trial": report.commit}


def test_a_proposed_change(proxy: FaultyHub, base: Path, api: HfApi) -> None:
    first = push(base, "lab/proposed").commit
    (base / "notes.txt").write_text("new\n")
    assert "give one of the two" in refusal(base, "lab/proposed", PushOptions(create_pr=True, revision="trial"))
    report = push(base, "lab/proposed", PushOptions(create_pr=True))
    assert head(api, "lab/proposed") == first != report.commit
    assert report.url is not None and report.url.startswith("http")
    proposed = api.list_repo_refs("lab/proposed", include_pull_requests=True).pull_requests
    assert proposed is not None and [change.target_commit for change in proposed] == [report.commit]
    assert "notes.txt" in api.list_repo_files("lab/proposed", revision=report.commit)


def test_a_public_repository_is_not_taken_for_a_private_one(proxy: FaultyHub, base: Path, api: HfApi) -> None:
    push(base, "lab/open")
    assert "lab/open is public" in refusal(base, "lab/open", PushOptions(private=True))
    push(base, "lab/closed", PushOptions(private=True))
    assert api.model_info("lab/closed").private


@pytest.mark.parametrize("name", ["alone", "lab/a..b", "lab/-x", "lab/x.git", "../x", "lab/" + "x" * 100, "lab/x@v1"])
def test_names_that_are_not_allowed(proxy: FaultyHub, base: Path, name: str) -> None:
    refusal(base, name)
    assert proxy.requests == []


def test_a_file_that_changes_while_it_is_sent(proxy: FaultyHub, base: Path, api: HfApi) -> None:
    prepared = prepare(base, "lab/moving")
    proxy.before = lambda request: (base / "README.md").write_text("later\n") and None  # type: ignore[func-returns-value]
    with pytest.raises(QlfError, match=r"README\.md changed while it was being sent; nothing was published"):
        send(prepared)
    assert proxy.commits() == 0


def test_a_file_that_changes_while_it_is_checked(proxy: FaultyHub, base: Path) -> None:
    def change(request: Request) -> None:  # the hub is asked meanwhile
        with (base / SHARDS[1]).open("ab") as shard:
            shard.write(b"x")

    proxy.before = change
    assert f"{SHARDS[1]}" in refusal(base, "lab/checked")
    assert proxy.commits() == 0 and proxy.puts() == []


def test_a_file_that_comes_while_the_others_are_checked(proxy: FaultyHub, base: Path) -> None:
    proxy.before = lambda request: (base / "notes.txt").write_text("new\n") and None  # type: ignore[func-returns-value]
    assert "notes.txt changed while it was being checked; nothing was published" in refusal(base, "lab/checked-too")
    assert proxy.commits() == 0 and proxy.puts() == []


def test_a_hub_that_refuses_ends_the_check(proxy: FaultyHub, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = []

    def endless(*args: object, stop: threading.Event, **more: object) -> tuple[str, ...]:
        given_up.append(stop.wait(60))
        raise Stopped

    monkeypatch.setattr(examination, "require_sound", endless)
    proxy.before = lambda request: Answer(403)
    assert "lab/forbidden" in refusal(base, "lab/forbidden")
    assert given_up == [True]


def test_a_broken_card_is_refused_before_anything_is_sent(proxy: FaultyHub, base: Path) -> None:
    (base / "README.md").write_text("---\nlicense: [unclosed\n---\n# Card\n")
    assert "README.md" in refusal(base, "lab/card")
    assert proxy.puts() == [] and proxy.commits() == 0


def test_a_link_that_leads_out_is_not_followed(proxy: FaultyHub, base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("private")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    assert "this link leads out of the repository" in refusal(base, "lab/link")
    assert proxy.puts() == []


def test_offline(proxy: FaultyHub, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert "HF_HUB_OFFLINE keeps the hub from being asked" in refusal(base, "lab/offline")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_no_message_holds_a_token_or_a_signature() -> None:
    from qlformat.hub.refusals import scrub

    text = "PUT https://user:pass@host/x?X-Amz-Signature=abc failed: Bearer hf_abcdefgh\nmore"
    assert scrub(text) == "PUT https://host/x failed: ***"
    assert scrub("got the-secret", "the-secret") == "got ***"
    assert len(scrub("x" * 10_000)) == 200
