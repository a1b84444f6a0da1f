"""Ranks that drop the optimizer, or end, after a backward pass that no step follows: nobody is kept from going on."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_radam import ShardedRAdam
from tests import programs
from tests.ranks import WORLD_SIZES, run

TRANSPORTS = ("shared_memory", "gloo", "native")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 30), nn.Linear(30, 3))


def build(model: nn.Module, transport: str | None, bucket_cap_mb: float) -> ShardedRAdam:
    return ShardedRAdam(model.parameters(), shard_gradients=True, transport=transport, bucket_cap_mb=bucket_cap_mb)


def backward(model: nn.Module, rank: int) -> None:
    model(torch.full((4, 100), 0.1 * (rank + 1))).square().sum().backward()


def two_steps(model: nn.Module, optimizer: ShardedRAdam, rank: int) -> None:
    for _ in range(2):
        backward(model, rank)
        optimizer.step()
        optimizer.zero_grad()


def compare(model: nn.Module, world_size: int) -> None:
    for ours, theirs in zip(model.parameters(), expected(world_size), strict=True):
        torch.testing.assert_close(ours.detach(), theirs)


def expected(world_size: int) -> list[torch.Tensor]:
    """Two steps of one RAdam, then one of another."""
    model = net()
    for num_steps in (2, 1):
        optimizer = torch.optim.RAdam(model.parameters(), foreach=False)
        for _ in range(num_steps):
            optimizer.zero_grad()
            for rank in range(world_size):
                backward(model, rank)
            for param in model.parameters():
                assert param.grad is not None
                param.grad /= world_size
            optimizer.step()
    return [param.detach() for param in model.parameters()]


def check_leaving(rank: int, world_size: int, transport: str | None, late: int) -> None:
    """All begin a pass, one rank later than the others; each drops its optimizer as soon as its pass is over."""
    model = net()
    optimizer = build(model, transport, 0.005)
    two_steps(model, optimizer, rank)
    dist.barrier()
    time.sleep(0.5 * (rank == late))
    backward(model, rank)
    del optimizer
    gc.collect()
    optimizer = build(model, transport, 0.005)  # the gradients of that pass are nobody's
    backward(model, rank)
    optimizer.step()
    compare(model, world_size)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_pass_that_no_step_follows(world_size: int, transport: str) -> None:
    for late in {0, world_size - 1}:
        run(check_leaving, world_size, transport if world_size > 1 else None, late)


def check_alone(rank: int, world_size: int, transport: str, who: int) -> None:
    """One rank has a batch more than the others, whose pass begins nothing that waits."""
    model = net()
    optimizer = build(model, transport, 25.0)
    two_steps(model, optimizer, rank)
    if rank == who:
        backward(model, rank)
    del optimizer
    gc.collect()
    dist.barrier()
    optimizer = build(model, transport, 25.0)
    optimizer.zero_grad()
    backward(model, rank)
    optimizer.step()
    compare(model, world_size)


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_pass_of_one_rank_alone(world_size: int, transport: str) -> None:
    for who in (0, world_size - 1):
        run(check_alone, world_size, transport, who)


LAST_STEP = """
import os, time, torch, torch.distributed as dist
from sharded_radam import ShardedRAdam

dist.init_process_group("gloo", init_method="file://STORE", rank=int(os.environ["RANK"]), world_size=2)
param = torch.nn.Parameter(torch.zeros(10_000_001))
optimizer = ShardedRAdam([param], lr=1.0, transport="TRANSPORT")
optimizer.overlap_forward(torch.nn.ParameterList([param]))
for step in range(2):
    param.grad = torch.ones_like(param)
    time.sleep(2 * step * dist.get_rank())
    optimizer.step()
if dist.get_rank():
    torch.testing.assert_close(param.detach(), torch.full_like(param, -2.0))
    print("arrived", flush=True)
"""


@pytest.mark.parametrize("transport", ["gloo"])
def test_a_process_that_ends_right_after_a_step(tmp_path: Path, transport: str) -> None:
    """The others come to that step later, and get all that it has updated."""
    script = LAST_STEP.replace("TRANSPORT", transport).replace("STORE", str(tmp_path / "store"))
    # Real processes: those of multiprocessing do not run what is registered for the interpreter's end.
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**programs.environment(), "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [each.communicate(timeout=100)[0] for each in ranks]
    assert "arrived" in said[1], said
