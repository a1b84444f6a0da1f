"""What scripts/test_versions.sh found, in scripts/results/versions.json, and as the table of scripts/README.md.

python scripts/versions_table.py                       # the table
python scripts/versions_table.py add STATUS LINE       # adds a row, with this Python and torch: the demo's exit status,
                                                       # and pytest's last line
"""

from __future__ import annotations

import datetime as dt
import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "versions.json"


def numbers(version: str) -> tuple[int, ...]:
    """A version as it is sorted: "3.11.2", "2.13.0+cpu"."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def add(demo_status: int, closing_line: str) -> None:
    """Put a row into the file, in the place of an older one of this Python and torch."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", closing_line)}
    row = {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "demo": "passed" if demo_status == 0 else f"failed ({demo_status})",
        "tests": counts,
        "date": dt.date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [other for other in rows if (other["python"], other["torch"]) != (row["python"], row["torch"])]
    rows = sorted([*rows, row], key=lambda row: (numbers(row["torch"]), numbers(row["python"])))
    RESULTS.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| torch | Python | demo | quick tests | date |", "|---|---|---|---|---|"]
    for row in rows:
        tests = ", ".join(f"{count} {what}" for what, count in row["tests"].items()) or "none"
        lines.append(f"| {row['torch']} | {row['python']} | {row['demo']} | {tests} | {row['date']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(int(sys.argv[2]), sys.argv[3])
    else:
        print(table(json.loads(RESULTS.read_text())))
