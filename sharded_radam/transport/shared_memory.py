"""CPU ranks of one host: shards are read where their owner wrote them.

Each rank's flats are in memory that its peers have mapped. After the update, and a barrier, each rank copies the other
shards out of their owners' flats; after a second one, owners may write again. With ``share_parameters`` there is one
flat for all ranks, in which each updates its shards, and nothing is copied.

Gradients are packed into a ring of ``SLOTS`` buckets, which peers have mapped too. With bucket i packed, a rank first
reads bucket i-1 of all ranks and sums its shard, then says that i is packed. So whoever has heard that from all ranks
knows that all have read i-1, and that bucket i+2 may take its slot::

    slot      0     1     2     0     1
    bucket   i-1    i    i+1   i+2   i+3

Small things (norms, flags, layouts) go through Gloo.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_radam.transport.base import Handle
from sharded_radam.transport.gloo import GlooTransport
from sharded_radam.transport.reducers import Reducer, SummingReducer, typed
from sharded_radam.transport.signals import Signals

SLOTS = 3
_UPDATE, _READ, _MARKS = 1, 2, 8
"""Marks of the barriers around an update; those of gradients are ``_MARKS`` and above."""


class SharedMemoryTransport(GlooTransport):
    """Gloo's transport, with flats and gradients in shared memory.

    Args:
        group: a Gloo group of ranks on one host.
        device: the CPU.
        signals: connections to the other ranks.
        share_parameters: one flat for all ranks.
    """

    name = "shared_memory"

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, signals: Signals, share_parameters: bool
    ) -> None:
        super().__init__(group, device)
        self.signals = signals
        self.share_parameters = share_parameters
        self._flats: list[list[Tensor]] = []
        self._to_read: list[tuple[list[Tensor], int, int]] = []

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        num_bytes = numel * dtype.itemsize
        if num_bytes == 0:
            return None
        memory = self.map(num_bytes, 0 if self.share_parameters else None)
        self._flats.append(memory)
        return memory[self.rank].view(dtype)

    def map(self, num_bytes: int, owner: int | None = None) -> list[Tensor]:
        """Collective: zeroed memory of each rank, mapped by all, as bytes; with an owner, its memory for all ranks.

        Raises:
            RuntimeError: on every rank, if one cannot have it.
        """
        problem, descriptor = None, os.memfd_create("sharded_radam")
        try:
            if owner in (None, self.rank):
                try:
                    os.posix_fallocate(descriptor, 0, num_bytes)
                except OSError as error:
                    problem = f"rank {self.rank}: {error}"
            problems = [found for found in self.all_gather_objects(problem) if found]
            if problems:
                raise RuntimeError(
                    f"no shared memory of {num_bytes} bytes per rank ({problems[0]}); transport='gloo' needs none"
                )
            descriptors = {**self.signals.exchange(descriptor), self.rank: descriptor}
            mapped = {
                rank: torch.frombuffer(mmap.mmap(descriptors[rank], num_bytes), dtype=torch.uint8)
                for rank in range(self.world_size)
                if owner in (None, rank)
            }
            for rank, received in descriptors.items():
                if rank != self.rank:
                    os.close(received)
        finally:
            os.close(descriptor)
        return [mapped[rank if owner is None else owner] for rank in range(self.world_size)]

    def count(self, kind: str, bucket: Tensor) -> None:
        if kind == "all_gather" and self.share_parameters:
            self.meter.count(kind, 0)
        else:
            super().count(kind, bucket)

    def begin_update(self) -> None:
        self._to_read.clear()
        if self.share_parameters:  # all ranks have used the parameters
            self.signals.barrier(_READ)

    def all_gather(self, bucket: Tensor) -> list[Handle]:
        first, num_bytes = bucket.data_ptr(), bucket.nbytes
        for memory in self._flats:
            offset = first - memory[self.rank].data_ptr()
            if 0 <= offset < memory[self.rank].nbytes:
                self._to_read.append((memory, offset, num_bytes))
                return []
        return super().all_gather(bucket)  # of a copy of the optimizer

    def end_update(self) -> None:
        self.signals.barrier(_UPDATE)
        if not self.share_parameters:
            for memory, offset, num_bytes in self._to_read:
                shards = [each.narrow(0, offset, num_bytes).chunk(self.world_size) for each in memory]
                for rank in self.sources():
                    _copy(shards[self.rank][rank], shards[rank][rank])
            self.signals.barrier(_READ)
        self._to_read.clear()

    def reducer(self, buckets: Sequence[tuple[int, torch.dtype]]) -> Reducer:
        return SharedMemoryReducer(self, self.map(max(1, SLOTS * Reducer.slot_bytes(buckets))))


def _copy(target: Tensor, source: Tensor) -> None:
    """Bytes, a multiple of 64 of them: as floats, which torch copies twice as fast as bytes."""
    target.view(torch.float32).copy_(source.view(torch.float32))


class _Packed(NamedTuple):
    number: int
    parts: list[Tensor]
    out: Tensor
    accumulate: bool


class SharedMemoryReducer(SummingReducer):
    """Each rank sums its shard where the ranks packed their gradients."""

    num_slots = SLOTS

    def __init__(self, transport: SharedMemoryTransport, memory: list[Tensor]) -> None:
        super().__init__(transport.world_size)
        self._signals = transport.signals
        self._rank = transport.rank
        self._memory = [each.chunk(SLOTS) for each in memory]
        self._next = 0
        self._opened: list[Tensor] = []
        self._packed: _Packed | None = None

    def open(self, numel: int, dtype: torch.dtype) -> Tensor:
        self._opened = [typed(slots[self._next % SLOTS], numel, dtype) for slots in self._memory]
        return self._opened[self._rank]

    def close(self, out: Tensor, accumulate: bool, mark: int) -> None:
        self.finish()  # of the bucket before
        number = self._signals.send(_MARKS + mark % (256 - _MARKS))
        parts = [bucket.chunk(self.world_size)[self._rank] for bucket in self._opened]
        self._packed = _Packed(number, parts, out, accumulate)
        self._next += 1

    def finish(self) -> None:
        if self._packed is not None:
            self._signals.wait(self._packed.number)
            self._sum(self._packed.out, self._packed.parts, self._packed.accumulate)
            self._packed = None
