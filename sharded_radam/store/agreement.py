"""What ranks agree on before and after they touch files, by small messages through torch.distributed's store.

Not by collectives: a rank that does not come is named when the time is over, nothing hangs, the process group stays
usable, and a thread may agree on one checkpoint while training communicates. Messages are JSON, never pickles.

An operation begins when all ranks have come, and goes on in stages. What a stage came to stands in one cell of the
store, that is written once: whoever decides, or gives up, writes it if it is empty, and does what it says then. So an
operation has one verdict, whoever was late, and all ranks succeed or all fail, with the same words::

    call      the newest operation that any rank has asked for. A rank that comes joins it, or, if it has seen it,
              replaces it by one of its own
    answer    of a call; empty until rank 0 comes, and writes a token    -> stage 0, under that token
                               or another rank gives up on rank 0        -> failed
    stage 0   all say what they call; rank 0 writes that all are there   -> stage 1
                               rank 0 gives up on a rank, or calls differ, or a rank gives up on rank 0  -> failed
                               another rank 0, later, finds it empty     -> again: a new call
    stage k   every rank posts what it offers, or what its problem is
                               rank 0 has all posts, and decides         -> a value: the next stage, or done
                               a problem, or somebody gives up           -> failed

A token is made by the rank 0 that lives now, so no post of any other operation, nor of processes that have ended, is
ever read for one of this. A rank that comes after its operation has failed raises what that came to, unless the others
call it again within two seconds.

A rank gives up on another that has ended, that has been silent for ``timeout``, or that has not come for ``timeout``;
never on one that lives and is slow (``liveness``). Rank 0 watches all others, these watch rank 0.

What a stage does may count beyond the store: a directory that was renamed. If rank 0 is lost there, the others cannot
know from messages whether it did that. Then ``settle`` decides, for all who ask: it makes sure that it cannot be done
any more, or finds that it has been. So it is if the store is lost too, as where rank 0 has it and is killed.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, cast

from sharded_radam.store.board import Board, StoreLostError, pauses
from sharded_radam.store.calls import Caller, FailedError, Operation
from sharded_radam.store.liveness import Address, Watch
from sharded_radam.store.offers import describe_error, encode_post, expect_one_call, join_reasons
from sharded_radam.store.peers import Line, Peers

_LEAVE_S = 5.0
"""How long rank 0 stays for others that have yet to read the last verdict."""

_USUAL_TIMEOUT_S = 600.0
"""By which ranks tell each other that one of them was given no time-out."""

_STORE_LOST = "the store by which ranks talk is gone: the process that had it (rank 0's, or torchrun's) has ended"


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or loaded; raised with the same text on every rank."""


class Agreement:
    """One operation of all peers, in stages. ``begin`` makes one that has begun on all ranks.

    It is a context manager: if it is left by an error, all ranks fail.

    Args:
        peers: the ranks.
        what: what is done, for errors, and alike on all ranks: ``"saving /runs/a"``.
        timeout: seconds to wait for a rank that has not come, or is silent.
    """

    def __init__(self, peers: Peers, what: str, timeout: float) -> None:
        self._peers, self._what, self._timeout = peers, what, timeout
        self._operation: Operation | None = None
        self._stage, self._is_open = 0, True
        self._settle: Callable[[], bool] | None = None
        self._addresses: dict[int, Address | None] = {}  # of ranks that are in it
        self._lost: set[int] = set()
        self._began = time.monotonic()
        if peers.line is not None:
            self._watch = Watch(peers.line.board, peers.line.known, timeout)
            weakref.finalize(self, self._watch.stop)

    @classmethod
    def begin(cls, peers: Peers, what: str, timeout: float, problem: Exception | None = None) -> Agreement:
        """Begin an operation on all ranks, in the same order on every rank, as collectives are.

        Args:
            peers, what, timeout: as for the class.
            problem: why this rank cannot do it, if it cannot.

        Raises:
            CheckpointError: on every rank the same: one did not come, called something else, or had a problem.
        """
        if not (isinstance(timeout, int | float) and timeout > 0):
            problem = problem or ValueError(f"timeout={timeout!r}: expected seconds above 0")
            timeout = _USUAL_TIMEOUT_S
        agreement = cls(peers, what, timeout)
        if peers.line is None:
            agreement._value(agreement._take_part(encode_post(None, problem), lambda offers: None), problem)
            return agreement
        try:
            with peers.line.lock:
                agreement._meet(peers.line, problem)
        except StoreLostError as error:
            agreement.close()
            raise CheckpointError(f"{what}: {_STORE_LOST}") from error
        except BaseException as error:
            agreement.close(error)
            raise
        return agreement

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    @property
    def _board(self) -> Board:
        assert self._peers.line is not None
        return self._peers.line.board

    def _meet(self, line: Line, problem: Exception | None) -> None:
        """Wait for all ranks, and see that all want the same."""
        line.known.arrive()
        post = encode_post({"what": self._what, "address": line.known.own}, problem)
        caller = Caller(line, self._peers.rank, self._what, self._watch, self._timeout, self._began)
        verdict: dict[str, Any] = {"again": True}
        while "again" in verdict:
            try:
                self._operation = caller.join()
            except FailedError as error:
                self._value({"failure": str(error)}, problem)
                raise
            if self._peers.rank == 0:
                self._began = time.monotonic()
            else:
                self._addresses = {0: self._operation.rank_0}
            self._watch.begin(self._operation.token, self._peers.rank)
            verdict = self._take_part(post, expect_one_call)
        self._value(verdict, problem)
        line.known.meet(self._addresses.values())

    # Stages

    def decide(
        self,
        offer: Any,
        problem: Exception | None = None,
        decide: Callable[[list[Any]], Any] = lambda offers: None,
        settle: Callable[[], bool] | None = None,
    ) -> Any:
        """One stage.

        Args:
            offer: JSON value of this rank.
            problem: what this rank failed with, if it did.
            decide: called on rank 0 with the offers of all ranks, in their order, if no rank has a problem; returns
                the verdict, a JSON value, or raises.
            settle: where ``decide`` does what counts beyond the store, and returns None: makes sure that it cannot be
                done any more, and returns False; or finds that it has been done, and returns True. On any rank.

        Raises:
            CheckpointError: a rank had a problem or was given up, or ``decide`` raised. The operation is over.
        """
        self._settle = settle
        value = self._value(self._take_part(encode_post(offer, problem), decide), problem)
        self._settle = None
        return value

    def check(self) -> None:
        """For who does long work before the next stage: raise RuntimeError if that must fail already."""
        if self._peers.line is None or not self._watch.is_due():
            return
        with suppress(StoreLostError):
            others = range(1, self._peers.world_size) if self._peers.rank == 0 else range(1)
            if lost := self._find_lost(others):
                self._claim(self._failure(join_reasons({}, lost)))
            if self._board.look(self._key("verdict")) is not None:
                raise RuntimeError("another rank has given up")

    def _take_part(self, post: str, decide: Callable[[list[Any]], Any]) -> dict[str, Any]:
        try:
            if self._peers.rank:
                return self._ask(post)
            verdict = self._judge(post, decide)
        except StoreLostError:
            return self._settled(_STORE_LOST)
        return self._failure("another process is rank 0 now") if "again" in verdict else verdict

    def _value(self, verdict: dict[str, Any], problem: Exception | None = None) -> Any:
        """What a verdict says: go on with its value, or the operation is over."""
        if "failure" in verdict:
            self.close()
            raise CheckpointError(verdict["failure"]) from problem
        self._stage += 1
        return verdict["value"]

    def _ask(self, post: str) -> dict[str, Any]:
        """As another rank than 0: post, and wait for the verdict."""
        self._board.put(self._key(self._peers.rank), post)
        verdict = None
        for _ in pauses():
            verdict = self._board.look(self._key("verdict"))
            if verdict is None and self._watch.is_due() and (why := self._why_lost(0)):
                verdict = self._claim(self._settled(f"rank 0 {why}"))
            if verdict is not None:
                break
        return cast("dict[str, Any]", verdict)

    def _judge(self, own: str, decide: Callable[[list[Any]], Any]) -> dict[str, Any]:
        """As rank 0: collect the posts, decide, and write the verdict."""
        posts = {0: json.loads(own)}
        lost = self._collect(posts) if self._peers.line else {}
        if self._peers.line and (verdict := self._board.look(self._key("verdict"))) is not None:
            return cast("dict[str, Any]", verdict)
        problems = {rank: post["problem"] for rank, post in sorted(posts.items()) if "problem" in post}
        if problems or lost:
            return self._claim(self._failure(join_reasons(problems, lost)))
        try:
            verdict = {"value": decide([posts[rank]["offer"] for rank in range(self._peers.world_size)])}
            json.dumps(verdict)
        except Exception as error:  # whatever it is, the others must not wait for a verdict
            verdict = self._settled(str(error) if isinstance(error, ValueError) else describe_error(error))
        return self._claim(verdict)

    def _collect(self, posts: dict[int, Any]) -> dict[int, str]:
        """Posts of the others, as they come (posts: filled). Returns why ranks are given up, if any is."""
        waiting = {rank: self._key(rank) for rank in range(1, self._peers.world_size)}
        lost: dict[int, str] = {}
        for _ in pauses():
            is_due = self._watch.is_due()
            if is_due or self._board.has([*waiting.values()]):
                posts |= self._take(waiting)
            if is_due:
                lost = self._find_lost(waiting)
            if not waiting or lost or (is_due and self._board.look(self._key("verdict")) is not None):
                break
        return lost

    def _take(self, waiting: dict[int, str]) -> dict[int, Any]:
        """Posts that are there (waiting: without them)."""
        posts = {rank: post for rank, key in waiting.items() if (post := self._board.look(key)) is not None}
        for rank, post in posts.items():
            self._board.drop(waiting.pop(rank))
            if not self._stage:
                address = post.get("offer", {}).get("address")
                self._addresses[rank] = Address(*address) if address else None
        return posts

    def _find_lost(self, ranks: Iterable[int]) -> dict[int, str]:
        """Those of some ranks that are given up, and why."""
        lost = {rank: why for rank in ranks if (why := self._why_lost(rank))}
        self._lost |= lost.keys()
        return lost

    def _why_lost(self, rank: int) -> str | None:
        if rank not in self._addresses:
            return self._watch.why_absent(rank, self._began)
        return self._watch.why_lost(rank, self._addresses[rank])

    def _key(self, name: object) -> str:
        assert self._operation is not None
        return f"{self._operation.token}/{self._stage}/{name}"

    def _claim(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """Write the verdict of this stage, if there is none; what it is now."""
        return cast("dict[str, Any]", self._board.claim(self._key("verdict"), verdict)) if self._peers.line else verdict

    def _failure(self, text: str) -> dict[str, Any]:
        return {"failure": f"{self._what}: {text}"}

    def _settled(self, text: str) -> dict[str, Any]:
        """A failure, unless what counts beyond the store has been done."""
        try:
            if self._settle is not None and self._settle():
                return {"value": None}
        except Exception as error:
            text += f"; whether it was done after all cannot be seen: {describe_error(error)}"
        return self._failure(text)

    # End

    def close(self, error: BaseException | None = None) -> None:
        """End this rank's part; with an error, that of all ranks."""
        if not self._is_open or self._peers.line is None:
            return
        self._is_open = False
        with suppress(StoreLostError):
            if self._operation and error is not None:
                self._claim(self._settled(f"rank {self._peers.rank}: {describe_error(error)}"))
            if self._operation:
                self._leave(self._operation)
        self._watch.close()

    def _leave(self, operation: Operation) -> None:
        """Let rank 0 stay until the others have read the verdict: the store may end with it. It removes the keys."""
        if self._peers.rank:
            self._board.put(f"{operation.token}/left/{self._peers.rank}", "")
            return
        deadline = time.monotonic() + _LEAVE_S
        staying = {rank: f"{operation.token}/left/{rank}" for rank in self._addresses.keys() - self._lost}
        for _ in pauses():
            if not staying or self._board.has([*staying.values()]):
                break
            if time.monotonic() > deadline:
                return
            if self._watch.is_due():
                ended = {rank for rank in staying if self._watch.has_ended(self._addresses[rank])}
                staying = {rank: key for rank, key in staying.items() if rank not in ended}
        line = self._peers.line
        if line is not None and len(staying) == self._peers.world_size - 1:  # nobody will look for them any more
            verdicts = [f"{operation.token}/{stage}/verdict" for stage in range(self._stage + 1)]
            self._board.drop(*staying.values(), *verdicts, *line.spent)
            line.spent = [f"{operation.call}/answer"]
