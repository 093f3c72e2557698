"""`qlf hub serve`: how fast one client downloads, and whether kills of the server lose anything.

    python benchmarks/bench_hub.py [--workdir DIR] [--megabytes 1000] [--repeats N]
    python benchmarks/bench_hub.py --stress [--clients 8] [--repos 100] [--commits 5] [--kills 20]

Download: one file over the loopback interface by one client: a plain socket; httpx2, as huggingface_hub uses it, from
the hub and from Python's http.server; and huggingface_hub itself into a file, against a plain copy of the file.
Needs 3.5 times the size on the disk.

Stress: clients push commits with pinned parents to all repositories and pull from them at once; the server is killed
(-9) and restarted at random points. Every acknowledged commit is then looked for, and its files are compared.

Runs smaller than the defaults are printed but not recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import goal, record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the server is started as the tests start it

GOAL_MB_S = 500


def main() -> None:
    """Measure or stress, print, and record."""
    parser = argparse.ArgumentParser(description="Measure downloads from `qlf hub serve`, or kill it while it is used.")
    parser.add_argument("--workdir", type=Path, help="where the files go (default: the system's temporary directory)")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stress", action="store_true", help="kill the server instead of measuring it")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--repos", type=int, default=100)
    parser.add_argument("--commits", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.workdir) as name:
        work = Path(name)
        if args.stress:
            stressed(work, args)
        else:
            downloaded(work, args.megabytes * 1_000_000, args.repeats)


def downloaded(work: Path, size: int, repeats: int) -> None:
    """Print the throughput of each way."""
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(work / "home")}
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from huggingface_hub import HfApi

    from tests.local_hub_fixture import serve

    source = work / "peer" / "model.safetensors"
    source.parent.mkdir()
    with source.open("wb") as out:
        for start in range(0, size, 1 << 20):
            out.write(os.urandom(min(1 << 20, size - start)))
    with serve(work / "root") as hub, http_server(source.parent) as peer:
        api = HfApi(endpoint=hub.url, token=False)
        api.create_repo("lab/model")
        api.upload_file(path_or_fileobj=source, path_in_repo=source.name, repo_id="lab/model")
        ways: dict[str, Callable[[], None]] = {
            "hub, plain socket": lambda: received(hub.url, f"/lab/model/resolve/main/{source.name}", size),
            "hub, client": lambda: streamed(f"{hub.url}/lab/model/resolve/main/{source.name}", size),
            "http.server, client": lambda: streamed(f"{peer}/{source.name}", size),
            "hub, huggingface_hub": lambda: fetched(api, source.name, work / "out"),
            "copy of the file": lambda: copied(source, work / "out"),
        }
        figures = {name: [size / 1e6 / timed(way) for _ in range(1)] for name, way in ways.items()}  # warms up
        figures = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                figures[name].append(size / 1e6 / timed(way))
        server = server_cost(hub.process.pid, ways["hub, client"], size)
    middle = {name: statistics.median(values) for name, values in figures.items()}
    for name, values in figures.items():
        print(f"{name:22} {middle[name]:7.0f} MB/s ({min(values):.0f} to {max(values):.0f}, {len(values)} runs)")
    print(f"the hub's processor time allows {server:.0f} MB/s")
    ratio = middle["hub, client"] / middle["http.server, client"]
    print(f"hub against http.server: {ratio:.2f}")
    for name in ("hub, plain socket", "hub, client", "hub, huggingface_hub"):
        print(f"{name}: {goal(f'{GOAL_MB_S} MB/s', middle[name] >= GOAL_MB_S)}")
    if size >= 1_000_000_000:
        record("hub", {"size": size, "mb_s": middle, "against_http_server": ratio, "server_mb_per_cpu_second": server})


def timed(way: Callable[[], None]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def received(url: str, path: str, size: int) -> None:
    """Read a body into one buffer again and again: what the server can do where the client costs next to nothing."""
    host, _, port = url.removeprefix("http://").partition(":")
    buffer, total = bytearray(1 << 20), 0
    with socket.create_connection((host, int(port))) as to:
        to.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        while count := to.recv_into(buffer):
            total += count
    if not size < total < size + 10_000:
        raise SystemExit(f"received {total} bytes, expected {size} and a head")


def streamed(url: str, size: int) -> None:
    """Read a body as huggingface_hub does, and drop it."""
    import httpx2

    received = 0
    with httpx2.stream("GET", url, timeout=60) as answer:
        for chunk in answer.iter_bytes(chunk_size=10 << 20):
            received += len(chunk)
    if received != size:
        raise SystemExit(f"received {received} bytes, expected {size}")


def fetched(api: object, name: str, out: Path) -> None:
    """Download by huggingface_hub, into a directory that is new."""
    shutil.rmtree(out, ignore_errors=True)
    api.hf_hub_download("lab/model", name, local_dir=out)  # type: ignore[attr-defined]


def copied(source: Path, out: Path) -> None:
    """Copy through user space, as a download does."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with source.open("rb") as read, (out / source.name).open("wb") as write:
        shutil.copyfileobj(read, write, 10 << 20)


def server_cost(pid: int, way: Callable[[], None], size: int) -> float:
    """Megabytes for each second of processor time of the server."""

    def used() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used()
    way()
    return size / 1e6 / max(used() - before, 0.01)


@contextlib.contextmanager
def http_server(directory: Path) -> Iterator[str]:
    """Python's http.server in a process of its own."""
    command = [sys.executable, __file__, "--serve", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None:
            raise SystemExit("http.server did not start")
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def serve_plainly(directory: str) -> None:
    """The peer's process."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        """Without a line on stderr for every request."""

        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    handler = functools.partial(Handler, directory=directory)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


def stressed(work: Path, args: argparse.Namespace) -> None:
    """Print what the clients saw."""
    from tests.local_hub.crashes import stress
    from tests.local_hub_fixture import serve

    (work / "clients").mkdir()
    with serve(work / "root") as hub:
        outcome = stress(
            hub,
            work / "clients",
            clients=args.clients,
            repos=args.repos,
            commits=args.commits,
            kills=args.kills,
            pause=1.0,
        )
        if "Traceback" in hub.log():
            raise SystemExit(hub.log())
    print(f"{args.clients} clients, {args.repos} repositories, {outcome.kills} kills, {outcome.seconds:.0f} s:")
    print(f"  {outcome.acknowledged} commits acknowledged, all there once and whole; {outcome.retries} calls repeated")
    print(f"  {outcome.pulls} pulls, none of a mixed state")
    print(goal(f"{args.kills} kills while clients work", outcome.kills == args.kills))
    if args.clients >= 8 and args.repos >= 100 and args.kills >= 20:
        record("hub_stress", vars(outcome))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_plainly(sys.argv[2])
    else:
        main()
