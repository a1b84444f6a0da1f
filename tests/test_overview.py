"""What an optimizer says of itself, beside what can be counted from outside."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import profile

from sharded_radam import ShardedRAdam
from sharded_radam.plan import ParamSpec, make_plan
from sharded_radam.stats import ownership
from sharded_radam.transport.meter import Meter
from tests.cases import make_params, set_grads
from tests.ranks import WORLD_SIZES, run

TRANSPORTS = ("native", "gloo", "shared_memory")
NUM_STEPS = 3


def others(num_bytes: int, world_size: int) -> int:
    return num_bytes * (world_size - 1) // world_size


def check_step(rank: int, world_size: int) -> None:
    for transport in TRANSPORTS:
        for dtype in (torch.float32, torch.bfloat16):
            params = make_params(dtype)
            optimizer = ShardedRAdam(params, transport=transport, bucket_cap_mb=1e-2)
            (flat,) = optimizer._shards.flats
            built = optimizer.stats()
            assert (built.steps, built.collectives, built.milliseconds) == (0, {}, {})
            for step in range(1, NUM_STEPS + 1):
                set_grads(params, step)
                optimizer.step()
            found = optimizer.stats()
            assert (found.rank, found.world_size, found.steps) == (rank, world_size, NUM_STEPS)
            assert found.transport == (transport if world_size > 1 else "none")
            assert found.engine == "fused"
            assert (found.num_params, found.numel) == (len(params), sum(param.numel() for param in params))
            assert found.padding_numel == flat.buffer.numel() - found.numel
            assert found.param_bytes == found.numel * dtype.itemsize
            per_element = 8 if dtype == torch.float32 else 12
            assert found.state_bytes == flat.buffer.numel() // world_size * per_element
            assert found.replicated_state_bytes == 2 * found.param_bytes
            assert (found.gradient_bytes, found.bucket_bytes) == (0, 0)
            if world_size > 1:
                assert found.num_buckets > 1
                # The first step compares the ranks' parameters.
                assert found.collectives == {"all_gather": NUM_STEPS * found.num_buckets, "all_reduce": 1}
                assert found.received_bytes["all_gather"] == NUM_STEPS * others(flat.buffer.nbytes, world_size)
            else:
                assert found.collectives == {}
            assert found.milliseconds.keys() == {"update", "all_gather"}
            assert found.milliseconds["update"] > 0
            assert json.loads(json.dumps(dataclasses.asdict(found)))["steps"] == NUM_STEPS
            again = optimizer.stats()
            assert again == found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_figures_of_steps(world_size: int) -> None:
    run(check_step, world_size)


def check_gradients(_rank: int, world_size: int) -> None:
    for transport in TRANSPORTS:
        for dtype in (torch.float32, torch.bfloat16):
            model = nn.Sequential(nn.Linear(17, 130), nn.Linear(130, 257)).to(dtype)
            optimizer = ShardedRAdam(
                model.parameters(), transport=transport, bucket_cap_mb=1e-2, shard_gradients=True, lr=1e-4
            )
            (flat,) = optimizer._shards.flats
            for _ in range(NUM_STEPS):
                model(torch.ones(3, 17, dtype=dtype)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            found = optimizer.stats()
            assert found.gradient_bytes == flat.buffer.numel() // world_size * 4
            # Half precision is packed into one half of each slot of native, and received into the other.
            memory = torch.float32 if transport == "native" and world_size > 1 else dtype
            slots = {"native": 2, "gloo": 4, "shared_memory": 3}[transport] if world_size > 1 else 1
            assert found.bucket_bytes == slots * flat.plan.bucket_numel * memory.itemsize
            assert {"update", "all_gather", "reduce_scatter"} == found.milliseconds.keys()
            if world_size > 1:
                assert found.collectives["reduce_scatter"] == NUM_STEPS * found.num_buckets
                expected = NUM_STEPS * others(flat.buffer.numel() * dtype.itemsize, world_size)
                assert found.received_bytes["reduce_scatter"] == expected
                assert found.collectives["broadcast"] == len(list(model.parameters()))
            before = found.collectives.get("all_reduce", 0)
            optimizer.grad_norm()
            # Flags of what has a gradient, and the norm.
            assert optimizer.stats().collectives.get("all_reduce", 0) - before == (2 if world_size > 1 else 0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_figures_of_sharded_gradients(world_size: int) -> None:
    run(check_gradients, world_size)


def check_shared(_rank: int, world_size: int) -> None:
    params = make_params()
    optimizer = ShardedRAdam(params, share_parameters=world_size > 1)
    set_grads(params, 1)
    optimizer.step()
    assert optimizer.stats().received_bytes.get("all_gather", 0) == 0
    assert optimizer.stats().collectives.get("all_gather", 0) == (world_size > 1)
    dist.barrier()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_shared_parameters_are_not_received(world_size: int) -> None:
    run(check_shared, world_size)


def check_copy(rank: int, world_size: int) -> None:
    """A copy has its own figures, and says what it is without the other ranks."""
    for options in ({"transport": "gloo"}, {}, {"shard_gradients": True}):
        params = make_params()
        optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3, **options)
        set_grads(params, 1)
        optimizer.step()
        before = optimizer.stats()
        copied = copy.deepcopy(optimizer)
        if rank == 0:  # the others are not there
            stats = copied.stats()
            assert (stats.steps, stats.collectives, stats.received_bytes, stats.bucket_bytes) == (0, {}, {}, 0)
            assert (stats.state_bytes, stats.transport) == (before.state_bytes, before.transport)
            assert str(world_size) in copied.describe()
        for param in (param for group in copied.param_groups for param in group["params"]):
            param.grad = torch.ones_like(param)
        copied.step()
        copied.zero_grad()
        assert copied.stats().steps == 1
        gathers = copied.stats().collectives.get("all_gather")
        assert gathers == before.collectives.get("all_gather")
        after = optimizer.stats()
        assert (after.steps, after.collectives, after.received_bytes) == (1, before.collectives, before.received_bytes)
        optimizer.zero_grad()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_copy_has_its_own_figures(world_size: int) -> None:
    run(check_copy, world_size)


def spec(name: str, numel: int, group: int = 0) -> ParamSpec:
    return ParamSpec(name, (numel,), (0,), torch.float32, "cpu", group)


def test_the_table_of_owners() -> None:
    params = [spec("a", 100), spec("b", 5), spec("c", 200), *(spec(f"d.{i}", 1) for i in range(8)), spec("e", 3, 1)]
    plan = make_plan(params, 2, bucket_cap_mb=512 * 4 / 2**20)
    table = ownership([(flat, [params[slot.param] for slot in flat.slots]) for flat in plan.flats])
    assert table.splitlines() == [
        "group 0, float32, cpu: 11 parameters, 1024 elements with 711 of padding, 2 buckets",
        "bucket  rank  elements  parameters",
        "     0     0     0:256  a, b, c[0:64]",
        "     0     1   256:512  c[64:200], d.0",
        "     1     0   512:768  d.1, d.2, d.3, d.4",
        "     1     1  768:1024  d.5, d.6, d.7",
        "group 1, float32, cpu: 1 parameters, 128 elements with 125 of padding, 1 buckets",
        "bucket  rank  elements  parameters",
        "     0     0      0:64  e",
        "     0     1    64:128  padding",
    ]
    alone = make_plan(params, 1)
    row = ownership([(alone.flats[0], params)]).splitlines()[-1]
    assert row == "     0     0     0:960  a, b, 8 more, d.7"


def check_describe(_rank: int, world_size: int) -> str:
    model = nn.Linear(17, 257)
    text = ShardedRAdam(model.named_parameters()).describe()
    rows = [line.split() for line in text.splitlines()[3:]]
    assert [int(row[1]) for row in rows] == list(range(world_size))
    assert "weight" in rows[0][3]
    return text


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_describes_all_of_them(world_size: int) -> None:
    assert len(set(run(check_describe, world_size))) == 1


def check_ranges(_rank: int, _world_size: int) -> None:
    model = nn.Linear(3, 5)
    optimizer = ShardedRAdam(model.parameters(), shard_gradients=True)
    with profile() as profiled:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    names = {event.key for event in profiled.key_averages()}
    assert {f"sharded_radam::{phase}" for phase in ("update", "all_gather", "reduce_scatter")} <= names


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranges_in_a_profile(world_size: int) -> None:
    run(check_ranges, world_size)


class FakeEvent:
    """An event of a device whose clock counts records; it is over when it is waited for."""

    now = 0
    waited = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        FakeEvent.waited += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


def test_phases_on_a_device_are_timed_by_events_and_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device_module: Any = type("module", (), {"Event": FakeEvent})
    monkeypatch.setattr(torch, "get_device_module", lambda device: device_module)
    meter = Meter(torch.device("cuda"))
    with meter.phase("update"):
        pass
    assert meter.milliseconds() == {}
    assert FakeEvent.now == 0
    meter.times_phases = True
    for name in ("update", "all_gather", "update"):
        with meter.phase(name):
            pass
    assert FakeEvent.waited == 0  # the host waits when it asks, and not before
    assert meter.milliseconds() == {"all_gather": 1.0, "update": 2.0}
    assert meter.milliseconds() == {"all_gather": 1.0, "update": 2.0}
    assert FakeEvent.waited == 3


def test_phases_are_off_again_when_switched_off() -> None:
    params = make_params()
    optimizer = ShardedRAdam(params)
    optimizer.time_phases(False)
    set_grads(params, 1)
    optimizer.step()
    assert optimizer.stats().milliseconds == {}
