"""`qlf push` and `qlf pull` as processes: killed, their hub killed, what they print, and who else loads the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.builders import LLAMA_PLAIN, LLAMA_QUANTIZED, build_checkpoint
from tests.faulty_hub import Answer, Lost, Request, faulty
from tests.hub.conftest import make_adapter
from tests.local_hub_fixture import LocalHub, serve
from tests.sources import file_bytes

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.usefixtures("online"), pytest.mark.slow]
BIG = {"model.embed_tokens.weight": (40_000, 64), "model.norm.weight": (64,)}


@pytest.fixture
def run(server: LocalHub, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start `qlf` against a hub: run("push", path, repo, at=url, token=...)."""

    def start(
        *args: object, at: str = server.url, token: str | None = server.token, xet: bool = False
    ) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {
            **kept,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/cli",
            "HF_ENDPOINT": at,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
        }
        command = [sys.executable, "-m", "qlf", *map(str, args)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )

    return start


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_killed_while_it_sends_and_run_again(
    run: Callable[..., subprocess.Popen[str]], server: LocalHub, api: HfApi, tmp_path: Path
) -> None:
    build_checkpoint(tmp_path / "big", shards=2, plain=BIG)
    sizes = {name: len(data) for name, data in file_bytes(tmp_path / "big").items() if name.endswith(".safetensors")}
    large = max(sizes, key=lambda name: sizes[name])
    arrived = threading.Event()
    with faulty(server.url) as proxy:

        def hold(request: Request) -> Answer | None:
            if request.method == "PUT" and len(request.body) == sizes[large]:
                arrived.set()
                time.sleep(30)
                raise Lost
            return None

        proxy.before = hold
        first = run("push", "big", "lab/killed", "--no-card", at=proxy.url)
        assert arrived.wait(60)
        deadline = time.monotonic() + 20
        while len(proxy.puts()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # the small one is stored by now
        first.kill()
        finish(first)
        assert not [file for file in api.list_repo_files("lab/killed") if not file.startswith(".")]
        proxy.before = lambda request: None
        proxy.clear()
        code, out, err = finish(run("push", "big", "lab/killed", "--no-card", "--json", at=proxy.url))
        assert (code, err) == (0, "")
        assert len(proxy.puts()) == 1 and proxy.commits() == 1  # only what had not arrived
        assert json.loads(out)["commit"] == api.model_info("lab/killed").sha
        assert "hf_" not in out


def test_a_hub_that_is_killed_and_comes_back(run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "big", shards=2, plain=BIG)
    with serve(tmp_path / "root") as hub, faulty(hub.url) as proxy:
        struck: list[str] = []
        one_at_a_time = threading.Lock()

        def strike(request: Request) -> Answer | None:
            kind = "commit" if request.is_commit() else request.method
            with one_at_a_time:
                if kind in ("PUT", "commit") and kind not in struck:
                    struck.append(kind)
                    hub.kill()
                    time.sleep(0.5)
                    hub.restart()
                    raise Lost
            return None

        proxy.before = strike
        code, out, err = finish(run("push", "big", "lab/restarted", "--no-card", at=proxy.url, token=None))
        assert (code, err) == (0, "") and sorted(struck) == ["PUT", "commit"]
        api = HfApi(endpoint=hub.url)
        assert str(api.model_info("lab/restarted").sha) in out
        code, _, err = finish(run("pull", "lab/restarted", "back", at=hub.url, token=None))
        assert (code, err) == (0, "")
        assert file_bytes(tmp_path / "back") == file_bytes(tmp_path / "big")


def test_a_pull_killed_and_run_again(
    run: Callable[..., subprocess.Popen[str]], server: LocalHub, api: HfApi, tmp_path: Path
) -> None:
    build_checkpoint(tmp_path / "big", shards=2, plain=BIG)
    api.create_repo("lab/pulled")
    api.upload_folder(repo_id="lab/pulled", folder_path=tmp_path / "big")
    arrived = threading.Event()
    with faulty(server.url) as proxy:

        def half(request: Request, answer: Answer) -> Answer:
            if request.method == "GET" and len(answer.body) > 4_000_000:
                arrived.set()
                time.sleep(1)
                body = answer.body[: len(answer.body) // 2]
                return Answer(answer.status, body, {**answer.headers, "Content-Length": str(len(answer.body))})
            return answer

        def hold(request: Request) -> Answer | None:
            if request.method == "GET" and request.headers.get("Range", "bytes=0-") != "bytes=0-":
                arrived.set()
                time.sleep(30)
            return None

        proxy.after, proxy.before = half, hold
        first = run("pull", "lab/pulled", "out", at=proxy.url)
        assert arrived.wait(60)
        time.sleep(3)
        first.kill()
        finish(first)
        assert not (tmp_path / "out").exists() and (tmp_path / ".out.qlf-partial").is_dir()
        proxy.after, proxy.before = lambda request, answer: answer, lambda request: None
        proxy.clear()
        code, out, err = finish(run("pull", "lab/pulled", "out", "--json", at=proxy.url))
        assert (code, err) == (0, "")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "big")
    assert json.loads(out)["kept"] > 2_000_000


def test_one_line_and_no_token(run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "base")
    secret = "hf_thisIsNobodysToken0123"
    for args in (
        ("push", "base", "lab/one-line", "--no-card"),
        ("push", "base", "lab/one-line", "--no-card", "--debug"),
    ):
        code, out, err = finish(run(*args, token=secret))
        assert code == 1 and "does not accept the token" in err and out == ""
        assert secret not in err
        if "--debug" not in args:
            assert err.count("\n") == 1 and err.startswith("qlf: error: ")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [data for data in written if secret.encode() in data]
    code, out, err = finish(run("push", "base", "lab/one-line", "--no-card", token=None))
    assert code == 1 and "run `hf auth login` or set HF_TOKEN" in err
    code, out, err = finish(run("push", "base", "lab/one-line", "--no-card", "--json", token=secret))
    assert code == 1 and json.loads(out)["error"]["message"] in err


def test_what_the_commands_print(run: Callable[..., subprocess.Popen[str]], api: HfApi, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "runs").mkdir()
    code, out, err = finish(run("push", "adapter", "lab/printed", "--dry-run"))
    assert (code, err) == (0, "")
    assert "Would publish the adapter to lab/printed@main" in out and "README.md would be written" in out
    assert not (tmp_path / "adapter" / "README.md").exists()
    code, out, err = finish(run("push", "adapter", "lab/printed", "--tag", "v1", "--license", "mit"))
    assert (code, err) == (0, "")
    assert "left out runs/ (the log of a run)" in out and "  tag      v1" in out
    assert api.model_info("lab/printed").card_data.license == "mit"  # type: ignore[union-attr]
    code, out, err = finish(run("push", "adapter", "lab/printed", "--dry-run", "--json"))
    report = json.loads(out)
    assert report["dry_run"] and report["bytes_to_send"] == 0 and not any(file["sent"] for file in report["files"])
    code, out, err = finish(run("pull", "lab/printed", "back", "--revision", "v1"))
    assert (code, err) == (0, "") and "Wrote back" in out


STRANGERS = """
import sys; sys.modules["qlformat"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("lab/tiny-base")
model = PeftModel.from_pretrained(base, "lab/tiny-adapter")
print(type(base.model.layers[0].self_attn.q_proj).__name__, len(model.peft_config))
"""


@pytest.mark.parametrize("xet", [False, True])
def test_others_load_it_from_the_hub(
    run: Callable[..., subprocess.Popen[str]], server: LocalHub, tmp_path: Path, xet: bool
) -> None:
    build_checkpoint(tmp_path / "base", quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN)
    make_adapter(tmp_path / "adapter")
    for path, repo in (("base", "lab/tiny-base"), ("adapter", "lab/tiny-adapter")):
        code, _, err = finish(run("push", path, repo, xet=xet))
        assert (code, err) == (0, "")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    home = {"HF_HOME": str(tmp_path / "strangers"), "HF_ENDPOINT": server.url, "HF_TOKEN": server.token}
    environment = {**kept, **home, "HF_HUB_DISABLE_XET": "0" if xet else "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGERS], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["Linear4bit", "1"]


def test_usage(run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, _, err = finish(run("verify", "x", "--headers", "--source", "y"))
    assert code == 2 and "--headers reads no weights" in err
