"""The benchmarks and the demo's table, on shapes small enough for a test. No figure of time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(ranks: int, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*torchrun, f"scripts/{script}", *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("ranks", [1, 2])
def test_bench_step(tmp_path: Path, ranks: int) -> None:
    file = tmp_path / "out.json"
    out = run(ranks, "bench_step.py", "--shapes", "small", "--rounds", "2", "--warmup", "1", "--json", str(file)).stdout
    figures = json.loads(file.read_text())
    wanted = {"sharded_radam", "sharded_radam, no communication", "DDP + RAdam"}
    assert figures["step"]["small"].keys() == (wanted | {"ZeroRedundancyOptimizer"} if ranks > 1 else wanted)
    assert all(name in out for name in wanted)
    assert figures["machine"]["ranks"] == ranks
    assert figures["plan_ms"].keys() == {"1", "1024"}


def test_bench_memory(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    run(2, "bench_memory.py", "--shapes", "small", "--json", str(file))
    figures = json.loads(file.read_text())["memory"]["small"]
    numel = figures["elements"]
    peers = figures["peers"]
    assert peers["DDP + RAdam"]["state_bytes"] == 8 * numel
    assert 8 * numel / 2 <= peers["sharded_radam"]["state_bytes"] < 8 * numel / 2 * 1.01
    assert peers["sharded_radam"]["state_bytes"] < 0.6 * peers["DDP + RAdam"]["state_bytes"]


def test_bench_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    flags = ("--shapes", "small", "--rounds", "1", "--folder", str(tmp_path / "x"), "--json", str(file))
    out = run(2, "bench_checkpoint.py", *flags).stdout
    figures = json.loads(file.read_text())["seconds"]
    assert len(figures) == 4
    for peer, times in figures.items():
        assert peer in out
        assert times.keys() >= {"save", "load", "load, not cached", "bytes"}
    ours = figures["sharded_radam"]
    assert ours.keys() >= {"async save: training waits", "async save: committed"}
    assert ours["bytes"][0] < 1.05 * figures["the bytes alone"]["bytes"][0]
    assert not list((tmp_path / "x").iterdir())


def table(tmp_path: Path, resumed_at: float, resumed_to: float) -> subprocess.CompletedProcess[str]:
    losses = {"first": (5.0, 3.0), "resumed": (resumed_at, resumed_to), "zero": (5.0, 4.0)}
    for name, (before, after) in losses.items():
        records: list[dict[str, Any]] = [{"validation_loss": before}]
        records += [{"optimizer_ms": 2.0, "loss": 4.0}] * 12 + [{"validation_loss": after}]
        records.append({"ranks": 2, "state_bytes": 1_000_000, "replicated_bytes": 2_000_000})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    table = [sys.executable, "scripts/demo_table.py", str(tmp_path)]
    return subprocess.run(table, cwd=ROOT, capture_output=True, text=True, check=False)


def test_demo_fails_if_the_loss_does_not_continue(tmp_path: Path) -> None:
    assert table(tmp_path, 3.0, 2.9).returncode == 0
    for resumed, message in (((3.5, 2.9), "resumed at 3.5"), ((3.0, 3.1), "did not lower the loss: 3.0000 to 3.1")):
        done = table(tmp_path, *resumed)
        assert done.returncode == 1
        assert message in done.stderr
