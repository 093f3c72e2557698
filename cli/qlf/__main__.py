"""The entry point: `qlf` and `python -m qlf`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run `qlf` and return its exit code. Ctrl-C while its modules load is answered like any other."""
    try:
        from qlf.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("qlf: interrupted\n")
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
