"""How ranks find into one operation; see ``agreement``."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any, cast

from sharded_radam.store.board import pauses
from sharded_radam.store.liveness import Address, Watch
from sharded_radam.store.peers import Line

_TOKEN_BYTES = 8
_LATE_S = 2.0
"""How long who comes late for an operation that has failed waits for the others to call it again."""


class FailedError(Exception):
    """The operation that a rank has come for has failed, with this text."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One that all ranks are asked to begin: its token, the call that it answers, and where rank 0 listens."""

    token: str
    call: str
    rank_0: Address | None


@dataclass(frozen=True, slots=True)
class Caller:
    """A rank that comes to do ``what`` at the time ``began``."""

    line: Line
    rank: int
    what: str
    watch: Watch
    timeout: float
    began: float

    def join(self) -> Operation:
        """Begin the operation (rank 0), or wait for rank 0 to do so.

        Raises:
            FailedError: rank 0 has ended or did not come; or this rank comes too late.
        """
        while True:
            if (operation := self._try()) is not None:
                return operation

    def _try(self) -> Operation | None:
        """Take part in the newest call; if that is over, none, and the call that is found next is another one."""
        board = self.line.board
        own = json.dumps({"id": secrets.token_hex(_TOKEN_BYTES), "what": self.what})
        text = board.exchange("call", self.line.seen, own)
        call = json.loads(text)
        answer = self._answer(call["id"]) if self.rank == 0 else self._await_answer(call["id"], text)
        if isinstance(answer, str) and call["what"] == self.what:
            self._wait_for_another(text, answer)
        self.line.seen = text
        return answer if isinstance(answer, Operation) else None

    def _answer(self, call: str) -> Operation | str | None:
        """As rank 0: the operation, or what it has failed with before this came."""
        own = {"token": secrets.token_hex(_TOKEN_BYTES), "address": self.line.known.own}
        answer = self.line.board.claim(f"{call}/answer", own)
        if "failure" in answer:
            return str(answer["failure"])
        if answer["token"] == own["token"]:
            return Operation(answer["token"], call, self.line.known.own)
        # Of a process that was rank 0 before this one, and may have ended while others wait.
        self.line.board.claim(f"{answer['token']}/0/verdict", {"again": True})
        return None

    def _await_answer(self, call: str, text: str) -> Operation | str | None:
        """As another rank: the operation, what it failed with before this came, or None if there is a newer call."""
        board, key = self.line.board, f"{call}/answer"
        if (early := board.look(key)) is not None and "failure" in early:
            return str(early["failure"])
        answer = early or self._wait(key, text)
        if "failure" in answer:
            self.line.seen = text
            raise FailedError(answer["failure"])
        if "token" not in answer:
            return None
        if (verdict := board.look(f"{answer['token']}/0/verdict")) is not None:
            return cast("str | None", verdict.get("failure"))
        return Operation(answer["token"], call, Address(*answer["address"]) if answer["address"] else None)

    def _wait(self, key: str, text: str) -> dict[str, Any]:
        """Rank 0's answer, or the failure when rank 0 is given up; nothing if there is a newer call."""
        for _ in pauses():
            if (answer := self.line.board.look(key)) is not None:
                return cast("dict[str, Any]", answer)
            if self.watch.is_due():
                if self.line.board.read("call") != text:
                    break
                if why := self.watch.why_absent(0, self.began):
                    return cast("dict[str, Any]", self.line.board.claim(key, {"failure": f"{self.what}: rank 0 {why}"}))
        return {}

    def _wait_for_another(self, text: str, failure: str) -> None:
        """Raise what an operation came to that this rank has missed, unless the others call it again just now."""
        deadline = time.monotonic() + min(_LATE_S, self.timeout)
        for _ in pauses():
            if self.line.board.read("call") != text:
                return
            if time.monotonic() > deadline:
                self.line.seen = text
                raise FailedError(failure)
