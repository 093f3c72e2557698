"""Test a decoder of the format, written in any language, against the vectors.

    python spec/kit/run.py [--only TEXT] [--jobs N] [--quiet] -- COMMAND [ARGUMENT]...

COMMAND is started once for each request, which it reads on stdin (README.md, "The protocol"). One line is printed for
each case. The exit status is 0 when every case passed, 1 when one failed, 2 for wrong usage. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
UNSUPPORTED = 3
TIMEOUT_SECONDS = 60
_RULE = re.compile(r"\[([A-Z]\d+)\]")


@dataclass(frozen=True)
class Request:
    """One question to the decoder and what the answer must be.

    Attributes:
        name: of the case.
        lines: what goes to stdin.
        size, sha256: of the decoded bytes that must come back; None for any answer.
        rules: ids of which one may be named by a decoder that must refuse; empty when it must accept.
        optional: exit status 3 is no failure.
    """

    name: str
    lines: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None
    rules: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a request: "ok", "FAIL" or "skip", and why."""

    name: str
    verdict: str
    reason: str = ""


def requests(vectors: Path, scratch: Path) -> Iterator[Request]:
    """Every request; files that the repository does not hold are made below `scratch`."""
    for path in sorted((vectors / "decode").glob("*.json")):
        vector = json.loads(path.read_text(encoding="utf-8"))
        file = scratch / f"{path.stem}.safetensors"
        file.write_bytes(container(vector["tensors"]))
        data = bytes.fromhex(vector["decoded"]["hex"])
        lines = ("decode", str(file), "weight")
        yield Request(f"decode/{path.stem}", lines, len(data), hashlib.sha256(data).hexdigest())
    for kind in ("valid", "invalid", "future"):
        for case in sorted((vectors / "checkpoints" / kind).iterdir()):
            expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
            repo = prepared(case, expected.get("setup", {}), scratch) / "repo"
            name = f"checkpoints/{kind}/{case.name}"
            yield from (valid_requests if kind == "valid" else refused_requests)(name, repo, expected)


def valid_requests(name: str, repo: Path, expected: dict[str, Any]) -> Iterator[Request]:
    """A sound checkpoint: it verifies, and each weight decodes to the expected bytes."""
    yield Request(f"{name} verify", ("verify", str(repo)), optional=True)
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    for weight, entry in expected.get("decoded", {}).items():
        size = sizes[entry["dtype"]]
        for dim in entry["shape"]:
            size *= dim
        lines = ("decode", str(repo / entry["file"]), weight)
        yield Request(f"{name} decode {weight}", lines, size, entry["sha256"])


def refused_requests(name: str, repo: Path, expected: dict[str, Any]) -> Iterator[Request]:
    """A broken checkpoint: it must be refused, by decoders of single files too where `decode` names a tensor."""
    if expected["rule"][0] == "E":
        return  # about a checkpoint and its source: no matter of decoders
    rules = (expected["rule"], *expected.get("also", ()))
    yield Request(f"{name} verify", ("verify", str(repo)), rules=rules, optional=True)
    if "decode" in expected:
        lines = ("decode", str(repo / expected["file"]), expected["decode"])
        yield Request(f"{name} decode", lines, rules=rules)


def prepared(case: Path, setup: dict[str, Any], scratch: Path) -> Path:
    """The case itself, or a copy with the links and directories that it asks for."""
    if not setup:
        return case
    copy = scratch / case.name
    shutil.copytree(case, copy)
    for link, target in setup.get("links", {}).items():
        (copy / "repo" / link).symlink_to(target)
    for directory in setup.get("directories", ()):
        (copy / "repo" / directory).mkdir()
    return copy


def container(tensors: dict[str, Any]) -> bytes:
    """A safetensors file of the tensors of a decode vector."""
    entries, data = {}, b""
    for name, tensor in tensors.items():
        content = bytes.fromhex(tensor["hex"])
        span = [len(data), len(data) + len(content)]
        entries[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": span}
        data += content
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def ask(command: list[str], request: Request) -> Outcome:
    """Run the decoder on one request and judge the answer."""
    question = "\n".join(("qlf-kit 1", *request.lines)) + "\n"
    try:
        answer = subprocess.run(
            command, input=question.encode(), capture_output=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(request.name, "FAIL", f"no answer within {TIMEOUT_SECONDS} s")
    message = answer.stderr.decode("utf-8", "replace").strip()
    if answer.returncode == UNSUPPORTED and request.optional:
        return Outcome(request.name, "skip", "the decoder does not support this request")
    problem = refusal_problem(request, answer.returncode, message)
    if problem is None and request.sha256 is not None:
        problem = data_problem(request, answer.stdout)
    return Outcome(request.name, "FAIL" if problem else "ok", problem or message.partition("\n")[0])


def refusal_problem(request: Request, status: int, message: str) -> str | None:
    """What is wrong with the exit status or the rule id, if anything."""
    if status < 0 or status >= 128:
        return f"the decoder crashed (status {status}): {message[-300:]}"
    if not request.rules:
        return f"refused (status {status}), needed acceptance: {message[-300:]}" if status else None
    if status in (0, UNSUPPORTED):
        return f"status {status}, needed a refusal by rule {request.rules[0]}"
    named = _RULE.search(message)
    if named and named[1] not in request.rules:
        return f"refused by {named[1]}, needed {request.rules[0]}: {message[-300:]}"
    return None


def data_problem(request: Request, data: bytes) -> str | None:
    """What is wrong with the decoded bytes, if anything."""
    if len(data) != request.size:
        return f"found {len(data)} bytes, needed {request.size}"
    found = hashlib.sha256(data).hexdigest()
    return None if found == request.sha256 else f"found bytes with sha256 {found}, needed {request.sha256}"


def main(arguments: list[str]) -> int:
    """Run every request; the exit status."""
    parser = argparse.ArgumentParser(usage="run.py [--only TEXT] [--jobs N] [--quiet] -- COMMAND [ARGUMENT]...")
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="decoders that run at the same time")
    parser.add_argument("--quiet", action="store_true", help="print failures and the sum only")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    counts = {"ok": 0, "FAIL": 0, "skip": 0}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        chosen = [request for request in requests(VECTORS, Path(scratch)) if options.only in request.name]
        for outcome in pool.map(lambda request: ask(options.command, request), chosen):
            counts[outcome.verdict] += 1
            if outcome.verdict == "FAIL" or not options.quiet:
                print(f"{outcome.verdict:4} {outcome.name}" + (f"  ({outcome.reason})" if outcome.reason else ""))
    print(f"{counts['ok']} passed, {counts['FAIL']} failed, {counts['skip']} not supported by the decoder")
    return 1 if counts["FAIL"] or not counts["ok"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
