"""Gloo: each rank sends its shard to each other one, straight from bucket to bucket.

Gloo's all_gather goes through buffers of its own and took 2.4 times as long at 2 ranks (2 cores, 498 MB of fp32,
torch 2.13: 534 ms against 222 ms with the update between); its reduce_scatter is one all-reduce a rank. So gradients
travel as in an all-to-all, and each rank sums its shard. Bytes, since Gloo lacks or mangles some dtypes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sharded_radam.transport.base import Handle, Transport, as_bytes
from sharded_radam.transport.reducers import UNDER_WAY, Queue, Reducer, SummingReducer, typed


class GlooTransport(Transport):
    """``world_size - 1`` sends and receives a bucket and rank, which Gloo's thread works off in the background."""

    name = "gloo"

    def all_gather(self, bucket: Tensor) -> list[Handle]:
        parts = as_bytes(bucket).chunk(self.world_size)
        # Messages of one pair arrive in the order of the calls, so buckets need no tags of their own.
        receives = [self._irecv(parts[source], source) for source in self.sources()]
        sends = [self._isend(parts[self.rank], target) for target in self.targets()]
        return receives + sends

    def targets(self) -> list[int]:
        """The other ranks; each rank begins with another one."""
        return [(self.rank + distance) % self.world_size for distance in range(1, self.world_size)]

    def sources(self) -> list[int]:
        """The other ranks, in the order in which they send to this one."""
        return [(self.rank - distance) % self.world_size for distance in range(1, self.world_size)]

    def reducer(self, buckets: Sequence[tuple[int, torch.dtype]]) -> Reducer:
        return GlooReducer(self, buckets)


class GlooReducer(SummingReducer):
    """Sends each rank its shard of a bucket, and sums what it receives for its own."""

    num_slots = 2 * UNDER_WAY

    def __init__(self, transport: GlooTransport, buckets: Sequence[tuple[int, torch.dtype]]) -> None:
        super().__init__(transport.world_size)
        self._transport = transport
        memory = [self._slot(buckets, transport.device) for _ in range(self.num_slots)]
        self._slots = deque(zip(memory[::2], memory[1::2], strict=True))
        self._queue = Queue()
        self._bucket = memory[0]

    def open(self, numel: int, dtype: torch.dtype) -> Tensor:
        self._queue.make_room()
        self._bucket = typed(self._slots[0][0], numel, dtype)
        return self._bucket

    def close(self, out: Tensor, accumulate: bool, mark: int) -> None:
        rank, ranks = self._transport.rank, self._transport.world_size
        mine = self._bucket.chunk(ranks)
        parts = list(typed(self._slots[0][1], self._bucket.numel(), self._bucket.dtype).chunk(ranks))
        parts[rank] = mine[rank]
        # With tags of their own, ranks that do not do the same run into the time-out and not into wrong sums.
        handles = [self._transport._irecv(parts[source], source, mark + 1) for source in self._transport.sources()]
        handles += [self._transport._isend(mine[target], target, mark + 1) for target in self._transport.targets()]
        self._queue.add(partial(self._complete, handles, parts, out, accumulate))
        self._slots.rotate(-1)

    def _complete(self, handles: list[Handle], parts: list[Tensor], out: Tensor, accumulate: bool) -> None:
        for handle in handles:
            handle.wait()
        self._sum(out, parts, accumulate)

    def finish(self) -> None:
        self._queue.finish()
