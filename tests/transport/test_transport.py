"""What travels, between whom, and what happens when ranks do not do the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from sharded_radam import ShardedRAdam, compat
from sharded_radam.compat import ALL_GATHER
from sharded_radam.plan import FlatPlan
from sharded_radam.transport import make_transport, native
from sharded_radam.update import update_buckets
from tests.cases import assert_same, make_params, missing_at, set_grads
from tests.ranks import WORLD_SIZES, run

COLLECTIVES = (ALL_GATHER, "isend", "irecv", "all_reduce", "broadcast", "all_gather_object", "barrier", "gather")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the calls of torch.distributed, and the bytes sent."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            original = getattr(dist, name)

            def call(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                counts[_name] += 1
                if _name == "isend":
                    counts["bytes sent"] += args[0].nbytes
                return _original(*args, **kwargs)

            patch.setattr(dist, name, call)
        yield counts


def check_counts(rank: int, world_size: int) -> None:
    for transport in ("gloo", "native"):
        params = make_params()
        with counted() as at_construction:
            optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3, transport=transport)
        assert not at_construction  # ranks meet in the store
        (flat,) = optimizer._shards.flats
        assert flat.plan.num_buckets > 3
        set_grads(params, 1)
        with counted() as at_first:
            optimizer.step()  # compares the ranks' parameters
        assert at_first["all_reduce"] == (world_size > 1)
        for missing in ((), missing_at(3), range(len(params))):
            set_grads(params, 1, missing)
            with counted() as counts:
                optimizer.step()
            messages = flat.plan.num_buckets * (world_size - 1)
            if world_size == 1:
                assert not counts
            elif transport == "gloo":
                sent = flat.plan.local_numel * 4 * (world_size - 1)
                assert counts == {"isend": messages, "irecv": messages, "bytes sent": sent}
            else:
                assert counts == {ALL_GATHER: flat.plan.num_buckets}
        with counted() as counts:
            optimizer.consolidate_state_dict(to=world_size - 1)
        # Moments travel as they are, bucket by bucket, to one rank; nothing is pickled or broadcast.
        messages, sends = 2 * flat.plan.num_buckets, rank != world_size - 1
        if world_size == 1:
            assert counts == {}
        elif transport == "native":
            assert counts == {"gather": messages}
        elif sends:
            assert counts == {"isend": messages, "bytes sent": 2 * flat.plan.local_numel * 4}
        else:
            assert counts == {"irecv": messages * (world_size - 1)}
        with counted() as counts:
            optimizer.sharded_state_dict()
            optimizer.zero_grad()
        assert not counts


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_collectives_are_counted(world_size: int) -> None:
    run(check_counts, world_size)


def check_transports(_rank: int, world_size: int) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
    results = []
    for transport in ("gloo", "native", "shared_memory", None):
        params = [p for dtype in dtypes for p in make_params(dtype)]
        optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3, transport=transport)
        assert optimizer._shards.transport.name == ("none" if world_size == 1 else transport or "shared_memory")
        for step in range(1, 8):
            set_grads(params, step, missing_at(step))
            optimizer.step()
        results.append(params)
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_transports_give_the_same_bits(world_size: int) -> None:
    run(check_transports, world_size)


def check_missing_gradients(rank: int, world_size: int) -> None:
    """What DDP never does: gradients on some ranks only. Nothing hangs, and ranks end with equal parameters."""
    for absent in ({0}, set(range(1, world_size)), set(range(world_size))):
        params = make_params()
        optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3)
        for step in range(1, 4):
            set_grads(params, step, range(len(params)) if rank in absent else ())
            if rank == 0 and params[0].grad is not None:
                params[0].grad.fill_(float("inf"))
            optimizer.step()
        for param in params:
            everyone = [torch.empty_like(param).contiguous() for _ in range(world_size)]
            dist.all_gather(everyone, param.detach().contiguous())
            assert all(torch.equal(other.nan_to_num(), everyone[0].nan_to_num()) for other in everyone)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_on_some_ranks_only_do_not_hang(world_size: int) -> None:
    run(check_missing_gradients, world_size)


def check_layouts(rank: int, world_size: int) -> None:
    last = world_size - 1

    def params_of(case: str) -> list[tuple[str, Parameter]]:
        shapes = {"a": (3, 5), "b": (7,), "c": (2,)}
        if rank == last and case == "shape":
            shapes["b"] = (8,)
        if rank == last and case == "count":
            del shapes["c"]
        found = [(name, torch.zeros(shape)) for name, shape in shapes.items()]
        if rank == last and case == "order":
            found = [found[1], found[0], found[2]]
        if rank == last and case == "memory format":
            found[0] = ("a", torch.zeros(5, 3).t())
        if rank == last and case == "dtype":
            found[2] = ("c", found[2][1].double())
        return [(name, Parameter(tensor)) for name, tensor in found]

    first = {"shape": "b", "count": "c", "order": "a", "memory format": "a", "dtype": "c"}
    for case, name in first.items():
        with pytest.raises(
            ValueError, match=rf"layout differs between ranks 0 and {last}, first at parameter '{name}'"
        ):
            ShardedRAdam(params_of(case))
    optimizer = ShardedRAdam(params_of(""))
    with pytest.raises(ValueError, match=rf"layout differs between ranks 0 and {last}, first at parameter 'd'"):
        optimizer.add_param_group({"params": [("d", Parameter(torch.zeros(3 + (rank == last))))]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_layouts_that_differ_raise_on_every_rank(world_size: int) -> None:
    run(check_layouts, world_size)


def check_sub_groups(rank: int, world_size: int) -> None:
    """Ranks of a group are not global ranks: here they are without rank 0, too."""
    for members in ([r for r in range(world_size) if r % 2], list(range(1, world_size)), list(range(world_size))):
        if not members:
            continue
        group = dist.new_group(members)
        if rank not in members:
            with pytest.raises(ValueError, match="process_group does not contain this process"):
                ShardedRAdam(make_params(), process_group=group)
            continue
        ours, theirs = make_params(), make_params()
        sharded = ShardedRAdam(ours, foreach=True, process_group=group, bucket_cap_mb=1e-3)
        radam = torch.optim.RAdam(theirs, foreach=True)
        for step in range(1, 9):
            for optimizer, params in ((sharded, ours), (radam, theirs)):
                set_grads(params, step)
                optimizer.step()
        assert_same(ours, theirs)
        assert sharded._shards.transport.world_size == len(members)
        with pytest.raises(ValueError, match=r"to=7: expected a rank of the group"):
            sharded.consolidate_state_dict(to=7)
        assert (sharded.consolidate_state_dict() is not None) == (rank == members[0])
        saved = sharded.consolidate_state_dict(to=members[-1])
        assert (saved is not None) == (rank == members[-1])
        if saved is not None:
            assert torch.equal(saved["state"][1]["exp_avg"], radam.state[theirs[1]]["exp_avg"])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_process_group_of_some_ranks(world_size: int) -> None:
    run(check_sub_groups, world_size)


def check_few_elements(_rank: int, world_size: int) -> None:
    """Fewer elements than ranks: most own nothing, and their counts go on all the same."""
    ours, theirs = [Parameter(torch.ones(()))], [Parameter(torch.ones(()))]
    sharded, radam = ShardedRAdam(ours, foreach=True), torch.optim.RAdam(theirs, foreach=True)
    for step in range(1, 9):
        for optimizer, params in ((sharded, ours), (radam, theirs)):
            set_grads(params, step)
            optimizer.step()
    assert_same(ours, theirs)
    assert sharded.state[ours[0]]["step"] == 8
    assert sharded.state[ours[0]]["exp_avg"].numel() == int(sharded._shards.transport.rank == 0)
    empty = ShardedRAdam([Parameter(torch.ones(0, 3))])
    empty.step()
    assert (empty.consolidate_state_dict() is None) == (sharded._shards.transport.rank != 0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_fewer_elements_than_ranks(world_size: int) -> None:
    run(check_few_elements, world_size)


def check_many_buckets(_rank: int, _world_size: int) -> None:
    """Hundreds of messages in flight arrive where they belong."""
    params = [Parameter(torch.zeros(100_000))]
    optimizer = ShardedRAdam(params, bucket_cap_mb=1e-6, lr=1.0)
    assert optimizer._shards.flats[0].plan.num_buckets > 380
    params[0].grad = torch.arange(100_000.0)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), -torch.arange(100_000.0))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_many_buckets_in_flight(world_size: int) -> None:
    run(check_many_buckets, world_size)


def check_overlap(_rank: int, _world_size: int) -> None:
    """Bucket i travels while bucket i+1 is updated: nothing is waited for before the last update."""
    params = make_params()
    optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3)
    order: list[str] = []
    network, update = optimizer._shards.transport, update_buckets
    gather = network.all_gather

    class Waits:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def wait(self) -> None:
            order.append("wait")
            self.handle.wait()

    def gathering(bucket: torch.Tensor) -> Any:
        order.append("gather")
        return [Waits(handle) for handle in gather(bucket)]

    def updating(*args: Any) -> None:
        order.append("update")
        update(*args)

    set_grads(params, 1)
    with mock.patch.object(network, "all_gather", gathering), mock.patch("sharded_radam.step.update_buckets", updating):
        optimizer.step()
    buckets = optimizer._shards.flats[0].plan.num_buckets
    assert order[: 2 * buckets] == ["update", "gather"] * buckets
    assert set(order[2 * buckets :]) <= {"wait"}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_communication_overlaps_the_update(world_size: int) -> None:
    run(check_overlap, world_size)


def check_several_in_one_call(rank: int, world_size: int) -> None:
    """As an accelerator updates them, with an engine whose calls are large."""
    params, others = make_params(), make_params()
    optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3, transport="native", foreach=True)
    one_by_one = ShardedRAdam(others, bucket_cap_mb=1e-3, transport="gloo", foreach=True)
    num_buckets = optimizer._shards.flats[0].plan.num_buckets
    calls = lambda self, _device_type: [range(2), range(2, self.num_buckets)]  # noqa: E731
    for step in range(1, 4):
        set_grads(params, step, missing_at(step))
        set_grads(others, step, missing_at(step))
        before = optimizer.stats().collectives.get("all_gather", 0)
        with mock.patch.object(FlatPlan, "calls", calls), counting_works() as works:
            optimizer.step()
        assert len(works) == 2 * (world_size > 1)
        assert optimizer.stats().collectives.get("all_gather", 0) == before + num_buckets * (world_size > 1)
        one_by_one.step()
        assert_same(params, others)


@contextmanager
def counting_works() -> Iterator[list[Any]]:
    """All-gathers of several tensors in one call."""
    begun: list[Any] = []
    original = compat.all_gather_coalesced

    def begin(*args: Any) -> Any:
        begun.append(original(*args))
        return begun[-1]

    with mock.patch.object(native, "all_gather_coalesced", begin):
        yield begun


@pytest.mark.parametrize("world_size", [*WORLD_SIZES, 8])
def test_several_buckets_are_gathered_in_one_call(world_size: int) -> None:
    run(check_several_in_one_call, world_size)


def check_what_was_done(rank: int, world_size: int) -> None:
    for name in ("native", "gloo", "shared_memory"):
        transport = make_transport(None, torch.device("cpu"), name)
        flags = [rank == 0, rank == world_size - 1, False]
        assert transport.union(flags, 2**32 - 1) == [True, True, False]
        assert transport.union([True] * 3, 0) == [True] * 3
        if world_size > 1:
            for odd in (0, world_size - 1):
                for here, there in ((7, 8), (0, 2**31), (2**32 - 1, 0)):
                    with pytest.raises(RuntimeError, match="ranks have done different things since the last step"):
                        transport.union(flags, here if rank == odd else there)
        for source in {0, world_size - 1, world_size // 2}:
            values = torch.arange(1000.0) * (rank + 1)
            transport.broadcast(values, source)
            assert torch.equal(values, torch.arange(1000.0) * (source + 1))
        assert transport.meter.received_bytes["broadcast"] in (
            0,
            4000 * len({0, world_size - 1, world_size // 2} - {rank}),
        )


@pytest.mark.parametrize("world_size", [*WORLD_SIZES, 8])
def test_ranks_compare_what_they_have_done(world_size: int) -> None:
    run(check_what_was_done, world_size)


def check_another_round(rank: int, world_size: int) -> None:
    """Their collectives match, so that a backend that knows no marks would add up what does not belong together."""
    for odd in {0, world_size - 1}:
        params = make_params()
        optimizer = ShardedRAdam(params, shard_gradients=True, transport="native", bucket_cap_mb=1e-3)
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
            optimizer.zero_grad()
        if rank == odd:
            optimizer.zero_grad()
        set_grads(params, 3)
        before = [param.detach().clone() for param in params]
        with pytest.raises(RuntimeError, match="ranks have done different things"):
            optimizer.step()
        assert_same(params, before)
        others = make_params()
        for ours, theirs in zip(params, others, strict=True):
            theirs.data.copy_(ours.detach())
        optimizer.zero_grad()  # on all ranks, and go on
        set_grads(params, 4)
        optimizer.step()
        assert not torch.equal(params[0], others[0])


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_a_round_of_another_step_is_noticed(world_size: int) -> None:
    run(check_another_round, world_size)


def check_another_round_of_a_mesh(rank: int, world_size: int) -> None:
    """A rank whose row and column differ from it: those in neither must hear of it in the same call."""
    mesh = init_device_mesh("cpu", (2, world_size // 2))
    for transport in ("native", "gloo"):
        optimizer = ShardedRAdam(make_params(), mesh=mesh, transport=transport)
        everyone = optimizer._shards.transport.everyone
        assert everyone.union([rank == 1, False], 5) == [True, False]
        for odd in (0, world_size - 1):
            with pytest.raises(RuntimeError, match="ranks have done different things"):
                everyone.union([True, True], 5 + (rank == odd))
        assert everyone.union([rank == 1, False], 5) == [True, False]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_round_of_another_step_is_noticed_in_a_mesh(world_size: int) -> None:
    run(check_another_round_of_a_mesh, world_size)


def check_choice(rank: int, world_size: int) -> None:
    cpu = torch.device("cpu")
    names = {None: "shared_memory", "gloo": "gloo", "native": "native", "shared_memory": "shared_memory"}
    for name, wanted in names.items():
        assert make_transport(None, cpu, name).name == (wanted if world_size > 1 else "none")
    if world_size > 1:
        with pytest.raises(ValueError, match=r"parameters are on meta.*backends for \['cpu'"):
            make_transport(None, torch.device("meta"), None)
        params = [Parameter(torch.ones(2)), Parameter(torch.ones(2, device="meta"))]
        with pytest.raises(ValueError, match=r"parameters are on \['cpu', 'meta'\]"):
            ShardedRAdam(params)
    mesh = init_device_mesh("cpu", (world_size,))
    sharded = Parameter(distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"'w' is a .*use torch\.optim\.RAdam with FSDP2"):
        ShardedRAdam([("w", sharded)])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_choice_of_transport(world_size: int) -> None:
    run(check_choice, world_size)
