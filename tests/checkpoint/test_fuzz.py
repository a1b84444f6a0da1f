"""Some of the damaged and hostile checkpoints of tests/fuzz.py, in a process of their own, which has little memory."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from sharded_radam.compat import VERSION
from tests.programs import ROOT

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux"),
]
KINDS = (
    *("damage of data", "damage of .metadata", "damage of manifest.json"),
    *("hostile boxes", "hostile chunk", "hostile index", "hostile manifest"),
)


def test_damaged_and_hostile_checkpoints() -> None:
    """Others than in the last release of torch, so that each is tried somewhere."""
    first = 100_000 * VERSION[1]
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--first", str(first), "--cases", "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "200 cases, 0 failures" in done.stdout
    for kind in KINDS:
        counts = re.findall(rf"^{re.escape(kind)} +(\w+) +(\d+)$", done.stdout, re.MULTILINE)
        refused = sum(int(count) for what, count in counts if what.endswith("Error"))
        assert refused > 3, kind
    assert re.search(r"^hostile chunk +harmless", done.stdout, re.MULTILINE)  # some are none
