"""All ranks of a mesh of two dimensions, for what is small or rare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from sharded_radam.transport.base import Transport


class Everyone:
    """What a transport does within its group, for all ranks: first in the shard group, then in the replica group.

    ``rank`` and ``world_size`` are those of where all ranks meet. All ranks make the same calls in the same order.

    Args:
        shard: within the shard group.
        replicas: within the replica group.
    """

    def __init__(self, shard: Transport, replicas: Transport) -> None:
        self._shard, self._replicas = shard, replicas
        self.rank, self.world_size = shard.meeting.rank, shard.meeting.world_size

    def broadcast(self, tensor: Tensor) -> None:
        """Collective: values of the first rank of the mesh into a contiguous tensor (modified in place)."""
        with self._shard.together():
            self._replicas.broadcast(tensor)
            self._shard.broadcast(tensor)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Collective: the sum, maximum or minimum over all ranks (modified in place); for a few elements."""
        with self._shard.together():
            return self._replicas.all_reduce(self._shard.all_reduce(tensor, op), op)

    def union(self, flags: Sequence[bool], done: int) -> list[bool]:
        """Collective: which flags are set on some rank; and whether all have done the same, as the transport's."""
        with self._shard.together():
            largest = self.all_reduce(self._replicas.union_row(flags, done), dist.ReduceOp.MAX)
            return self._replicas.read_union(flags, largest)

    def all_gather_objects(self, item: object) -> list[Any]:
        """Every rank's picklable object, in the order of where they meet."""
        with self._shard.together():
            rows = self._replicas.all_gather_objects(self._shard.all_gather_objects((self.rank, item)))
        pairs = [pair for row in rows for pair in row]
        return [item for _, item in sorted(pairs, key=lambda pair: pair[0])]
