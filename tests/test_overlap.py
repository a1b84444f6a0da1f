"""Parameters that arrive during the next forward, and one copy of them for all ranks of a host."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import io
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sharded_radam import ShardedRAdam
from sharded_radam.arrivals import Arrivals, ArrivingParameter
from sharded_radam.transport import Handle
from tests.cases import assert_same
from tests.gradients.test_gradients import OPTIONS, SMALL, Training, images, train, unused_on_some_ranks
from tests.ranks import WORLD_SIZES, run

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

    def wait(self, is_last: bool = True) -> None:
        Held.waited += 1
        self.handle.wait(is_last)


def step_and_hold(optimizer: ShardedRAdam, model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    network = optimizer._shards.transport
    gather = type(network).all_gather
    with mock.patch.object(network, "all_gather", lambda bucket: [Held(h) for h in gather(network, bucket)]):
        optimizer.step()
    Held.waited = 0


def usable(model: nn.Module) -> None:
    """What was copied while parameters travelled has ordinary parameters, of after the step."""
    assert all(type(param) is Parameter for param in model.parameters())
    model(torch.ones(1, 33))


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


READERS: dict[str, Callable[[nn.Module, ShardedRAdam], object]] = {
    "state_dict": lambda model, _: model.state_dict(),
    "norm": lambda model, _: next(model.parameters()).norm(),
    "data": lambda model, _: next(model.parameters()).data,
    "foreach": lambda model, _: torch._foreach_norm(list(model.parameters())),
    "deepcopy": lambda model, _: usable(copy.deepcopy(model)),
    "deepcopy of one": lambda model, _: copy.deepcopy(next(model.parameters())).numel(),
    "copy of one": lambda model, _: copy.copy(next(model.parameters())).numel(),
    "AveragedModel": lambda model, _: usable(AveragedModel(model)),
    "torch.save": lambda model, _: usable(torch.load(saved(model), weights_only=False)),
    "numpy": lambda model, _: next(model.parameters()).detach().numpy(),
    "item": lambda model, _: next(model.parameters())[0, 0].item(),
    "data_ptr": lambda model, _: next(model.parameters()).data_ptr(),
    "to": lambda model, _: next(model.parameters()).to(torch.float64),
    "repr": lambda model, _: repr(next(model.parameters())),
    "in place": lambda model, _: nn.init.zeros_(next(model.parameters())),
    "optimizer.state_dict": lambda _, optimizer: optimizer.consolidate_state_dict(),
    "step": lambda _, optimizer: optimizer.step(),
}


def exchange_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        assert param.grad is not None
        param.grad = grad = param.grad + 1
        assert param.grad is grad
        del param.grad
        assert param.grad is None


NOT_READERS: dict[str, Callable[[nn.Module, ShardedRAdam], object]] = {
    "zero_grad": lambda _, optimizer: optimizer.zero_grad(),
    "model.zero_grad": lambda model, _: model.zero_grad(),
    "grad": lambda model, _: exchange_gradients(model),
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
        assert Held.waited == 2 * (world_size - 1) * optimizer._shards.flats[0].plan.num_buckets, name
        optimizer._shards.wait()
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
    everywhere = optimizer._shards.transport.all_gather_objects(
        [param.detach().clone() for param in model.parameters()]
    )
    for other in everywhere:
        assert_same(other, everywhere[0])


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_nobody_reads_stale_parameters(world_size: int) -> None:
    run(check_readers, world_size)


def check_threads(rank: int, world_size: int) -> None:
    """Threads that read at once all have the new values, however long these take."""
    model = nn.Sequential(*(nn.Linear(33, 33) for _ in range(6)))
    optimizer = ShardedRAdam(model.parameters(), transport="gloo", bucket_cap_mb=0.005, lr=1.0)
    optimizer.overlap_forward(model)

    class Slow(Held):
        def wait(self, is_last: bool = True) -> None:
            time.sleep(0.01)
            super().wait(is_last)

    for _ in range(3):
        with mock.patch(f"{__name__}.Held", Slow):
            step_and_hold(optimizer, model)
        found: list[list[Tensor]] = []

        def read(found: list[list[Tensor]] = found) -> None:
            with torch.no_grad():
                found.append([param.clone() for param in model.parameters()])

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        everywhere = optimizer._shards.transport.all_gather_objects(found[0])
        for other in (*found, *everywhere):
            assert_same(other, found[0])


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_threads_that_read_at_once(world_size: int) -> None:
    run(check_threads, world_size)


def check_compiled(rank: int, world_size: int, has_streams: bool) -> None:
    """Compiled after the call: the same results, in whatever way."""
    results = []
    for way in (None, "wrapped", "in place", "block", "block replaced"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 33))
        optimizer = ShardedRAdam(model.parameters(), transport="gloo", bucket_cap_mb=SMALL, lr=0.1)
        with streams(["main"]) if has_streams else contextlib.nullcontext():
            optimizer.overlap_forward(model)
            call: Any = torch.compile(model, backend="aot_eager") if way == "wrapped" else model
            if way == "in place":
                model.compile(backend="aot_eager")
            if way == "block":
                model[0].compile(backend="eager")
            if way == "block replaced":
                model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
            for step in range(4):
                call(torch.full((2, 33), 1.0 + rank + step)).square().mean().backward()
                for param in model.parameters():
                    dist.all_reduce(param.grad)
                optimizer.step()
                optimizer.zero_grad()
                arriving = all(type(param) is ArrivingParameter for param in model.parameters())
                assert arriving == (world_size > 1 and way not in ("in place", "block")), way
            results.append([param.detach().clone() for param in model.parameters()])
        assert_same(results[0], results[-1], way)


@pytest.mark.parametrize("has_streams", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_models_that_are_compiled_later(world_size: int, has_streams: bool) -> None:
    run(check_compiled, world_size, has_streams)


# Streams, which only say what is current


@contextlib.contextmanager
def streams(current: list[str], is_captured: Callable[[], bool] = lambda: False) -> Iterator[Callable[[str], Any]]:
    """Have streams on the CPU, of which the last one is current; yields torch.cuda.stream."""

    @contextlib.contextmanager
    def stream(name: str) -> Iterator[None]:
        current.append(name)
        yield
        current.pop()

    with (
        mock.patch("sharded_radam.streams.has_streams", return_value=True),
        mock.patch("torch.cuda.current_stream", side_effect=lambda _: current[-1]),
        mock.patch("torch.cuda.stream", stream),
        mock.patch("torch.cuda.is_current_stream_capturing", is_captured),
    ):
        yield stream


class Wait:
    """Work whose waiting is noted, with the stream that waits."""

    def __init__(self, current: list[str], noted: list[str]) -> None:
        self.current, self.noted = current, noted

    def wait(self) -> None:
        self.noted.append(self.current[-1])


def arriving(current: list[str]) -> tuple[nn.Linear, Arrivals, list[str]]:
    """A module whose parameters arrive, and who has waited."""
    model, noted = nn.Linear(3, 3), list[str]()
    optimizer = ShardedRAdam(model.parameters())
    arrivals = Arrivals()
    arrivals.hook(model)
    arrivals.begin(optimizer._shards.flats, {(0, 0): [Handle(Wait(current, noted))]})  # type: ignore[arg-type]
    return model, arrivals, noted


def test_each_stream_that_reads_waits_once() -> None:
    current = ["main"]
    with streams(current) as on:
        model, arrivals, noted = arriving(current)
        assert noted == []
        with on("side"):
            model.weight.norm()
            model.weight.norm()
        assert noted == ["side"]
        model(torch.ones(3))
        model(torch.ones(3))
        assert noted == ["side", "main"]
        with on("other"):
            model.bias.detach()  # its module's forward has left it as it was
        assert noted == ["side", "main", "other"]
        usable_copy = copy.deepcopy(model)
        assert type(usable_copy.weight) is Parameter
        arrivals.end()
        assert type(model.weight) is Parameter
        with on("late"):
            model.weight.norm()
        assert noted == ["side", "main", "other"]


def test_the_module_has_parameters_of_its_own_class_in_its_forward() -> None:
    """Not those that ask for each operation; also where the forward fails, others wait again."""
    current = ["main"]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Parameter(torch.ones(3))

        def forward(self, fails: bool) -> None:
            assert type(self.weight) is Parameter
            if fails:
                raise KeyError

    with streams(current):
        model = Net()
        optimizer = ShardedRAdam(model.parameters())
        arrivals, noted = Arrivals(), list[str]()
        arrivals.hook(model)
        arrivals.begin(optimizer._shards.flats, {(0, 0): [Handle(Wait(current, noted))]})  # type: ignore[arg-type]
        for fails in (False, True):
            with pytest.raises(KeyError) if fails else contextlib.nullcontext():
                model(fails)
            assert type(model.weight) is ArrivingParameter
        assert noted == ["main"]
        arrivals.end()


def test_no_wait_crosses_the_border_of_a_captured_graph() -> None:
    current, captured = ["main"], [False]
    with streams(current, lambda: captured[0]):
        model, arrivals, noted = arriving(current)
        captured[0] = True  # all that was launched before has ended
        model(torch.ones(3))
        model.weight.norm()
        arrivals.end()
        assert noted == []
        model, arrivals, noted = arriving(current)  # launched in the graph, and waited for there
        assert noted == ["main"]
        assert type(model.weight) is Parameter


def test_arrivals_do_not_outlive_their_owner() -> None:
    """On a device with streams nobody knows that all have waited until the next step, which may never come."""
    current = ["main"]
    with streams(current):
        model, arrivals, noted = arriving(current)
        reference = weakref.ref(arrivals)
        del arrivals
        assert reference() is not None
        weight = model.weight
        del model
        gc.collect()
        assert reference() is not None  # nobody has waited
        weight.norm()
        gc.collect()
        assert reference() is None
        weight.norm()
        assert noted == ["main"]


def test_overlap_is_refused_where_it_cannot_be() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs parameters_as_bucket_view=True"):
        ShardedRAdam(model.parameters(), parameters_as_bucket_view=False).overlap_forward(model)
    optimizer = ShardedRAdam(model.parameters())
    with pytest.raises(ValueError, match="not for compiled models, and it is"):
        optimizer.overlap_forward(torch.compile(model))  # type: ignore[arg-type]
    model[1].compile()
    with pytest.raises(ValueError, match="not for compiled models, and its module '1' is"):
        optimizer.overlap_forward(model)
    model[1] = torch.compile(nn.Linear(2, 2))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="not for compiled models, and its module '1' is"):
        optimizer.overlap_forward(model)


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps_rollup")
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
    return int(sum(optimizer._shards.transport.all_gather_objects(grown)))


def check_read_in_a_graph(rank: int, world_size: int) -> None:
    """When the graph runs, nobody asks; so its parameters have arrived when the step returns."""
    model = nn.Linear(70, 70)
    optimizer = ShardedRAdam(model.parameters(), transport="gloo" if world_size > 1 else None)
    optimizer.overlap_forward(model)
    for is_captured in (False, True, False):
        with mock.patch.object(Arrivals, "_is_captured", lambda _, is_captured=is_captured: is_captured):
            model(torch.ones(2, 70))
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        is_under_way = any(type(param) is ArrivingParameter for param in model.parameters())
        assert is_under_way == (world_size > 1 and optimizer._shards.steps == 1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_parameters_that_a_graph_reads_arrive_within_the_step(world_size: int) -> None:
    run(check_read_in_a_graph, world_size)
