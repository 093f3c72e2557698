"""Cards of bases, adapters and merged models: what they say, what the Hub takes, and what they leave alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from qlf.main import main

from qlformat.cards import document, metadata, picture, write_card
from qlformat.cards.content import Inherited
from qlformat.cards.writer import make_card
from qlformat.errors import QlfError, TargetError
from qlformat.hashing import hash_file
from qlformat.manifest import Manifest, Source, WeightEntry, seal
from qlformat.manifest import parse as parse_manifest
from tests.builders import build_checkpoint
from tests.cards.conftest import Copy
from tests.hub_server import Hub

COMMIT = "5ba0" * 10


def card(directory: Path) -> ModelCard:
    """As the client reads it: with metadata that the Hub would refuse this fails."""
    return ModelCard.load(directory / "README.md")


def data(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = card(directory).data.to_dict()
    return found


def name_source(base: Path, repo_id: str = "ORG/MODEL") -> None:
    """Let the manifest say that the base came from the Hub."""
    path = base / "qlf.json"
    root = json.loads(path.read_bytes())
    root["source"] |= {"repo_id": repo_id, "revision": COMMIT}
    path.write_bytes(seal(json.dumps(root).encode()))


def test_a_base(tiny_base: Path, copy: Copy) -> None:
    base = copy(tiny_base)
    name_source(base)
    manifest: Manifest = parse_manifest((base / "qlf.json").read_bytes())
    assert write_card(base, name="ORG/tiny-nf4", license_id="apache-2.0", online=False) == ()
    assert data(base) == {
        "license": "apache-2.0", "base_model": "ORG/MODEL", "base_model_relation": "quantized",
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["qlformat", "4-bit", "bitsandbytes", "nf4", "double-quantization"],
        "quantization": {"quant_method": "bitsandbytes", "quant_type": "nf4", "bits": 4, "blocksize": 64,
                         "double_quant": True, "compute_dtype": "bfloat16"},
    }  # fmt: skip
    text = (base / "README.md").read_text()
    assert text.partition("---\n\n")[2].startswith("# tiny-nf4\n")
    assert manifest.fingerprint in text and f"`ORG/MODEL` at commit `{COMMIT}`" in text
    assert "nf4, one scale for 64 weights, in 8 bits (double quantization)" in text
    assert 'from_pretrained("ORG/tiny-nf4")' in text and 'load_model("ORG/tiny-nf4")' in text
    assert (base / "quantization-error.png").read_bytes().startswith(b"\x89PNG")
    errors = [entry.relative_error for entry in manifest.weights if entry.name.endswith("q_proj.weight")]
    row = next(line for line in text.splitlines() if line.startswith("| `q_proj`"))
    cells = [part.strip() for part in row.strip("|").split("|")]
    found = [float(value) for value in errors if value is not None]
    assert cells[1] == "2" and cells[2] == f"{100 * sum(found) / 2:.2f} %" and cells[3] == f"{100 * max(found):.2f} %"
    assert cells[4] == str(found.index(max(found)))


def test_an_adapter(trained: Path, tiny_base: Path) -> None:
    """`qlf finetune` writes it; nothing is asked of it but to be there."""
    root = json.loads((trained / "qlf.json").read_bytes())
    found = card(trained)
    assert found.data.library_name == "peft" and found.data.tags == ["lora", "qlora", "nf4", "qlformat"]
    (result,) = found.data.eval_results or []
    assert result.metric_type == "loss" and result.metric_value == pytest.approx(root["result"]["eval_loss"], rel=1e-5)
    text = (trained / "README.md").read_text()
    assert root["base"]["fingerprint"] in text and "![training and held-out loss](loss.png)" in text
    assert root["data"]["train"]["rows_sha256"] in text
    assert f"{root['result']['eval_loss_at_start']:.4f} -> {root['result']['eval_loss']:.4f}" in text
    for package in ("torch", "peft", "trl"):
        assert f"{package} {root['versions'][package]}" in text
    assert f"qlf verify tiny-counts --base {tiny_base.name}" in text
    assert str(tiny_base.parent) not in text and str(trained.parent) not in text
    assert "More Information Needed" not in text


def test_an_adapter_names_its_base(trained: Path, copy: Copy) -> None:
    made = copy(trained)
    root = json.loads((made / "qlf.json").read_bytes())
    root["base"] |= {"repo_id": "ORG/tiny-nf4", "revision": COMMIT}
    (made / "qlf.json").write_text(json.dumps(root))
    write_card(made, name="ORG/counts", online=False)
    assert (data(made)["base_model"], data(made)["base_model_relation"]) == ("ORG/tiny-nf4", "adapter")
    text = (made / "README.md").read_text()
    assert f'from_pretrained("ORG/tiny-nf4", revision="{COMMIT}")' in text
    assert f'load_model("ORG/tiny-nf4@{COMMIT}", adapter="ORG/counts")' in text
    assert "qlf verify ORG/counts\n" in text


def test_merged_models(merged: dict[str, Path], copy: Copy, tiny_base: Path) -> None:
    for to, directory in merged.items():
        made = copy(directory)
        report = json.loads((made / "merge_report.json").read_bytes())
        write_card(made, online=False)
        text = (made / "README.md").read_text()
        assert report["adapters"][0]["sha256"] in text and report["base"]["fingerprint"] in text
        assert f"{report['summary']['share_median']:.3f}" in text and "](merge_report.svg)" in text
        assert data(made)["tags"][0] == "merge" and data(made)["library_name"] == "transformers"
        assert ("quantization" in data(made)) == ("Quantization error" in text) == (to == "nf4")
        assert ("qlformat.load_model" in text) == (to == "nf4")
    report["base"] |= {"name": "ORG/tiny-nf4", "revision": COMMIT}
    (made / "merge_report.json").write_text(json.dumps(report))
    write_card(made, online=False)
    assert (data(made)["base_model"], data(made)["base_model_relation"]) == ("ORG/tiny-nf4", "merge")


HAND_WRITTEN = """---
# our own words
license: mit  # as the lawyers said
language:
- de
base_model: ORG/OTHER
tags: [ours]
---

# Unser Modell

Prosa  mit | Zeichen und <b>HTML</b>.\r
"""


def test_a_hand_written_card_keeps_what_it_says(tiny_base: Path, copy: Copy) -> None:
    base = copy(tiny_base)
    name_source(base)
    (base / "README.md").write_bytes(HAND_WRITTEN.encode())
    notes = write_card(base, name="ORG/tiny-nf4", online=False)
    assert [note for note in notes if "README.md says base_model: ORG/OTHER, found ORG/MODEL; kept" in note]
    text = (base / "README.md").read_bytes().decode()
    front, _, prose = HAND_WRITTEN.partition("---\n\n")
    assert text.startswith(front) and prose in text
    found = data(base)
    assert (found["license"], found["base_model"], found["tags"]) == ("mit", "ORG/OTHER", ["ours"])
    assert "base_model_relation" not in found, "ours says nothing of a base that a person named"
    assert found["quantization"]["bits"] == 4
    write_card(base, name="ORG/tiny-nf4", online=False)
    assert (base / "README.md").read_bytes().decode() == text


def test_what_was_generated_is_generated_anew_and_what_was_edited_stays(tiny_base: Path, copy: Copy) -> None:
    base = copy(tiny_base)
    write_card(base, license_id="mit", online=False)
    first = (base / "README.md").read_text()
    name_source(base)
    write_card(base, license_id="mit", online=False)
    second = data(base)
    assert second["base_model"] == "ORG/MODEL" and second["license"] == "mit"
    edited = (
        (base / "README.md").read_text().replace("- qlformat\n", "- my-tag\n").replace("# tiny\n", "# Tiny!\n\nMine.\n")
    )
    (base / "README.md").write_text(edited.replace("## Load it", "## Changed inside the block"))
    name_source(base, "ORG/RENAMED")
    write_card(base, license_id="gemma", online=False)
    text = (base / "README.md").read_text()
    assert data(base)["tags"][0] == "my-tag" and data(base)["base_model"] == "ORG/RENAMED"
    assert data(base)["license"] == "gemma"
    assert "# Tiny!\n\nMine.\n" in text and "## Load it" in text and "Changed inside" not in text
    assert first.count("qlformat:begin") == text.count("qlformat:begin") == 1


def test_the_same_files_give_the_same_card(tiny_base: Path, copy: Copy) -> None:
    base = copy(tiny_base)
    write_card(base, online=False)
    before = [hash_file(base / name) for name in ("README.md", "quantization-error.png")]
    (base / "quantization-error.png").unlink()
    write_card(base, online=False)
    assert [hash_file(base / name) for name in ("README.md", "quantization-error.png")] == before


def test_a_picture_is_drawn_again_when_it_would_be_another(tiny_base: Path, copy: Copy) -> None:
    base = copy(tiny_base)
    drawn = base / "quantization-error.png"
    write_card(base, name="ORG/first", online=False)
    first, when = drawn.read_bytes(), drawn.stat().st_mtime_ns
    write_card(base, name="ORG/first", online=False)
    assert drawn.stat().st_mtime_ns == when
    write_card(base, name="ORG/second", online=False)
    second = drawn.read_bytes()
    assert second != first
    drawn.write_bytes(b"another picture")
    write_card(base, name="ORG/second", online=False)
    assert drawn.read_bytes() == second


def test_a_plain_bitsandbytes_repository(tiny_base: Path, copy: Copy) -> None:
    base = copy(tiny_base)
    (base / "qlf.json").unlink()
    write_card(base, online=False)
    assert data(base)["quantization"]["quant_type"] == "nf4" and "base_model" not in data(base)
    assert "bitsandbytes 4-bit" in (base / "README.md").read_text()


def test_the_form_that_peft_leaves(trained: Path, copy: Copy) -> None:
    """peft names the base by the path it was loaded from, which no hub takes and nobody should read."""
    made = copy(trained)
    (made / "qlf.json").unlink()
    (made / "adapter_config.json").write_text(
        json.dumps(
            {**json.loads((made / "adapter_config.json").read_text()), "base_model_name_or_path": "/data/ann/tiny"}
        )
    )
    front = "base_model: /data/ann/tiny\nlibrary_name: peft\ntags:\n- base_model:adapter:/data/ann/tiny\n- lora\n"
    (made / "README.md").write_text(f"---\n{front}---\n\n# Model Card for Model ID\n\n[More Information Needed]\n")
    write_card(made, online=False)
    text = (made / "README.md").read_text()
    assert "/data/ann" not in text and "# Model Card for Model ID" in text
    assert "base_model" not in data(made) and data(made)["tags"] == ["lora", "qlformat"]
    assert "not pinned" in text and 'from_pretrained("tiny")' in text
    (made / "README.md").write_text(f"---\n{front.replace('/ann/', '/bob/')}---\n\n# Its base was recorded since\n")
    write_card(made, online=False)
    assert "/data/bob" not in (made / "README.md").read_text()


REFUSED = {
    "license: Apache 2.0": "license is 'Apache 2.0', needed an identifier of the Hub such as apache-2.0",
    "license: [mit, 3]": "license is \"['mit', 3]\", needed text or a list of texts",
    "base_model: /data/ann/model": "base_model is '/data/ann/model', needed a repository of the Hub",
    "base_model_relation: distilled": "base_model_relation is 'distilled', needed one of adapter, finetune, merge",
    "tags: {a: b}": "tags is",
    "pipeline_tag: [a]": "pipeline_tag is",
    "datasets: ['a b']": "datasets is 'a b'",
    "model-index: [{name: x}]": "Invalid `model_index`",
    "license: 'x": "broken YAML in line ",
}


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=REFUSED)
def test_what_the_hub_would_refuse(line: str, message: str, tiny_base: Path, copy: Copy, capsys: Any) -> None:
    base = copy(tiny_base)
    text = f"---\n{line}\n---\n# Mine\n"
    (base / "README.md").write_text(text)
    before = sorted(path.name for path in base.iterdir())
    with pytest.raises(QlfError) as caught:
        write_card(base, online=False)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "README.md" in str(caught.value)
    assert main(["card", str(base), "--offline"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (base / "README.md").read_text() == text and sorted(path.name for path in base.iterdir()) == before


def test_a_licence_of_another_form(tiny_base: Path, copy: Copy) -> None:
    with pytest.raises(QlfError, match=r"needed an identifier of the Hub such as apache-2\.0; write apache-2\.0"):
        write_card(copy(tiny_base), license_id="Apache 2.0", online=False)


def test_what_is_nothing_to_describe(tmp_path: Path) -> None:
    with pytest.raises(QlfError, match="found no model and no adapter"):
        write_card(tmp_path)
    with pytest.raises(QlfError, match="found no model and no adapter"):
        write_card(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    assert write_card(tmp_path) == () and make_card(tmp_path) is None
    assert not (tmp_path / "README.md").exists()


def test_a_directory_that_takes_nothing(tiny_base: Path, copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    base = copy(tiny_base)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr("qlformat.cards.writer.os.replace", full)
    with pytest.raises(TargetError, match="the disk is full"):
        write_card(base, online=False)
    assert not [path for path in base.iterdir() if "partial" in path.name or path.name == "README.md"]


def test_names_from_files_cannot_leave_their_place(tiny_base: Path, copy: Copy) -> None:
    base = copy(tiny_base)
    path = base / "qlf.json"
    root = json.loads(path.read_bytes())
    evil = "a|b\n<!-- qlformat:end -->\n<script>"
    root["writer"] = evil
    root["recipe"]["skip"] = [evil]
    path.write_bytes(seal(json.dumps(root).encode()))
    write_card(base, online=False)
    text = (base / "README.md").read_text()
    assert "<script>" not in text and document.parse(text.encode()).after == ""


def test_inheriting(hub: Hub, tmp_path: Path) -> None:
    source = hub.root / "ORG" / "MODEL"
    source.mkdir(parents=True)
    front = "license: other\nlicense_name: our\nlicense_link: LICENSE.md\nlanguage: [en]\npipeline_tag: summarization\n"
    (source / "README.md").write_text(f"---\n{front}---\n# Source\n")
    link = f"https://huggingface.co/ORG/MODEL/blob/{COMMIT}/LICENSE.md"
    assert metadata.inherit("ORG/MODEL", COMMIT) == Inherited("other", "our", link, ["en"], "summarization")
    base = build_checkpoint(tmp_path / "base").path
    assert base is not None
    name_source(base)
    write_card(base)
    assert data(base)["license_name"] == "our" and data(base)["language"] == ["en"]
    assert data(base)["pipeline_tag"] == "summarization"
    write_card(base, license_id="mit")
    assert data(base)["license"] == "mit" and "license_name" not in data(base)
    assert write_card(base, online=False) == ()
    assert data(base)["license"] == "mit", "what was given before is not forgotten"
    for text, reason in (("---\nlicense: [\n---\n", "broken YAML"), ("# No metadata\n", "names no licence")):
        (source / "README.md").write_text(text)
        (note,) = metadata.inherit("ORG/MODEL", COMMIT).notes
        assert reason in note and "--license" in note
    (source / "README.md").unlink()
    (note,) = metadata.inherit("ORG/MODEL", None).notes
    assert "ORG/MODEL has no card" in note


def test_a_source_that_cannot_be_asked_is_a_note(tmp_path: Path) -> None:
    base = build_checkpoint(tmp_path / "base").path
    assert base is not None
    name_source(base)
    (note,) = write_card(base)  # HF_HUB_OFFLINE
    assert note.startswith("the licence is not known: ") and "--license" in note
    assert "license" not in data(base) and data(base)["base_model"] == "ORG/MODEL"


def test_the_command(tiny_base: Path, copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    base = copy(tiny_base)
    assert main(["card", str(base), "--print", "--offline"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("---\n") and not (base / "README.md").exists()
    assert main(["card", str(base), "--offline", "--license", "mit", "--name", "ORG/X", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(base), "notes": []}
    assert data(base)["license"] == "mit" and 'from_pretrained("ORG/X")' in (base / "README.md").read_text()
    assert main(["card", str(base), "--base", "x", "--print"]) == 2


def test_without_matplotlib_there_is_no_picture(tiny_base: Path, copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    base = copy(tiny_base)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (note,) = write_card(base, license_id="mit", online=False)
    assert "pip install matplotlib" in note and not (base / "quantization-error.png").exists()
    text = (base / "README.md").read_text()
    assert "quantization-error.png" not in text and "| `q_proj` | 2 |" in text


def test_experts_are_one_kind() -> None:
    def weight(name: str, error: float | None) -> WeightEntry:
        return WeightEntry(f"{name}.weight", "nf4", "bfloat16", (2, 2), "linear", relative_error=error)

    weights = [weight(f"model.layers.{layer}.mlp.experts.{e}.w1", 0.1 * (e + 1)) for layer in (1, 0) for e in (0, 1)]
    weights += [weight(f"h.{layer}.{kind}.c_proj", 0.5) for layer in (0, 1) for kind in ("attn", "mlp")]
    weights += [weight("lm_head", 0.5), weight("model.layers.0.self_attn.q_proj", None)]
    errors = picture.errors_by_kind(weights)
    assert errors["attn.c_proj"] == errors["mlp.c_proj"] == {0: 0.5, 1: 0.5}
    assert list(errors["w1 (mean of 2)"]) == [0, 1] and errors["w1 (mean of 2)"][0] == pytest.approx(0.15)
    assert len(errors) == 3 and picture.drawable(errors) and not picture.drawable({"a": {0: 0.1}})


def test_source_files_are_named_with_their_hashes(tiny_base: Path, copy: Copy) -> None:
    base = copy(tiny_base)
    root = json.loads((base / "qlf.json").read_bytes())
    root["source"]["files"] = [{"name": "model.safetensors", "size": 2_000_000, "sha256": "e" * 64}]
    (base / "qlf.json").write_bytes(seal(json.dumps(root).encode()))
    write_card(base, online=False)
    text = (base / "README.md").read_text()
    assert "e" * 64 in text and re.search(r"\| size \| 2\.0 MB -> \d+\.\d MB \|", text)
    assert Source().files == ()
