"""Write qlformat/_tables.py from spec/codebooks/*.json, the only source of the code tables."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def bits(name: str, key: str = "bits") -> list[str]:
    """The float32 bit patterns of one codebook, as hexadecimal literals."""
    found: list[str] = json.loads((ROOT / "spec" / "codebooks" / f"{name}.json").read_text())[key]
    return found


def block(constant: str, literals: list[str], per_line: int = 8) -> str:
    """A Python tuple literal with `per_line` entries a line."""
    rows = [", ".join(literals[i : i + per_line]) for i in range(0, len(literals), per_line)]
    return f"{constant} = (\n" + "".join(f"    {row},\n" for row in rows) + ")\n"


def render() -> str:
    """The text of qlformat/_tables.py."""
    order = json.loads((ROOT / "spec" / "codebooks" / "fp4.json").read_text())["sorted_codes"]
    return (
        '"""float32 bit patterns of the code tables. Generated from spec/codebooks by tools/sync_codebooks.py."""\n\n'
        "# fmt: off\n"
        + block("NF4_BITS", bits("nf4"))
        + block("FP4_BITS", bits("fp4"))
        + block("FP4_SORTED_CODES", [str(code) for code in order], 16)
        + block("DYNAMIC8_BITS", bits("dynamic8"))
        + block("DYNAMIC8_THRESHOLD_BITS", bits("dynamic8", "threshold_bits"))
        + "# fmt: on\n"
    )


if __name__ == "__main__":
    (ROOT / "qlformat" / "_tables.py").write_text(render())
