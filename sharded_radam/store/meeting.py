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

A rank that waits looks whether the process of the next rank has ended (``liveness``), and at the connections of the
transport. So a rank that is killed is noticed within seconds, by the one before it, or, if that one is dead too, by the
one before that. The others learn where to look for a rank when it first comes here, which is when it begins to build an
optimizer. One that is killed between ``init_process_group`` and that has run nothing of ours: nothing tells it from one
that is slow, and the others wait until the time is over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any, TypeVar, cast

import torch.distributed as dist

from sharded_radam.store.board import Board, StoreLostError, pauses
from sharded_radam.store.groups import own_group, ranks_of_mesh, timeout_of
from sharded_radam.store.liveness import Acquaintance, Watch
from sharded_radam.store.verdicts import agreed, error_of, judge, make_post, name_ranks

T = TypeVar("T")

logger = logging.getLogger("sharded_radam")

_QUIET_S = 10.0
"""After which a rank that waits says so, once."""

_GRACE_S = 5.0
"""How long a rank that has failed waits for the others to say what they know."""

_MISSING = (
    "every rank of the process group must come here, also those without data, and not under a condition such as "
    "`if rank == 0:`, and be alive"
)


_known: weakref.WeakKeyDictionary[Any, dict[str, Acquaintance]] = weakref.WeakKeyDictionary()
"""Of the store of a process group, by places in it: where the ranks listen that meet there."""


class Connections:
    """By what ranks wait for each other outside of meetings; here nothing that could be looked at.

    ``key`` tells one optimizer's connections from another's; ``sent`` are the marks that this rank has sent by them.
    """

    key = ""
    sent = 0

    def gone(self) -> str | None:
        """Why it is in vain to wait in a meeting, if it is."""
        return None

    def is_ahead(self) -> bool:
        """Whether another rank waits for a mark of this one."""
        return False

    def call(self) -> None:
        """Call those here who wait for a mark of this rank."""

    def advance(self, number: int) -> None:
        """Send marks until there are so many: after a failure, all ranks are equally far again."""


class Meeting:
    """The ranks of a process group, or this process alone.

    Args:
        store: where they meet; None if there is nobody to meet.
        rank: of this process in the group.
        world_size: of the group.
        timeout: seconds that a rank waits for the others.
        known: where they listen.

    ``connections`` are looked at while others are waited for.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, timeout: float, known: Acquaintance | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.connections = Connections()
        self._next = (rank + 1) % world_size
        self._board = None if store is None else Board(store)
        self._known = known
        if self._known is None and self._board is not None:
            self._known = Acquaintance(self._board, store, rank, [self._next])
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
        store = dist.distributed_c10d._get_process_group_store(group)
        return Meeting._at(store, "", dist.get_rank(group), dist.get_world_size(group), group)

    @staticmethod
    def of_mesh(mesh: Any) -> Meeting:
        """All ranks of a DeviceMesh, whatever their order in it, and whatever its process groups are.

        Ranks are counted in increasing order.

        Raises:
            TypeError: it is no mesh.
            ValueError: this process is not in it.
        """
        ranks = ranks_of_mesh(mesh)
        if len(ranks) == dist.get_world_size():
            return Meeting.of(None)
        place = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
        store = dist.distributed_c10d._get_default_store()
        world = own_group(None)
        return Meeting._at(store, f"/{place}", ranks.index(dist.get_rank()), len(ranks), world)

    @staticmethod
    def _at(store: Any, place: str, rank: int, world_size: int, group: dist.ProcessGroup) -> Meeting:
        # The fake backend has one process that plays one of its ranks.
        if world_size == 1 or dist.get_backend(group) == "fake":
            return Meeting(None, rank, world_size, 0.0)
        prefixed = cast("Any", dist).PrefixStore(f"sharded_radam/meeting{place}", store)
        known = _known.setdefault(store, {})
        meeting = Meeting(prefixed, rank, world_size, timeout_of(group), known.get(place))
        assert meeting._known is not None
        known[place] = meeting._known
        with suppress(StoreLostError):  # will be raised when they meet
            meeting._known.arrive()
        return meeting

    def agree(
        self,
        what: str,
        offer: Any = None,
        problem: Exception | None = None,
        decide: Callable[[list[Any]], Any] = lambda offers: None,
        summon: Callable[[], None] = lambda: None,
        is_within: bool = False,
    ) -> Any:
        """Collective: come together for an operation.

        Args:
            what: this rank does; the same words on every rank.
            offer: a JSON value of this rank.
            problem: what this rank failed with, if it did.
            decide: a pure function of the offers of all ranks, in their order; returns a JSON value, or raises.
            summon: called if this fails before all ranks have come: those that wait for this one elsewhere fail then.
            is_within: this rank is in the middle of what all have begun. If it comes late, it is told how that ended,
                although the others may have gone on to something else.

        Returns:
            What ``decide`` returned.

        Raises:
            Exception: on every rank, in the same words: a rank had a problem, did something else, or did not come. Of
                a rank's problem, its type if that is one of Python's for wrong arguments; otherwise RuntimeError.
        """
        if self._board is None:
            if problem is not None:
                raise problem
            return decide([offer] * self.world_size)
        post = {**make_post(what, offer, problem), "sent": {self.connections.key: self.connections.sent}}
        try:
            verdict = self._verdict(self._board, what, post, decide, is_within)
        except StoreLostError as error:
            verdict = {"failure": f"{what}: the process that has the store of the process group is gone ({error})"}
        if "failure" not in verdict:
            return verdict["value"]
        if verdict.get("came") != self.world_size:
            summon()
        self.connections.advance(verdict.get("sent", {}).get(self.connections.key, 0))
        if problem is not None and verdict["failure"] == post["problem"]:  # every rank has the same one
            raise agreed(problem)
        raise error_of(verdict) from problem

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
        self, board: Board, what: str, post: dict[str, Any], decide: Callable[[list[Any]], Any], is_within: bool
    ) -> dict[str, Any]:
        assert self._known is not None
        self._known.arrive()
        self._known.meet([self._known.address(self._next)])
        token = (self._missed(board) if is_within else None) or self._join(board, post)
        self._known.last = token
        board.put(f"{token}/{self.rank}", json.dumps(post))
        if board.count(f"{token}/count") == self.world_size or board.claim(f"{token}/what", what) != what:
            return self._settle(board, token, decide)
        with closing(Watch(board, self._known, self.timeout)) as watch:
            found = self._wait(board, watch, token, post)
        return self._settle(board, token, decide, found) if isinstance(found, str) else found

    def _wait(self, board: Board, watch: Watch, token: str, post: dict[str, Any]) -> dict[str, Any] | str:
        """The verdict, or why it is in vain to wait for it."""
        has_failed = "problem" in post
        patience = min(_GRACE_S, self.timeout) if has_failed else self.timeout
        begin, patiently = time.monotonic(), _QUIET_S
        for _ in pauses():
            if (verdict := board.look(f"{token}/verdict")) is not None:
                return cast("dict[str, Any]", verdict)
            waited = time.monotonic() - begin
            if (vain := self.connections.gone()) is not None:
                return vain
            if watch.is_due() and (why := watch.why_ended(self._next)):
                return f"rank {self._next} {why}"
            # Otherwise it has left this meeting.
            if self.connections.is_ahead() and board.read(f"{token}/verdict") is None:
                self.connections.call()
            if waited >= patience:
                break
            if waited > patiently:
                came = self._posts(board, token)
                missing = [rank for rank in range(self.world_size) if rank not in came]
                logger.warning("%s: rank %d waits for %s", post["what"], self.rank, name_ranks(missing))
                patiently = math.inf
        return f"did not come{'' if has_failed else f' within {patience:g} s'}; {_MISSING}"

    def _join(self, board: Board, post: dict[str, Any]) -> str:
        """The token of the open operation, after opening one if this rank has been in it, or it failed without us."""
        fresh = secrets.token_hex(8)
        token = board.exchange("open", "", fresh)
        while token != fresh and self._is_over(board, token, post):
            board.put(f"{fresh}/before", token)
            token = board.exchange("open", token, fresh)
            if token != fresh:  # another rank has opened one meanwhile
                board.drop(f"{fresh}/before")
        self._note_written(board, token, ("count", "what", "verdict", "before") if token == fresh else ())
        return token

    def _missed(self, board: Board) -> str | None:
        """The token of the first operation after the last that this rank was in."""
        assert self._known is not None
        token, missed = board.read("open"), None
        while token and token != self._known.last:
            missed, token = token, board.read(f"{token}/before")
        if missed is not None:
            self._note_written(board, missed)
        return missed

    def _note_written(self, board: Board, token: str, names: Sequence[str] = ()) -> None:
        """Note what this rank writes; remove that of operations that every rank has left long ago."""
        self._written.append([f"{token}/{name}" for name in (self.rank, *names)])
        if len(self._written) > 8:
            board.drop(*self._written.popleft())

    def _is_over(self, board: Board, token: str, post: dict[str, Any]) -> bool:
        """For this rank. One that is late learns how the operation ended that it missed."""
        if board.has([f"{token}/{self.rank}"]):
            return True
        if not board.has([f"{token}/verdict"]):
            return False
        return post["what"] not in {each["what"] for each in self._posts(board, token).values()}

    def _posts(self, board: Board, token: str) -> dict[int, dict[str, Any]]:
        return board.look_at_all({rank: f"{token}/{rank}" for rank in range(self.world_size)})

    def _settle(
        self, board: Board, token: str, decide: Callable[[list[Any]], Any] = lambda offers: None, vain: str = ""
    ) -> dict[str, Any]:
        """Write a verdict unless there is one; return the one that counts."""
        posts = self._posts(board, token)
        verdict = judge(posts, self.world_size, decide, vain)
        sent: dict[str, int] = {}
        for key, number in (pair for post in posts.values() for pair in post["sent"].items()):
            sent[key] = max(sent.get(key, 0), number + 1)
        found = board.claim(f"{token}/verdict", {**verdict, "sent": sent, "came": len(posts)})
        return cast("dict[str, Any]", found)
