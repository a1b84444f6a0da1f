"""The benchmarks and the demo's table, on shapes small enough for a test. No figure of time is asserted."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import Tensor

from sharded_radam import compat
from sharded_radam.plan import ParamSpec
from sharded_radam.tools.compare import estimates
from sharded_radam.tools.estimate import OURS as OURS_DDP
from sharded_radam.tools.estimate import OURS_SHARDED
from tests.programs import ROOT, call

README = ROOT / "README.md"
OURS = "sharded_radam, shard_gradients"
ALONE = {"sharded_radam", "sharded_radam, no communication", "DDP + RAdam"}
TOGETHER = {"sharded_radam, transport gloo", "sharded_radam, share_parameters", "ZeroRedundancyOptimizer"}
ITERATIONS = {OURS, "DDP + sharded_radam", "DDP + RAdam foreach"}
MORE_ITERATIONS = {f"{OURS}, transport gloo", f"{OURS}, share_parameters", "DDP + ZeroRedundancyOptimizer"}
MORE_ITERATIONS |= {"FSDP2 + RAdam foreach"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_bench_step(tmp_path: Path, ranks: int) -> None:
    file = tmp_path / "out.json"
    flags = ("--shapes", "tiny", "tiny-bf16", "--rounds", "1", "--warmup", "1", "--passes", "2", "--json", str(file))
    out = call(ranks, "scripts/bench_step.py", *flags, seconds=200).stdout
    figures = json.loads(file.read_text())
    limit = {"limit: update, bytes at the speed of memcpy"}
    assert figures["step"]["tiny"].keys() == ALONE | limit | (TOGETHER if ranks > 1 else set())
    rows = figures["sync_and_step"]["tiny"].keys() - {"DeepSpeed ZeRO-2 + RAdam foreach"}
    assert rows == ITERATIONS | limit | {"the backward pass alone"} | (MORE_ITERATIONS if ranks > 1 else set())
    assert all(name in out for name in rows)
    assert figures["rounds"] == 2
    assert figures["machine"]["ranks"] == ranks
    assert figures["machine"]["command"].startswith("OMP_NUM_THREADS=1 torchrun")
    assert figures["plan_ms"].keys() == {"1", "1024"}
    steps, syncs = figures["step"]["tiny-bf16"], figures["sync_and_step"]["tiny-bf16"]
    zero = {"ZeroRedundancyOptimizer"} if ranks > 1 else set()
    assert steps.keys() == ALONE | limit | {"sharded_radam, compiled"} | zero
    wanted = {f"{OURS}, compiled", OURS, "DDP + RAdam foreach", "the backward pass alone"} | limit
    assert syncs.keys() == wanted | ({"DDP + ZeroRedundancyOptimizer", "FSDP2 + RAdam foreach"} if ranks > 1 else set())
    for rows in (steps, syncs):
        assert next(iter(rows.values()))["times_ours"] == 1.0


def test_bench_train(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    sizes = ("--layers", "1", "--heads", "2", "--width", "32", "--context", "16")
    call(2, "scripts/bench_train.py", "--rounds", 2, "--warmup", 6, *sizes, "--json", file, seconds=200)
    figures = json.loads(file.read_text())
    rows = figures["iteration"]
    assert rows.keys() >= ITERATIONS | MORE_ITERATIONS
    losses = {row["last_loss"] for row in rows.values()}
    assert max(losses) - min(losses) < 1e-3  # all train the same model on the same batches
    for ranges in (figures["profile"][OURS], figures["profile"][f"{OURS}, share_parameters"]):
        assert {f"sharded_radam::{name}" for name in ("reduce_scatter", "update", "all_gather")} <= ranges.keys()


def test_plots_and_tables(tmp_path: Path) -> None:
    """Of the results in the repository."""
    code = f"import plot, pathlib; plot.RESULTS = pathlib.Path({str(tmp_path)!r}); plot.main()"
    shutil.copytree(ROOT / "scripts" / "results", tmp_path, dirs_exist_ok=True)
    for old in tmp_path.glob("*.png"):
        old.unlink()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert {path.stem for path in tmp_path.glob("*.png")} == {"step", "train", "memory", "checkpoint"}
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 8
    page = (ROOT / "scripts" / "README.md").read_text()
    assert [table for table in tables if table not in page] == []
    shown = re.findall(r"^\| .*, ms \|.*\n(?:\|.*\n)+|^\| .*, MiB \|.*\n(?:\|.*\n)+", README.read_text(), re.MULTILINE)
    assert len(shown) == 2
    assert all(table.strip() in tables for table in shown)


def test_drawings(tmp_path: Path) -> None:
    """Those of README.md are what the plan and the schedule say now."""
    subprocess.run([sys.executable, "scripts/draw.py", tmp_path], cwd=ROOT, check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn.keys() == {"step.svg", "backward.svg"}
    for name, content in drawn.items():
        assert (ROOT / "docs" / name).read_text() == content, "run scripts/draw.py"
        assert f"docs/{name}" in README.read_text()
        ET.fromstring(content)
        assert len(content) < 12_000


def check_plan(figures: dict[str, Any], ranks: int, numel: int) -> None:
    """Within 1 % of what a rank's process grows by, the plan being that of now."""
    params = [ParamSpec("all", (numel,), (0,), torch.float32, "cpu", 0)]
    planned = {row.optimizer: row.memory.steady for row in estimates(params, ranks, transport="shared_memory")}
    peers = figures["peers"]
    for name, row in peers.items():
        assert row["all_pss"] == pytest.approx(row["planned_bytes"], rel=0.01), name
    for name, ours in (("sharded_radam", OURS_DDP), ("sharded_radam, shard_gradients", OURS_SHARDED)):
        assert peers[name]["all_pss"] == pytest.approx(planned[ours], rel=0.01)


def bench_memory(shapes: str, peers: set[str], file: Path) -> tuple[int, dict[str, Any]]:
    """Elements, and the figures of peers, of which each is in processes of its own."""
    call(2, "scripts/bench_memory.py", "--shapes", shapes, "--peers", *sorted(peers), "--json", file, seconds=200)
    figures = json.loads(file.read_text())["memory"][shapes]
    assert figures["peers"].keys() == peers
    return figures["elements"], figures["peers"]


def test_bench_memory(tmp_path: Path) -> None:
    numel, peers = bench_memory("tiny", {"DDP + RAdam", "ZeroRedundancyOptimizer"}, tmp_path / "out.json")
    assert peers["DDP + RAdam"]["state_bytes"] == 8 * numel


def test_the_plan_is_what_processes_take(tmp_path: Path) -> None:
    ours = {"sharded_radam", "sharded_radam, shard_gradients"}
    numel, peers = bench_memory("gpt2", ours, tmp_path / "out.json")
    check_plan({"peers": peers}, 2, numel)
    for name in ours:
        assert 8 * numel / 2 <= peers[name]["state_bytes"] < 8 * numel / 2 * 1.01


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_plan_is_what_was_measured(ranks: int) -> None:
    """Of GPT-2, in scripts/results."""
    figures = json.loads((ROOT / "scripts" / "results" / f"memory_{ranks}_ranks.json").read_text())["memory"]["gpt2"]
    check_plan(figures, ranks, 124_439_808)


def test_bench_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    flags = ("--shapes", "tiny", "--rounds", "1", "--folder", str(tmp_path / "x"), "--json", str(file))
    out = call(2, "scripts/bench_checkpoint.py", *flags, seconds=200).stdout
    figures = json.loads(file.read_text())["seconds"]
    assert len(figures) == 4
    for peer, times in figures.items():
        assert peer in out
        assert times.keys() >= {"save", "load", "load, not cached", "load, running", "bytes"}
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


@pytest.mark.timeout(620)
def test_demo(tmp_path: Path) -> None:
    """All of it, with a small model, in the environment that there is."""
    pytest.importorskip("tqdm")
    small = "--layers 1 --heads 2 --width 32 --context 32 --data-bytes 300000"
    done = subprocess.run(
        ["scripts/demo.sh"],
        cwd=ROOT,
        env={
            **os.environ,
            **here(),
            "DEMO_OUTPUT": str(tmp_path / "demo"),
            "DEMO_FLAGS": small,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "complete; all checksums are right" in done.stdout
    assert "resumed on 3" in done.stdout
    assert (tmp_path / "demo" / "radam.pt").exists()


def gpu_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """scripts/test_gpu.sh with the Python that runs here."""
    command = ["scripts/test_gpu.sh", *arguments]
    environment = {**os.environ, **here()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=220, check=False)


def test_gpu_command_on_a_cpu(tmp_path: Path) -> None:
    """A test and the fused rows. The suite of all tests has tests/gpu on the CPU, too."""
    file = tmp_path / "out.json"
    bench = "--shapes tiny --only fused --rounds 1 --warmup 0"
    done = gpu_command("--device", "cpu", "--output", str(file), "--bench", bench, "-k", "float64 and fused")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert figures["tests"]["passed"] == 1
    assert figures["tests"]["failed"] == 0
    assert all("no GPU" in reason for reason in figures["tests"]["skipped"])
    assert figures["machine"]["command"].startswith("scripts/test_gpu.sh --device cpu")
    bytes_of = {
        title: {name: row["bytes_per_element"] for name, row in rows.items()} for title, rows in figures["rows"].items()
    }
    fp32, bf16 = bytes_of["24 tensors, fp32"], bytes_of["24 tensors, bf16 with fp32 masters"]
    assert fp32 == {"sharded_radam, fused": 28, "torch Adam, fused": 28, "a copy": 8}
    assert bf16.keys() == {"sharded_radam, fused", "torch Adam, fused, masters by hand", "a copy"}
    assert figures["missing"] == {}
    table = [sys.executable, "scripts/bench_gpu.py", "--table", str(file)]
    again = subprocess.run(table, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout.strip() in done.stdout
    assert "| torch Adam, fused |" in again.stdout


def test_gpu_command_tells_what_fails(tmp_path: Path) -> None:
    """Without a GPU nothing is shown; neither is it where no test is run."""
    if not torch.cuda.is_available():
        done = gpu_command()
        assert done.returncode == 2
        assert "finds no GPU here. So nothing was run, and nothing is shown" in done.stderr
    flags = ("--output", str(tmp_path / "x"), "--bench", "--shapes tiny --only no_such_row")
    done = gpu_command("--device", "cpu", *flags, "-k", "no_such_test")
    assert done.returncode == 1
    assert "FAILED: see above" in done.stderr
    assert "--device tpu: expected cuda or cpu" in gpu_command("--device", "tpu").stderr


TRAFFIC: dict[str, tuple[float, Callable[[Tensor, Tensor], object]]] = {
    "copy_": (8, lambda a, b: a.copy_(b)),
    "in place": (8, lambda a, b: a.mul_(2)),
    "out": (12, lambda a, b: torch.add(a, b, out=a)),
    "new": (12, lambda a, b: a + b),
    "twice": (8, lambda a, b: a * a),
    "zeros": (4, lambda a, b: torch.zeros_like(a)),
    "empty": (0, lambda a, b: torch.empty_like(a)),
    "view": (0, lambda a, b: a.view(2, -1).t()),
    "cast": (6, lambda a, b: a.bfloat16()),
    "list": (16, lambda a, b: torch._foreach_add_([a, b], 1.0)),
    "list copied": (8, lambda a, b: torch._foreach_copy_([a], [b])),
}


def test_bytes_that_operations_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    traffic = importlib.import_module("traffic")
    for name, (wanted, operate) in TRAFFIC.items():
        operands = torch.ones(1000), torch.ones(1000)
        assert traffic.bytes_of(partial(operate, *operands)) == 1000 * wanted, name
    param = torch.nn.Parameter(torch.ones(100_000))
    param.grad = torch.ones(100_000)
    for wanted, optimizer in (
        (28, torch.optim.Adam([param], fused=True)),
        (88, torch.optim.RAdam([param], foreach=True)),
    ):
        for _ in range(6):
            optimizer.step()
        assert round(traffic.bytes_of(optimizer.step) / 100_000, 1) == wanted


def bash(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Bash in the checkout, after ``source scripts/venv.sh``."""
    return subprocess.run(
        ["bash", "-euc", f"source scripts/venv.sh; {code}"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_which_python_and_torch_the_scripts_use(tmp_path: Path) -> None:
    """An installed torch is found; a Python that is too old, or has none, is an error that says what to set."""
    assert bash('torch_of "$PYTHON"', PYTHON=sys.executable).stdout == f"{torch.__version__}\n"
    assert bash("usable_python", PYTHON=sys.executable).stdout == f"{sys.executable}\n"
    done = bash("usable_python", PYTHON="/no/such/python")
    assert done.returncode == 1
    assert "PYTHON=/no/such/python cannot be started: " in done.stderr
    assert "Python 3.10 or newer is needed; set PYTHON to one" in done.stderr
    for release in ("2.5.1", "3.12", "newest"):
        done = bash("make_venv train", PYTHON=sys.executable, VENV=str(tmp_path / "x"), TORCH=release)
        assert done.returncode == 1
        assert f"TORCH={release}: expected a release of 2.6 or newer" in done.stderr
    done = bash("scripts/test_versions.sh 3.12")
    assert done.returncode == 2
    assert "3.12: expected PYTHON:TORCH, such as 3.12:2.11.0" in done.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    done = bash("make_venv train", PYTHON=str(tmp_path / "empty" / "bin" / "python"), VENV="none")
    assert done.returncode == 1
    assert "VENV=none: " in done.stderr
    assert "has no torch of 2.6 or newer" in done.stderr
    done = bash("make_venv train", TORCH="2.13.0", **here())
    assert "VENV=none installs nothing, so TORCH=2.13.0 cannot be chosen" in done.stderr
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    done = bash("make_venv train", PYTHON=sys.executable, VENV=str(mine))
    assert done.returncode == 1
    assert "was not made by this script, which would empty it" in done.stderr
    assert (mine / "thesis.txt").read_text() == "all of it"
    done = bash("make_venv train; python -c 'import sharded_radam; print(sharded_radam.__file__)'", **here())
    assert done.stdout == f"{ROOT}/sharded_radam/__init__.py\n"


def here() -> dict[str, str]:
    """Variables for scripts that use the environment that there is."""
    return {"PYTHON": sys.executable, "VENV": "none", "GLOO_SOCKET_IFNAME": "lo"}


def test_the_oldest_versions_are_the_same_everywhere() -> None:
    oldest = ".".join(map(str, compat.OLDEST))
    assert f'dependencies = ["torch>={oldest},<3"]' in (ROOT / "pyproject.toml").read_text()
    assert f"torch {oldest} or newer" in README.read_text()
    assert f">= {compat.OLDEST}" in (ROOT / "scripts" / "venv.sh").read_text()


def test_table_of_versions() -> None:
    """scripts/README.md has what scripts/test_versions.sh found."""
    table = [sys.executable, "scripts/versions_table.py"]
    done = subprocess.run(table, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout in (ROOT / "scripts" / "README.md").read_text()
    rows = json.loads((ROOT / "scripts" / "results" / "versions.json").read_text())
    assert all(row["demo"] == "passed" and row["tests"].keys() <= {"passed", "skipped"} for row in rows)
    found = {(row["python"].rpartition(".")[0], row["torch"].partition("+")[0]) for row in rows}
    wanted = {("3.11", "2.13.0"), ("3.10", "2.6.0"), ("3.12", "2.8.0"), ("3.12", "2.11.0"), ("3.13", "2.14.1")}
    assert found >= wanted
    data = ROOT / "tests" / "data"
    assert all((data / f"{row['python']}-{row['torch'].partition('+')[0]}.tar.xz").exists() for row in rows)
