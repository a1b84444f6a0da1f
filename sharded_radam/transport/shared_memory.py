"""CPU ranks of one host: shards are read where their owner wrote them.

Each rank's flats are in memory that its peers have mapped. After the update, and a barrier, each rank copies the other
shards out of their owners' flats; after a second one, owners may write again. With ``share_parameters`` there is one
flat for all ranks, in which each updates its shards, and nothing is copied.

Gradients are packed into a ring of ``SLOTS`` buckets, which peers have mapped too. With bucket i packed, a rank first
reads bucket i-1 of all ranks and sums its shard, then says that i is packed. So whoever has heard that from all ranks
knows that all have read i-1, and that bucket i+2 may take its slot::

    slot      0     1     2     0     1
    bucket   i-1    i    i+1   i+2   i+3

All else (norms, flags, consolidated state) goes by a slate of each rank: it is written, a barrier, read, a barrier.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_radam.store.meeting import Meeting
from sharded_radam.store.verdicts import LostError
from sharded_radam.transport.base import Handle, as_bytes
from sharded_radam.transport.gloo import GlooTransport
from sharded_radam.transport.reducers import Reducer, SummingReducer, typed
from sharded_radam.transport.sockets import Signals

SLOTS = 3
_UPDATE, _READ, _WRITTEN, _SEEN, _MARKS = 1, 2, 4, 5, 8
"""Marks of the barriers around an update, and around the use of slates; those of gradients are ``_MARKS`` and above."""

_SLATE_BYTES = 2**18
_REDUCE: dict[dist.ReduceOp.RedOpType, Callable[[Tensor, Tensor], Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
}


class SharedMemoryTransport(GlooTransport):
    """Gloo's transport, with flats and gradients in shared memory.

    Args:
        group: a Gloo group of ranks on one host.
        device: the CPU.
        signals: connections to the other ranks.
        share_parameters: one flat for all ranks.
        meeting, names: as for Transport.
    """

    name = "shared_memory"

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        signals: Signals,
        share_parameters: bool,
        meeting: Meeting | None = None,
        names: Sequence[int] | None = None,
    ) -> None:
        super().__init__(group, device, meeting, names)
        self.signals = signals
        self.meeting.connections = signals
        self.share_parameters = share_parameters
        self._flats: list[list[Tensor]] = []
        self._to_read: list[tuple[list[Tensor], int, int]] = []
        self._slate = self.map(_SLATE_BYTES)

    @property
    def has_one_copy(self) -> bool:
        return self.share_parameters and self.replicas is None

    @property
    def restarted(self) -> int:
        return self.signals.excused

    def buffers(self, sizes: Sequence[tuple[int, torch.dtype]]) -> list[Tensor | None]:
        """All in one piece of memory for each rank, so that flats cost no descriptors and one agreement."""
        num_bytes = sum(numel * dtype.itemsize for numel, dtype in sizes)
        if num_bytes == 0:
            return [None] * len(sizes)
        memory = self.map(num_bytes, 0 if self.share_parameters else None)
        self._flats.append(memory)
        ends = accumulate(numel * dtype.itemsize for numel, dtype in sizes)
        pairs = zip(ends, sizes, strict=True)
        return [memory[self.rank][end - n * dtype.itemsize : end].view(dtype) for end, (n, dtype) in pairs]

    def keep(self, buffers: Sequence[Tensor]) -> None:
        used = {buffer.data_ptr() for buffer in buffers}
        self._flats = [
            m for m in self._flats if any(0 <= at - m[self.rank].data_ptr() < m[self.rank].nbytes for at in used)
        ]

    def map(self, num_bytes: int, owner: int | None = None) -> list[Tensor]:
        """Collective: zeroed memory of each rank, mapped by all, as bytes; with an owner, its memory for all ranks.

        No descriptor is kept.

        Raises:
            RuntimeError: on every rank, if one cannot have it.
        """
        mapped: dict[int, Tensor] = {}
        problem: Exception | None = None
        try:
            self._share(num_bytes, owner in (None, self.rank), mapped)
        except LostError as error:
            problem = error
        except (OSError, RuntimeError) as error:
            problem = RuntimeError(f"no shared memory of {num_bytes} bytes ({error}); transport='gloo' needs none")
        self.meeting.agree(f"sharing memory for {self.operation}", None, problem)
        return [mapped[rank if owner is None else owner] for rank in range(self.world_size)]

    def _share(self, num_bytes: int, owns: bool, mapped: dict[int, Tensor]) -> None:
        """Make memory, if this rank owns some, and exchange it (mapped: filled)."""
        descriptor, problem = None, None
        try:
            if owns:
                descriptor = os.memfd_create("sharded_radam")
                os.posix_fallocate(descriptor, 0, num_bytes)
                mapped[self.rank] = _map(descriptor, num_bytes)
        except (OSError, RuntimeError) as error:
            problem = error

        def take(rank: int, received: int) -> None:
            mapped[rank] = _map(received, num_bytes)

        try:
            self.signals.exchange(descriptor if problem is None else None, take)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        if problem is not None:
            raise problem

    def count(self, kind: str, bucket: Tensor) -> None:
        if kind == "all_gather" and self.share_parameters:
            self.meter.count(kind, 0)
        else:
            super().count(kind, bucket)

    def begin_update(self) -> None:
        self._to_read.clear()
        if self.share_parameters:  # all ranks have used the parameters
            self._barrier(_READ)

    def all_gather(self, bucket: Tensor) -> list[Handle]:
        first, num_bytes = bucket.data_ptr(), bucket.nbytes
        for memory in self._flats:
            offset = first - memory[self.rank].data_ptr()
            if 0 <= offset < memory[self.rank].nbytes:
                self._to_read.append((memory, offset, num_bytes))
                return []
        return super().all_gather(bucket)  # of a copy of the optimizer

    def end_update(self) -> None:
        self._barrier(_UPDATE)
        if not self.share_parameters:
            for memory, offset, num_bytes in self._to_read:
                shards = [each.narrow(0, offset, num_bytes).chunk(self.world_size) for each in memory]
                for rank in self.sources():
                    _copy(shards[self.rank][rank], shards[rank][rank])
            self._barrier(_READ)
        self._to_read.clear()

    def _barrier(self, mark: int) -> None:
        with self.losing_ranks():
            self.signals.barrier(mark)

    # All else: ranks write it onto their slates, and read each other's.

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        self.meter.count("all_reduce", tensor.nbytes)
        parts = [row.view(tensor.dtype) for row in self._gather_rows(as_bytes(tensor.contiguous()))]
        total = parts[0].clone()
        for part in parts[1:]:  # in the same order on every rank
            total = _REDUCE[op](total, part)
        return tensor.copy_(total.view(tensor.shape))

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        if tensor.numel():
            self.meter.count("broadcast", 0 if self.rank == source else tensor.nbytes)
            message = as_bytes(tensor)
            for part, slates in self._on_slates(message, self.rank == source):
                if self.rank != source:
                    part.copy_(slates[source])

    def gather(self, shard: Tensor, bucket: Tensor | None, to: int) -> None:
        message = as_bytes(shard)
        rows = None if bucket is None else as_bytes(bucket).view(self.world_size, -1)
        self._fill(rows, message)

    def _gather_rows(self, row: Tensor) -> Tensor:
        message = as_bytes(row)
        table = message.new_empty((self.world_size, message.numel()))
        self._fill(table, message)
        return table.view(row.dtype)

    def _fill(self, rows: Tensor | None, message: Tensor) -> None:
        """Bytes of each rank, as many of each, into the rows of a matrix where there is one (modified in place)."""
        start = 0
        for part, slates in self._on_slates(message):
            if rows is not None:
                for row, slate in zip(rows, slates, strict=True):
                    row[start : start + part.numel()].copy_(slate)
            start += part.numel()

    def _on_slates(self, message: Tensor, writes: bool = True) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Parts of some bytes, and what the ranks have written there in their places."""
        for start in range(0, message.numel(), _SLATE_BYTES):
            part = message[start : start + _SLATE_BYTES]
            slates = [slate[: part.numel()] for slate in self._slate]
            if writes:
                slates[self.rank].copy_(part)
            self._barrier(_WRITTEN)
            yield part, slates
            self._barrier(_SEEN)

    def summon(self) -> None:
        """Nobody waits in Gloo, but replicas."""
        if self.replicas is not None:
            self.replicas.break_up()

    def reducer(self, buckets: Sequence[tuple[int, torch.dtype]]) -> Reducer:
        return SharedMemoryReducer(self, self.map(max(1, SLOTS * Reducer.slot_bytes(buckets))))


def _map(descriptor: int, num_bytes: int) -> Tensor:
    """The memory of a file descriptor, which may be closed then."""
    storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{descriptor}", shared=True, nbytes=num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(cast("torch.UntypedStorage", storage))


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
        self._transport = transport
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
        with self._transport.losing_ranks():
            number = self._signals.send(_MARKS + mark % (256 - _MARKS))
        parts = [bucket.chunk(self.world_size)[self._rank] for bucket in self._opened]
        self._packed = _Packed(number, parts, out, accumulate)
        self._next += 1

    def restart(self) -> None:
        self._next, self._packed = 0, None

    def finish(self) -> None:
        if self._packed is not None:
            packed, self._packed = self._packed, None
            with self._transport.losing_ranks():
                self._signals.wait(packed.number)
            self._sum(packed.out, packed.parts, packed.accumulate)
