"""The unmodified clients against `qlf hub serve`: huggingface_hub by LFS and by xet, transformers, peft, and `hf`."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local_hub.client_process import environment, run_client
from tests.local_hub_fixture import READ_TOKEN, LocalHub, serve, write_tokens


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    directory = tmp_path_factory.mktemp("hub")
    with serve(directory / "root", "--part-size", "3MB", token_file=write_tokens(directory / "tokens")) as running:
        yield running
        assert "Traceback" not in running.log()


def tree(directory: Path) -> dict[str, str]:
    files = [file for file in directory.rglob("*") if file.is_file() and ".cache" not in file.parts]
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "nested" / "deep").mkdir(parents=True)
    noise = random.Random(source.name)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    (source / "model.safetensors").write_bytes(noise.randbytes(8_000_001))
    (source / "nested" / "deep" / "small.bin").write_bytes(noise.randbytes(10))
    (source / "nested" / "spaces and ünïcode.json").write_text("{}", encoding="utf-8")
    (source / "empty.txt").touch()
    return source


FOLDER = """
    from huggingface_hub import HfApi, snapshot_download
    api = HfApi()
    api.create_repo(repo, private=True)
    first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="first")
    again = api.upload_folder(repo_id=repo, folder_path=folder)
    commits = [commit.title for commit in api.list_repo_commits(repo)]
    siblings = api.model_info(repo, files_metadata=True).siblings
    files = {f.rfilename: [f.size, f.lfs.sha256 if f.lfs else None] for f in siblings}
    snapshot_download(repo, local_dir=out)
    info = api.get_paths_info(repo, ["nested", "model.safetensors", "none"])
    answer([first.oid, again.oid, commits, files, [item.path for item in info]])
"""


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_folder_there_and_back(hub: LocalHub, folder: Path, tmp_path: Path, xet: bool) -> None:
    out = tmp_path / "out"
    values = {"repo": f"ann/folder-{xet}", "folder": str(folder), "out": str(out)}
    first, again, commits, files, info = run_client(FOLDER, hub, tmp_path / "home", xet=xet, **values)
    assert tree(out) == tree(folder)
    assert first == again, "unchanged files make no commit"
    assert commits == ["first", "initial commit"]
    assert files["model.safetensors"] == [8_000_001, tree(folder)["model.safetensors"]]
    assert files["empty.txt"] == [0, None]
    assert info == ["nested", "model.safetensors"]


CHANGES = """
    from huggingface_hub import HfApi, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    api = HfApi()
    def fails(kind, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except kind as error:
            return error.response.status_code
    api.create_repo(repo)
    api.create_repo(repo, exist_ok=True)
    base = api.upload_folder(repo_id=repo, folder_path=folder).oid
    api.create_branch(repo, branch="dev/one")
    api.create_branch(repo, branch="dev/one", exist_ok=True)
    moved = api.create_commit(repo, [
        CommitOperationCopy("model.safetensors", "copied.safetensors"),
        CommitOperationDelete("model.safetensors"),
        CommitOperationDelete("nested/"),
        CommitOperationAdd("new.txt", b"new"),
    ], commit_message="move", revision="dev/one", parent_commit=base)
    found = {"files": sorted(api.list_repo_files(repo, revision="dev/one")), "main": len(api.list_repo_files(repo))}
    found["stale"] = fails(HfHubHTTPError, api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id=repo,
                           revision="dev/one", parent_commit=base)
    api.create_tag(repo, tag="v1.0", revision=moved.oid, tag_message="release")
    refs = api.list_repo_refs(repo)
    found["refs"] = [[ref.name for ref in refs.branches], [ref.name for ref in refs.tags]]
    found["tagged"] = api.model_info(repo, revision="v1.0").sha == moved.oid
    pull = api.create_commit(repo, [CommitOperationAdd("pr.txt", b"pr")], commit_message="pr", create_pr=True)
    found["pull"] = [pull.pr_num, pull.pr_revision, "pr.txt" in api.list_repo_files(repo)]
    api.merge_pull_request(repo, pull.pr_num)
    found["merged"] = "pr.txt" in api.list_repo_files(repo)
    opened = api.create_pull_request(repo, "later")
    api.upload_file(path_or_fileobj=b"y", path_in_repo="y", repo_id=repo, revision=opened.git_reference)
    api.change_discussion_status(repo, opened.num, "closed")
    found["discussions"] = [[d.num, d.status] for d in api.get_repo_discussions(repo)]
    api.delete_folder("nested", repo)
    api.delete_file("pr.txt", repo)
    api.super_squash_history(repo)
    found["squashed"] = [len(api.list_repo_commits(repo)), sorted(api.list_repo_files(repo))]
    api.delete_tag(repo, tag="v1.0")
    api.delete_branch(repo, branch="dev/one")
    found["no_revision"] = fails(RevisionNotFoundError, api.model_info, repo, revision="v1.0")
    found["no_file"] = fails(EntryNotFoundError, api.hf_hub_download, repo, "none")
    api.move_repo(repo, repo + "-moved")
    api.update_repo_settings(repo + "-moved", private=True)
    found["moved"] = api.model_info(repo).id
    found["hidden"] = fails(RepositoryNotFoundError, HfApi(token=False).model_info, repo + "-moved")
    found["exists"] = [api.repo_exists(repo), api.file_exists(repo, "README.md"), api.revision_exists(repo, "none")]
    api.delete_repo(repo + "-moved")
    found["deleted"] = fails(RepositoryNotFoundError, api.model_info, repo)
    api.create_repo("bob/data", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"a,b", path_in_repo="a.csv", repo_id="bob/data", repo_type="dataset")
    found["dataset"] = open(api.hf_hub_download("bob/data", "a.csv", repo_type="dataset")).read()
    found["who"] = [api.whoami()["name"], [d.id for d in api.list_datasets(author="bob")]]
    answer(found)
"""


def test_everything_that_changes_a_repository(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    found = run_client(CHANGES, hub, tmp_path / "home", repo="ann/changes", folder=str(folder))
    assert found == {
        "files": ["README.md", "copied.safetensors", "empty.txt", "new.txt"],
        "main": 5,
        "stale": 412,
        "refs": [["dev/one", "main"], ["v1.0"]],
        "tagged": True,
        "pull": [1, "refs/pr/1", False],
        "merged": True,
        "discussions": [[1, "merged"], [2, "closed"]],
        "squashed": [1, ["README.md", "empty.txt", "model.safetensors"]],
        "no_revision": 404,
        "no_file": 404,
        "moved": "ann/changes-moved",
        "hidden": 404,
        "exists": [True, True, False],
        "deleted": 404,
        "dataset": "a,b",
        "who": ["ann", ["bob/data"]],
    }


REFUSED = """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    found = []
    for token in (reader, "hf_wrong_0123456789abcdef", False):
        try:
            HfApi(token=token).create_repo("ann/refused")
        except HfHubHTTPError as error:
            found.append([error.response.status_code, str(error)])
    answer(found)
"""


def test_clients_see_why_they_are_refused(hub: LocalHub, tmp_path: Path) -> None:
    found = run_client(REFUSED, hub, tmp_path / "home", token=None, reader=READ_TOKEN)
    assert [status for status, _ in found] == [403, 401, 401]
    assert "may read only" in found[0][1]
    assert "Invalid credentials" in found[1][1]
    assert "needs a token" in found[2][1]


CHUNKS = """
    from huggingface_hub import HfApi
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    commit = api.upload_file(path_or_fileobj=file, path_in_repo="w.safetensors", repo_id=repo)
    answer(api.get_paths_info(repo, ["w.safetensors"])[0].lfs.sha256)
"""


def test_xet_stores_only_the_chunks_that_changed(hub: LocalHub, tmp_path: Path) -> None:
    content = bytearray(random.Random(1).randbytes(8_000_000))
    file = tmp_path / "w.safetensors"
    sizes = []
    for changed in (False, True):
        if changed:
            content[4_000_000:4_000_100] = bytes(100)
        file.write_bytes(content)
        values = {"repo": "ann/chunks", "file": str(file)}
        sha256 = run_client(CHUNKS, hub, tmp_path / f"home-{changed}", xet=True, **values)
        assert sha256 == hashlib.sha256(content).hexdigest()
        sizes.append(sum(xorb.stat().st_size for xorb in (hub.root / "xet" / "xorbs").iterdir()))
    assert sizes[1] - sizes[0] < 1_000_000


MAKE = """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, **sizes)
    model = LlamaForCausalLM(config)
    model.push_to_hub("ann/tiny")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "ann/tiny"
    adapted.push_to_hub("ann/tiny-lora")
    answer(adapted(torch.arange(8)[None]).logits[0, -1].tolist())
"""

LOAD = """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("ann/tiny")
    adapted = PeftModel.from_pretrained(model, "ann/tiny-lora")
    answer(adapted(torch.arange(8)[None]).logits[0, -1].tolist())
"""


def test_transformers_and_peft(hub: LocalHub, tmp_path: Path) -> None:
    made = run_client(MAKE, hub, tmp_path / "one")
    loaded = run_client(LOAD, hub, tmp_path / "two", token=READ_TOKEN)
    assert loaded == made


def test_the_hf_command(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    env = environment(hub, tmp_path / "home", xet=False)
    program = Path(sys.executable).with_name("hf")

    def hf(*args: str) -> str:
        done = subprocess.run([program, *args], env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    hf("upload", "ann/by-command", str(folder), ".")
    hf("download", "ann/by-command", "--local-dir", str(tmp_path / "out"))
    assert tree(tmp_path / "out") == tree(folder)
    assert "ann" in hf("auth", "whoami")


def test_what_it_keeps_survives_a_kill(tmp_path: Path, folder: Path) -> None:
    with serve(tmp_path / "root") as hub:
        values = {"repo": "ann/killed", "folder": str(folder), "out": str(tmp_path / "out")}
        first = run_client(FOLDER, hub, tmp_path / "home", **values)[0]
        hub.kill()
        hub.restart()
        code = "from huggingface_hub import HfApi, snapshot_download; snapshot_download(repo, local_dir=out)\n"
        code += "answer(HfApi().model_info(repo).sha)"
        values["out"] = str(tmp_path / "after")
        assert run_client(code, hub, tmp_path / "home-2", **values) == first
        assert tree(tmp_path / "after") == tree(folder)
        assert hub.stop() == 0
        assert os.listdir(tmp_path / "root" / "tmp") == []
