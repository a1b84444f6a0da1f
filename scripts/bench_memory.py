"""Bytes per rank that a peer's optimizer takes, steady and at its peak, ours beside its peers.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 scripts/bench_memory.py

Each peer runs in processes of its own, one after the other. ``state`` are bytes of state tensors. RSS is that of the
process (psutil), less what parameters and gradients took before the optimizer was built: ``steady`` after some steps,
``peak`` the largest seen by a thread that looks every millisecond, ``built`` the peak of construction. ``all`` is what
the process has grown by since before there were parameters, after some steps, with freed memory handed back and pages
that ranks share counted once (PSS); ``planned`` is what ``sharded-radam plan`` says of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import peers
import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from sharded_radam import ShardedRAdam
from sharded_radam.plan import ParamSpec
from sharded_radam.tools.compare import estimates
from sharded_radam.tools.estimate import OURS, OURS_SHARDED

STEPS = 8
PLANNED = {
    peers.OURS: OURS,
    peers.OURS_SHARDED: OURS_SHARDED,
    peers.DDP: "DDP + RAdam",
    peers.ZERO: "DDP + ZeroRedundancyOptimizer",
}
"""Peers, and what the planner calls them."""


class Watch:
    """The largest RSS of this process while it is open."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self.process.memory_info().rss)


def proportional_bytes() -> int:
    """PSS of this process, after the C allocator has handed back what was freed."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_full_info().pss)


def planned_bytes(peer: str, shapes: list[tuple[int, ...]], world_size: int) -> int:
    """What the planner says of a rank between two steps."""
    params = [
        ParamSpec(str(index), shape, tuple(range(len(shape))), torch.float32, "cpu", 0)
        for index, shape in enumerate(shapes)
    ]
    name = PLANNED[peer]
    rows = {row.optimizer: row for row in estimates(params, world_size, transport="shared_memory", device="cpu")}
    return rows[name].memory.steady


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state tensors of this rank, padding included."""
    local = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    if isinstance(local, ShardedRAdam):
        return local.stats().state_bytes
    return sum(t.nbytes for s in local.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim())


def measure(peer: str, shapes: list[tuple[int, ...]], store: str, rank: int, world_size: int) -> dict[str, int]:
    """Figures of one peer on this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=peers.file_store(store, world_size), rank=rank, world_size=world_size)
    device = torch.device("cpu")
    warm_up()
    nothing = proportional_bytes()
    grads = [None] * len(shapes) if peer == peers.OURS_SHARDED else peers.make_grads(shapes, device)
    params = peers.make_params(shapes, device, grads)
    del grads
    gc.collect()
    before = psutil.Process().memory_info().rss
    with Watch() as building:
        optimizer = peers.build(peer, params)
    for _ in range(2):
        step(optimizer)
    with Watch() as stepping:
        for _ in range(STEPS):
            step(optimizer)
    gc.collect()
    steady = psutil.Process().memory_info().rss
    dist.barrier()
    everything = proportional_bytes() - nothing
    dist.barrier()
    dist.destroy_process_group()
    return {
        "state_bytes": state_bytes(optimizer),
        "built_rss": building.peak - before,
        "steady_rss": steady - before,
        "peak_rss": stepping.peak - before,
        "all_pss": everything,
        "planned_bytes": planned_bytes(peer, shapes, world_size),
    }


def step(optimizer: torch.optim.Optimizer) -> None:
    """With gradients that exist, or, where they are released, with new ones."""
    if getattr(optimizer, "shards_gradients", False):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.full_like(param, 1e-3)
    optimizer.step()


def warm_up() -> None:
    """Load what torch loads with the first step, which is not the optimizers' memory."""
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    for peer in (peers.OURS, peers.DDP, peers.ZERO):
        peers.build(peer, [param]).step()


def send(connection: Any, *arguments: Any) -> None:
    connection.send(measure(*arguments))


def in_own_process(peer: str, shapes: list[tuple[int, ...]], store: str) -> dict[str, int]:
    """The same in a new process, so that no peer inherits memory of another."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, peer, shapes, store, dist.get_rank(), dist.get_world_size())
    process = context.Process(target=send, args=arguments)
    process.start()
    theirs.close()
    figures: dict[str, int] = ours.recv()
    process.join()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(peers.SHAPES), default=["gpt2"])
    parser.add_argument("--peers", nargs="+", choices=list(PLANNED), default=list(PLANNED))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    peers.start()
    is_main = dist.get_rank() == 0
    machine = peers.describe_machine()
    result: dict[str, Any] = {"machine": machine, "memory": {}}
    if is_main:
        print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    for name in arguments.shapes:
        shapes = peers.SHAPES[name]()
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        rows = {}
        for number, peer in enumerate(arguments.peers):
            store = f"{os.environ.get('TMPDIR', '/tmp')}/bench_memory_{os.getppid()}_{name}_{number}"
            figures = in_own_process(peer, shapes, store)
            largest: list[dict[str, int]] = [{}] * dist.get_world_size()
            dist.all_gather_object(largest, figures)
            rows[peer] = {key: max(each[key] for each in largest) for key in figures}
            Path(store).unlink(missing_ok=True)
        result["memory"][name] = {"elements": numel, "peers": rows}
        if is_main:
            print(f"\n{name}: {numel / 1e6:.1f}M elements, {numel * 4 / 2**20:.0f} MiB of parameters; MiB per rank")
            print(f"{'':28}{'state':>10}{'built':>10}{'steady':>10}{'peak':>10}{'all':>10}{'planned':>10}")
            for peer, row in rows.items():
                print(f"{peer:28}" + "".join(f"{value / 2**20:10.1f}" for value in row.values()), flush=True)
    if is_main and arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
