"""Ranks that are not together: one that fails in an operation, does another, or is killed. Nobody waits for it in vain.

All raise the same words; and where shared memory is used, they go on together afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.nn import Parameter

from sharded_radam import ShardedRAdam
from sharded_radam.state import consolidate, dicts
from sharded_radam.store import meeting
from tests.cases import num_descriptors
from tests.ranks import CONTEXT, WORLD_SIZES, run, stop

TIMEOUT_S = 3.0
SOON_S = 10.0
"""Far less than the time-out where ranks can know; this is no measure of speed."""

TRANSPORTS = ("shared_memory", "gloo", "native")


def group(transport: str | None) -> dist.ProcessGroup:
    """All ranks; a new one, since a failure may break Gloo's, and with a short time-out where only that helps."""
    waits = TIMEOUT_S if transport in ("gloo", "native") else 30
    made: dist.ProcessGroup = dist.new_group(timeout=dt.timedelta(seconds=waits))
    return made


def build(transport: str | None, sharded: bool = False, **options: Any) -> ShardedRAdam:
    params = [Parameter(torch.ones(40, 11)), Parameter(torch.ones(7))]
    return ShardedRAdam(
        params,
        process_group=group(transport),
        bucket_cap_mb=1e-3,
        transport=transport,
        shard_gradients=sharded,
        **options,
    )


def params_of(optimizer: ShardedRAdam) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def backward(optimizer: ShardedRAdam) -> None:
    torch.stack([param.sum() for param in params_of(optimizer)]).sum().backward()  # type: ignore[no-untyped-call]


def iterate(optimizer: ShardedRAdam) -> None:
    backward(optimizer)
    optimizer.step()
    optimizer.zero_grad()


def told(call: Callable[[], Any]) -> tuple[str, str, float]:
    """Name and text of what a call raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "nothing", "", time.monotonic() - begin


def same(results: list[tuple[str, str, float]], within: float) -> tuple[str, str]:
    """What all ranks raised, all of them within some seconds."""
    assert len({result[:2] for result in results}) == 1, results
    assert all(seconds < within for _, _, seconds in results), results
    return results[0][0], results[0][1]


def goes_on(optimizer: ShardedRAdam) -> None:
    """Everybody is as far as the others, and waits for none of them."""
    for _ in range(3):
        iterate(optimizer)
    assert optimizer.grad_norm() == 0
    optimizer.consolidate_state_dict(to=optimizer._shards.transport.world_size - 1)
    for param in params_of(optimizer):
        everyone = [torch.empty_like(param) for _ in range(optimizer._shards.transport.world_size)]
        dist.all_gather(everyone, param.detach())
        assert all(torch.isfinite(other).all() for other in everyone)


# One rank is elsewhere


def check_consolidate(rank: int, world_size: int, transport: str, sharded: bool) -> tuple[str, str, float]:
    optimizer = build(transport, sharded)
    iterate(optimizer)
    if rank == 0:
        found = told(lambda: optimizer.consolidate_state_dict(to=0))
    else:
        found = told(lambda: iterate(optimizer))
    if transport == "shared_memory":
        optimizer.zero_grad()
        goes_on(optimizer)
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_consolidate_on_one_rank_only(world_size: int, transport: str, sharded: bool) -> None:
    fast = transport == "shared_memory"
    results = run(check_consolidate, world_size, transport, sharded)
    kind, text = same(results, SOON_S if fast else TIMEOUT_S + SOON_S)
    assert kind == "RuntimeError"
    assert "consolidate_state_dict(to=0) after 1 steps" in text
    if fast:
        assert text.startswith("ranks do different things (rank 0: consolidate")
        assert "step 2)" in text


def check_shared_parameters(rank: int, world_size: int) -> tuple[str, str, float]:
    optimizer = build(None, share_parameters=True)
    iterate(optimizer)
    found = told((lambda: optimizer.consolidate_state_dict(to=0)) if rank == 0 else (lambda: iterate(optimizer)))
    optimizer.zero_grad()
    goes_on(optimizer)
    dist.barrier()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_consolidate_on_one_rank_only_with_shared_parameters(world_size: int) -> None:
    assert "ranks do different things" in same(run(check_shared_parameters, world_size), SOON_S)[1]


def check_pass_more(rank: int, world_size: int) -> tuple[str, str, float]:
    """One rank runs a step more, the others look at what they have."""
    optimizer = build(None, sharded=True)
    iterate(optimizer)
    if rank == world_size - 1:
        found = told(lambda: iterate(optimizer))
    else:
        found = told(lambda: optimizer.load_state_dict(copy.deepcopy(LOADED)))
    optimizer.zero_grad()
    goes_on(optimizer)
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_a_pass_more_on_one_rank(world_size: int) -> None:
    kind, text = same(run(check_pass_more, world_size), SOON_S)
    assert kind == "RuntimeError"
    assert f"rank {world_size - 1}: step 2" in text
    assert "load_state_dict() after 1 steps" in text


# One rank fails


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def one_rank(rank: int, world_size: int, fail: Callable[[], Any]) -> None:
    if rank == world_size - 1:
        fail()


LOADED = torch.optim.RAdam([Parameter(torch.ones(40, 11)), Parameter(torch.ones(7))]).state_dict()


def foreign_state(optimizer: ShardedRAdam) -> None:
    optimizer.state[params_of(optimizer)[0]]["exp_avg"] = torch.ones(3)


def recast(optimizer: ShardedRAdam) -> None:
    param = params_of(optimizer)[1]
    param.grad = None
    param.data = param.data.double()


def no_memory(optimizer: ShardedRAdam) -> None:
    def update(*_: Any) -> None:
        raise MemoryError("of 3 GB")

    optimizer._shards.flats[0].copy_in = update  # type: ignore[method-assign, assignment]


FAILURES: dict[str, tuple[Callable[[ShardedRAdam], None], str, str]] = {
    "foreign state": (foreign_state, "ValueError", "loaded exp_avg of parameter '0.0' has shape (3,), expected"),
    "recast": (recast, "RuntimeError", "parameter '0.1' was torch.float32 and is now torch.float64"),
    "no memory": (no_memory, "MemoryError", "of 3 GB"),
}


def check_step(rank: int, world_size: int, transport: str, sharded: bool, name: str) -> tuple[str, str, float]:
    optimizer = build(transport, sharded)
    iterate(optimizer)
    backward(optimizer)
    before = [param.clone() for param in params_of(optimizer)]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    if rank == world_size - 1:
        FAILURES[name][0](optimizer)
    found = told(optimizer.step)
    assert optimizer.stats().steps == 1
    if sharded and name == "foreign state":  # all learn of it before they change anything
        assert all(torch.equal(*pair) for pair in zip(before, params_of(optimizer), strict=True))
        if rank != world_size - 1:
            now = [state["exp_avg"] for state in optimizer.state.values()]
            assert all(torch.equal(*pair) for pair in zip(moments, now, strict=True))
    if transport == "shared_memory" and name == "foreign state":
        optimizer.zero_grad()
        optimizer.state.clear()
        goes_on(optimizer)
    return found


@pytest.mark.parametrize("world_size", [*WORLD_SIZES[1:], 8])
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_rank_that_fails_in_a_step(world_size: int, transport: str, sharded: bool, name: str) -> None:
    if world_size > 3 and (transport != "shared_memory" or name != "foreign state"):
        pytest.skip("2 and 3 ranks show it")
    kind, text = same(run(check_step, world_size, transport, sharded, name), SOON_S)
    assert kind == FAILURES[name][1]
    assert text.startswith(f"rank {world_size - 1}: ")
    assert FAILURES[name][2] in text


def check_load(rank: int, world_size: int) -> list[tuple[str, str, float]]:
    optimizer = build(None)
    iterate(optimizer)
    before = {key: value.clone() for key, value in optimizer.state[params_of(optimizer)[0]].items()}
    found = []
    for change in ("shape", "keys", "groups", "to"):
        loaded = copy.deepcopy(optimizer.consolidate_state_dict(to=world_size - 1)) or {}
        dicts = [loaded]
        dist.broadcast_object_list(dicts, src=world_size - 1)
        loaded = dicts[0]
        if rank == world_size - 1:
            if change == "shape":
                loaded["state"][0]["exp_avg"] = torch.ones(3)
            if change == "keys":
                del loaded["state"]
            if change == "groups":
                loaded["param_groups"] *= 2
        if change == "to":
            bad = world_size if rank == world_size - 1 else 0
            found.append(told(lambda to=bad: optimizer.consolidate_state_dict(to)))  # type: ignore[misc]
        else:
            found.append(told(lambda d=loaded: optimizer.load_state_dict(d)))  # type: ignore[misc]
        for key, value in optimizer.state[params_of(optimizer)[0]].items():
            assert torch.equal(before[key], value)
    goes_on(optimizer)
    return found


@pytest.mark.parametrize("world_size", [*WORLD_SIZES[1:], 8])
def test_one_rank_that_cannot_load(world_size: int) -> None:
    results = run(check_load, world_size)
    texts = [same([result[i] for result in results], SOON_S) for i in range(4)]
    last = world_size - 1
    assert texts[0][1].startswith(f"rank {last}: loaded exp_avg of parameter '0.0' has shape (3,)")
    assert texts[1][1].startswith(f"rank {last}: loaded state dict has no ['state']")
    assert "different number of parameter groups" in texts[2][1]
    assert "ranks do different things" in texts[3][1]
    assert [kind for kind, _ in texts[:3]] == ["ValueError"] * 3


class Unknown:
    pass


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


UNSAVABLE: dict[str, tuple[Any, str]] = {
    "function": (die, " is a builtins.function, which cannot be saved"),
    "object": ([Unknown()], "[0] is a tests.store.test_apart.Unknown, which cannot be saved"),
    "sparse": (torch.eye(2).to_sparse(), " is a torch.Tensor, which cannot be saved"),
    "itself": (endless(), "contains itself"),
    "key": ({torch.ones(1): 1}, " has the tensor tensor([1.]) as a key"),
}

PLACES: dict[str, tuple[Callable[[ShardedRAdam], dict[Any, Any]], str]] = {
    "group": (lambda optimizer: optimizer.param_groups[0], "param_groups.0.f"),
    "parameter": (lambda optimizer: optimizer.state[params_of(optimizer)[1]], "state.1.f"),
    "key": (lambda optimizer: optimizer.state, "state.f"),
}


def fails(*_: Any, **__: Any) -> Any:
    raise MemoryError("of 5 GB")


def check_unsavable(rank: int, world_size: int) -> list[tuple[str, str, float]]:
    """One rank has what cannot be saved, or no memory; also where the others have nothing left to do."""
    optimizer = build(None)
    iterate(optimizer)
    is_odd, found = rank == world_size - 1, []
    for value, _ in UNSAVABLE.values():
        for place, _ in PLACES.values():
            if is_odd:
                place(optimizer)["f"] = value
            found.append(told(lambda: optimizer.consolidate_state_dict(to=0)))
            place(optimizer).pop("f", None)
    goes_on(optimizer)
    places = [(dicts, "deepcopy"), *((consolidate, name) for name in ("gather_flat", "export_step", "_copy"))]
    for module, name in places:
        iterate(optimizer)
        with mock.patch.object(module, name, fails) if is_odd else contextlib.nullcontext():
            optimizer.param_groups[0]["f"] = [1]  # there is something to copy
            found.append(told(lambda: optimizer.consolidate_state_dict(to=world_size - 1)))
        with pytest.raises(RuntimeError, match="only this rank's part"):
            optimizer.state_dict()
        goes_on(optimizer)
    return found


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_one_rank_whose_state_cannot_be_saved(world_size: int) -> None:
    results = run(check_unsavable, world_size)
    texts = [same([result[at] for result in results], SOON_S) for at in range(len(results[0]))]
    last = world_size - 1
    wanted = [
        ("ValueError", f"rank {last}: {name}", text) for _, text in UNSAVABLE.values() for _, name in PLACES.values()
    ]
    wanted += [("MemoryError", f"rank {last}: of 5 GB", "")] * 4
    for (kind, text), (expected, begin, part) in zip(texts, wanted, strict=True):
        assert kind == expected
        assert text.startswith(begin), (text, begin)
        assert part in text, (text, part)


def half_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(40, 11).bfloat16()


def check_full_precision(rank: int, world_size: int, transport: str | None) -> list[tuple[str, str, float]]:
    """One rank does not come; has a wrong state, or target; no memory; gives something that is no model."""
    model = half_model()
    optimizer = ShardedRAdam(model.parameters(), process_group=group("gloo"), bucket_cap_mb=1e-3, transport=transport)
    last, found = world_size - 1, []
    is_odd = rank == last

    def full(to: int = 0, model: Any = model) -> Any:
        return optimizer.full_precision_state_dict(model, to)

    found.append(
        told(full if not is_odd else lambda: optimizer.add_param_group({"params": [Parameter(torch.ones(3))]}))
    )
    dist.barrier()  # who is late is told of the operation that it missed only while there is no other
    found.append(told(lambda: full(world_size if is_odd else 0)))
    dist.barrier()
    if is_odd:
        optimizer.state[model.weight]["master"] = torch.ones(3)
    found.append(told(full))
    if is_odd:
        optimizer.state[model.weight].clear()
    found.append(told(lambda: full(last, None if is_odd else model)))
    with mock.patch.object(consolidate, "gather_flat", fails) if is_odd else contextlib.nullcontext():
        found.append(told(lambda: full(last)))
    if transport == "shared_memory":  # the failure in the middle has broken Gloo's group
        full(last)
    found.append(told(full if not is_odd else lambda: time.sleep(TIMEOUT_S + 1)))
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_full_precision_is_agreed_on(world_size: int, transport: str) -> None:
    if world_size > 3 and transport != "shared_memory":
        pytest.skip("2 and 3 ranks show it")
    results = run(check_full_precision, world_size, transport)
    last = world_size - 1
    texts = [same([result[at] for result in results], SOON_S) for at in range(5)]
    assert "ranks do different things" in texts[0][1]
    assert "full_precision_state_dict(to=0) after 0 steps" in texts[0][1]
    assert "ranks do different things" in texts[1][1]
    assert texts[2][0] == "ValueError"
    assert texts[2][1].startswith(f"rank {last}: loaded master of parameter '0.0' has shape (3,)")
    assert texts[3][1].startswith(f"rank {last}: ")
    assert texts[4] == ("MemoryError", f"rank {last}: of 5 GB")
    kind, text = same([result[5] for result in results[:-1]], TIMEOUT_S + SOON_S)
    assert kind == "RuntimeError"
    assert text.startswith(f"full_precision_state_dict(to=0) after 0 steps: rank {last} did not come within 3 s; every")


def check_closure(rank: int, world_size: int, transport: str) -> tuple[str, str, float]:
    optimizer = build(transport)

    def closure() -> float:
        if rank == 0:
            raise KeyError("no such word")
        backward(optimizer)
        return 0.0

    return told(lambda: optimizer.step(closure))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_closure_that_raises_on_one_rank(world_size: int, transport: str) -> None:
    found = same(run(check_closure, world_size, transport), SOON_S)
    assert found == ("RuntimeError", "rank 0: KeyError: 'no such word'")


def check_forward(rank: int, world_size: int, transport: str) -> tuple[str, str, float]:
    """One rank's forward raises, which it catches, and goes on to the next batch."""
    optimizer = build(transport, sharded=True)
    iterate(optimizer)

    def train() -> None:
        for batch in range(4):
            try:
                if rank == 0 and batch == 1:
                    raise MemoryError
                backward(optimizer)
            except MemoryError:
                optimizer.zero_grad()
                continue
            optimizer.step()
            optimizer.zero_grad()

    found = told(train)
    optimizer.zero_grad()
    goes_on(optimizer)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_forward_that_raises_on_one_rank(world_size: int) -> None:
    results = run(check_forward, world_size, "shared_memory")
    kind, text = same(results, SOON_S)
    assert kind == "RuntimeError"
    assert "is doing something else than rank" in text


# One rank is killed


def fatal_params() -> Iterator[Parameter]:
    yield Parameter(torch.ones(60, 60))
    die()


def in_gather(optimizer: ShardedRAdam) -> None:
    network = optimizer._shards.transport
    gather, calls = network.gather, []

    def fatal(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            die()
        gather(*args)

    network.gather = fatal  # type: ignore[method-assign, assignment]


DEATHS: dict[str, Callable[[ShardedRAdam], None]] = {"before": die, "gather": in_gather}


def consolidating(rank: int, world_size: int, folder: str, transport: str, place: str) -> None:
    """The last rank is killed while it builds its optimizer, before it would consolidate, or while all gather."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=dt.timedelta(seconds=20))
    is_victim = rank == world_size - 1

    def act() -> None:
        params = fatal_params() if is_victim and place == "building" else [Parameter(torch.ones(60, 60))]
        optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3, transport=transport)
        iterate(optimizer)
        if is_victim:
            DEATHS[place](optimizer)
        for to in range(world_size):
            optimizer.consolidate_state_dict(to)

    kind, text, seconds = told(act)
    Path(folder, f"told{rank}").write_text(f"{seconds} {kind} {text}")
    os._exit(0)  # Gloo's destructors may wait for the dead


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("transport", "place"), [("native", "building"), *itertools.product(TRANSPORTS, DEATHS)])
def test_a_rank_that_is_killed(tmp_path: Path, world_size: int, transport: str, place: str) -> None:
    ranks = [
        CONTEXT.Process(target=consolidating, args=(rank, world_size, str(tmp_path), transport, place))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks[:-1]:
            process.join(40)
            assert process.exitcode == 0
        ranks[-1].join(10)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert ranks[-1].exitcode == -signal.SIGKILL
    texts = [(tmp_path / f"told{rank}").read_text().split(" ", 2) for rank in range(world_size - 1)]
    assert all(float(seconds) < 18 for seconds, _, _ in texts), texts
    assert len({text for _, _, text in texts}) == 1, texts
    what = "building ShardedRAdam" if place == "building" else "consolidate_state_dict(to="
    assert texts[0][2].startswith(what), texts
    assert (
        f"rank {world_size - 1} {'is gone' if transport == 'shared_memory' else 'has ended: it was killed'}"
        in texts[0][2]
    )


def check_late(rank: int, world_size: int) -> tuple[str, str, float]:
    """The last rank lives, and is elsewhere while the others gather."""
    optimizer = build("native")
    network, gather = optimizer._shards.transport, optimizer._shards.transport.gather

    def late(*args: Any) -> None:
        time.sleep(TIMEOUT_S + 3)
        gather(*args)

    with mock.patch.object(meeting, "_GRACE_S", 1.0):
        if rank == world_size - 1:
            network.gather = late  # type: ignore[method-assign, assignment]
        return told(lambda: optimizer.consolidate_state_dict(to=0))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_the_backend_waits_for_is_named(world_size: int) -> None:
    """Gloo's own gather says after the time-out that it is over, and no more."""
    kind, text = same(run(check_late, world_size), 2 * SOON_S)
    assert kind == "RuntimeError"
    begin = f"consolidate_state_dict(to=0) after 0 steps: rank {world_size - 1} did not come; every rank of the process"
    assert text.startswith(begin), text
    assert "a rank did not come within 3 s, or is gone (" in text


# Descriptors


def check_descriptors(rank: int, world_size: int, num_groups: int) -> tuple[int, str]:
    optimizer = ShardedRAdam(
        [{"params": [Parameter(torch.ones(100 + index))], "lr": 1e-3 * (1 + index)} for index in range(num_groups)],
        shard_gradients=True,
    )
    iterate(optimizer)
    for _ in range(3):
        optimizer.add_param_group({"params": [Parameter(torch.ones(9))]})
    iterate(optimizer)
    return optimizer.stats().steps, optimizer.stats().transport


def limited(rank: int, world_size: int, limit: int, num_groups: int) -> tuple[int, str]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        return check_descriptors(rank, world_size, num_groups)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_descriptors_do_not_grow_with_groups_and_ranks() -> None:
    """16 ranks, 48 param groups, 64 descriptors."""
    stop()  # ranks of tests before have others open
    assert run(limited, 16, 64, 48) == [(2, "shared_memory")] * 16


def check_too_few(rank: int, world_size: int) -> tuple[str, str, float]:
    """No descriptor can be received on one rank: an error on all, and nothing is left open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    optimizer = ShardedRAdam([Parameter(torch.ones(100))])
    opened = num_descriptors()
    spare: list[int] = []
    try:
        if rank == world_size - 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 8, before[1]))
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.dup(0))
            os.close(spare.pop())  # one for its own memory, none for the others'
        found = told(lambda: optimizer.add_param_group({"params": [Parameter(torch.ones(200))]}))
    finally:
        for descriptor in spare:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert num_descriptors() == opened
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [Parameter(torch.ones(200))]})
    iterate(optimizer)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_no_descriptors_on_one_rank_is_an_error_on_all(world_size: int) -> None:
    kind, text = same(run(check_too_few, world_size), SOON_S)
    assert kind == "RuntimeError"
    assert f"rank {world_size - 1}: no shared memory of" in text
    assert "Too many open files" in text
