"""Every block of Python in a card is run, as it stands: transformers and peft in a process without qlformat."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlformat import pins
from qlformat.cards import write_card
from tests.hub.published import make_base, served, upload

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import sys
blocks = open(sys.argv[1]).read().split("\\0")
ours = [code for code in blocks if "import qlformat" in code]
sys.modules["qlformat"] = None
for code in (code for code in blocks if code not in ours):
    names = {}
    exec(code, names)
    print("RAN", type(names["model"]).__name__)
del sys.modules["qlformat"]
for code in ours:
    names = {}
    exec(code, names)
    print("OURS", type(names["model"]).__name__, *names["model"].qlf_notes)
"""


def run(card: Path, place: Path, **variables: str) -> list[str]:
    """Run all blocks of a card in `place`; the lines that tell what each one made."""
    blocks = re.findall(r"^```python\n(.*?)^```", card.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (place / "blocks").write_text("\0".join(blocks), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, "blocks"],
        cwd=place, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line for line in done.stdout.splitlines() if line.startswith(("RAN ", "OURS "))]
    assert len(found) == len(blocks)
    return found


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path) -> Path:
    """A directory with the base, where a reader would try the blocks."""
    shutil.copytree(tiny_base, tmp_path / tiny_base.name)
    return tmp_path


@pytest.mark.slow
def test_a_base(place: Path, tiny_base: Path) -> None:
    write_card(place / tiny_base.name, online=False)
    found = run(place / tiny_base.name / "README.md", place)
    assert found == ["RAN LlamaForCausalLM", "RAN PeftModelForCausalLM", "OURS LlamaForCausalLM"]


@pytest.mark.slow
def test_a_base_without_a_chat_template(place: Path, tiny_base: Path) -> None:
    base = place / tiny_base.name
    (base / "chat_template.jinja").unlink()
    settings = (base / "tokenizer_config.json").read_text()
    assert "chat_template" not in settings
    write_card(base, online=False)
    assert "apply_chat_template" not in (base / "README.md").read_text()
    assert run(base / "README.md", place)[0] == "RAN LlamaForCausalLM"


@pytest.mark.slow
def test_an_adapter(place: Path, trained: Path) -> None:
    shutil.copytree(trained, place / trained.name)
    found = run(place / trained.name / "README.md", place)
    assert found == ["RAN PeftModelForCausalLM", "RAN LlamaForCausalLM", "OURS PeftModelForCausalLM"]


@pytest.mark.slow
def test_an_adapter_and_its_base_on_a_hub(tiny_base: Path, trained: Path, tmp_path: Path) -> None:
    """The base at its commit, while the newest commit of its repository holds another one."""
    made = Path(shutil.copytree(trained, tmp_path / "made"))
    with pytest.MonkeyPatch.context() as patch, served(tmp_path, patch) as hub:
        commit = upload(hub, tiny_base, "lab/tiny")
        pins.record_home(made, "lab/tiny")
        upload(hub, make_base(tmp_path / "other"), "lab/tiny")
        write_card(made, name="lab/counts", license_id="mit")
        upload(hub, made, "lab/counts")
        assert (made / "README.md").read_text().count(commit) == 4  # three blocks and the table
        (tmp_path / "empty").mkdir()
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "home")}
        found = run(made / "README.md", tmp_path / "empty", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", **variables)
    assert found == ["RAN PeftModelForCausalLM", "RAN LlamaForCausalLM", "OURS PeftModelForCausalLM"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["bfloat16", "nf4"])
def test_a_merged_model(place: Path, merged: dict[str, Path], to: str) -> None:
    directory = place / merged[to].name
    shutil.copytree(merged[to], directory)
    write_card(directory, online=False)
    found = run(directory / "README.md", place)
    assert found[0] == "RAN LlamaForCausalLM" and len(found) == (3 if to == "nf4" else 1)
