"""Programs that tests start: launch/train.py with a small model, as its users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["--layers", "1", "--heads", "2", "--width", "32", "--context", "32", "--batch", "12", "--warmup", "3"]
SMALL += ["--schedule-steps", "20", "--data-bytes", "300000", "--validate-every", "100"]


def command(ranks: int, *flags: object) -> list[str]:
    """With torchrun; without it, as one rank alone, for 0."""
    pytest.importorskip("tqdm")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *torchrun, "launch/train.py", *SMALL, *map(str, flags)]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def train(ranks: int, *flags: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(ranks, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
