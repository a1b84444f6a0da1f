"""Nothing that two streams do with the same memory is without an order; what would be is found."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from sharded_radam.arrivals import Arrivals, ArrivingParameter
from sharded_radam.gradients.packing import Sums
from sharded_radam.gradients.sharded import ShardedGradients
from sharded_radam.streams import Lane
from sharded_radam.transport import Everyone, Handle, Transport
from sharded_radam.transport.reducers import Queue
from tests.branches import MODES, Training
from tests.clocks import Stream
from tests.races import Races


@pytest.fixture
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A process group that only has ranks; collectives are those of the races."""
    monkeypatch.setattr(Transport, "all_gather_objects", lambda self, item: [item] * self.world_size)
    monkeypatch.setattr("sharded_radam.step._is_check_due", lambda *_: False)  # it reads what it compares
    for kind in (Transport, Everyone):
        monkeypatch.setattr(kind, "union", lambda self, flags, done: list(flags))
    monkeypatch.setattr("sharded_radam.transport._backend", lambda *_: "fake")
    monkeypatch.setattr("sharded_radam.transport.native.backend_of", lambda *_: "nccl")
    world_size = getattr(request, "param", 2)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    yield world_size
    dist.destroy_process_group()


def run_mode(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    overlap: bool = False,
    num_streams: int = 0,
    dtype: torch.dtype = torch.float32,
    mesh: DeviceMesh | None = None,
) -> Training:
    """Train where races are recorded.

    Args:
        monkeypatch: of the test.
        mode: of ``MODES``.
        overlap: whether parameters arrive during forward.
        num_streams: of the branches; all are on the main one if 0.
        dtype: of the parameters.
        mesh: with two dimensions, replicas average their sums.
    """
    train, options = MODES[mode]
    races = Races()
    races.install(monkeypatch)
    with races:
        training = Training(races, monkeypatch, dtype, num_streams, mesh=mesh, **options)
        if overlap:
            training.optimizer.overlap_forward(training.model)
        train(training)
        training.run()
    assert races.num_accesses > 500
    return training


@pytest.mark.parametrize("num_streams", [0, 3])
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("mode", MODES)
def test_all_is_in_an_order(
    monkeypatch: pytest.MonkeyPatch, group: int, mode: str, overlap: bool, num_streams: int
) -> None:
    training = run_mode(monkeypatch, mode, overlap, num_streams)
    assert training.races.found[:3] == []
    assert overlap == (training.races.num_grouped == 0)
    assert overlap == any(type(param) is ArrivingParameter for param in training.model.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", [1, 4], indirect=True)
def test_at_every_world_size_and_in_half_precision(monkeypatch: pytest.MonkeyPatch, group: int, mode: str) -> None:
    assert run_mode(monkeypatch, mode, True, 3, torch.bfloat16).races.found[:3] == []


SHARDED = [mode for mode, (_, options) in MODES.items() if options.get("shard_gradients")]


@pytest.mark.parametrize("num_streams", [0, 3])
@pytest.mark.parametrize("mode", SHARDED)
@pytest.mark.parametrize("group", [2, 4], indirect=True)
def test_replicas_average_in_an_order(monkeypatch: pytest.MonkeyPatch, group: int, mode: str, num_streams: int) -> None:
    mesh = init_device_mesh("cpu", (2, group // 2))
    training = run_mode(monkeypatch, mode, False, num_streams, mesh=mesh)
    assert training.races.found[:3] == []
    if mode != "dropped":  # there another one takes its place
        assert training.optimizer.stats().collectives["average"] > 1


@pytest.mark.parametrize("method", ["wait", "finish_average"])
def test_sums_that_are_under_way_are_found(monkeypatch: pytest.MonkeyPatch, group: int, method: str) -> None:
    """By the update, and by clipping."""
    monkeypatch.setattr(Sums, method, lambda *_: None)
    training = run_mode(
        monkeypatch, "sharded, average" if method == "wait" else "sharded", mesh=init_device_mesh("cpu", (2, 1))
    )
    assert any("all_reduce" in found for found in training.races.found)


def test_on_one_stream_nothing_is_done_for_streams(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    gradients = run_mode(monkeypatch, "sharded").optimizer._shards.gradients
    assert gradients is not None
    assert gradients._lane is not None
    assert not gradients._lane._is_shared


@pytest.mark.parametrize("captured", ["none", "one", "both"])
def test_no_event_crosses_the_border_of_a_captured_graph(monkeypatch: pytest.MonkeyPatch, captured: str) -> None:
    races = Races()
    races.install(monkeypatch)
    side = Stream(races, "side")
    graph = {"none": (), "one": (side,), "both": (side, races.main)}[captured]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: races.current in graph)
    with races:
        lane = Lane(torch.device("meta"))
        torch.zeros(8, device="meta")
        with races.stream(side):
            lane.move()
    assert side.seen[races.main] == (0 if captured == "one" else 1)


# The detector itself


def write_and_read(monkeypatch: pytest.MonkeyPatch, order: Callable[[Races, Stream], None]) -> list[str]:
    """Write on the main stream, read on a side stream after ``order``, and write on the main one again."""
    races = Races()
    races.install(monkeypatch)
    side = Stream(races, "side")
    with races:
        tensor = torch.zeros(8, device="meta")
        order(races, side)
        with races.stream(side):
            tensor.narrow(0, 0, 4).sum()
        tensor.narrow(0, 4, 4).zero_()  # other bytes
        order(races, races.main)
        tensor.zero_()
    return races.found


def no_order(races: Races, to: Stream) -> None:
    pass


def by_stream(races: Races, to: Stream) -> None:
    others = {each.clock for block in races._blocks.values() for each in block.accesses} - {to}
    for other in others:
        assert isinstance(other, Stream)
        to.wait_stream(other)


def by_event(races: Races, to: Stream) -> None:
    for other in (each.clock for block in races._blocks.values() for each in list(block.accesses)):
        assert isinstance(other, Stream)
        to.wait_event(other.record_event())


def by_host(races: Races, to: Stream) -> None:
    for other in (each.clock for block in races._blocks.values() for each in list(block.accesses)):
        assert isinstance(other, Stream)
        other.synchronize()


@pytest.mark.parametrize("order", [by_stream, by_event, by_host])
def test_what_is_ordered_is_no_race(monkeypatch: pytest.MonkeyPatch, order: Callable[[Races, Stream], None]) -> None:
    assert write_and_read(monkeypatch, order) == []


def test_what_is_not_ordered_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    written, read = write_and_read(monkeypatch, no_order)
    assert "main writes [0:32] (aten.zeros.default), then side reads [0:16] (aten.sum.default)" in written
    assert "side reads [0:16] (aten.sum.default), then main writes [0:32] (aten.zero_.default)" in read


@pytest.mark.parametrize("way", ["at once", "recorded", "waited for"])
def test_memory_that_is_freed_is_used_again(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    races = Races()
    races.install(monkeypatch)
    side = Stream(races, "side")
    with races:
        tensor = torch.zeros(8, device="meta")
        side.wait_stream(races.main)
        with races.stream(side):
            tensor.sum()
            if way == "recorded":
                tensor.record_stream(side)  # type: ignore[arg-type]
        del tensor
        if way == "waited for":
            races.main.wait_stream(side)
        torch.zeros(8, device="meta")
    assert ["then it is freed" in race for race in races.found] == ([True] if way == "at once" else [])


def test_work_is_waited_for_by_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    races = Races()
    races.install(monkeypatch)
    side = Stream(races, "side")
    with races:
        tensor = torch.zeros(8, device="meta")
        work: Any = dist.all_reduce(tensor, async_op=True)
        side.wait_stream(races.main)
        work.wait()
        tensor.sum()
        assert races.found == []
        with races.stream(side):
            tensor.sum()
    assert len(races.found) == 1


# Faults


def nothing(*_: Any, **__: Any) -> None:
    pass


def pack_on_the_stream_of_the_last_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lane, "note", nothing)
    monkeypatch.setattr(Lane, "move", nothing)
    monkeypatch.setattr(Lane, "entered", lambda _: contextlib.nullcontext())


def only_the_first_reader_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arrivals, "_stream", lambda _: "the first")


def patch(owner: type, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, nothing)


def end_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardedGradients, "_end_pass", ShardedGradients.settle)


def keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharded_radam.streams.keep", nothing)


def stage_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "copy_", lambda to, source: torch.ops.aten.copy_(to, source, non_blocking=True))


class Fault(NamedTuple):
    """What is broken, in which mode that shows, and the words that the race has then."""

    break_it: Callable[[pytest.MonkeyPatch], None]
    mode: str
    overlap: bool
    num_streams: int
    words: str


PACKED_TOO_EARLY = r"branch \d writes .*branch \d reads .*_foreach_copy_"
READ_TOO_EARLY = r"communication writes .*all_gather.*main reads"

FAULTS = {
    "packed on the stream of the last hook": Fault(
        pack_on_the_stream_of_the_last_hook, "sharded", False, 3, PACKED_TOO_EARLY
    ),
    "packed without waiting for arrivals": Fault(patch(Lane, "note"), "sharded", False, 3, PACKED_TOO_EARLY),
    "the step does not wait for the packing": Fault(
        patch(Lane, "move"), "on other streams", False, 0, "measuring reads .*_foreach_norm.*changing writes"
    ),
    "released while it is packed": Fault(
        patch(Lane, "keep"), "sharded", False, 3, r"branch \d reads .*_foreach_copy_.*freed, and used again"
    ),
    "packed when the caller has waited already": Fault(
        end_elsewhere, "dropped", False, 3, r"main: branch \d .*freed, and used again"
    ),
    "released while it is added to": Fault(
        keep_nothing, "sharded", False, 3, r"branch \d reads .*aten.add.Tensor.*freed, and used again"
    ),
    "a slot is used again at once": Fault(
        patch(Queue, "make_room"), "sharded", False, 0, "communication .*reduce_scatter.*main writes .*_foreach_copy_"
    ),
    "the average takes the waiting away": Fault(only_the_first_reader_waits, "average", True, 0, READ_TOO_EARLY),
    "the forward takes the waiting away": Fault(
        patch(Arrivals, "close"), "average", True, 0, "communication writes .*all_gather.*side reads"
    ),
    "nobody waits in forward": Fault(patch(Arrivals, "wait_for"), "ddp", True, 0, READ_TOO_EARLY),
    "the step does not wait for the gather": Fault(patch(Handle, "wait"), "ddp", False, 0, READ_TOO_EARLY),
    "written before it is staged": Fault(stage_without_waiting, "saves", False, 0, "main writes .*copy_.*host reads"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(monkeypatch: pytest.MonkeyPatch, group: int, fault: str) -> None:
    break_it, mode, overlap, num_streams, words = FAULTS[fault]
    break_it(monkeypatch)
    found = run_mode(monkeypatch, mode, overlap, num_streams).races.found
    assert any(re.search(words, race) for race in found), found[:3]
