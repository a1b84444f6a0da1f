"""What the optimizer asks of the network, and all of it that does not depend on the backend."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 0x5AD0
"""Point-to-point messages of ours carry tags from here on, apart from a user's own, which are mostly small."""


class Handle:
    """Communication under way; it owns the request and the tensors read and written."""

    def __init__(self, work: dist.Work | None, *tensors: Tensor) -> None:
        self._work = work
        self._tensors = tensors

    def wait(self) -> None:
        """Return when the tensors may be used (on CUDA: by kernels launched from now on)."""
        if self._work is not None:
            self._work.wait()
        self._work, self._tensors = None, ()


HALF_DTYPES = (torch.float16, torch.bfloat16)
"""Summed in fp32."""

CHUNK_NUMEL = 2**17
"""On CPU, sums are formed over so many elements at a time: 512 KiB of fp32 stay in the cache."""


class Reducer(ABC):
    """Averages buckets of gradients over the ranks; each rank gets its shard of each bucket.

    ``open``, ``fill`` and ``close`` follow each other; every rank calls them for the same buckets in the same order. A
    bounded number of buckets is under way. Each shard is ``(g0 / N + g1 / N) + g2 / N + ...`` for N ranks, summed in
    their order; for half precision ``((g0 + g1) + g2 + ...) / N`` in fp32. ``native`` divides last, too, and sums in
    the order of the backend.
    """

    @abstractmethod
    def open(self, numel: int, dtype: torch.dtype) -> Tensor:
        """1-D memory for a bucket of gradients, contents undefined; waits until some is free."""

    def fill(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Put gradients into parts of the opened bucket (targets: modified in place)."""
        if targets:
            torch._foreach_copy_(list(targets), list(sources))

    @abstractmethod
    def close(self, out: Tensor, accumulate: bool, mark: int) -> None:
        """Begin to reduce the bucket that was opened last.

        Args:
            out: where the own shard goes, 1-D; defined after ``finish``.
            accumulate: add to ``out`` instead of overwriting it.
            mark: 0 to 255, equal on all ranks; tells apart what is sent, where the backend can.
        """

    @abstractmethod
    def finish(self) -> None:
        """Return when all that was closed is in its ``out``."""


def sum_(out: Tensor, parts: Sequence[Tensor], accumulate: bool, divisor: int = 1) -> None:
    """Set ``out`` (modified in place) to, or add, the sum of 1-D parts, in their order and ``out``'s dtype, divided."""
    is_one_operation = len(parts) == 2 and parts[0].dtype == out.dtype and divisor == 1 and not accumulate
    in_chunks = out.device.type == "cpu" and not is_one_operation
    chunk_numel = CHUNK_NUMEL if in_chunks else max(out.numel(), 1)
    scratch = out.new_empty(min(chunk_numel, out.numel())) if accumulate else None
    for start in range(0, out.numel(), chunk_numel):
        numel = min(chunk_numel, out.numel() - start)
        target = out.narrow(0, start, numel)
        total = target if scratch is None else scratch.narrow(0, 0, numel)
        first, *others = (part.narrow(0, start, numel) for part in parts)
        if others and first.dtype == total.dtype:
            torch.add(first, others.pop(0), out=total)
        else:
            torch._foreach_copy_([total], [first])
        for part in others:
            total.add_(part)
        if divisor != 1:
            total.div_(divisor)
        if scratch is not None:
            target.add_(total)


UNDER_WAY = 2
"""Buckets of gradients that a queue has under way: one travels while the next is filled."""


class Queue:
    """What is to be done when communication has ended, in order, and at most ``UNDER_WAY`` of it."""

    def __init__(self) -> None:
        self._completions: deque[Callable[[], None]] = deque()

    def add(self, completion: Callable[[], None]) -> None:
        """Put at the end; there must be room."""
        self._completions.append(completion)

    def make_room(self) -> None:
        """Complete the first if there is no room for another one."""
        if len(self._completions) == UNDER_WAY:
            self._completions.popleft()()

    def finish(self) -> None:
        """Complete all."""
        while self._completions:
            self._completions.popleft()()


class SummingReducer(Reducer):
    """Sums on the CPU. What it divides while it copies costs nothing more; half precision would lose digits there."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def fill(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            if self._divides_last(target):
                target.copy_(source)
            else:
                torch.div(source, self.world_size, out=target)

    def _sum(self, out: Tensor, parts: Sequence[Tensor], accumulate: bool) -> None:
        sum_(out, parts, accumulate, self.world_size if self._divides_last(parts[0]) else 1)

    def _divides_last(self, bucket: Tensor) -> bool:
        return bucket.dtype in HALF_DTYPES


class Transport(ABC):
    """Moves shards between the ranks of one process group; all ranks make the same calls in the same order.

    ``rank`` and ``world_size`` are those of the group, whose backend moves tensors of ``device``. Tensors are
    contiguous, and travel as bytes: any dtype does.
    """

    name: str

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        """Collective: 1-D memory that suits this transport for a flat, None if any does."""
        return None

    def begin_update(self) -> None:  # noqa: B027  (nothing to wait for where shards travel as messages)
        """Return when this rank may write its shards."""

    @abstractmethod
    def all_gather(self, bucket: Tensor) -> list[Handle]:
        """Begin to fill a 1-D bucket, in place, with each rank's shard of it; the own shard is final already."""

    def end_update(self) -> None:  # noqa: B027
        """Return when all buckets are gathered here, beside those with handles, and no rank reads this one's."""

    @abstractmethod
    def reducer(self, buckets: Sequence[tuple[int, torch.dtype]]) -> Reducer:
        """Collective: a reducer for buckets of these sizes in elements, and dtypes."""

    def gather(self, shard: Tensor, bucket: Tensor | None, to: int) -> None:
        """Fill ``bucket`` on rank ``to`` with the shards of all ranks; other ranks pass None."""
        if self.rank != to:
            self.send(shard, to)
            return
        assert bucket is not None
        parts = bucket.chunk(self.world_size)
        handles = [self._irecv(part, rank) for rank, part in enumerate(parts) if rank != to]
        parts[to].copy_(shard)
        for handle in handles:
            handle.wait()

    def send(self, tensor: Tensor, to: int) -> None:
        """Send to one rank of the group, which calls receive."""
        self._isend(tensor, to).wait()

    def receive(self, tensor: Tensor, source: int) -> None:
        """Receive into a contiguous tensor."""
        self._irecv(tensor, source).wait()

    def _isend(self, tensor: Tensor, to: int, tag: int = 0) -> Handle:
        message = as_bytes(tensor)
        return Handle(dist.isend(message, group=self.group, group_dst=to, tag=_TAG + tag), message)

    def _irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Handle:
        message = as_bytes(tensor)
        return Handle(dist.irecv(message, group=self.group, group_src=source, tag=_TAG + tag), message)

    def broadcast(self, tensor: Tensor) -> None:
        """Collective: rank 0's values into a contiguous tensor (modified in place)."""
        if tensor.numel():
            dist.broadcast(as_bytes(tensor), group=self.group, group_src=0)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Collective: the sum, maximum or minimum over the ranks (modified in place); for a few elements."""
        dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """Collective: which flags are set on some rank. The device is not waited for where all are set here."""
        mask = self.all_reduce(
            torch.tensor(flags, dtype=torch.uint8).to(self.device, non_blocking=True), dist.ReduceOp.MAX
        )
        return [True] * len(flags) if all(flags) else [bool(flag) for flag in mask.tolist()]

    def all_gather_objects(self, item: object) -> list[Any]:
        """Every rank's picklable object: for small things, out of the hot path.

        Not ``dist.all_gather_object``, which needs numpy.
        """
        message = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8).to(self.device)
        lengths = [int(row) for row in self._gather_rows(torch.tensor([message.numel()], device=self.device))]
        padded = message.new_zeros(max(lengths))
        padded[: message.numel()] = message
        rows = self._gather_rows(padded)
        return [pickle.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)]

    def _gather_rows(self, row: Tensor) -> Tensor:
        """A 1-D tensor of each rank, all of one length, as the rows of a 2-D one on CPU."""
        table = row.new_empty((self.world_size, row.numel()))
        table[self.rank] = row
        for handle in self.all_gather(table.view(-1)):
            handle.wait()
        return table.cpu()

    def average(self, tensor: Tensor) -> Tensor:
        """Mean over the ranks, out of place, real or complex; half precision is summed in fp32."""
        wide = tensor.float() if tensor.dtype in HALF_DTYPES else tensor.clone()
        dist.all_reduce(torch.view_as_real(wide) if wide.is_complex() else wide, group=self.group)
        return (wide / self.world_size).to(tensor.dtype)


class Alone(Transport):
    """One rank, or no process group at all: nothing to communicate."""

    name = "none"

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.group = group  # type: ignore[assignment]
        self.device = device
        self.rank = 0
        self.world_size = 1

    def all_gather(self, bucket: Tensor) -> list[Handle]:
        return []

    def all_gather_objects(self, item: object) -> list[Any]:
        return [item]

    def average(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def broadcast(self, tensor: Tensor) -> None:
        pass

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        return tensor

    def reducer(self, buckets: Sequence[tuple[int, torch.dtype]]) -> Reducer:
        return AloneReducer(slot(buckets, self.device))


class AloneReducer(Reducer):
    """The mean over one rank."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._bucket = memory

    def open(self, numel: int, dtype: torch.dtype) -> Tensor:
        self._bucket = typed(self._memory, numel, dtype)
        return self._bucket

    def close(self, out: Tensor, accumulate: bool, mark: int) -> None:
        sum_(out, [self._bucket], accumulate)

    def finish(self) -> None:
        pass


def slot(buckets: Sequence[tuple[int, torch.dtype]], device: torch.device) -> Tensor:
    """Bytes that hold any one of the buckets."""
    return torch.empty(slot_bytes(buckets), dtype=torch.uint8, device=device)


def slot_bytes(buckets: Sequence[tuple[int, torch.dtype]]) -> int:
    """How many they are."""
    return max((numel * dtype.itemsize for numel, dtype in buckets), default=0)


def typed(memory: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """The beginning of some bytes as ``numel`` elements."""
    return memory.narrow(0, 0, numel * dtype.itemsize).view(dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as 1-D uint8."""
    return tensor.view(-1).view(torch.uint8)
