"""Parameters that arrive during the next forward, and one copy of them for all ranks of a host."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import ShardedRAdam
from sharded_radam.overlap import ArrivingParameter
from tests.cases import assert_same
from tests.ranks import WORLD_SIZES, run
from tests.test_gradients import OPTIONS, SMALL, Training, images, train, unused_on_some_ranks

psutil = pytest.importorskip("psutil")

# Overlap


def check_overlap(rank: int, world_size: int) -> None:
    for transport in ("gloo", "native", "shared_memory"):
        results = []
        for overlap in (False, True):
            training = Training(True, transport, rank)
            if overlap:
                training.sharded.overlap_forward(training.net)
            results.append(train(training, unused_on_some_ranks))
        for one, other in zip(*results, strict=True):
            assert_same(one, other, transport)
    wrapped = []
    for overlap in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 3)))
        optimizer = ShardedRAdam(model.parameters(), bucket_cap_mb=SMALL, transport="gloo", **OPTIONS)
        if overlap:
            optimizer.overlap_forward(model)
        for step in range(7):
            model(images(rank, step).flatten()[:34].view(2, 17)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        wrapped.append([param.detach().clone() for param in model.parameters()])
    assert_same(wrapped[0], wrapped[1])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_overlap_gives_the_same_bits(world_size: int) -> None:
    run(check_overlap, world_size)


class Held:
    """A gather whose values come when it is waited for."""

    waited = 0

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def wait(self) -> None:
        Held.waited += 1
        self.handle.wait()


def step_and_hold(optimizer: ShardedRAdam, model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    network = optimizer._network
    gather = type(network).all_gather
    with mock.patch.object(network, "all_gather", lambda bucket: [Held(h) for h in gather(network, bucket)]):
        optimizer.step()
    Held.waited = 0


READERS: dict[str, Callable[[nn.Module, ShardedRAdam], object]] = {
    "state_dict": lambda model, _: model.state_dict(),
    "norm": lambda model, _: next(model.parameters()).norm(),
    "data": lambda model, _: next(model.parameters()).data,
    "foreach": lambda model, _: torch._foreach_norm(list(model.parameters())),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "numpy": lambda model, _: next(model.parameters()).detach().numpy(),
    "item": lambda model, _: next(model.parameters())[0, 0].item(),
    "data_ptr": lambda model, _: next(model.parameters()).data_ptr(),
    "to": lambda model, _: next(model.parameters()).to(torch.float64),
    "repr": lambda model, _: repr(next(model.parameters())),
    "in place": lambda model, _: nn.init.zeros_(next(model.parameters())),
    "optimizer.state_dict": lambda _, optimizer: optimizer.consolidate_state_dict(),
    "step": lambda _, optimizer: optimizer.step(),
}

NOT_READERS: dict[str, Callable[[nn.Module, ShardedRAdam], object]] = {
    "zero_grad": lambda _, optimizer: optimizer.zero_grad(),
    "model.zero_grad": lambda model, _: model.zero_grad(),
    "shape": lambda model, _: [(p.shape, p.dtype, p.device, p.requires_grad) for p in model.parameters()],
    "hash": lambda model, _: dict.fromkeys(model.parameters()),
}


def check_readers(rank: int, world_size: int) -> None:
    model = nn.Sequential(*(nn.Linear(33, 33) for _ in range(6)))
    optimizer = ShardedRAdam(model.parameters(), transport="gloo", bucket_cap_mb=0.005, lr=1.0)
    optimizer.overlap_forward(model)
    for name, read in READERS.items():
        if name == "numpy" and importlib.util.find_spec("numpy") is None:
            continue
        step_and_hold(optimizer, model)
        assert all(type(param) is ArrivingParameter for param in model.parameters()), name
        read(model, optimizer)
        if name != "step":
            assert all(type(param) is Parameter for param in model.parameters()), name
        assert Held.waited == 2 * (world_size - 1) * optimizer._flats[0].plan.num_buckets, name
        optimizer._wait_for_parameters()
    for name, touch in NOT_READERS.items():
        step_and_hold(optimizer, model)
        touch(model, optimizer)
        assert Held.waited == 0, name
        model.eval()(torch.ones(1, 33))
        assert Held.waited > 0, name
    step_and_hold(optimizer, model)
    waits = []
    with torch.no_grad():
        x = torch.ones(1, 33)
        for layer in model:
            x = layer(x)
            waits.append(Held.waited)
    assert len(set(waits)) > 2, "each module waits for its own buckets"
    assert waits == sorted(waits)
    everywhere = optimizer._network.all_gather_objects([param.detach().clone() for param in model.parameters()])
    for other in everywhere:
        assert_same(other, everywhere[0])


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_nobody_reads_stale_parameters(world_size: int) -> None:
    run(check_readers, world_size)


def test_overlap_is_refused_where_it_cannot_be() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="needs parameters_as_bucket_view=True"):
        ShardedRAdam(model.parameters(), parameters_as_bucket_view=False).overlap_forward(model)
    with pytest.raises(ValueError, match="not for compiled models"):
        ShardedRAdam(model.parameters()).overlap_forward(torch.compile(model))  # type: ignore[arg-type]


# One copy of the parameters


def check_shared(rank: int, world_size: int) -> None:
    results: list[list[list[Tensor]]] = []
    for share in (False, True):
        training = Training(True, None, rank, share_parameters=share)
        results.append(train(training, unused_on_some_ranks))
    for one, other in zip(*results, strict=True):
        assert_same(one, other)
    # Stage 1 too: gradients that are there already.
    torch.manual_seed(rank)  # rank 0's values count
    params = [Parameter(torch.randn(1000)), Parameter(torch.randn(7, 9).t())]
    optimizer = ShardedRAdam(params, share_parameters=True, **OPTIONS)
    torch.manual_seed(0)
    reference = [Parameter(torch.randn(1000)), Parameter(torch.randn(7, 9).t())]
    radam = torch.optim.RAdam(reference, **OPTIONS)
    for step in range(8):
        for param in (*params, *reference):
            param.grad = torch.full_like(param, 1.0 + step)
        optimizer.step()
        radam.step()
    assert_same(params, reference)
    dist.barrier()
    if world_size > 1:
        if rank == 0:
            with torch.no_grad():
                params[0][0] = 7.0
        dist.barrier()
        assert params[0][0] == 7.0, "what one rank writes, all see"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_shared_parameters_give_the_same_bits(world_size: int) -> None:
    run(check_shared, world_size)


NUMEL = 8 * 2**20


def proportional() -> int:
    fields = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text().split("\n")
    shmem = [line for line in fields if line.startswith("Pss_Shmem")]
    return int(shmem[0].split()[1]) * 1024


@pytest.mark.skipif(not psutil.LINUX, reason="reads /proc/self/smaps_rollup")
@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_bytes_of_shared_parameters_on_a_host(world_size: int) -> None:
    """Of the memory in shared mappings; the rest of a process is not the parameters'."""
    for share in (False, True):
        totals = run(shared_bytes, world_size, share)
        copies = 1 if share else world_size
        for total in totals:
            assert copies * NUMEL * 4 * 0.999 <= total < copies * NUMEL * 4 * 1.05 + 2**20


def shared_bytes(rank: int, world_size: int, share: bool) -> int:
    dist.barrier()
    before = proportional()
    dist.barrier()
    params = [Parameter(torch.ones(NUMEL // 4)) for _ in range(4)]
    optimizer = ShardedRAdam(params, share_parameters=share)
    assert all(param.sum() == param.numel() for param in params)
    dist.barrier()
    grown = proportional() - before
    return int(sum(optimizer._network.all_gather_objects(grown)))
