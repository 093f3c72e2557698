"""How long `qlf --help` takes, as a whole process, against a Python that does nothing.

python benchmarks/bench_startup.py [--repeats N]
"""

from __future__ import annotations

import argparse
import sys

from common import goal, qlf_command, record, run_process, summarize

GOAL_SECONDS = 0.2


def main() -> None:
    """Measure in turns, print, and record."""
    parser = argparse.ArgumentParser(description="Measure how long `qlf --help` takes.")
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    commands = {"qlf --help": [*qlf_command(), "--help"], "python -c pass": [sys.executable, "-c", "pass"]}
    runs = {name: [run_process(command)] for name, command in commands.items()}  # fills the page cache, not counted
    runs = {name: [] for name in runs}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(run_process(command))
    results = {name: summarize(list_of_runs) for name, list_of_runs in runs.items()}
    for name, result in results.items():
        print(f"{name:16} {result.seconds:.3f} s ({result.fastest:.3f} to {result.slowest:.3f}, {repeats} runs)")
    seconds = results["qlf --help"].seconds
    print(goal(f"{GOAL_SECONDS} s", seconds < GOAL_SECONDS))
    record("startup", {name: result.as_json() for name, result in results.items()})


if __name__ == "__main__":
    main()
