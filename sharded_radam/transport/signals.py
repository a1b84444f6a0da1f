"""Ranks of one host tell each other how far they are, and give each other memory: by Unix sockets.

Nothing has a name in the file system: sockets are in Linux's abstract namespace, memory is ``memfd_create``'s and goes
to the peers as file descriptors. So nothing is left behind by kill -9 at whatever moment, no mount such as /dev/shm is
needed or can be too small, and a rank that dies closes its sockets, which its peers see at once.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_CONNECT_S = 20.0
_HELLO = struct.Struct("!I")


class Signals:
    """One connection to each other rank, on which each rank's marks come in order.

    A mark is one byte that says what a rank has done. Ranks do the same things in the same order, so the n-th marks of
    all ranks must be equal. The system calls on both sides order the memory accesses around them.
    """

    def __init__(self, rank: int, connections: dict[int, socket.socket], timeout: float) -> None:
        self.rank = rank
        self._connections = connections
        self._timeout = timeout
        self._awaited: deque[int] = deque()
        self._sent = self._seen = 0
        for connection in connections.values():
            connection.settimeout(timeout)

    def send(self, mark: int) -> int:
        """Tell all others; returns the number of this mark, for ``wait``."""
        self._awaited.append(mark)
        for rank, connection in self._connections.items():
            try:
                connection.sendall(bytes([mark]))
            except TimeoutError as error:
                raise self._late(rank) from error
            except OSError as error:
                raise _gone(rank) from error
        self._sent += 1
        return self._sent

    def wait(self, number: int) -> None:
        """Return when all others have sent their mark of this number.

        Raises:
            RuntimeError: a rank is gone, does not come within the time-out, or did something else.
        """
        while self._seen < number:
            expected = self._awaited[0]
            for rank, connection in self._connections.items():
                self._check(rank, self._receive(rank, connection), expected)
            self._awaited.popleft()
            self._seen += 1

    def barrier(self, mark: int) -> None:
        """Return when all ranks have come here."""
        self.wait(self.send(mark))

    def _receive(self, rank: int, connection: socket.socket) -> bytes:
        try:
            received = connection.recv(1)
        except TimeoutError as error:
            raise self._late(rank) from error
        except OSError as error:
            raise _gone(rank) from error
        if not received:
            raise _gone(rank)
        return received

    def _check(self, rank: int, received: bytes, expected: int) -> None:
        if received[0] != expected:
            self.close()
            raise RuntimeError(
                f"rank {rank} is doing something else than rank {self.rank} (mark {received[0]}, expected {expected}): "
                "between two steps all ranks must run the same number of backward passes, and call step(), "
                "zero_grad(), grad_norm() and clip_grad_norm_() in the same order"
            )

    def _late(self, rank: int) -> RuntimeError:
        self.close()
        return RuntimeError(f"rank {rank} did not come within the process group's time-out of {self._timeout:g} s")

    def exchange(self, descriptor: int) -> dict[int, int]:
        """Collective: the file descriptors of the other ranks, for the own one. The receiver closes them."""
        self.barrier(0)  # no mark is under way: what comes next is a descriptor
        for connection in self._connections.values():
            socket.send_fds(connection, [b"d"], [descriptor])
        found = {}
        for rank, connection in self._connections.items():
            message, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if not message:
                raise _gone(rank)
            found[rank] = descriptors[0]
        self.barrier(0)
        return found

    def close(self) -> None:
        """Peers then see that this rank is gone."""
        for connection in self._connections.values():
            connection.close()


def _gone(rank: int) -> RuntimeError:
    return RuntimeError(f"rank {rank} is gone: it ended, was killed, or failed before (its own error says why)")


Gather = Callable[[object], list[Any]]


def connect(rank: int, world_size: int, gather: Gather, timeout: float) -> Signals | str:
    """Collective: connect all ranks.

    Args:
        rank: of this process.
        world_size: number of ranks.
        gather: returns every rank's object.
        timeout: of the process group, in seconds.

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
    return Signals(rank, dict(sorted(connections.items())), timeout)


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
