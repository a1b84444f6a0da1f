"""One operation has one verdict, on every rank, whoever is late, slow, stopped, killed, or fails in whatever way."""

from __future__ import annotations

import datetime as dt
import functools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore

from sharded_radam import CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint import draft
from sharded_radam.checkpoint import load as loading
from sharded_radam.checkpoint import save as saving
from sharded_radam.checkpoint.format import chunks as files
from sharded_radam.checkpoint.format import directory
from sharded_radam.checkpoint.staging import Staging
from sharded_radam.store import liveness
from sharded_radam.store.agreement import Agreement
from sharded_radam.store.board import Board
from sharded_radam.store.liveness import Acquaintance
from sharded_radam.store.peers import Line, Peers
from tests.ranks import CONTEXT, WORLD_SIZES, run

# The state machine: ranks are threads of one process


class Store:
    """One that can be lost, as where the process that has it is killed."""

    def __init__(self, store: Any = None) -> None:
        self.store = store or cast("Any", dist).HashStore()
        self.is_lost = False

    def __getattr__(self, name: str) -> Any:
        if self.is_lost:
            raise RuntimeError("Broken pipe")
        return getattr(self.store, name)


def peers_of(store: Any, rank: int, world_size: int) -> Peers:
    """A rank of a new process."""
    board = Board(store)
    others = range(1) if rank else range(1, world_size)
    return Peers(rank, world_size, Line(board, Acquaintance(board, store, rank, others)))


class Group:
    """Ranks, each a thread; ``calls`` begins an action on some of them."""

    def __init__(self, world_size: int, store: Any = None) -> None:
        self.store = store or Store()
        self.peers = [peers_of(self.store, rank, world_size) for rank in range(world_size)]
        self._threads = ThreadPoolExecutor(4 * world_size)

    def begin(self, action: Callable[[Peers], Any], *ranks: int) -> list[Future[Any]]:
        return [self._threads.submit(attempt, action, self.peers[rank]) for rank in ranks or range(len(self.peers))]

    def call(self, action: Callable[[Peers], Any], *ranks: int) -> list[Any]:
        return [future.result(30) for future in self.begin(action, *ranks)]


def attempt(action: Callable[..., Any], *args: Any) -> Any:
    """What it returns, or the text of its error."""
    try:
        return action(*args)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def one(found: list[Any]) -> Any:
    """What is the same for all."""
    assert all(value == found[0] for value in found), found
    return found[0]


def operation(what: str = "saving a", timeout: float = 5.0) -> Callable[[Peers], Any]:
    def act(peers: Peers) -> Any:
        with Agreement.begin(peers, what, timeout) as agreement:
            offers = agreement.decide(peers.rank, decide=lambda offers: offers)
            return agreement.decide(None, decide=lambda _: [*offers, "done"])

    return act


def works(group: Group, what: str = "saving b") -> bool:
    return bool(one(group.call(operation(what))) == [*range(len(group.peers)), "done"])


SIZES = [2, 3, 8]


@pytest.mark.parametrize("world_size", SIZES)
def test_operations_one_after_the_other_leave_nothing(world_size: int) -> None:
    group = Group(world_size)
    for _ in range(3):
        assert works(group)
    keys = group.store.num_keys()
    for _ in range(5):
        assert works(group)
    assert group.store.num_keys() == keys


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("again", ["saving a", "saving b"])
def test_who_does_not_come_in_time_learns_what_came_of_it(world_size: int, again: str) -> None:
    """Whichever it is, rank 0 too; and the next operation works, whether or not the late one ever came for this."""
    for late in {0, 1, world_size - 1}:
        for comes in (True, False):
            group = Group(world_size)
            assert works(group)
            others = [rank for rank in range(world_size) if rank != late]
            text = one(group.call(operation(timeout=0.3), *others))
            assert text == (
                f"CheckpointError: saving a: rank {late} did not come within 0.3 s: every rank of the process group "
                "must make this call"
            )
            if comes:
                assert group.call(operation(timeout=0.3), late) == [text]
            assert works(group, again)


@pytest.mark.parametrize("late", [0, 2])
def test_who_is_late_joins_if_the_others_call_again(late: int) -> None:
    group = Group(3)
    others = [rank for rank in range(3) if rank != late]
    assert "did not come" in one(group.call(operation(timeout=0.2), *others))
    waiting = group.begin(operation(), late)  # sees that it has failed
    time.sleep(0.1)
    waiting += group.begin(operation(), *others)
    assert one([future.result(30) for future in waiting]) == [0, 1, 2, "done"]


@pytest.mark.parametrize("world_size", SIZES)
def test_calls_that_differ(world_size: int) -> None:
    group, last = Group(world_size), world_size - 1
    waiting = group.begin(operation("loading x"), *range(last)) + group.begin(operation("saving y"), last)
    text = one([future.result(30) for future in waiting])
    assert f"rank 0 is loading x, rank {last} is saving y; all ranks must make the same call" in text
    assert works(group)


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


PROBLEMS = {
    "memory": (MemoryError("no memory"), "MemoryError: no memory"),
    "own": (SpeechlessError(), "SpeechlessError"),
    "recursion": (RecursionError("too deep"), "RecursionError: too deep"),
    "not JSON": (None, "TypeError: Object of type set is not JSON serializable"),
    "time-out": (None, "ValueError: timeout=-1: expected seconds above 0"),
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("failing", [0, 2])
def test_every_problem_is_said(kind: str, failing: int) -> None:
    problem, text = PROBLEMS[kind]

    def act(peers: Peers) -> None:
        is_own = peers.rank == failing
        with Agreement.begin(peers, "saving a", -1 if is_own and kind == "time-out" else 5.0) as agreement:
            agreement.decide({1} if is_own and kind == "not JSON" else 1, problem if is_own else None)

    group = Group(3)
    assert one(group.call(act)) == f"CheckpointError: saving a: rank {failing}: {text}"
    assert works(group)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_is_interrupted(failing: int, stage: int) -> None:
    """Between two stages, by what is no Exception: the others need not wait for its time-out."""

    def act(peers: Peers) -> None:
        with Agreement.begin(peers, "saving a", 20.0) as agreement:
            for number in (1, 2):
                if peers.rank == failing and number == stage:
                    raise KeyboardInterrupt
                agreement.decide(None)

    group = Group(3)
    found = group.call(act)
    assert found.pop(failing) == "KeyboardInterrupt: "
    assert one(found) == f"CheckpointError: saving a: rank {failing}: KeyboardInterrupt: "
    assert works(group)


class Deed:
    """What counts beyond the store: done once or withdrawn once, as a rename."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.state = "open"

    def _become(self, state: str) -> str:
        with self._lock:
            if self.state == "open":
                self.state = state
            return self.state

    def do(self) -> None:
        if self._become("done") != "done":
            raise FileNotFoundError("it was taken away")

    def settle(self) -> bool:
        return self._become("withdrawn") == "done"


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("moment", ["before its post", "before it is done", "after it is done"])
def test_rank_0_is_silent_where_it_counts(world_size: int, moment: str) -> None:
    """For longer than any time-out; then it goes on. All say the same, and that is what there is."""
    deed = Deed()

    def act(peers: Peers) -> str:
        agreement = Agreement.begin(peers, "saving a", 0.3)

        def is_silent(now: str) -> None:
            if peers.rank == 0 and now == moment:
                agreement._watch.stop()  # beats no more, as if it was stopped
                time.sleep(1.2)

        def decide(offers: list[Any]) -> None:
            is_silent("before it is done")
            deed.do()
            is_silent("after it is done")

        is_silent("before its post")
        with agreement:
            agreement.decide(None, decide=decide, settle=deed.settle)
        return "saved"

    group = Group(world_size)
    verdict = one(group.call(act))
    if moment == "after it is done":
        assert (verdict, deed.state) == ("saved", "done")
    else:
        assert verdict.startswith("CheckpointError: saving a: rank 0 has been silent for 0.3 s")
        assert deed.state == "withdrawn"
    assert works(group)


@pytest.mark.parametrize("is_done", [True, False])
def test_the_store_is_lost_where_it_counts(is_done: bool) -> None:
    """Rank 0 has it, and is killed: the others know from what was done."""
    group, deed = Group(3), Deed()

    def act(peers: Peers) -> str:
        def decide(offers: list[Any]) -> None:
            if is_done:
                deed.do()
            group.store.is_lost = True

        Agreement.begin(peers, "saving a", 5.0).decide(None, decide=decide, settle=deed.settle)
        return "saved"

    verdict = one(group.call(act))
    if is_done:
        assert verdict == "saved"
    else:
        assert verdict.startswith("CheckpointError: saving a: the store by which ranks talk is gone")
    assert deed.state == ("done" if is_done else "withdrawn")
    assert "the store by which ranks talk is gone" in one(group.call(operation()))


@pytest.mark.parametrize("stage", ["called", "answered", "come", "begun"])
def test_a_store_that_outlives_its_ranks(stage: str) -> None:
    """They end in the middle of an operation and come back as new processes: nothing of that is read."""
    store = Store()
    group = Group(3, store)
    assert works(group)

    who = {"called": [1], "answered": [0], "come": [0, 2], "begun": [0, 1, 2]}[stage]

    def act(peers: Peers) -> None:
        agreement = Agreement.begin(peers, "saving a", 100.0)
        time.sleep(0.6)
        agreement.decide(None)

    began = group.begin(act, *who)
    time.sleep(0.3)
    store.is_lost = True  # for them: they say nothing any more
    new = Group(3, Store(store.store))
    assert works(new, "saving a")
    assert works(new, "saving b")
    assert all("the store by which ranks talk is gone" in future.result(30) for future in began)


def test_a_slow_rank_is_not_given_up() -> None:
    """It takes three times as long as the time-out, in each stage, on each rank in turn."""

    def act(peers: Peers) -> str:
        with Agreement.begin(peers, "saving a", 0.5) as agreement:
            for stage in range(3):
                if peers.rank == stage:
                    time.sleep(1.5)
                agreement.check()
                agreement.decide(None)
        return "saved"

    assert one(Group(3).call(act)) == "saved"


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_comes_back_as_a_new_process(victim: int) -> None:
    """It has ended within an operation: the others give it up, and go on with the new one."""
    store = Store()
    group, theirs = Group(3, store), Store(store.store)
    assert works(group)
    group.peers[victim] = peers_of(theirs, victim, 3)

    def act(peers: Peers) -> None:
        agreement = Agreement.begin(peers, "saving a", 0.4)
        if peers.rank == victim:
            theirs.is_lost = True
        agreement.decide(None)

    found = group.call(act)
    assert "the store by which ranks talk is gone" in found.pop(victim)
    assert one(found).startswith(f"CheckpointError: saving a: rank {victim} has been silent for 0.4 s")
    group.peers[victim] = peers_of(store, victim, 3)
    assert works(group, "saving a")


@pytest.mark.parametrize("is_met", [True, False])
def test_a_process_of_another_host(monkeypatch: pytest.MonkeyPatch, is_met: bool) -> None:
    """That it cannot be reached is a sign only if it could be before: there may be a firewall."""
    monkeypatch.setattr(liveness, "_is_own_to_each_host", lambda address: False)
    store = Store()
    known = Acquaintance(Board(store), store, 0, range(0))
    listener = socket.create_server(("127.0.0.1", 0))
    address = liveness.Address("another", *listener.getsockname())
    if is_met:
        known.meet([address, None])
        deadline = time.monotonic() + 20
        while address not in known.met and time.monotonic() < deadline:
            time.sleep(0.01)
        watch = liveness.Watch(Board(store), known, 5.0)
        assert not watch.has_ended(address)
        assert not watch.has_ended(address)
    listener.close()
    assert liveness.Watch(Board(store), known, 5.0).has_ended(address) == is_met
    if is_met:
        assert watch.has_ended(address)  # the connection that it had is broken
        watch.close()


# Real processes


def rank_process(rank: int, world_size: int, place: str | int, kind: str, pipe: Connection) -> None:
    """Does what it is told through the pipe, as a rank of a group."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    stores: Any = dist
    if kind == "file":
        store = FileStore(str(place), world_size)
    elif kind == "tcp of rank 0" and rank == 0:
        store = stores.TCPStore("127.0.0.1", place, is_master=True, wait_for_workers=False)
    else:
        store = stores.TCPStore("127.0.0.1", place)
    if kind == "prefix":
        store = stores.PrefixStore("attempt_1", stores.PrefixStore("worker", store))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=dt.timedelta(seconds=60))
    while True:
        function, args = pipe.recv()
        pipe.send(attempt(function, rank, world_size, *args))


class Ranks:
    """Processes that are asked; one that was killed answers "killed"."""

    def __init__(self, world_size: int, kind: str, folder: Path) -> None:
        stores: Any = dist
        self._server = stores.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = str(folder / "store") if kind == "file" else self._server.port
        if kind == "tcp of rank 0":
            place, self._server = self._server.port, None
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=rank_process, args=(rank, world_size, place, kind, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        self.tell(function, *args)
        return [self.hear(rank) for rank in range(len(self.pipes))]

    def tell(self, function: Callable[..., Any], *args: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function, args))

    def hear(self, rank: int, seconds: float = 40.0) -> Any:
        assert self.pipes[rank].poll(seconds), f"rank {rank} hangs"
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return "killed"

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def ranks(world_size: int, kind: str, folder: Path) -> Iterator[Ranks]:
    started = Ranks(world_size, kind, folder)
    try:
        yield started
    finally:
        started.end()


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@functools.cache
def small() -> ShardedRAdam:
    torch.manual_seed(0)
    return ShardedRAdam(nn.Linear(7, 5).named_parameters())


def save(rank: int, world_size: int, path: str, timeout: float) -> str:
    small().save(path, timeout=timeout)
    return "saved"


def load(rank: int, world_size: int, path: str, timeout: float) -> str:
    small().load(path, timeout=timeout)
    return "loaded"


def at(place: str, then: Callable[[], object]) -> Callable[[], None]:
    """Let something happen at a place of the next operation of this process, once; returns what ends that."""
    owner, name, after = {
        "come": (draft, "part_of_rank", False),
        "write": (files.DataFile, "__init__", False),
        "commit": (directory, "commit", False),
        "committed": (directory, "commit", True),
        "read": (loading, "read", False),
    }[place]
    original = getattr(owner, name)

    def instead(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, original)
        result = original(*args, **kwargs) if after else None
        then()
        return result if after else original(*args, **kwargs)

    setattr(owner, name, instead)
    return lambda: setattr(owner, name, original)


def with_victim(
    rank: int, world_size: int, victim: int, place: str, then: Callable[[], object], action: Any, *args: Any
) -> Any:
    if rank == victim and place == "before":
        then()
    undo = at(place, then) if rank == victim and place != "before" else lambda: None
    try:
        return action(rank, world_size, *args)
    finally:
        undo()


KILLED = [
    (2, "file", 0, "come"),
    (2, "file", 0, "commit"),
    (2, "file", -1, "before"),
    (3, "prefix", 0, "committed"),
    (3, "prefix", -1, "write"),
    (3, "tcp of rank 0", 0, "commit"),
    (3, "tcp of rank 0", 0, "committed"),
    (8, "tcp", 0, "write"),
    (8, "tcp", -1, "before"),
]


@pytest.mark.parametrize(("world_size", "kind", "victim", "place"), KILLED)
def test_a_killed_rank_is_noticed(tmp_path: Path, world_size: int, kind: str, victim: int, place: str) -> None:
    """Long before the time-out, with one verdict, which is what there is on the disk."""
    victim %= world_size
    with ranks(world_size, kind, tmp_path) as group:
        assert one(group.ask(save, str(tmp_path / "a"), 600.0)) == "saved"
        found = group.ask(with_victim, victim, place, die, save, str(tmp_path / "b"), 600.0)
    assert found.pop(victim) == "killed"
    text = one(found)
    if place == "committed":
        assert text == "saved"
    elif victim == 0 and kind == "tcp of rank 0":
        assert "the store by which ranks talk is gone" in text
    else:
        assert f"rank {victim} has ended: it was killed, or failed before" in text
    assert (tmp_path / "b").exists() == (place == "committed")
    assert not [*tmp_path.glob(".b.*")]


STOPPED = [
    (2, "tcp", [(0, "before"), (0, "commit"), (-1, "write")]),
    (3, "file", [(0, "write"), (0, "committed"), (-1, "come")]),
    (8, "prefix", [(0, "commit"), (-1, "write")]),
]


@pytest.mark.parametrize(("world_size", "kind", "cases"), STOPPED)
def test_a_stopped_rank_is_given_up(tmp_path: Path, world_size: int, kind: str, cases: list[tuple[int, str]]) -> None:
    """When it wakes up it says the same and does no harm, and the next save works."""
    with ranks(world_size, kind, tmp_path) as group:
        assert one(group.ask(save, str(tmp_path / "a"), 30.0)) == "saved"
        for number, (victim, place) in enumerate(cases):
            check_stopped(group, tmp_path / str(number), victim % world_size, place)


def check_stopped(group: Ranks, folder: Path, victim: int, place: str) -> None:
    group.tell(with_victim, victim, place, stop_here, save, str(folder / "b"), 1.2)
    text = one([group.hear(rank) for rank in range(len(group.pipes)) if rank != victim])
    pid = group.processes[victim].pid
    assert pid is not None
    os.kill(pid, signal.SIGCONT)
    assert group.hear(victim) == text
    if place == "committed":
        assert text == "saved"
    else:
        assert f"rank {victim} " + ("did not come" if place == "before" else "has been silent for 1.2 s") in text
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert there == ({"b"} if text == "saved" else set())
    assert one(group.ask(save, str(folder / "c"), 30.0)) == "saved"
    assert one(group.ask(load, str(folder / "c"), 30.0)) == "loaded"


def slow() -> None:
    time.sleep(2.5)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_disk_that_is_slower_than_the_time_out(tmp_path: Path, world_size: int) -> None:
    with ranks(world_size, "file", tmp_path) as group:
        for victim in {0, world_size - 1}:
            path = str(tmp_path / f"{victim}")
            assert one(group.ask(with_victim, victim, "write", slow, save, path, 1.0)) == "saved"
            assert one(group.ask(with_victim, victim, "read", slow, load, path, 1.0)) == "loaded"
        path = str(tmp_path / "c")
        assert one(group.ask(with_victim, 0, "commit", slow, save, path, 1.0)) == "saved"


# What may differ between ranks, and what rank 0 does alone


def texts(world_size: int, text: str) -> list[Any]:
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, text)
    return found


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def check_bad_input(rank: int, world_size: int, folder: str) -> None:
    import numpy as np

    place, last, model = Path(folder, str(world_size)), world_size - 1, nn.Linear(7, 5)
    with CheckpointManager(place, timeout=60) as manager:
        number = 1

        def fails(match: str, *, step: Any = None, blocking: bool = True, **parts: Any) -> None:
            """At the call, on all ranks in the same words; nothing is left, and the next save works."""
            nonlocal number
            number += 1
            text = attempt(lambda: manager.save(number if step is None else step, blocking=blocking, **parts))
            assert one(texts(world_size, text)).startswith("CheckpointError: saving "), text
            assert re.search(match, text), text
            assert not place.exists() or not [*place.glob(".*")]
            manager.save(number, model=model, user=number)
            dist.barrier()

        for blocking in (True, False):
            fails(
                r"user\['f'\] is a builtins.function, which cannot be saved", user={"f": lambda: 0}, blocking=blocking
            )
            for bad in ("a", 1.5, -1):
                step = bad if rank == last else number + 1
                fails("step=|all ranks must make the same call", step=step, blocking=blocking)
                fails("step=.*: expected a whole number from 0 on", step=bad, blocking=blocking)
            with replaced(draft, "part_of_rank", raising(MemoryError("none"))) if rank == last else nullcontext():
                text = attempt(functools.partial(manager.save, 10**6, blocking=blocking))
            assert f"rank {last}: MemoryError: none" in one(texts(world_size, text))
            fails("unhashable", data=UnhashableState() if rank == last else None, blocking=blocking)
        with replaced(Staging, "copy", raising(MemoryError("no copy"))) if rank == last else nullcontext():
            text = attempt(lambda: manager.save(10**6, model=model, blocking=False))
        assert f"rank {last}: MemoryError: no copy" in one(texts(world_size, text))
        for whole in (np.int64(1000), torch.tensor(1001), np.uint8(200), True):
            manager.save(whole, model=model)  # type: ignore[arg-type]
        dist.barrier()
        assert {1, 200, 1000, 1001} <= set(manager.steps())
        assert manager.load_latest(model=model).step == 1001  # type: ignore[union-attr]
    long = CheckpointManager(f"/tmp/{'x' * 300}", timeout=60)
    assert "File name too long" in one(texts(world_size, attempt(lambda: long.save(1, model=model))))


class UnhashableState:
    def state_dict(self) -> Any:
        return {[]: 1}


@pytest.mark.parametrize("world_size", [*WORLD_SIZES, 8])
def test_bad_input_is_an_error_at_the_call_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    run(check_bad_input, world_size, str(tmp_path))


def fsync_of_files(path: Path) -> None:
    """Of what is being written; not of the folder that it is in."""
    if not any(part.endswith(".unfinished") for part in path.parts):
        raise PermissionError(13, "Permission denied")


def check_rank_0(rank: int, world_size: int, folder: str) -> None:
    place, model = Path(folder, str(world_size)), nn.Linear(7, 5)
    failing = OSError(5, "Input/output error")
    fails = raising(failing)
    manager = CheckpointManager(place, keep=2, timeout=60)
    manager.save(1, model=model)

    def only_now(owner: Any, name: str, action: Callable[[], Any]) -> str:
        with replaced(owner, name, fails) if rank == 0 else nullcontext():
            return str(one(texts(world_size, attempt(lambda: type(action()).__name__))))

    # Before the rename: no checkpoint. The folder is looked at, made, and its files are brought to the disk.
    for number, (owner, name) in enumerate([(os.path, "lexists"), (directory, "begin"), (saving, "write_index")], 2):
        text = only_now(owner, name, lambda: manager.save(number, model=model))  # noqa: B023
        assert text.endswith("OSError: [Errno 5] Input/output error"), text
        assert [path.name for path in place.iterdir()] == ["step_1"]
        dist.barrier()
    looking: list[tuple[Any, str, Callable[[], Any]]] = [
        (directory, "committed_steps", functools.partial(manager.load_latest, model=model)),
        (loading, "read_index", functools.partial(manager.load, 1, model=model)),
    ]
    for owner, name, action in looking:
        assert "Input/output error" in only_now(owner, name, action)
        dist.barrier()
        assert action().step == 1
    # After it: there is one, so it is no failure.
    with replaced(directory, "fsync", fsync_of_files) if rank == 0 else nullcontext():
        manager.save(7, model=model)
    assert only_now(directory, "remove", lambda: manager.save(8, model=model)) == "SaveReport"
    assert only_now(manager, "steps", lambda: manager.save(9, model=model)) == "SaveReport"
    dist.barrier()
    assert {8, 9} <= set(manager.steps())
    manager.save(10, model=model)
    dist.barrier()
    assert manager.steps() == [9, 10]


@pytest.mark.parametrize("world_size", [*WORLD_SIZES, 8])
def test_what_rank_0_does_alone_may_fail(tmp_path: Path, world_size: int) -> None:
    run(check_rank_0, world_size, str(tmp_path))


def check_two_groups(rank: int, world_size: int, folder: str) -> None:
    """One saves while the other does: the second is told so, and takes nothing away."""
    half = world_size // 2
    groups = [dist.new_group([*range(half)]), dist.new_group([*range(half, world_size)])]
    is_second = rank >= half
    optimizer = ShardedRAdam(nn.Linear(7, 5).named_parameters(), process_group=groups[is_second])
    path = Path(folder, str(world_size), "a")
    barrier = Peers.of(None)

    def wait() -> None:
        with Agreement.begin(barrier, "waiting", 60.0):
            pass

    def write(self: saving.Save) -> list[Any]:
        wait()  # the first is writing
        wait()  # the second has failed
        return write_file(self)

    write_file = saving.Save._write_file
    if is_second:
        wait()
        text = attempt(lambda: optimizer.save(path, timeout=60))
        assert "a is being saved by another process: save from one process group, or to another path each" in text
        manager = CheckpointManager(path.parent, process_group=groups[1], timeout=60)
        manager.save(1, optimizer=optimizer)  # removes all leftovers of the folder, and this is none
        wait()
    else:
        with replaced(saving.Save, "_write_file", write):
            optimizer.save(path, timeout=60)
    dist.barrier()
    text = attempt(lambda: CheckpointManager(path.parent, timeout=60).save(2, optimizer=optimizer))
    assert "optimizer: its process group has the ranks [0" in one(texts(world_size, text))
    optimizer.load(path, timeout=60)
    assert sorted(file.name for file in path.parent.iterdir()) == ["a", "step_1"]
    assert not (path / ".lock").exists()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_two_groups_save_to_one_folder(tmp_path: Path, world_size: int) -> None:
    run(check_two_groups, world_size, str(tmp_path))
