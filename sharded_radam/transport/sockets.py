"""Ranks of one host tell each other how far they are, and give each other memory: by Unix sockets.

Nothing has a name in the file system: sockets are in Linux's abstract namespace, memory is ``memfd_create``'s and goes
to the peers as file descriptors. So nothing is left behind by kill -9 at whatever moment, no mount such as /dev/shm is
needed or can be too small, and a rank that dies closes its sockets, which its peers see at once.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sharded_radam.store.meeting import Connections
from sharded_radam.store.verdicts import LostError

MEET = 3
"""Mark of a rank that does not go on: come to the meeting."""

_CONNECT_S = 20.0
_HELLO = struct.Struct("!I")


class Signals(Connections):
    """One connection to each other rank, on which each rank's marks come in order.

    A mark is one byte that says what a rank has done. Ranks do the same things in the same order, so the n-th marks of
    all ranks must be equal; ``MEET`` is for the others to come to a meeting instead of going on. The system calls on
    both sides order the memory accesses around them. Marks up to number ``excused`` are not compared: ranks have failed
    together then.
    """

    def __init__(
        self,
        rank: int,
        connections: dict[int, socket.socket],
        timeout: float,
        key: str,
        names: Sequence[int] | None = None,
    ) -> None:
        self.rank = rank
        self._names = names or range(len(connections) + 1)
        self.key = key
        self.sent = 0
        self._connections = connections
        self._timeout = timeout
        self._marks: dict[int, int] = {}
        self._received = dict.fromkeys(connections, 0)
        self.excused = 0
        for connection in connections.values():
            connection.settimeout(timeout)

    def send(self, mark: int) -> int:
        """Tell all others; returns the number of this mark, for ``wait``.

        One who is gone need not hear it. Whether it has left a mark behind that is waited for, ``wait`` finds.
        """
        self.sent += 1
        self._marks[self.sent] = mark
        lost: list[LostError] = []
        for rank, connection in self._connections.items():
            try:
                connection.sendall(bytes([mark]))
            except TimeoutError as error:  # the others are told all the same
                lost.append(self._lost(rank, error))
            except OSError:
                pass
        if lost:
            raise lost[0]
        return self.sent

    def wait(self, number: int) -> None:
        """Return when all others have sent their mark of this number.

        Raises:
            LostError: a rank is gone, does not come within the time-out, did something else, or calls for a meeting.
        """
        apart: LostError | None = None
        for rank, connection in self._connections.items():
            while self._received[rank] < number:
                mark = self._receive(rank, connection)[0]
                self._received[rank] += 1
                expected = self._marks[self._received[rank]]
                if self._received[rank] > self.excused and mark != expected:
                    apart = apart or self._apart(rank, mark, expected)
        self._marks = {at: mark for at, mark in self._marks.items() if at > number}
        if apart is not None:
            raise apart

    def _apart(self, rank: int, mark: int, expected: int) -> LostError:
        other, own = self._names[rank], self._names[self.rank]
        return LostError(
            f"rank {other} is doing something else than rank {own} (mark {mark}, expected {expected}): between two "
            "steps all ranks must run the same number of backward passes, and call step(), zero_grad(), grad_norm() "
            "and clip_grad_norm_() in the same order"
        )

    def barrier(self, mark: int) -> None:
        """Return when all ranks have come here."""
        self.wait(self.send(mark))

    def gone(self) -> str | None:
        hung_up = select.POLLHUP | select.POLLRDHUP | select.POLLERR
        closed = (rank for rank, connection in self._connections.items() if _events(connection) & hung_up)
        return next((str(self._gone(rank)) for rank in closed), None)

    def is_ahead(self) -> bool:
        for rank, connection in self._connections.items():
            if _events(connection) == select.POLLIN:
                waiting = connection.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                if self._received[rank] + len(waiting) > self.sent:
                    return True
        return False

    def call(self) -> None:
        with suppress(LostError):  # who is gone is seen by the next look
            self.send(MEET)

    def advance(self, number: int) -> None:
        """Send marks until there are so many; what was sent so far is not compared."""
        while self.sent < number:
            self.call()
        self.excused = max(self.excused, number)

    def _receive(self, rank: int, connection: socket.socket) -> bytes:
        try:
            received = connection.recv(1)
        except OSError as error:
            raise self._lost(rank, error) from error
        if not received:
            raise self._gone(rank)
        return received

    def _lost(self, rank: int, error: OSError) -> LostError:
        if isinstance(error, TimeoutError):
            name = self._names[rank]
            return LostError(f"rank {name} did not come within the process group's time-out of {self._timeout:g} s")
        return self._gone(rank)

    def _gone(self, rank: int) -> LostError:
        return LostError(
            f"rank {self._names[rank]} is gone: it ended, was killed, or failed before (its own error says why)"
        )

    def exchange(self, descriptor: int | None, take: Callable[[int, int], None]) -> None:
        """Collective: give a file descriptor, or none, to all others, and take theirs, one at a time.

        Raises:
            LostError: a rank is gone or late.
            OSError: a descriptor could not be received, or what ``take`` raised, when all have been received.
        """
        self.barrier(0)  # no mark is under way: what comes next is a descriptor
        for rank, connection in self._connections.items():
            try:
                if descriptor is None:
                    connection.sendall(b"n")
                else:
                    socket.send_fds(connection, [b"d"], [descriptor])
            except OSError as error:
                raise self._lost(rank, error) from error
        problem: Exception | None = None
        for rank, connection in self._connections.items():
            for received in self._descriptors(rank, connection):
                try:
                    if received is None:  # the system drops what there is no room for
                        raise OSError(
                            errno.EMFILE,
                            f"the file descriptor of rank {self._names[rank]}: {os.strerror(errno.EMFILE)}",
                        )
                    take(rank, received)
                except (OSError, RuntimeError) as error:
                    problem = problem or error
                finally:
                    if received is not None:
                        os.close(received)
        if problem is not None:
            raise problem

    def _descriptors(self, rank: int, connection: socket.socket) -> list[int | None]:
        """What a rank gives: one descriptor, or none; None in its place if it could not be received."""
        try:
            message, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        except OSError as error:
            raise self._lost(rank, error) from error
        if not message:
            raise self._gone(rank)
        return [*descriptors] or ([None] if message == b"d" else [])

    def close(self) -> None:
        """Peers then see that this rank is gone."""
        for connection in self._connections.values():
            connection.close()


def _events(connection: socket.socket) -> int:
    """What ``poll`` says of a connection, at once."""
    if connection.fileno() < 0:  # closed on this side
        return select.POLLHUP
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLRDHUP)
    return next((events for _, events in poll.poll(0)), 0)


Gather = Callable[[object], list[Any]]


def connect(
    rank: int, world_size: int, gather: Gather, timeout: float, names: Sequence[int] | None = None
) -> Signals | str:
    """Collective: connect all ranks.

    Args:
        rank: of this process.
        world_size: number of ranks.
        gather: returns every rank's object.
        timeout: of the process group, in seconds.
        names: what the ranks are called in errors.

    Returns:
        The connections, or, on every rank, why there are none.
    """
    heard = gather((_host(), secrets.token_hex(16)))
    hosts = [host for host, _ in heard]
    if None in hosts:
        return f"rank {hosts.index(None)} is not on Linux"
    if len(set(hosts)) > 1:
        return "ranks are on several hosts, in several network namespaces, or of several users"
    address = f"\0sharded_radam.{heard[0][1]}."
    connections: dict[int, socket.socket] = {}

    def bind() -> None:
        listener.bind(address + str(rank))
        listener.listen(world_size)

    # No step waits for another rank's: who has bound can be connected to, and who was connected to can accept.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(_CONNECT_S)
        for action in (
            bind,
            lambda: _connect(rank, address, connections),
            lambda: _accept(world_size, listener, connections),
        ):
            problem = None
            try:
                action()
            except (OSError, struct.error) as error:
                problem = f"rank {rank}: {error}"
            problems = [p for p in gather(problem) if p]
            if problems:
                for connection in connections.values():
                    connection.close()
                return str(problems[0])
    return Signals(rank, dict(sorted(connections.items())), timeout, heard[0][1], names)


def _host() -> tuple[str, int, int] | None:
    """Equal for processes that can connect and trust each other: of one boot, network namespace and user."""
    if sys.platform != "linux":
        return None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.stat("/proc/self/ns/net").st_ino, os.getuid()
    return None


def _connect(rank: int, address: str, connections: dict[int, socket.socket]) -> None:
    """To lower ranks (connections: filled)."""
    for other in range(rank):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connections[other] = connection
        connection.settimeout(_CONNECT_S)
        connection.connect(address + str(other))
        connection.sendall(_HELLO.pack(rank))


def _accept(world_size: int, listener: socket.socket, connections: dict[int, socket.socket]) -> None:
    """Higher ranks (connections: filled)."""
    while len(connections) < world_size - 1:
        connection, _ = listener.accept()
        connection.settimeout(_CONNECT_S)
        user = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if user != os.getuid():  # abstract names have no permissions
            connection.close()
            continue
        connections[_HELLO.unpack(connection.recv(_HELLO.size))[0]] = connection
