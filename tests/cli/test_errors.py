"""Every failure is one line and the right exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from qlf import errors

from qlformat.errors import FormatError, QlfError
from tests.builders import LLAMA_CONFIG, build_source, edit_json, flip_bit
from tests.cli.conftest import Run


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _empty(source: Path) -> None:
    for path in source.iterdir():
        path.unlink()


def _gguf(source: Path) -> None:
    _empty(source)
    (source / "model.gguf").write_bytes(b"GGUF" + bytes(100))


def _pickle(source: Path) -> None:
    (source / "model.safetensors").unlink()
    # A pickle whose loading would call os.getcwd.
    (source / "pytorch_model.bin").write_bytes(b"cos\ngetcwd\n(tR.")


def _quantized(source: Path) -> None:
    edit_json(source / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))


def _truncated(source: Path) -> None:
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])


def _huge_header(source: Path) -> None:
    (source / "model.safetensors").write_bytes((2 << 30).to_bytes(8, "little") + b"{}")


def _no_config(source: Path) -> None:
    (source / "config.json").unlink()


def _bad_config(source: Path) -> None:
    (source / "config.json").write_text("{nonsense")


def _escaping_link(source: Path) -> None:
    outside = source.parent / "outside.safetensors"
    (source / "model.safetensors").rename(outside)
    (source / "model.safetensors").symlink_to(outside)


def _index_with_parent(source: Path) -> None:
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "../model.safetensors"}}')


def _missing_shard(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "model-1.safetensors"}}')


BAD_SOURCES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (_empty, "config.json"),
    "gguf": (_gguf, "[E4]"),
    "pickle": (_pickle, "[E4]"),
    "quantized": (_quantized, "[E2]"),
    "truncated": (_truncated, "[S5]"),
    "huge-header": (_huge_header, "[S1]"),
    "no-config": (_no_config, "config.json"),
    "bad-config": (_bad_config, "config.json"),
    "escaping-link": (_escaping_link, "[R4]"),
    "index-with-parent": (_index_with_parent, "[R3]"),
    "missing-shard": (_missing_shard, "[R4]"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source(qlf: Run, source: Path, tmp_path: Path, name: str) -> None:
    spoil, expected = BAD_SOURCES[name]
    spoil(source)
    before = _files(source)
    result = qlf("convert", source, tmp_path / "out")
    assert result.code == 1 and result.out == ""
    assert result.error.startswith("qlf: error: ") and expected in result.error
    assert _files(source) == before
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) in ([], ["outside.safetensors"])


def test_not_finite_weight_is_named(qlf: Run, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    source = build_source(tmp_path / "source", values={name: np.full((16, 16), np.nan, np.float32)})
    result = qlf("convert", source, tmp_path / "out")
    assert result.code == 1 and "[E1]" in result.error and name in result.error
    assert os.listdir(tmp_path) == ["source"]


def test_missing_path(qlf: Run, tmp_path: Path) -> None:
    missing, out = tmp_path / "no", tmp_path / "out"
    export = ["export", missing, out, "--dtype", "float16"]
    for args in (["convert", missing, out], ["verify", missing], ["inspect", missing], export):
        result = qlf(*args)
        assert result.code == 1 and result.out == "" and str(missing) in result.error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["convert", "verify", "inspect", "export"])
def test_repository_that_is_not_there(child: Run, tmp_path: Path, command: str) -> None:
    """In a process of its own: what huggingface_hub has imported before must not matter."""
    out: dict[str, list[object]] = {"convert": [tmp_path / "out"], "export": [tmp_path / "out", "--dtype", "float16"]}
    result = child("-m", "qlf", command, "no-such-org/none@v1", *out.get(command, []))
    assert result.code == 1 and "no-such-org/none" in result.error and "unexpected" not in result.error
    assert os.listdir(tmp_path) == []


def test_existing_target_is_kept(qlf: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert qlf("convert", source, out).code == 0
    before = _files(out)
    result = qlf("convert", source, out)
    assert result.code == 1 and "--overwrite" in result.error
    assert _files(out) == before
    assert qlf("convert", source, out, "--overwrite").code == 0


@pytest.mark.parametrize("out", ["/proc/qlf-out", "{file}", "{file}/out"])
def test_target_that_cannot_be_written(qlf: Run, source: Path, tmp_path: Path, out: str) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    result = qlf("convert", source, out.format(file=file))
    assert result.code == 1 and result.out == "" and "unexpected" not in result.error
    assert file.read_text() == "precious"


def test_converting_a_checkpoint_again_is_refused(qlf: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = qlf("convert", checkpoint, tmp_path / "out", "--json")
    assert result.code == 1
    assert result.json["error"]["rule"] == "E2"
    assert result.json["error"]["message"] == result.error.removeprefix("qlf: error: ")


def test_names_from_files_cannot_steer_the_terminal(qlf: Run, tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "\x1b]0;owned\x07\nqlf: all is well"}}
    source = build_source(tmp_path / "so\x1b[31murce", config=config)
    for extra in ([], ["--json"]):
        result = qlf("convert", source, tmp_path / "out", *extra)
        assert result.code == 1 and "owned" in result.error
        assert result.error.isprintable() and "\x1b" not in result.out


def test_flipped_bit_in_a_path_with_an_escape(qlf: Run, checkpoint: Path, tmp_path: Path) -> None:
    target = checkpoint.rename(tmp_path / "check\x1b[31mpoint")
    flip_bit(target / "model.safetensors", (target / "model.safetensors").stat().st_size // 2)
    result = qlf("verify", target)
    assert result.code == 1 and "\x1b" not in result.out


def _raising(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (QlfError("found 3, needed 4"), 1, "qlf: error: found 3, needed 4"),
        (FormatError("bad\nthing", rule="T4", tensor="a\x1b"), 1, "qlf: error: [T4] tensor 'a\\x1b': bad\\x0athing"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1,
         "qlf: error: /x/y: No space left on device; free some space and try again"),
        (PermissionError(errno.EACCES, "Permission denied", b"/x"), 1,
         "qlf: error: /x: Permission denied; check the permissions, or choose another place"),
        (OSError("odd"), 1, "qlf: error: odd"),
        (MemoryError(), 1, "qlf: error: not enough memory"),
        (ValueError("a\nb"), 1,
         "qlf: error: unexpected ValueError: a\\x0ab; this is a bug, please report it with the output of --debug"),
        (KeyError(), 1, "qlf: error: unexpected KeyError; this is a bug, please report it with the output of --debug"),
        (KeyboardInterrupt(), 130, "qlf: interrupted"),
        (click.Abort(), 130, "qlf: interrupted"),
        (errors.InterruptedRun("convert"), 130, "qlf: interrupted; run the same command with --resume to go on"),
        (click.UsageError("Strange use."), 2, "qlf: error: strange use (see 'qlf --help')"),
        (click.FileError("f", "why"), 1, "qlf: error: Could not open file 'f': why"),
    ],
)  # fmt: skip
def test_guard(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str) -> None:
    assert errors.guard(_raising(error), []) == code
    assert capsys.readouterr() == ("", text + "\n")


def test_guard_passes_the_exit_code_on() -> None:
    assert errors.guard(lambda: 1, []) == 1
    assert errors.guard(lambda: None, []) == 0


def test_debug_shows_the_traceback_and_still_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for args, variable in ((["--debug"], None), ([], "1")):
        if variable:
            monkeypatch.setenv("QLF_DEBUG", variable)
        assert errors.guard(_raising(QlfError("plain words")), args) == 1
        shown = capsys.readouterr().err
        assert "Traceback" in shown and shown.endswith("qlf: error: plain words\n")


def test_debug_after_two_dashes_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    errors.guard(_raising(QlfError("plain words")), ["--", "--debug", "--json"])
    assert capsys.readouterr() == ("", "qlf: error: plain words\n")


def test_interrupt_while_modules_load(child: Run) -> None:
    code = """
import sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from qlf.__main__ import main
sys.exit(main())
"""
    result = child("-c", code)
    assert (result.code, result.out, result.err) == (130, "", "qlf: interrupted\n")


def test_reader_that_goes_away_is_no_error(checkpoint: Path, child_environment: Callable[..., dict[str, str]]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "qlf", "verify", str(checkpoint)]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=child_environment(), timeout=120, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_full_stdout_is_one_line(checkpoint: Path, child_environment: Callable[..., dict[str, str]]) -> None:
    for extra in ([], ["--json"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "qlf", "verify", str(checkpoint), *extra],
                stdout=full, stderr=subprocess.PIPE, text=True, env=child_environment(), timeout=120, check=False,
            )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr == "qlf: error: No space left on device; free some space and try again\n"
