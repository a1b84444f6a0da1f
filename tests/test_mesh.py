"""Hybrid sharding: state sharded within a row of a mesh, replicated across its columns."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import CheckpointError, CheckpointManager, GradScaler, ShardedRAdam, make_mesh
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.state.values import equal
from sharded_radam.update import update_buckets
from tests.cases import assert_same, make_params, missing_at, set_grads
from tests.ranks import ends, run

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


def bits(tensors: Any) -> list[Any]:
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
            if shards.replicas is not None:
                assert shards.replicas.name == ("native" if transport == "native" else "gloo")
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
        options: dict[str, Any] = {"mesh": mesh_of(shape), "bucket_cap_mb": SMALL, "transport": transport}
        options |= {"shard_gradients": True, "share_parameters": transport == "shared_memory" and shape[1] > 1}
        first, optimizer = train_net(rank, True, **options)
        again, _ = train_net(rank, True, **options)
        assert_same(first, again, transport)
        replicas_are_equal(optimizer, shape)
        for one, other in zip(first, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 1), (3, 2)])
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
    torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]


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
            if step % 3 == 1:
                sharded.grad_norm()  # the mean of replicas, to which more is added
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
                if grad is not None and other.grad is not None:
                    assert torch.equal(grad, other.grad), transport
            sharded.step()
            radam.step()
            sharded.zero_grad()
            # Three passes, and what reads the gradients: one sum over the replicas, of one flat.
            assert sharded._shards.transport.meter.collectives["average"] == before + (shape[0] > 1)
        assert_same(ours, theirs, transport)
        replicas_are_equal(sharded, shape)
        own = sharded._shards.flats[0].plan.local_numel * 4
        whole = own + -own % (64 * 4 * shape[0])
        found = sharded.stats()
        assert found.collectives.get("average", 0) == (STEPS + 3 if shape[0] > 1 else 0)
        assert found.received_bytes.get("average", 0) == (STEPS + 3) * 2 * whole // shape[0] * (shape[0] - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_sharded_gradients_are_the_mean_over_all_ranks(shape: tuple[int, int]) -> None:
    run(check_sharded, shape[0] * shape[1], shape)


def check_order(rank: int, world_size: int, transport: str) -> None:
    """The first buckets are updated while the last sums are under way; what reads them waits for all."""
    ours, theirs = make_params(), make_params()
    options: dict[str, Any] = {"bucket_cap_mb": SMALL, "transport": transport, "check_replicas": 1}
    sharded = ShardedRAdam(ours, foreach=True, mesh=mesh_of((2, 2)), shard_gradients=True, **options)
    radam = torch.optim.RAdam(theirs, foreach=True)
    order: list[str] = []

    def note(what: str, call: Any) -> Any:
        def noted(*args: Any) -> Any:
            order.append(what)
            return call(*args)

        return noted

    def iterate(step: int, between: Any = lambda: None) -> list[str]:
        for part in range(3):
            pass_backward(ours, step, part, rank)
        mean_grads(theirs, step, world_size)
        order.clear()
        between()
        sharded.step()
        radam.step()
        sharded.zero_grad()
        assert_same(ours, theirs)
        return order

    iterate(0)
    averages: Any = sharded._shards.gradients.sums._averages  # type: ignore[union-attr]
    assert len(averages.parts[0]) > 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(averages, "_end", note("end", averages._end))
        patch.setattr("sharded_radam.step.update_buckets", note("update", update_buckets))
        assert iterate(1)[:4] == ["end", "update", "update", "end"]
        assert iterate(2, sharded.grad_norm) == [*sorted(order)]

        def assign() -> None:
            """Into sums that would be under way: all end before."""
            for params in (ours, theirs):
                params[0].grad = torch.full_like(params[0], 0.5)

        assert iterate(3, assign) == sorted(order)
    # A step that fails between: what is under way ends before anything else is done with the sums.
    for part in range(3):
        pass_backward(ours, 4, part, rank)
    sharded.param_groups[0]["lr"] = 1e-3 * (1 + (rank == 3))
    with pytest.raises(RuntimeError, match="lr of param group 0 differs"):
        sharded.step()
    sharded.param_groups[0]["lr"] = 1e-3
    mean_grads(theirs, 4, world_size)
    sharded.step()
    radam.step()
    assert_same(ours, theirs)
    replicas_are_equal(sharded, (2, 2))


@pytest.mark.parametrize("transport", ["gloo", "native"])
def test_replicas_average_while_the_first_buckets_are_updated(transport: str) -> None:
    run(check_order, 4, transport)


def half_results(rank: int, _world_size: int, shape: tuple[int, ...], reduce_dtype: torch.dtype | None) -> Any:
    params = make_params(torch.bfloat16)
    mesh = init_device_mesh("cpu", shape)
    sharded = ShardedRAdam(params, bucket_cap_mb=SMALL, mesh=mesh, shard_gradients=True, reduce_dtype=reduce_dtype)
    for step in range(STEPS):
        for part in range(2):
            pass_backward(params, step, part, rank)
        sharded.step()
        sharded.zero_grad()
    return bits(params)


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_half_precision_has_the_bits_of_one_shard_group(reduce_dtype: torch.dtype | None) -> None:
    """Replicas average sums of fp32."""
    wanted = run(half_results, 4, (4,), reduce_dtype)
    assert all(each == wanted[0] for each in wanted)
    for shape in ((2, 2), (4, 1)):
        assert run(half_results, 4, shape, reduce_dtype) == wanted


# Groups that do not fit


def told(call: Any) -> str:
    """The error that all ranks raise."""
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    texts: list[str] = on_all_ranks(str(error.value))
    assert len(set(texts)) == 1, texts
    return texts[0]


def build(**options: Any) -> ShardedRAdam:
    return ShardedRAdam(make_params(), **options)


def check_misfits(rank: int, world_size: int) -> None:
    mesh, line = mesh_of((2, 2)), init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "tp"))
    assert "exclude each other" in told(lambda: build(mesh=mesh, process_group=dist.group.WORLD))
    assert "exclude each other" in told(lambda: build(mesh=mesh, process_group=dist.group.WORLD if rank == 3 else None))
    assert "has 3 dimensions: expected one" in told(lambda: build(mesh=cube))
    assert "has 3 dimensions: expected one" in told(lambda: build(mesh=cube if rank == 2 else mesh))
    assert "has 2 dimensions" in told(lambda: build(process_group=mesh))
    assert "mesh= is a ProcessGroup: expected a torch" in told(lambda: build(mesh=dist.group.WORLD))
    # Ranks that mean different meshes, or none.
    wanted = "mesh differs between ranks: rank 0 has [[0, 1], [2, 3]], rank 1 has None"
    assert wanted in told(lambda: build(mesh=line if rank == 1 else mesh))
    assert wanted in told(lambda: build(mesh=None if rank == 1 else mesh))
    rows, columns = mesh.get_group(1), mesh.get_group(0)
    names, world = ("replicate", "shard"), dist.group.WORLD
    assert world is not None
    turned = DeviceMesh.from_group([rows, columns], "cpu", [[0, 2], [1, 3]], mesh_dim_names=names)
    assert build(mesh=turned).process_group == columns  # a mesh as good as the other, on all ranks
    text = told(lambda: build(mesh=turned if rank == 3 else mesh))
    assert "mesh differs between ranks: rank 0 has [[0, 1], [2, 3]], rank 3 has [[0, 2], [1, 3]]" in text
    # Megatron #6048: the layout is made for one group, and another one shares it, so nobody owns some shards.
    whole = DeviceMesh.from_group([columns, world], "cpu", [[0, 1], [2, 3]], mesh_dim_names=names)
    text = told(lambda: build(mesh=whole))
    assert "the process group of its last dimension has the ranks [0, 1, 2, 3]" in text
    text = told(lambda: build(mesh=whole if rank == 1 else mesh))
    assert "has the ranks [0, 1, 2, 3], in this order, where the mesh has [0, 1]" in text
    alone = [dist.new_group([each]) for each in range(world_size)][rank]
    few = DeviceMesh.from_group([alone, rows], "cpu", [[0, 1], [2, 3]], mesh_dim_names=names)
    text = told(lambda: build(mesh=few))
    assert "first dimension" in text
    # Another order: torch sorts the ranks of a group, so rank 1 would share the shards of rank 2.
    order = [[1, 0], [2, 3]]
    text = told(lambda: build(mesh=DeviceMesh.from_group([columns, rows], "cpu", order, mesh_dim_names=names)))
    assert "in this order, where the mesh has [1, 0]" in text
    # A rank in two places.
    double = DeviceMesh.from_group([columns, rows], "cpu", [[0, 1], [2, 3]], mesh_dim_names=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceMesh, "mesh", torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]))
        assert "has [0, 1, 2, 3] more than once" in told(lambda: build(mesh=double))
    assert len(on_all_ranks(build(mesh=mesh).stats().rank)) == world_size  # and it still works


def test_groups_that_do_not_fit_raise_on_every_rank() -> None:
    run(check_misfits, 4)


def check_some_ranks(rank: int, _world_size: int, folder: str) -> None:
    """Two meshes side by side, as where a model is split in two: ranks of one know nothing of the other."""
    cube = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tp"))
    mesh = cube["replicate", "shard"]
    ours, theirs = make_params(), make_params()
    sharded = ShardedRAdam(ours, foreach=True, bucket_cap_mb=SMALL, mesh=mesh, shard_gradients=True)
    radam = torch.optim.RAdam(theirs, foreach=True)
    ranks = mesh.mesh.flatten().tolist()
    place = ranks.index(rank)
    for step in range(STEPS if rank % 2 else 3):
        for part in range(3):
            pass_backward(ours, step, part, place)
        mean_grads(theirs, step, 4)
        sharded.step()
        radam.step()
        sharded.zero_grad()
    assert_same(ours, theirs)
    assert sharded._shards.ranks() == ranks
    saved = sharded.consolidate_state_dict(to=ranks[2])
    assert (saved is not None) == (rank == ranks[2])
    again = make_params()
    other = ShardedRAdam(again, foreach=True, mesh=mesh)
    with CheckpointManager(f"{folder}/{rank % 2}", process_group=mesh) as manager:
        manager.save(1, model=nn.ParameterList(ours), optimizer=sharded)
        manager.load(1, model=nn.ParameterList(again), optimizer=other)
    assert_same(again, ours)
    for one, param in zip(again, theirs, strict=True):
        whole = other.full_state(one)["exp_avg"]
        assert torch.equal(whole, radam.state[param]["exp_avg"]) if param in radam.state else not whole.any()
    with pytest.raises(CheckpointError, match="its process group has the ranks"):
        CheckpointManager(f"{folder}/all").save(1, optimizer=sharded)


def test_a_mesh_of_some_ranks(tmp_path: Path) -> None:
    run(check_some_ranks, 8, str(tmp_path))


# From torchrun's environment


def check_made(rank: int, world_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def set_place(nodes: int, per_node: int, node: int, local: int) -> None:
            values = {"GROUP_WORLD_SIZE": nodes, "LOCAL_WORLD_SIZE": per_node, "GROUP_RANK": node, "LOCAL_RANK": local}
            for name, value in values.items():
                patch.setenv(name, str(value))

        with pytest.raises(ValueError, match="rank 0 has not all of GROUP_WORLD_SIZE"):
            make_mesh("cpu")
        set_place(2, 2, rank // 2, rank % 2)
        mesh = make_mesh("cpu")
        assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
        assert mesh.mesh_dim_names == ("replicate", "shard")
        assert ShardedRAdam(make_params(), mesh=mesh).process_group == mesh.get_group("shard")
        set_place(1, 4, 0, rank)
        assert make_mesh("cpu").mesh.tolist() == [[0, 1, 2, 3]]
        assert ShardedRAdam(make_params(), mesh=make_mesh("cpu"))._shards.transport.replicas is None
        set_place(2, 3 if rank < 3 else 1, rank // 3, rank % 3)
        text = told(lambda: make_mesh("cpu"))
        assert "nodes have different numbers of ranks (3 on node 0, 1 on node 1)" in text
        set_place(2, 2, rank % 2, rank // 2)
        assert "rank 1 is number 0 of node 1, are not 2 nodes" in told(lambda: make_mesh("cpu"))
        set_place(3, 2, rank // 2, rank % 2)
        assert "are not 3 nodes with 2 ranks each" in told(lambda: make_mesh("cpu"))


def test_a_mesh_of_torchruns_nodes() -> None:
    run(check_made, 4)
    with pytest.raises(RuntimeError, match=r"before torch\.distributed\.init_process_group"):
        make_mesh("cpu")


# What is measured, compared and broadcast


class Buffered(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean.fill_(seed)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.linear(x))
        return found


def backward(model: nn.Module, seed: int, factor: float = 1.0, scaler: GradScaler | None = None) -> None:
    data = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    loss = model(data).pow(2).mean() * factor
    (loss if scaler is None else scaler.scale(loss)).backward()


def check_measures(rank: int, world_size: int, shape: tuple[int, int]) -> None:
    for transport in ("gloo", "shared_memory", "native"):
        model, first = Buffered(rank), Buffered(0)
        options: dict[str, Any] = {"mesh": mesh_of(shape), "transport": transport, "shard_gradients": True}
        optimizer = ShardedRAdam(model.named_parameters(), module=model, check_gradients=True, **options)
        assert_same(model.state_dict().values(), first.state_dict().values(), "broadcast at construction")
        model.norm.running_mean.fill_(rank)  # type: ignore[union-attr]
        optimizer.broadcast_buffers(model)
        assert model.norm.running_mean.eq(0).all()  # type: ignore[union-attr]
        # An inf on one rank only: all skip, whichever shard group it is in.
        scaler = GradScaler("cpu", init_scale=4.0)
        quiet = ShardedRAdam(model.named_parameters(), **options)
        before = [param.detach().clone() for param in model.parameters()]
        backward(model, rank, float("inf") if rank == world_size - 1 else 1.0, scaler)
        scaler.unscale_(quiet)
        scaler.step(quiet)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert_same(model.parameters(), before, "skipped")
        quiet.zero_grad()
        backward(model, rank, 1.0, scaler)
        scaler.step(quiet)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert not torch.equal(next(model.parameters()), before[0])
        # Who has what is not finite is named, of all ranks.
        optimizer.zero_grad()
        backward(model, rank, float("nan") if rank in (0, world_size - 1) else 1.0)
        with pytest.raises(RuntimeError, match=rf"on rank 0: .*; rank {world_size - 1}: .*linear\.weight"):
            optimizer.step()
        optimizer.zero_grad()
        # And who has other values.
        kept = model.linear.bias.detach().clone()
        with torch.no_grad():
            model.linear.bias[1] += float(rank == world_size - 1)
        with pytest.raises(RuntimeError, match=rf"'linear.bias' at \(1,\) differs: .* on rank {world_size - 1}"):
            optimizer.check_replicas()
        with torch.no_grad():
            model.linear.bias.copy_(kept)
        optimizer.param_groups[0]["lr"] = 0.1 * (rank == world_size - 1)
        with pytest.raises(RuntimeError, match=r"lr of param group 0 differs: 0.0 on rank 0, 0.1 on rank"):
            optimizer.check_replicas()


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_measures_are_those_of_all_ranks(shape: tuple[int, int]) -> None:
    run(check_measures, shape[0] * shape[1], shape)


# Ranks that fail


def check_failures(rank: int, _world_size: int, transport: str, sharded: bool) -> None:
    """What one rank raises, all raise that a step has something to do with; nobody waits for ever."""
    params = make_params()
    optimizer = ShardedRAdam(params, mesh=mesh_of((2, 2)), transport=transport, shard_gradients=sharded)

    def iterate(step: int) -> None:
        if sharded:
            pass_backward(params, step, 2, rank)
        else:
            set_grads(params, step)
        if rank == 3 and step == 3:
            params[0].data = params[0].data.double()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(3):
        iterate(step)
    if not sharded and rank < 2:  # its shard group sends nothing to the other
        iterate(3)
        return
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"was torch\.float32 and is now torch\.float64") as error:
        iterate(3)
    assert time.monotonic() - began < 25
    assert "rank 3: " in str(error.value)


@pytest.mark.parametrize(("transport", "sharded"), [("gloo", True), ("shared_memory", True), ("gloo", False)])
def test_what_one_rank_raises_all_raise(transport: str, sharded: bool) -> None:
    run(check_failures, 4, transport, sharded)


def die_in_step(rank: int, _world_size: int, transport: str) -> None:
    params = make_params()
    optimizer = ShardedRAdam(params, mesh=mesh_of((2, 2)), transport=transport, shard_gradients=True)
    for step in range(3):
        pass_backward(params, step, 2, rank)
        if rank == 3 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()


def test_a_rank_that_is_killed_is_named_in_both_shard_groups() -> None:
    for *others, last in ends(die_in_step, 4, ("gloo",), ("shared_memory",)):
        assert last.status == -signal.SIGKILL
        for end in others:
            assert end.status == 1
            assert end.text.startswith("RuntimeError: step 3: "), end
            assert "rank 3 has ended: it was killed" in end.text or "rank 3 is gone" in end.text, end


# Checkpoints


def build_at(shape: tuple[int, ...] | None, params: list[Parameter], **options: Any) -> ShardedRAdam:
    """Ours over a mesh of two dimensions, or one, or this process alone."""
    named = [(str(index), param) for index, param in enumerate(params)]
    if shape is None:
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        return ShardedRAdam(named, process_group=alone[dist.get_rank()], foreach=True, **options)
    mesh = init_device_mesh("cpu", shape)
    return ShardedRAdam(named, mesh=mesh, foreach=True, bucket_cap_mb=SMALL, **options)


def train_whole(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step, missing_at(step))
        optimizer.step()


def check_checkpoints(rank: int, world_size: int, shape: tuple[int, int], folder: str) -> None:
    theirs = make_params()
    radam = torch.optim.RAdam(theirs, foreach=True)
    train_whole(radam, theirs, range(1, 5))
    model = nn.ParameterList(make_params())
    sharded = build_at(shape, list(model))
    train_whole(sharded, list(model), range(1, 5))
    with CheckpointManager(folder) as manager:
        report = manager.save(4, model=model, optimizer=sharded)
    assert report is not None
    sharded.save(f"{folder}/alone")
    # Every element once, and the work is spread: of the optimizer, each rank has written its part of a part.
    index = read_index(Path(folder, "alone"))
    wanted = sum(param.numel() for param in theirs)
    moments = {key: saved for key, saved in index.tensors.items() if "exp_avg" in key}
    assert sum(math.prod(box.sizes) for saved in moments.values() for box in saved.boxes) == 2 * wanted
    by_file: Counter[str] = Counter()
    for saved in moments.values():
        for box in saved.boxes:
            by_file[box.extent.file] += math.prod(box.sizes)
    assert len(by_file) == world_size
    assert max(by_file.values()) <= 2 * sharded._shards.flats[0].plan.local_numel // shape[0] + 2
    train_whole(radam, theirs, range(5, STEPS))
    shapes: list[tuple[int, ...] | None] = [(shape[1], shape[0]), (world_size,), (1, world_size), shape, None]
    for other in shapes:
        for path in ("step_4", "alone"):
            params = nn.ParameterList(make_params())
            loaded = build_at(other, list(params))
            if path == "alone":
                with torch.no_grad():
                    for param, value in zip(params, model, strict=True):
                        param.copy_(value)
                loaded.load(f"{folder}/{path}")
            else:
                group = loaded.process_group if other is None else None
                with CheckpointManager(folder, process_group=group) as manager:
                    manager.load(4, model=params, optimizer=loaded)
            train_whole(loaded, list(params), range(5, STEPS))
            assert_same(params, theirs, (other, path))
            dist.barrier()
    # What one process had saved, and what torch saves.
    once = build_at(None, list(make_params()))
    assert once.ranks == [rank]
    dcp.save(  # type: ignore[attr-defined]
        {"optimizer": sharded.sharded_state_dict()}, checkpoint_id=f"{folder}/torchs"
    )
    again = nn.ParameterList(make_params())
    other_mesh = build_at((shape[1], shape[0]), list(again))
    state = {"optimizer": other_mesh.sharded_state_dict()}
    dcp.load(  # type: ignore[attr-defined]
        state, checkpoint_id=f"{folder}/torchs"
    )
    other_mesh.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for param, value in zip(again, model, strict=True):
            param.copy_(value)
    train_whole(other_mesh, list(again), range(5, STEPS))
    assert_same(again, theirs)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (2, 4)])
def test_a_checkpoint_has_each_element_once_and_loads_anywhere(shape: tuple[int, int], tmp_path: Path) -> None:
    run(check_checkpoints, shape[0] * shape[1], shape, str(tmp_path))


def check_consolidation(rank: int, world_size: int, shape: tuple[int, int]) -> None:
    theirs = make_params(torch.bfloat16)
    ours = make_params(torch.bfloat16)
    model = nn.ParameterList(ours)
    alone, sharded = build_at(None, theirs), build_at(shape, ours)
    for optimizer, params in ((alone, theirs), (sharded, ours)):
        train_whole(optimizer, params, range(1, STEPS))
    wanted, masters = alone.consolidate_state_dict(), alone.full_precision_state_dict(nn.ParameterList(theirs))
    assert wanted is not None
    assert masters is not None
    for to in range(world_size):
        found = sharded.consolidate_state_dict(to=to)
        assert (found is not None) == (rank == to)
        if found is not None:
            assert equal(found["state"], wanted["state"])
            assert equal(sharded.state_dict()["state"], wanted["state"])
        full = sharded.full_precision_state_dict(model, to=to)
        assert (full is not None) == (rank == to)
        assert full is None or equal(full, masters)
    assert (sharded.consolidate_state_dict() is not None) == (rank == 0)
    assert "to=7: expected a rank of the group, 0 to 3" in told(lambda: sharded.consolidate_state_dict(to=7))
    for on_rank_0 in (True, False):
        options = StateDictOptions(full_state_dict=True, cpu_offload=on_rank_0)
        gathered = get_optimizer_state_dict(model, sharded, options=options)
        assert bool(gathered) == (not on_rank_0 or rank == 0)
    new = build_at((shape[1], shape[0]), make_params(torch.bfloat16))
    new.load_state_dict(wanted)
    again = new.consolidate_state_dict(to=1)
    assert again is None or equal(again["state"], wanted["state"])
    copied = copy.deepcopy(sharded)
    set_grads([param for group in copied.param_groups for param in group["params"]], STEPS)
    copied.step()
    replicas_are_equal(copied, shape)


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_the_state_is_gathered_on_a_global_rank(shape: tuple[int, int]) -> None:
    run(check_consolidation, 4, shape)
