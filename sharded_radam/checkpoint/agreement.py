"""What ranks agree on before and after they touch files, by small messages through torch.distributed's store.

Not by collectives: a rank that does not come is named when the time is over, nothing hangs, the process group stays
usable, and a thread may agree on one checkpoint while training communicates. Each stage is

    every rank    posts what it offers, or what its problem is
    rank 0        waits for all posts, decides, posts the verdict: a value, or the text of the error
    every rank    returns the value, or raises CheckpointError with the text

so that all ranks succeed or all fail, with the same words. Messages are JSON, never pickles.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from sharded_radam.compat import own_connection


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded; raised with the same text on every rank."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks that save and load together: those of a process group, or this process alone (``store`` None)."""

    rank: int
    world_size: int
    store: Any

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> Peers:
        """The ranks of a group (None: the default one, or this process alone where there is none)."""
        if not dist.is_available() or not dist.is_initialized():
            return Peers(0, 1, None)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        if len(ranks) == 1:
            return Peers(0, 1, None)
        name = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
        # A connection of its own, since one that waits for a message lets nobody else ask for anything.
        store = own_connection(dist.distributed_c10d._get_default_store())
        return Peers(dist.get_rank(group), len(ranks), cast("Any", dist).PrefixStore(f"sharded_radam/{name}", store))


class Agreement:
    """One operation of all peers, in stages; made in the same order on every rank, as collectives are.

    Args:
        peers: the ranks.
        what: what is done, for errors: ``"saving runs/a"``.
        timeout: seconds that rank 0 waits for the posts of a stage; others wait twice as long for its verdict, since
            it may have come later than they.
    """

    def __init__(self, peers: Peers, what: str, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: expected seconds above 0")
        self._peers = peers
        self._what = what
        self._timeout = timeout
        self._stage = 0
        # The store counts, not this process: a new store, as after an elastic restart, begins anew.
        self._number = peers.store.add(f"operations/{peers.rank}", 1) if peers.store else 0

    def decide(
        self, offer: Any, problem: Exception | None = None, decide: Callable[[list[Any]], Any] = lambda offers: None
    ) -> Any:
        """One stage.

        Args:
            offer: JSON value of this rank.
            problem: what this rank failed with, if it did.
            decide: called on rank 0 with the offers of all ranks, in their order, if no rank has a problem; returns
                the verdict, a JSON value, or raises.

        Raises:
            CheckpointError: a rank had a problem or did not come, or ``decide`` raised.
        """
        self._stage += 1
        post = {"problem": f"{type(problem).__name__}: {problem}"} if problem is not None else {"offer": offer}
        if self._peers.rank == 0:
            verdict = self._judge([post, *self._collect()], decide)
            self._set("verdict", verdict)
            self._forget(f"{self._stage - 1}/verdict")
        else:
            self._set(str(self._peers.rank), post)
            found = self._get("verdict", time.monotonic() + 2 * self._timeout + 1)
            late = f"{self._what}: rank 0 did not come within {2 * self._timeout:g} s, or has ended"
            verdict = found or {"failure": late}
        if "failure" in verdict:
            raise CheckpointError(verdict["failure"]) from problem
        return verdict["value"]

    def _judge(self, posts: Sequence[Any], decide: Callable[[list[Any]], Any]) -> dict[str, Any]:
        missing = [rank for rank, post in enumerate(posts) if post is None]
        problems: dict[str, list[int]] = {}
        for rank, post in enumerate(posts):
            if post is not None and "problem" in post:
                problems.setdefault(post["problem"], []).append(rank)
        failures = [f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in problems.items()]
        if missing:
            failures.append(
                f"rank {', '.join(map(str, missing))} did not come within {self._timeout:g} s: every rank of the "
                "process group must make this call, and be alive"
            )
        if failures:
            return {"failure": f"{self._what}: {'; '.join(failures)}"}
        try:
            return {"value": decide([post["offer"] for post in posts])}
        except Exception as error:  # whatever it is, the others must not wait for a verdict
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return {"failure": f"{self._what}: {text}"}

    def _collect(self) -> list[Any]:
        deadline = time.monotonic() + self._timeout
        posts = []
        for rank in range(1, self._peers.world_size):
            posts.append(self._get(str(rank), deadline))
            self._forget(f"{self._stage}/{rank}")
        return posts

    def _set(self, name: str, value: Any) -> None:
        if self._peers.store:
            self._peers.store.set(f"{self._number}/{self._stage}/{name}", json.dumps(value))

    def _get(self, name: str, deadline: float) -> Any:
        """A message as soon as it is there; None if it is not in time, or the store is gone."""
        key = f"{self._number}/{self._stage}/{name}"
        try:
            self._peers.store.wait([key], timedelta(seconds=max(0.001, deadline - time.monotonic())))
            return json.loads(self._peers.store.get(key))
        except RuntimeError:  # too late, or the process that has the store ended
            return None

    def _forget(self, key: str) -> None:
        if self._peers.store and self._stage:
            self._peers.store.delete_key(f"{self._number}/{key}")


def expect_same(offers: Sequence[Any], what: str) -> None:
    """Raise ValueError unless all ranks offered the same."""
    for rank, offer in enumerate(offers):
        if offer != offers[0]:
            raise ValueError(f"{what}: rank 0 has {offers[0]!r}, rank {rank} has {offer!r}; all ranks must have one")
