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

from sharded_radam import ShardedRAdam, make_mesh
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
        received = sharded.stats().received_bytes.get("average", 0)
        assert received == STEPS * 2 * whole // shape[0] * (shape[0] - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_sharded_gradients_are_the_mean_over_all_ranks(shape: tuple[int, int]) -> None:
    run(check_sharded, shape[0] * shape[1], shape)


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


def check_some_ranks(rank: int, _world_size: int) -> None:
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


def test_a_mesh_of_some_ranks() -> None:
    run(check_some_ranks, 8)


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
