"""The ranks that save and load together, and by what they talk."""

from __future__ import annotations

import hashlib
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist

from sharded_radam.compat import own_connection
from sharded_radam.store.board import Board
from sharded_radam.store.groups import Groups, is_mesh, own_group, ranks_of_mesh
from sharded_radam.store.liveness import Acquaintance

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(slots=True)
class Line:
    """By what the same ranks talk again and again, and what this process remembers of it.

    ``seen`` is the last call (see ``agreement``) that this process took part in or found to be over, ``spent`` keys
    that can be removed when the next operation is over; ``lock`` is held by the thread that begins an operation.
    """

    board: Board
    known: Acquaintance
    seen: str = ""
    spent: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


_DIGITS = 16
"""Of the checksum by which ranks are named in the store."""

_lines: weakref.WeakKeyDictionary[Any, dict[str, Line]] = weakref.WeakKeyDictionary()
"""Of a default store, by ranks."""


def ranks_of(group: dist.ProcessGroup | DeviceMesh | Groups | None) -> list[int]:
    """The ranks of a group, None for the default one, or of all groups of a mesh, among all processes.

    Raises:
        ValueError: this process is in none of them.
        RuntimeError: the group has been destroyed, and there were several ranks in it.
    """
    if not dist.is_available():
        return [0]
    if is_mesh(group):
        return ranks_of_mesh(group)
    if isinstance(group, Groups):
        if group.rows and dist.is_initialized():
            return sorted(rank for row in group.rows for rank in row)
        group = group.shard
    if dist.is_initialized():
        with suppress(KeyError):  # of a group that was destroyed, perhaps before another one was made
            return dist.get_process_group_ranks(
                group if isinstance(group, dist.ProcessGroup) else own_group(cast("Any", group))
            )
    if not isinstance(group, dist.ProcessGroup) or group.size() == 1:
        return [0]
    raise RuntimeError(
        f"the process group has been destroyed, of whose {group.size()} ranks each holds its part of the state: save "
        "before destroy_process_group(); with a new process group, build the optimizer and the manager anew"
    )


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks that save and load together: those of a process group, or this process alone (``line`` None)."""

    rank: int
    world_size: int
    line: Line | None

    @staticmethod
    def of(group: dist.ProcessGroup | DeviceMesh | Groups | None) -> Peers:
        """The ranks of a group (None: the default one, or this process alone where there is none), or of a mesh."""
        ranks = ranks_of(group)
        if len(ranks) == 1:
            return Peers(0, 1, None)
        rank, name = ranks.index(dist.get_rank()), hashlib.sha256(repr(ranks).encode()).hexdigest()[:_DIGITS]
        default = dist.distributed_c10d._get_default_store()
        lines = _lines.setdefault(default, {})
        if name not in lines:
            # A connection of its own, since one that waits for a message lets nobody else ask for anything.
            store = cast("Any", dist).PrefixStore(f"sharded_radam/{name}", own_connection(default))
            board = Board(store)
            others = range(1) if rank else range(1, len(ranks))
            lines[name] = Line(board, Acquaintance(board, store, rank, others))
        return Peers(rank, len(ranks), lines[name])
