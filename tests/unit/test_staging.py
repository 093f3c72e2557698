"""Atomic directory output: nothing half-written under the final name, and nothing old lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from qlformat.errors import TargetError
from qlformat.staging import Staging, free_bytes, require_space, size_text


def fill(directory: Path, text: str) -> None:
    (directory / "sub").mkdir(exist_ok=True)
    (directory / "config.json").write_text(text)
    (directory / "sub" / "x").write_text(text)


def tree(directory: Path) -> dict[str, str]:
    return {p.relative_to(directory).as_posix(): p.read_text() for p in directory.rglob("*") if p.is_file()}


def write(out: Path, text: str, *, overwrite: bool = False) -> None:
    with Staging(out, overwrite=overwrite) as staging:
        fill(staging.path, text)
        staging.commit()


NOBODY = 65534


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(TargetError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_commit(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with Staging(out) as staging:
        fill(staging.path, "new")
        assert not out.exists()
        staging.commit()
    assert tree(out) == {"config.json": "new", "sub/x": "new"}
    assert os.listdir(out.parent) == ["out"]


def test_an_empty_directory_is_a_free_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out, "new")
    assert tree(out) == {"config.json": "new", "sub/x": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_nothing_is_left_without_commit(tmp_path: Path, error: type[BaseException] | None) -> None:
    try:
        with Staging(tmp_path / "a" / "b" / "out") as staging:
            fill(staging.path, "new")
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert os.listdir(tmp_path) == []


def test_an_existing_model_is_refused_or_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    assert "--overwrite" in refusal(lambda: Staging(out))
    assert os.listdir(tmp_path) == ["out"]
    with Staging(out, overwrite=True) as staging:
        fill(staging.path, "new")
        assert tree(out)["config.json"] == "old"
        staging.commit()
    assert tree(out) == {"config.json": "new", "sub/x": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_only_models_are_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    assert "no model" in refusal(lambda: Staging(home, overwrite=True))
    (tmp_path / "file").write_text("x")
    assert "found a file" in refusal(lambda: Staging(tmp_path / "file", overwrite=True))
    assert sorted(os.listdir(tmp_path)) == ["file", "home"]
    assert os.listdir(home) == ["letter.txt"]


def test_the_source_is_never_the_target(tmp_path: Path) -> None:
    source = tmp_path / "models" / "source"
    write(source, "source")
    (tmp_path / "link").symlink_to("models/source")
    for target in (source, tmp_path / "models", tmp_path / "link"):
        assert "source lies here" in refusal(partial(Staging, target, overwrite=True, source=source))
    write(tmp_path / "models" / "source2", "other")  # a name that begins alike is another directory
    Staging(tmp_path / "models" / "source2", overwrite=True, source=source).discard()
    assert tree(source)["config.json"] == "source"


def test_a_link_as_target_keeps_the_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    write(real, "old")
    link = tmp_path / "link"
    link.symlink_to("real")
    write(link, "new", overwrite=True)
    assert link.is_symlink()
    assert tree(real)["config.json"] == "new"


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out) as staging:
        fill(staging.path, "first")
        assert "another process" in refusal(lambda: Staging(out, resume=True))
        staging.commit()
    assert tree(out)["config.json"] == "first"


def killed_writer(out: Path) -> None:
    """A process that is killed with SIGKILL while it holds the staging directory of `out`."""
    code = f"""
        import os, signal
        from pathlib import Path
        from qlformat.staging import Staging
        staging = Staging(Path({str(out)!r}))
        (staging.path / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=python_env(), check=False)
    assert done.returncode == -signal.SIGKILL


def python_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_killed_writer_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_writer(out)
    assert not out.exists()
    with Staging(out, resume=True) as staging:
        assert staging.resumed
        assert (staging.path / "half").read_text() == "half"
        staging.keep = True
        staging.release()
    with Staging(out) as staging:
        assert not staging.resumed
        assert not (staging.path / "half").exists()
    assert os.listdir(tmp_path) == []


def test_keep_leaves_the_work_of_a_failed_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with suppress(ValueError), Staging(out) as staging:
        staging.keep = True
        fill(staging.path, "half")
        raise ValueError
    assert not out.exists()
    with Staging(out, resume=True) as staging:
        assert staging.resumed
        staging.commit()
    assert tree(out)["config.json"] == "half"


def test_a_fresh_run_is_not_resumed(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", resume=True) as staging:
        assert not staging.resumed


@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_a_crash_during_replacement_loses_neither_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    out = tmp_path / "out"
    write(out, "old")
    staging = Staging(out, overwrite=True)
    fill(staging.path, "new")
    calls = 0
    rename, unlink = Path.rename, Path.unlink

    def crash(function: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == crash_at:
                os._exit(7)
            return function(*args, **kwargs)

        return step

    child = os.fork()
    if child == 0:  # the child commits and dies at one of the steps; its parent's lock is the same open file
        monkeypatch.setattr(Path, "rename", crash(rename))
        monkeypatch.setattr(Path, "unlink", crash(unlink))
        staging.commit()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    os.close(staging._lock)
    staging._lock = -1
    versions = [tree(d)["config.json"] for d in tmp_path.iterdir()]
    assert "old" in versions
    assert "new" in versions
    with Staging(out, overwrite=True):  # the next run repairs, and then gives up
        assert out.is_dir()
    assert tree(out)["config.json"] == ("old" if crash_at < 3 else "new")
    assert os.listdir(tmp_path) == ["out"]


def test_errors_of_reading_are_not_blamed_on_the_target(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Staging(tmp_path / "out"):
        (tmp_path / "source" / "missing").read_bytes()
    assert os.listdir(tmp_path) == []


def test_a_file_beyond_the_size_limit(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        line = refusal(lambda: big_write(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "size limit" in line
    assert os.listdir(tmp_path) == []


def big_write(out: Path) -> None:
    with Staging(out) as staging, (staging.path / "big").open("wb", buffering=0) as file:
        for _ in range(3):
            file.write(b"x" * (1 << 16))


def test_a_full_disk(tmp_path: Path) -> None:
    line = refusal(lambda: full_write(tmp_path / "out"))
    assert "the disk is full, found" in line and " free; " in line
    assert os.listdir(tmp_path) == []


def full_write(out: Path) -> None:
    with Staging(out), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


def test_names_and_places_that_cannot_be(tmp_path: Path) -> None:
    assert "too long" in refusal(lambda: Staging(tmp_path / ("x" * 255)))
    assert "mount point" in refusal(lambda: Staging(Path("/")))
    assert "cannot write here" in refusal(lambda: Staging(Path("/proc/qlf/out")))
    (tmp_path / "file").touch()
    refusal(lambda: Staging(tmp_path / "file" / "out"))
    assert os.listdir(tmp_path) == ["file"]


def test_a_read_only_directory() -> None:
    """Root may write everywhere, so as root this is tried as somebody else, in a place that all may enter."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o555)
        try:
            if user == 0:
                os.seteuid(NOBODY)
            assert "no permission" in refusal(lambda: Staging(Path(place) / "out"))
        finally:
            os.seteuid(user)
            os.chmod(place, 0o700)


def test_require_space(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    require_space(tmp_path / "not" / "yet" / "there", 1)
    line = refusal(lambda: require_space(tmp_path, free_bytes(tmp_path) * 2 + 10**12))
    assert "needed" in line
    assert "free" in line


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.50 kB"), (2_345_678, "2.35 MB"), (10**10, "10.00 GB")],
)
def test_size_text(count: int, text: str) -> None:
    assert size_text(count) == text
