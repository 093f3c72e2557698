"""`qlf convert --calibration`: the same format, other codes, and nothing else changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
import torch
import transformers
from click.testing import CliRunner
from qlf.convert import command

from qlformat import convert, verify
from qlformat.calibration.activations import LayerWalk
from qlformat.calibration.own_text import own_windows
from qlformat.calibration.settings import CalibrationSettings
from qlformat.checkpoint import Checkpoint
from qlformat.errors import QlfError
from qlformat.model_loader import load_model
from tests.calibration.conftest import llama_config, small_model
from tests.sources import file_bytes

SETTINGS = CalibrationSettings(tokens=1024, own_tokens=1024, window=64)
SCHEMA = Path(__file__).resolve().parents[2] / "spec" / "schema" / "qlf.schema.json"


@pytest.fixture(scope="module")
def calibrated(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    convert(llama, out, calibration=text, calibration_settings=SETTINGS)
    return out


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    convert(llama, out)
    return out


def logits(model: torch.nn.Module, text: Path, llama: Path) -> torch.Tensor:
    """Of the end of the text, which the calibration did not see."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokens = torch.tensor([[256, *tokenizer(text.read_text(encoding="utf-8"))["input_ids"][-120:]]])
    with torch.inference_mode():
        result: torch.Tensor = model(tokens).logits.float()
    return result


def test_the_same_input_gives_the_same_bytes(llama: Path, text: Path, calibrated: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "again", calibration=text, calibration_settings=SETTINGS)
    assert file_bytes(tmp_path / "again") == file_bytes(calibrated)


def test_only_codes_and_scales_of_the_selected_weights_differ(calibrated: Path, plain: Path) -> None:
    with Checkpoint(calibrated) as ours, Checkpoint(plain) as theirs:
        assert list(ours.tensors) == list(theirs.tensors)
        changed = {name for name in ours.tensors if ours.read(name) != theirs.read(name)}
        quantized = {name for name, weight in ours.weights.items() if weight.quant_state is not None}
        assert quantized <= changed
        assert all(any(name.startswith(weight) for weight in quantized) for name in changed)


def test_outputs_are_nearer_to_the_source(llama: Path, text: Path, calibrated: Path, plain: Path) -> None:
    source = logits(transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), text, llama)
    errors = []
    for path in (calibrated, plain):
        model = load_model(path, dtype="float32", dequantize=True, device_map="cpu")
        errors.append(float((logits(model, text, llama) - source).square().mean()))
    assert errors[0] < 0.6 * errors[1]


def test_verify_says_what_it_compared(llama: Path, calibrated: Path) -> None:
    assert not [finding for finding in verify(calibrated) if finding.severity == "error"]
    findings = list(verify(calibrated, source=llama))
    assert not [finding for finding in findings if finding.severity == "error"]
    assert any("calibration text" in finding.message for finding in findings)


def test_the_manifest_records_the_calibration(calibrated: Path, plain: Path, text: Path) -> None:
    manifest = json.loads((calibrated / "qlf.json").read_bytes())
    jsonschema.validate(manifest, json.loads(SCHEMA.read_bytes()))
    recorded = manifest["recipe"]["calibration"]
    assert recorded["window"] == 64 and recorded["seed"] == 0 and recorded["damping"] == SETTINGS.damping
    assert recorded["samples"] == 32 and recorded["own_samples"] == 16
    assert "calibration" not in json.loads((plain / "qlf.json").read_bytes())["recipe"]


def test_conv1d_is_calibrated_too(text: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=260)
    source = small_model(tmp_path / "gpt2", config)
    convert(source, tmp_path / "plain")
    convert(source, tmp_path / "out", calibration=text, calibration_settings=SETTINGS)
    assert not [finding for finding in verify(tmp_path / "out", source=source) if finding.severity == "error"]
    with Checkpoint(tmp_path / "out") as ours, Checkpoint(tmp_path / "plain") as theirs:
        quantized = [name for name, weight in ours.weights.items() if weight.quant_state is not None]
        assert quantized and all(ours.read(name) != theirs.read(name) for name in quantized)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9 " * 500, "byte 3 is not UTF-8"), (b"too short", "9 tokens")],
)
def test_a_text_that_does_not_do(llama: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(QlfError, match=message) as caught:
        convert(llama, tmp_path / "out", calibration=tmp_path / "text.txt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command(llama: Path, text: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = CliRunner().invoke(command, [str(llama), out, "--calibration", str(text), "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    assert any(note.startswith("calibrated on") for note in json.loads(done.stdout)["notes"])


def test_no_text_at_all(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(QlfError, match="cannot be read"):
        convert(llama, tmp_path / "out", calibration=tmp_path / "absent.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QlfError, match="needed a calibration text"):
        convert(llama, tmp_path / "out", calibration=tmp_path / "empty")


def test_a_model_whose_layers_cannot_be_walked(llama: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(llama_config().num_hidden_layers)]
    with pytest.raises(QlfError, match=r"cannot be walked one by one .*without --calibration"):
        LayerWalk(llama, ["other.weight"], ["other.weight"], lambda name: torch.zeros(1))
    walk = LayerWalk(llama, names, names, lambda name: torch.zeros(96, 96))
    with pytest.raises(QlfError, match=r"the source has no model\.embed_tokens.weight"):
        walk.embed(torch.zeros(8, 16, dtype=torch.int64))
    with pytest.raises(QlfError, match=r"the source has no model\.embed_tokens"), walk.whole():
        pass


def test_the_walk_is_the_model(llama: Path) -> None:
    """Left as they are, the layers give what the model of transformers gives; each weight is visited once, in order."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    state = model.state_dict()
    wanted = [name for name in state if name.endswith("_proj.weight")]
    walk = LayerWalk(llama, list(state), wanted, lambda name: state[name].clone())
    windows = torch.randint(0, 256, (5, 20), generator=torch.Generator().manual_seed(0))
    visited = []

    def visit(name: str, module: torch.nn.Module, entering: torch.Tensor, exact: torch.Tensor) -> None:
        assert torch.equal(entering, exact) and entering.shape[:2] == windows.shape
        visited.append(name)

    with torch.no_grad():
        walk.embed(windows)
        for index in range(len(walk.layers)):
            walk.quantize(index, visit)
        expected = model(windows, output_hidden_states=True).hidden_states[-1]
    assert len(set(visited)) == len(visited) == len(wanted)
    assert [name.split(".")[-2] for name in visited[:4]] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.testing.assert_close(model.model.norm(walk._hidden), expected, rtol=1e-5, atol=1e-5)


def test_what_the_model_writes_is_what_it_would_write(llama: Path) -> None:
    """Drawn through the cache, one token after another, from the distribution of the whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(2)  # a distribution with a likely token
    with torch.no_grad():
        windows = own_windows(model, 256, 64, 12, seed=0)
        logs = model(windows).logits[:, :-1].log_softmax(-1)
        assert torch.equal(windows, own_windows(model, 256, 64, 12, seed=0))
        assert not torch.equal(windows, own_windows(model, 256, 64, 12, seed=1))
    assert windows.shape == (64, 12) and bool((windows[:, 0] == 256).all())
    surprise = -logs.gather(2, windows[:, 1:, None]).mean()
    entropy = -(logs.exp() * logs).sum(-1).mean()
    assert abs(float(surprise - entropy)) < 0.15


def test_a_model_too_large_writes_nothing(llama: Path, text: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, own_limit=1000)
    convert(llama, tmp_path / "out", calibration=text, calibration_settings=settings)
    recorded = json.loads((tmp_path / "out" / "qlf.json").read_bytes())["recipe"]["calibration"]
    assert recorded["samples"] == 16 and recorded["own_samples"] == 0
