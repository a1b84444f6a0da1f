"""Whether other ranks live, while one waits for them.

A process that has ended
    does not listen any more. Every process has a socket that listens, at an address that stands in the store; nobody
    is ever let in. Who waits for a rank for longer than a moment connects to it: the system does that for it, also if
    it is busy or stopped. When the process ends the connection breaks, and no new one can be made. That none can be
    made counts only where one was made before, or on the same host: there may be firewalls.
A process that is stopped, or a host that is cut off
    is silent. While it takes part in an operation, a thread of every rank writes a beat into the store every few
    seconds, whatever the rank does: a disk may be slow. Silence is measured by the clock of who listens.

A store may outlive processes. Addresses of processes that had ended before this one looked for the first time are
nobody's: those who will come have not come yet.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from sharded_radam.store.board import Board, StoreLostError

_ENDED = "has ended: it was killed, or failed before (its own output says why)"
_BEAT_S = 2.0
_LOOK_S = 1.0
_CONNECT_S = 1.0
_MOST_CONNECTIONS = 64
_BACKLOG = 4096


class Address(NamedTuple):
    """Where a process listens; ``host`` is equal for processes of one network namespace of one host, "" if unknown."""

    host: str
    ip: str
    port: int


_listeners: dict[str, socket.socket] = {}
"""Of this process, by IP."""


def _forget_listeners() -> None:
    """In a forked process: it must not seem that its parent lives."""
    for listener in _listeners.values():
        listener.close()
    _listeners.clear()


os.register_at_fork(after_in_child=_forget_listeners)


def listen(store: Any) -> Address:
    """Let this process listen, if it does not; where the way to the store begins, which others can reach."""
    ip = _own_ip(store)
    if ip not in _listeners:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        _listeners[ip] = socket.create_server((ip, 0), family=family, backlog=_BACKLOG)
        _listeners[ip].setblocking(False)
    return Address(_host(), ip, _listeners[ip].getsockname()[1])


def _own_ip(store: Any) -> str:
    stores: Any = dist  # stubs do not have its stores
    while isinstance(store, stores.PrefixStore):
        store = store.underlying_store
    if isinstance(store, stores.TCPStore):
        with suppress(OSError):
            family, kind, _, _, place = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as way:
                way.connect(place)  # sends nothing
                return str(way.getsockname()[0])
    return "127.0.0.1"


@functools.lru_cache(1)
def _host() -> str:
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/net').st_ino}"
    return ""


def _is_own_to_each_host(address: Address) -> bool:
    return ipaddress.ip_address(address.ip.partition("%")[0]).is_loopback


def _empty_queues() -> None:
    """Drop who has connected to this process: the queue is finite. Who still waits connects again."""
    for listener in _listeners.values():
        with suppress(OSError):
            while True:
                listener.accept()[0].close()


def _connect(address: Address) -> socket.socket:
    connection = socket.create_connection(address[1:], timeout=_CONNECT_S)
    if connection.getsockname() == connection.getpeername():  # the system chose the port that it should reach
        connection.close()
        raise ConnectionRefusedError
    connection.setblocking(False)
    return connection


def _is_open(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


class Acquaintance:
    """What this process knows of where its peers listen, for as long as the store is there.

    Args:
        board: where addresses are written.
        store: of the board.
        rank: of this process.
        others: ranks that this one will watch.
    """

    def __init__(self, board: Board, store: Any, rank: int, others: Iterable[int]) -> None:
        self._board, self._store, self._rank, self._others = board, store, rank, others
        self._pid = 0
        self.own: Address | None = None
        self.met: set[Address] = set()
        self._tried: set[Address] = set()
        self.nobodys: set[Address] = set()
        self.last = ""
        """The last operation of ``meeting`` that this process was in."""

    def arrive(self) -> None:
        """Write down where this process listens; again after a fork. The first time, see who has ended already."""
        if self._pid != os.getpid():
            self.own = None
            with suppress(OSError):
                self.own = listen(self._store)
                self._board.put(f"here/{self._rank}", json.dumps(self.own))
            if not self._pid:
                known = [address for other in self._others if (address := self.address(other))]
                self.nobodys = {each for each in known if self.is_near(each) and not self._answers(each)}
            self._pid = os.getpid()
        _empty_queues()

    def address(self, rank: int) -> Address | None:
        """Where the process that is a rank now listens; None if it has not said so."""
        found = self._board.look(f"here/{rank}")
        return Address(*found) if found else None

    def is_near(self, address: Address) -> bool:
        """Whether a process is on this host, where nothing but its end keeps connections away."""
        return address.host == _host() != ""

    def meet(self, addresses: Iterable[Address | None]) -> None:
        """Connect once to processes of other hosts: who could be reached once and cannot any more has ended.

        On a thread, since what a firewall drops takes a second each.
        """
        new = {a for a in addresses if a and not self.is_near(a) and not _is_own_to_each_host(a)} - self._tried
        self._tried |= new
        if new:
            threading.Thread(target=lambda: [*map(self._answers, new)], name="sharded_radam-meet", daemon=True).start()

    def _answers(self, address: Address) -> bool:
        try:
            _connect(address).close()
        except OSError:
            return False
        self.met.add(address)
        return True


class Watch:
    """This rank's beats in one operation, and its look at the others'.

    Args:
        board: where beats are.
        known: of the peers.
        timeout: seconds of silence after which a rank is given up.
    """

    def __init__(self, board: Board, known: Acquaintance, timeout: float) -> None:
        self._board, self._known, self._timeout = board, known, timeout
        self._connections: dict[Address, socket.socket] = {}
        self._unreachable: set[Address] = set()
        self._heard: dict[int, tuple[str | None, float]] = {}
        self._stop = threading.Event()
        self.stop = self._stop.set
        self._thread: threading.Thread | None = None
        self._next_look = time.monotonic() + min(_LOOK_S, timeout / 5)
        self._token = ""

    def begin(self, token: str, rank: int) -> None:
        """Begin to beat for the operation of a token."""
        self._token, self._own = token, f"{token}/beat/{rank}"
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="sharded_radam-beat", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(min(_BEAT_S, self._timeout / 5)):
            count += 1
            with suppress(StoreLostError):  # others see it for themselves
                self._board.put(self._own, str(count))
        if count:
            with suppress(StoreLostError):
                self._board.drop(self._own)

    def is_due(self) -> bool:
        """Whether it is time to look at others again: once a second."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + min(_LOOK_S, self._timeout / 5)
        return True

    def why_ended(self, rank: int) -> str | None:
        """That the process has ended which said that it is a rank, None if it has not, or has said nothing."""
        return _ENDED if self.has_ended(self._known.address(rank)) else None

    def why_absent(self, rank: int, began: float) -> str | None:
        """Why a rank is given up that is not in the operation that began at a time, None if it is not."""
        if ended := self.why_ended(rank):
            return ended
        absent = f"did not come within {self._timeout:g} s: every rank of the process group must make this call"
        return absent if time.monotonic() > began + self._timeout else None

    def why_lost(self, rank: int, address: Address | None) -> str | None:
        """Why a rank is given up that is in the operation, None if it is not."""
        if self.has_ended(address):
            return _ENDED
        silent = f"has been silent for {self._timeout:g} s: it is stopped, or cut off from the store"
        return silent if self.is_silent(rank) else None

    def is_silent(self, rank: int) -> bool:
        """Whether no new beat of a rank has been seen for ``timeout``, since it was first asked for."""
        beat, now = self._board.read(f"{self._token}/beat/{rank}"), time.monotonic()
        before, since = self._heard.setdefault(rank, (beat, now))
        if beat != before:
            self._heard[rank] = beat, now
            return False
        return now - since > self._timeout

    def has_ended(self, address: Address | None) -> bool:
        """Whether the process that listened at an address has certainly ended."""
        if address is None or address in self._known.nobodys or address in self._unreachable:
            return False
        if not self._known.is_near(address) and _is_own_to_each_host(address):
            return False
        connection = self._connections.get(address)
        if connection is not None:
            if _is_open(connection):
                return False
            self._connections.pop(address).close()
        return self._is_refused(address)

    def _is_refused(self, address: Address) -> bool:
        try:
            connection = _connect(address)
        except ConnectionRefusedError:
            return address in self._known.met or self._known.is_near(address)
        except OSError:  # a firewall, a lost host, no descriptors: silence decides
            self._unreachable.add(address)
            return False
        self._known.met.add(address)
        if len(self._connections) < _MOST_CONNECTIONS:
            self._connections[address] = connection
        else:
            connection.close()
        return False

    def close(self) -> None:
        """End beats and connections."""
        self.stop()
        if self._thread is not None:
            self._thread.join(_BEAT_S)
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
