"""Real clients in processes of their own, which know nothing of qlformat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.local_hub_fixture import LocalHub

_PRELUDE = """
import json, sys
def answer(value):
    assert "qlformat" not in sys.modules
    print("\\n" + json.dumps(value))
"""


def environment(hub: LocalHub, home: Path, *, xet: bool, token: str | None = "") -> dict[str, str]:
    """Of a client of this hub, with caches of its own. `token` "" is the one that may write."""
    left = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    left |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    left |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_XET_CACHE": str(home / "xet")}
    if not xet:
        left["HF_HUB_DISABLE_XET"] = "1"
    if token is not None:
        left["HF_TOKEN"] = token or hub.token
    return left


def run_client(
    code: str, hub: LocalHub, home: Path, *, xet: bool = False, token: str | None = "", **values: object
) -> Any:
    """Run Python code that ends with answer(JSON value); `values` are its variables."""
    home.mkdir(exist_ok=True)
    given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + given + textwrap.dedent(code)],
        env=environment(hub, home, xet=xet, token=token),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr[-4000:]}\nserver: {hub.log()[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])
