"""Hybrid sharding: state sharded within a row of a mesh, replicated across its columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import ShardedRAdam
from tests.cases import assert_same, make_params, missing_at, set_grads
from tests.ranks import run

SHAPES = ((2, 1), (1, 2), (2, 2), (2, 4), (4, 2))
"""Replicas, shards: 2, 4 and 8 ranks."""
SMALL = 1e-3
STEPS = 9
"""Past the switch of rectification, at step 6."""


def mesh_of(shape: tuple[int, int]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def on_all_ranks(value: Any) -> list[Any]:
    """Python values of all ranks, whatever the optimizer's groups are."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def bits(tensors: Any) -> list[list[float]]:
    return [tensor.detach().double().flatten().tolist() for tensor in tensors]


def replicas_are_equal(optimizer: ShardedRAdam, shape: tuple[int, int]) -> None:
    """Parameters on all ranks, and the own state in each column, to the bit."""
    flats = optimizer._shards.flats
    params = on_all_ranks(bits(p for flat in flats for p in flat.params))
    assert all(each == params[0] for each in params)
    state = on_all_ranks(bits(tensor for flat in flats for tensor in flat.state.values()))
    for rank, each in enumerate(state):
        assert each == state[rank % shape[1]], rank


# Gradients that are whole: DistributedDataParallel averages them


def check_whole(_rank: int, _world_size: int, shape: tuple[int, int]) -> None:
    for transport in ("gloo", "native", "shared_memory"):
        for dtype in (torch.float32, torch.complex64):
            ours, theirs = make_params(dtype), make_params(dtype)
            mesh = mesh_of(shape)
            sharded = ShardedRAdam(ours, foreach=True, bucket_cap_mb=SMALL, mesh=mesh, transport=transport)
            radam = torch.optim.RAdam(theirs, foreach=True)
            for step in range(1, STEPS):
                for optimizer, params in ((sharded, ours), (radam, theirs)):
                    set_grads(params, step, missing_at(step))
                    optimizer.step()
            assert_same(ours, theirs, (transport, dtype))
            replicas_are_equal(sharded, shape)
            shards = sharded._shards.transport
            assert shards.world_size == sharded._shards.flats[0].plan.world_size == shape[1]
            assert shards.name == ("none" if shape[1] == 1 else transport)
            assert (shards.replicas is None) == (shape[0] == 1)
            # Nothing but the comparison at the first step leaves the shard group.
            assert "broadcast" not in shards.meter.collectives


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_gradients_give_radams_bits(shape: tuple[int, int]) -> None:
    run(check_whole, shape[0] * shape[1], shape)


class Net(nn.Module):
    """Sizes that do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 33)
        self.second = nn.Linear(33, 5)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


def train_net(rank: int, ours: bool, **options: Any) -> tuple[list[Tensor], Any]:
    torch.manual_seed(1)
    net = Net()
    model = net if options.get("shard_gradients") else DistributedDataParallel(net, find_unused_parameters=True)
    build: Any = ShardedRAdam if ours else torch.optim.RAdam
    optimizer = build(net.parameters(), lr=0.02, weight_decay=0.01, foreach=True, **options)
    syncing: Any = optimizer if options.get("shard_gradients") else model
    for step in range(STEPS):
        for part in range(3):
            data = torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * step + 10 * part + rank))
            if part < 2:
                with syncing.no_sync():
                    model(data).square().mean().backward()
            else:
                model(data).square().mean().backward()
        if options.get("shard_gradients"):
            optimizer.clip_grad_norm_(0.5)
        else:
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in net.parameters()], optimizer


def check_ddp(rank: int, _world_size: int, shape: tuple[int, int]) -> None:
    theirs, _ = train_net(rank, False)
    ours, optimizer = train_net(rank, True, mesh=mesh_of(shape), bucket_cap_mb=SMALL)
    assert_same(ours, theirs)
    replicas_are_equal(optimizer, shape)
    for transport in ("gloo", "native", "shared_memory"):
        options = {"mesh": mesh_of(shape), "bucket_cap_mb": SMALL, "shard_gradients": True, "transport": transport}
        first, optimizer = train_net(rank, True, **options)
        again, _ = train_net(rank, True, **options)
        assert_same(first, again, transport)
        replicas_are_equal(optimizer, shape)
        for one, other in zip(first, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_that_of_ddp_and_radam(shape: tuple[int, int]) -> None:
    run(check_ddp, shape[0] * shape[1], shape)


# Gradients that are sharded


def local_grad(param: Tensor, index: int, step: int, part: int, rank: int) -> Tensor:
    """Integers: their sums, and the means over 2, 4 and 8 ranks, are exact."""
    generator = torch.Generator().manual_seed(((step * 10 + part) * 10 + rank) * 100 + index)
    return torch.randint(-64, 64, param.shape, generator=generator).to(param.dtype)


def has_grad(index: int, step: int, part: int, rank: int) -> bool:
    """One parameter on one rank of the job only; some not in each pass, not in each step, never."""
    if index == 1:
        return rank == (step + part) % 2
    return index != 8 and not (index % 3 == 0 and (index + step) % 4 == 0) and not (index == 4 and part == 0)


def pass_backward(params: list[Parameter], step: int, part: int, rank: int) -> None:
    terms = [
        (param * local_grad(param, index, step, part, rank)).sum()
        for index, param in enumerate(params)
        if has_grad(index, step, part, rank)
    ]
    torch.stack(terms).sum().backward()


def mean_grads(params: list[Parameter], step: int, world_size: int) -> None:
    for index, param in enumerate(params):
        ranks = [(part, rank) for part in range(3) for rank in range(world_size) if has_grad(index, step, part, rank)]
        found = [local_grad(param, index, step, part, rank).double() for part, rank in ranks]
        param.grad = (torch.stack(found).sum(0) / world_size).to(param.dtype) if found else None


def check_sharded(rank: int, world_size: int, shape: tuple[int, int]) -> None:
    for transport in ("gloo", "native", "shared_memory"):
        ours, theirs = make_params(), make_params()
        sharded = ShardedRAdam(
            ours, foreach=True, bucket_cap_mb=SMALL, mesh=mesh_of(shape), transport=transport, shard_gradients=True
        )
        radam = torch.optim.RAdam(theirs, foreach=True)
        for step in range(STEPS):
            with sharded.no_sync():
                pass_backward(ours, step, 0, rank)
            pass_backward(ours, step, 1, rank)
            pass_backward(ours, step, 2, rank)
            mean_grads(theirs, step, world_size)
            wanted = nn.utils.get_total_norm([param.grad for param in theirs if param.grad is not None])
            before = sharded._shards.transport.meter.collectives["average"]
            norm = sharded.grad_norm()
            assert len(set(on_all_ranks(norm.item()))) == 1
            torch.testing.assert_close(norm.float(), wanted)
            for one, other in zip(ours, theirs, strict=True):
                grad = sharded.full_grad(one)
                assert (grad is None) == (other.grad is None)
                assert grad is None or torch.equal(grad, other.grad), transport
            sharded.step()
            radam.step()
            sharded.zero_grad()
            # Three passes, and what reads the gradients: one sum over the replicas, of one flat.
            assert sharded._shards.transport.meter.collectives["average"] == before + (shape[0] > 1)
        assert_same(ours, theirs, transport)
        replicas_are_equal(sharded, shape)
        own = sharded._shards.flats[0].plan.local_numel * 4
        whole = own + -own % (64 * 4 * shape[0])
        received = sharded.stats().received_bytes.get("average", 0)
        assert received == STEPS * 2 * whole // shape[0] * (shape[0] - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_sharded_gradients_are_the_mean_over_all_ranks(shape: tuple[int, int]) -> None:
    run(check_sharded, shape[0] * shape[1], shape)
