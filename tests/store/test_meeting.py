"""What is wrong on one rank is raised on all of them, in the same words, and a rank that does not come is named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn import Parameter

from sharded_radam import ShardedRAdam
from sharded_radam.store.meeting import Meeting
from sharded_radam.store.verdicts import judge
from tests.ranks import WORLD_SIZES, run

# Threads as ranks


def meetings(world_size: int, timeout: float = 20.0) -> list[Meeting]:
    store: Any = HashStore()
    return [Meeting(store, rank, world_size, timeout) for rank in range(world_size)]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each returned, or the exception it raised; all at the same time."""
    found: list[Any] = [None] * len(calls)

    def one(index: int) -> None:
        try:
            found[index] = calls[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


@pytest.mark.quick
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_all_offers_are_decided_on(world_size: int) -> None:
    ranks = meetings(world_size) if world_size > 1 else [Meeting(None, 0, 1, 0.0)]
    for number in range(20):  # more than are remembered
        found = together(*(lambda m=m, n=number: m.agree("adding", m.rank + n, None, sum) for m in ranks))
        assert found == [sum(range(world_size)) + world_size * number] * world_size


def raised(found: list[Any]) -> tuple[type[Exception], str]:
    """What all of them raised."""
    assert len({(type(error), str(error)) for error in found}) == 1, found
    assert isinstance(found[0], Exception)
    return type(found[0]), str(found[0])


@pytest.mark.quick
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_problems_are_raised_everywhere_and_the_next_operation_works(world_size: int) -> None:
    ranks = meetings(world_size)
    last = world_size - 1

    class OddError(KeyError):
        pass

    problems = [
        (ValueError("v"), ValueError, "v"),
        (TypeError("t"), TypeError, "t"),
        (MemoryError("m"), MemoryError, "m"),
    ]
    problems += [(OddError("x"), RuntimeError, "OddError: 'x'"), (UnicodeError("u"), ValueError, "UnicodeError: u")]
    for problem, kind, text in problems:
        found = together(*(lambda m=m, p=problem: m.agree("it", None, p if m.rank == last else None) for m in ranks))
        assert raised(found) == (kind, f"rank {last}: {text}")
        assert found[last].__cause__ is problem
        assert together(*(lambda m=m: m.agree("it", 1, None, sum) for m in ranks)) == [world_size] * world_size
    found = together(*(lambda m=m: m.agree("it", None, ValueError("all")) for m in ranks))
    assert raised(found) == (ValueError, "all")
    found = together(*(lambda m=m: m.agree("it", 0, None, lambda offers: 1 // offers[0]) for m in ranks))
    assert raised(found)[1].startswith("ZeroDivisionError")


@pytest.mark.quick
@pytest.mark.parametrize("world_size", [2, 3])
def test_different_operations_are_seen_at_once(world_size: int) -> None:
    ranks = meetings(world_size, timeout=50.0)
    begin = time.monotonic()

    def call(meeting: Meeting) -> Any:
        return meeting.agree("saving" if meeting.rank == 0 else "loading")

    first = together(*(lambda m=m: call(m) for m in ranks[:2]))
    late = together(*(lambda m=m: call(m) for m in ranks[2:]))  # comes when it is over, and is told the same
    kind, text = raised(first + late)
    assert kind is RuntimeError
    assert "(rank 0: saving; rank 1: loading)" in text
    assert time.monotonic() - begin < 40  # not by the time-out
    assert together(*(lambda m=m: m.agree("next", 1, None, sum) for m in ranks)) == [world_size] * world_size


@pytest.mark.quick
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_rank_that_does_not_come_is_named_and_is_told_when_it_does(world_size: int) -> None:
    ranks = meetings(world_size, timeout=0.5)
    last = world_size - 1
    found = together(*(lambda m=m: m.agree("consolidating") for m in ranks[:-1]))
    found += together(lambda: ranks[-1].agree("consolidating"))
    kind, text = raised(found)
    assert kind is RuntimeError
    assert text.startswith(f"consolidating: rank {last} did not come within 0.5 s; every rank")
    for what in ("consolidating", "next"):  # nobody is one behind
        assert together(*(lambda m=m, w=what: m.agree(w, 1, None, sum) for m in ranks)) == [world_size] * world_size


@pytest.mark.quick
def test_who_waits_says_for_whom(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sharded_radam.store.meeting._QUIET_S", 0.4)
    ranks = meetings(4, timeout=2.0)
    together(*(lambda m=m: m.agree("consolidating") for m in ranks[:2]))
    said = [record.getMessage() for record in caplog.records if "waits" in record.getMessage()]
    assert sorted(said) == [f"consolidating: rank {rank} waits for ranks 2, 3" for rank in (0, 1)]


@pytest.mark.quick
def test_a_rank_that_missed_an_operation_joins_the_next() -> None:
    ranks = meetings(2, timeout=0.3)
    for _ in range(3):
        assert isinstance(together(lambda: ranks[0].agree("alone"))[0], RuntimeError)
    assert together(lambda: ranks[1].agree("next", 1, None, sum), lambda: ranks[0].agree("next", 1, None, sum)) == [
        2,
        2,
    ]


@pytest.mark.quick
def test_one_operation_has_one_verdict_whoever_is_late() -> None:
    """Ranks come when the time is just over, over and over."""
    for wait in (0.05, 0.09, 0.1, 0.105, 0.11, 0.15):
        ranks = meetings(3, timeout=0.1)

        def late(meeting: Meeting = ranks[2], seconds: float = wait) -> Any:
            time.sleep(seconds)
            return meeting.agree("it", 1, None, sum)

        found = together(*(lambda m=m: m.agree("it", 1, None, sum) for m in ranks[:2]), late)
        assert len(set(map(str, found))) == 1, found


@pytest.mark.quick
def test_who_is_late_within_an_operation_is_told_how_it_ended() -> None:
    """And nothing of what the others have begun since, which goes on without it until it comes."""
    ranks = meetings(3, timeout=1.0)
    assert together(*(lambda m=m: m.agree("gathering") for m in ranks)) == [None] * 3
    bad = MemoryError("of 5 GB")
    first = together(*(lambda m=m: m.agree("gathering", None, bad, is_within=True) for m in ranks[1:]))
    found: list[Any] = []

    def go_on() -> None:
        found.extend(together(*(lambda m=m: m.agree("next", 1, None, sum) for m in ranks[1:])))

    thread = threading.Thread(target=go_on)
    thread.start()
    time.sleep(0.2)
    late = together(lambda: ranks[0].agree("gathering", is_within=True))
    kind, text = raised(first + late)
    assert kind is MemoryError
    assert text == "ranks 1, 2: of 5 GB"
    found.extend(together(lambda: ranks[0].agree("next", 1, None, sum)))
    thread.join()
    assert found == [3, 3, 3]


@pytest.mark.quick
def test_waiting_ends_when_it_is_in_vain() -> None:
    ranks = meetings(3)
    ranks[0].connections = mock.Mock(gone=lambda: "rank 2 is gone", key="", sent=0)
    found = together(lambda: ranks[0].agree("it"), lambda: ranks[1].agree("it"))
    assert raised(found) == (RuntimeError, "it: rank 2 is gone")


@pytest.mark.quick
def test_what_counts_for_whom_who_gives_up() -> None:
    """All have come after all: the decision. One is certainly gone: that. Else who did not come, and what is known."""
    came: dict[int, dict[str, Any]] = {rank: {"what": "it", "offer": rank} for rank in range(3)}
    assert judge(came, 3, sum, "did not come") == {"value": 3}
    assert judge(came, 3, sum, "rank 2 has ended") == {"failure": "it: rank 2 has ended"}
    came[0] = {"what": "it", "problem": "a rank is gone (closed)", "lost": True}
    del came[2]
    assert judge(came, 3, sum, "rank 2 has ended") == {"failure": "it: rank 2 has ended"}
    assert judge(came, 3, sum, "did not come; all must") == {
        "failure": "it: rank 2 did not come; all must; rank 0: a rank is gone (closed)"
    }
    came[1] = {"what": "it", "kind": "ValueError", "problem": "no number", "lost": False}
    assert judge(came, 3, sum, "rank 2 has ended") == {"failure": "rank 1: no number", "kind": "ValueError"}


def test_what_is_left_in_the_store_is_bounded() -> None:
    ranks = meetings(3)
    board = ranks[0]._board
    assert board is not None
    store = board._store
    sizes = []
    for _ in range(40):
        together(*(lambda m=m: m.agree("it", "x" * 100) for m in ranks))
        sizes.append(store.num_keys())
    assert max(sizes[20:]) <= max(sizes[:20])


# Construction


class Fails:
    """Raises while it is consumed."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Parameter]:
        yield Parameter(torch.zeros(3))
        raise self.error


def params() -> list[Parameter]:
    return [Parameter(torch.zeros(5, 3)), Parameter(torch.zeros(7))]


def on_meta() -> list[Parameter]:
    return [Parameter(torch.zeros(5, 3, device="meta")), Parameter(torch.zeros(7, device="meta"))]


def module(numel: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    made = nn.Linear(3, 5)
    made.register_buffer("ours", torch.zeros(numel, dtype=dtype))
    return made


def sharing() -> list[Parameter]:
    first = Parameter(torch.zeros(4))
    return [first, Parameter(first.detach())]


BAD: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "lr": (lambda: {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "betas": (lambda: {"betas": (0.9, 1.5)}, ValueError, "Invalid beta parameter at index 1: 1.5"),
    "eps": (lambda: {"eps": -1}, ValueError, "Invalid epsilon value: -1"),
    "eps of no number": (lambda: {"eps": "x"}, TypeError, "not supported between"),
    "bucket_cap_mb": (lambda: {"bucket_cap_mb": 0}, ValueError, "bucket_cap_mb=0: expected a size in MiB, above 0"),
    "endless bucket": (
        lambda: {"bucket_cap_mb": float("inf")},
        ValueError,
        "bucket_cap_mb=inf: expected a size in MiB, above 0",
    ),
    "transport": (lambda: {"transport": "pigeon"}, ValueError, "transport='pigeon': expected None or one of"),
    "engine": (lambda: {"fused": True, "foreach": True}, ValueError, "fused=True excludes foreach=True"),
    "module": (lambda: {"module": module(3)}, ValueError, "module= are for shard_gradients=True"),
    "no parameters": (lambda: {"params": []}, ValueError, "optimizer got an empty parameter list"),
    "no parameters but a tensor": (lambda: {"params": torch.zeros(3)}, TypeError, "params argument given to the opti"),
    "no leaf": (lambda: {"params": [2 * Parameter(torch.zeros(3))]}, ValueError, "can't optimize a non-leaf Tensor"),
    "generator": (lambda: {"params": Fails(KeyError("gone"))}, RuntimeError, "KeyError: 'gone'"),
    "memory": (lambda: {"params": Fails(MemoryError("of 7 GB"))}, MemoryError, "of 7 GB"),
    "meta": (lambda: {"params": on_meta()}, ValueError, "parameters are on meta, but the process group has backends"),
    "two devices": (lambda: {"params": params() + on_meta()}, ValueError, "parameters are on ['cpu', 'meta']"),
    "shared memory": (lambda: {"params": sharing()}, ValueError, "share memory"),
    "dtype": (lambda: {"params": [Parameter(torch.zeros(3, dtype=torch.float8_e5m2))]}, ValueError, "float8_e5m2"),
}

OTHER: dict[str, tuple[Callable[[bool], dict[str, Any]], str]] = {
    "bucket_cap_mb": (
        lambda odd: {"bucket_cap_mb": 1.0 if odd else 25},
        "bucket_cap_mb differs between ranks: rank 0 has 25.0, rank {last} has 1.0",
    ),
    "transport": (
        lambda odd: {"transport": "gloo" if odd else None},
        "transport differs between ranks: rank 0 has None, rank {last} has 'gloo'",
    ),
    "shard_gradients": (
        lambda odd: {"shard_gradients": odd},
        "shard_gradients differs between ranks: rank 0 has False, rank {last} has True",
    ),
    "share_parameters": (
        lambda odd: {"share_parameters": not odd},
        "share_parameters differs between ranks: rank 0 has True, rank {last} has False",
    ),
    "check_gradients": (
        lambda odd: {"shard_gradients": True, "check_gradients": odd},
        "check_gradients differs between ranks",
    ),
    "reduce_dtype": (
        lambda odd: {"shard_gradients": True, "reduce_dtype": torch.bfloat16 if odd else None},
        "reduce_dtype differs between ranks: rank 0 has None, rank {last} has 'torch.bfloat16'",
    ),
    "views": (lambda odd: {"parameters_as_bucket_view": odd}, "parameters_as_bucket_view differs between ranks"),
    "fused": (lambda odd: {"fused": odd or None}, "fused differs between ranks: rank 0 has None, rank {last} has True"),
    "module": (
        lambda odd: {"shard_gradients": True, "module": module(3) if odd else None},
        "module differs between ranks: rank 0 has None, rank {last} has 'a model'",
    ),
    "foreach": (
        lambda odd: {"foreach": odd},
        "first at param group 0: rank 0 has param group 0 with foreach=False, capturable=False, differentiable=False",
    ),
    "maximize": (lambda odd: {"maximize": odd}, "first at param group 0: "),
    "buffer": (
        lambda odd: {"shard_gradients": True, "module": module(3 + odd)},
        "first at buffer 'ours': rank 0 has buffer 'ours' of shape (3,), torch.float32, ",
    ),
    "dtype of a buffer": (
        lambda odd: {"shard_gradients": True, "module": module(3, torch.half if odd else torch.float32)},
        "first at buffer 'ours': ",
    ),
    "a group more": (
        lambda odd: {"params": [{"params": [each]} for each in params()[odd:]]},
        "first at param group 1: rank 0 has param group 1 with ",
    ),
}


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def check_construction(rank: int, world_size: int, transport: str | None) -> list[tuple[str, tuple[str, str]]]:
    last = world_size - 1
    found = []
    for name, (bad, _, _) in BAD.items():
        arguments = {"params": params(), "transport": transport, **(bad() if rank == last else {})}
        found.append((name, outcome(partial(ShardedRAdam, **arguments))))
    for name, (other, _) in OTHER.items():
        arguments = {"params": params(), "transport": transport, **other(rank == last)}
        if name == "share_parameters":
            arguments["transport"] = None
        found.append((f"other {name}", outcome(partial(ShardedRAdam, **arguments))))
    optimizer = ShardedRAdam(params(), transport=transport)  # and all goes on
    for name, bad_group in BAD_GROUPS.items():
        group = bad_group() if rank == last else {"params": [Parameter(torch.ones(9))]}
        found.append((f"group {name}", outcome(partial(optimizer.add_param_group, group))))
        assert len(optimizer.param_groups) == 1
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.add_param_group({"params": [Parameter(torch.ones(9))]})
    optimizer.step()
    return found


BAD_GROUPS: dict[str, Callable[[], Any]] = {
    "no group": lambda: [1],
    "nothing": dict,
    "empty": lambda: {"params": Fails(ValueError("it ended"))},
    "meta": lambda: {"params": [Parameter(torch.ones(9, device="meta"))]},
    "float8": lambda: {"params": [Parameter(torch.zeros(3, dtype=torch.float8_e5m2))]},
    "shape": lambda: {"params": [Parameter(torch.ones(8))]},
    "foreach": lambda: {"params": [Parameter(torch.ones(9))], "foreach": True},
}


@pytest.mark.parametrize("world_size", [*WORLD_SIZES[1:], 8])
@pytest.mark.parametrize("transport", [None, "gloo", "native"])
def test_what_is_wrong_on_one_rank_is_raised_on_all(world_size: int, transport: str | None) -> None:
    if world_size > 3 and transport is not None:
        pytest.skip("ranks meet before there is a transport")
    results = run(check_construction, world_size, transport)
    last = world_size - 1
    for result in results[1:]:
        assert result == results[0]
    found = dict(results[0])
    for name, (_, kind, text) in BAD.items():
        assert found[name][0] == kind.__name__, (name, found[name])
        assert found[name][1].startswith(f"rank {last}: "), (name, found[name])
        assert text in found[name][1], (name, found[name])
    for name, (_, text) in OTHER.items():
        assert found[f"other {name}"][0] == "ValueError", (name, found[f"other {name}"])
        assert text.format(last=last) in found[f"other {name}"][1], (name, found[f"other {name}"])
    assert all(found[f"group {name}"][0] in ("ValueError", "TypeError", "RuntimeError") for name in BAD_GROUPS)


def check_equal(_rank: int, _world_size: int) -> None:
    compared = 0
    for bad, _, _ in BAD.values():
        ours, theirs = (
            outcome(partial(optimizer, **{"params": params(), **bad()}))
            for optimizer in (ShardedRAdam, torch.optim.RAdam)
        )
        if theirs[0] in ("ValueError", "TypeError", "MemoryError") and "unexpected keyword" not in theirs[1]:
            assert ours == theirs
            compared += 1
    assert compared > 6


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_same_mistake_everywhere_is_radams_own_error(world_size: int) -> None:
    run(check_equal, world_size)
