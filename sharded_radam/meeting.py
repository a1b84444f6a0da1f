"""Where ranks meet before they do something together: in the store of their process group.

Not by collectives: what is wrong on one rank is raised on all of them, a rank that does not come is named, and nothing
depends on devices. There is one open operation at a time, which has a token::

    every rank      joins the open operation, or, if it has been there, opens the next one;
                    posts what it does and what it offers, or its problem
    the last one    decides: a value of all offers, or the text of an error
    who knows that it fails (another operation, the time is over, a rank is gone) decides it, too
    every rank      takes the decision; the first that was written counts

So all ranks succeed or all fail with the same words, whoever is late. Nothing is counted that could part: a rank that
missed an operation joins the next one. Messages are JSON, never pickles.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.25
"""Between two looks at the store; they grow, so that it can be asked by thousands."""

_GRACE_S = 3.0
"""How long a rank that has failed waits for the others to say what they know."""

_KINDS: tuple[type[Exception], ...] = (ValueError, TypeError, MemoryError)
"""Exceptions of one rank that are raised as they are on the others; all else is a RuntimeError there."""

_MISSING = (
    "every rank of the process group must come here, also those without data, and not under a condition such as "
    "`if rank == 0:`, and be alive"
)


class Meeting:
    """The ranks of a process group, or this process alone.

    Args:
        store: where they meet; None if there is nobody to meet.
        rank: of this process in the group.
        world_size: of the group.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._store = store
        self._written: deque[list[str]] = deque()

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> Meeting:
        """The ranks of a group (None: the default one, or this process alone where there is none).

        Raises:
            TypeError: it is no process group.
            ValueError: this process is not in it.
        """
        if not dist.is_available() or not dist.is_initialized():
            return Meeting(None, 0, 1, 0.0)
        group = own_group(group)
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        # The fake backend has one process that plays one of its ranks.
        if world_size == 1 or dist.get_backend(group) == "fake":
            return Meeting(None, rank, world_size, 0.0)
        store = dist.distributed_c10d._get_process_group_store(group)
        prefixed = cast("Any", dist).PrefixStore("sharded_radam/meeting", store)
        return Meeting(prefixed, rank, world_size, timeout_of(group))

    def agree(
        self,
        what: str,
        offer: Any = None,
        problem: Exception | None = None,
        decide: Callable[[list[Any]], Any] = lambda offers: None,
        watch: Callable[[], str | None] = lambda: None,
    ) -> Any:
        """Collective: come together for an operation.

        Args:
            what: this rank does; the same words on every rank.
            offer: a JSON value of this rank.
            problem: what this rank failed with, if it did.
            decide: a pure function of the offers of all ranks, in their order; returns a JSON value, or raises.
            watch: asked now and then while others are waited for; returns why that is in vain.

        Returns:
            What ``decide`` returned.

        Raises:
            Exception: on every rank, in the same words: a rank had a problem, did something else, or did not come. Of
                a rank's problem, its type if that is one of Python's for wrong arguments; otherwise RuntimeError.
        """
        if self._store is None:
            if problem is not None:
                raise problem
            return decide([offer] * self.world_size)
        try:
            verdict = self._verdict(what, _post(what, offer, problem), decide, watch)
        except dist.DistNetworkError as error:
            verdict = {"failure": f"{what}: the process that has the store of the process group is gone ({error})"}
        if "failure" not in verdict:
            return verdict["value"]
        kind = {each.__name__: each for each in _KINDS}.get(verdict.get("kind", ""), RuntimeError)
        raise kind(verdict["failure"]) from problem

    def attempt(self, what: str, make: Callable[[], T]) -> T:
        """Collective: do what may fail on this rank, alone; return when all ranks have done it.

        Raises:
            Exception: on every rank, in the same words: what ``make`` raised on one of them.
        """
        problem: Exception | None = None
        try:
            made = make()
        except Exception as error:  # whatever it is, the others must not wait for this rank
            problem = error
        self.agree(what, None, problem)
        return made

    def _verdict(
        self, what: str, post: dict[str, Any], decide: Callable[[list[Any]], Any], watch: Callable[[], str | None]
    ) -> dict[str, Any]:
        token = self._join(what)
        self._store.set(f"{token}/{self.rank}", json.dumps(post))
        if self._store.add(f"{token}/count", 1) == self.world_size:
            return self._settle(token, _judge(self._posts(token), self.world_size, decide))
        if self._store.compare_set(f"{token}/what", "", what).decode() != what:
            return self._settle(token, _judge(self._posts(token), self.world_size))
        patience = min(_GRACE_S, self.timeout) if "problem" in post else self.timeout
        end, pause = time.monotonic() + patience, _FIRST_PAUSE_S
        while (verdict := self._look(token)) is None:
            if (vain := watch()) is not None:
                return self._settle(token, {"failure": f"{what}: {vain}"})
            if time.monotonic() >= end:
                return self._settle(token, _judge(self._posts(token), self.world_size, seconds=patience))
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        return verdict

    def _join(self, what: str) -> str:
        """The token of the open operation, after opening one if this rank has been in it, or it failed without us."""
        fresh = secrets.token_hex(8)
        token = str(self._store.compare_set("open", "", fresh).decode())
        while token != fresh and self._is_over(token, what):
            token = str(self._store.compare_set("open", token, fresh).decode())
        self._written.append([f"{token}/{self.rank}"])
        if token == fresh:
            self._written[-1] += [f"{token}/{name}" for name in ("count", "what", "verdict")]
        if len(self._written) > 8:  # every rank has left that one long ago
            for key in self._written.popleft():
                self._store.delete_key(key)
        return token

    def _is_over(self, token: str, what: str) -> bool:
        """For this rank. One that is late learns how the operation ended that it comes for."""
        if self._store.check([f"{token}/{self.rank}"]):
            return True
        missed = self._store.check([f"{token}/verdict"])
        return missed and what not in {post["what"] for post in self._posts(token).values()}

    def _posts(self, token: str) -> dict[int, dict[str, Any]]:
        keys = [f"{token}/{rank}" for rank in range(self.world_size)]
        if self._store.check(keys):
            return {rank: json.loads(post) for rank, post in enumerate(self._store.multi_get(keys))}
        return {rank: json.loads(self._store.get(key)) for rank, key in enumerate(keys) if self._store.check([key])}

    def _settle(self, token: str, verdict: dict[str, Any]) -> dict[str, Any]:
        """Write a verdict unless there is one; return the one that counts."""
        found = self._store.compare_set(f"{token}/verdict", "", json.dumps(verdict))
        return cast("dict[str, Any]", json.loads(found))

    def _look(self, token: str) -> dict[str, Any] | None:
        """The verdict, if it is there. ``store.wait`` would say on stderr each time that it is not."""
        key = f"{token}/verdict"
        if not self._store.check([key]):
            return None
        return cast("dict[str, Any]", json.loads(self._store.get(key)))


def _post(what: str, offer: Any, problem: Exception | None) -> dict[str, Any]:
    if problem is None:
        return {"what": what, "offer": offer}
    kind = next((each.__name__ for each in _KINDS if isinstance(problem, each)), "RuntimeError")
    known = type(problem) in (*_KINDS, RuntimeError)
    return {"what": what, "kind": kind, "problem": str(problem) if known else f"{type(problem).__name__}: {problem}"}


def _judge(
    posts: dict[int, dict[str, Any]],
    world_size: int,
    decide: Callable[[list[Any]], Any] = lambda offers: None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """What follows from the posts that there are, after so many seconds."""
    doing = _by_value({rank: post["what"] for rank, post in posts.items()})
    if len(doing) > 1:
        calls = "; ".join(f"{_ranks(ranks)}: {what}" for what, ranks in doing.items())
        return {"failure": f"ranks do different things ({calls}): all ranks must make the same calls in the same order"}
    problems = _by_value({rank: post["problem"] for rank, post in posts.items() if "problem" in post})
    if problems:
        kind = next(post["kind"] for post in posts.values() if "problem" in post)
        if len(problems) == 1 and len(next(iter(problems.values()))) == world_size:
            return {"failure": next(iter(problems)), "kind": kind}
        return {"failure": "; ".join(f"{_ranks(ranks)}: {text}" for text, ranks in problems.items()), "kind": kind}
    missing = [rank for rank in range(world_size) if rank not in posts]
    if missing:
        late = f"{next(iter(doing))}: {_ranks(missing)} did not come within {seconds:g} s; {_MISSING}"
        return {"failure": late}
    try:
        return {"value": decide([posts[rank]["offer"] for rank in range(world_size)])}
    except Exception as error:  # whatever it is, the others must not wait for a verdict
        post = _post("", None, error)
        return {"failure": post["problem"], "kind": post["kind"]}


def _by_value(of_rank: dict[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, value in of_rank.items():
        found.setdefault(value, []).append(rank)
    return found


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def own_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group given, or the default one.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not in it.
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            f"process_group={group!r}: expected a torch.distributed.ProcessGroup, as dist.new_group() or a "
            "DeviceMesh's get_group() returns"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"process_group does not contain this process (global rank {dist.get_rank()}): build the optimizer only "
            "on the ranks of its group, and give it the group that they are in"
        )
    return group


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that a group's backend waits for a rank."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return float(options._timeout.total_seconds())
    return dist.default_pg_timeout.total_seconds()
