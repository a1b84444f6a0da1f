"""Programs that tests start, as their users start them: by torchrun, or by what has imported torch for them already."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from tests.ranks import CONTEXT

ROOT = Path(__file__).parent.parent
TRAIN = "launch/train.py"
SMALL = ["--layers", "1", "--heads", "2", "--width", "32", "--context", "32", "--batch", "12", "--warmup", "3"]
SMALL += ["--schedule-steps", "20", "--data-bytes", "300000", "--validate-every", "100"]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def torchrun(ranks: int, *command: object) -> list[str]:
    """torchrun itself, which imports torch once more, and in each rank again: 8 seconds of CPU each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, *map(str, command)]


# Without torchrun: in processes that have torch already


@dataclass(frozen=True, slots=True)
class Program:
    """One that runs: its processes by rank, and the files that all of them write to."""

    processes: tuple[ForkServerProcess, ...]
    out: Path
    err: Path

    def wait(self, seconds: float = 100) -> list[int]:
        """The exit status of each rank; all of them end by themselves."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        assert all(process.exitcode is not None for process in self.processes), self.out.read_text() + self.text()
        return [process.exitcode or 0 for process in self.processes]

    def text(self) -> str:
        """What it has said on stderr until now."""
        return self.err.read_text()


@contextlib.contextmanager
def started(ranks: int, *words: object, **variables: str) -> Iterator[Program]:
    """A script with its arguments, and torchrun's variables, on each of so many ranks; for 0 as one rank alone.

    Processes of tests/ranks.py, that have imported torch, become the script: what begins with that is quick. A module's
    name takes the place of a script's, as for ``python -m``.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        each = [torchruns_variables(rank, ranks, store.port) for rank in range(ranks)] or [{}]
        texts = [*map(str, words)]
        processes = tuple(
            CONTEXT.Process(target=_become, args=(texts, {**environment(), **own, **variables}, out, err))
            for own in each
        )
        try:
            for process in processes:
                process.start()
            yield Program(processes, out, err)
        finally:
            for process in processes:
                process.kill()
                process.join()


def torchruns_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As torchrun sets them for the ranks of one host, with its store at a port."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), ranks)
    own = {"RUN_ID": "none", "USE_AGENT_STORE": True, "RESTART_COUNT": 0, "MAX_RESTARTS": 0}
    found = {**places, **sizes, "ROLE_NAME": "default", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    found |= {f"TORCHELASTIC_{name}": value for name, value in own.items()}
    return {name: str(value) for name, value in found.items()}


def _become(words: list[str], variables: Mapping[str, str], out: Path, err: Path) -> None:
    """Let this process be that of a script, until it ends."""
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = words
    if not words[0].endswith(".py"):
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        path = Path(words[0]).absolute()
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")


def call(
    ranks: int, *words: object, check: bool = True, seconds: float = 100, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; ``started`` says how. The status is the first that is not 0."""
    with started(ranks, *words, **variables) as program:
        statuses = program.wait(seconds)
        status = next(filter(None, statuses), 0)
        done = subprocess.CompletedProcess([*map(str, words)], status, program.out.read_text(), program.text())
    assert status == 0 or not check, (statuses, done.stdout + done.stderr)
    return done


def train(ranks: int, *flags: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """launch/train.py with a small model."""
    pytest.importorskip("tqdm")
    return call(ranks, TRAIN, *SMALL, *flags, check=check)


def metrics(path: Path) -> list[dict[str, Any]]:
    """The records that are whole; the last line may be half written while the run goes on."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
