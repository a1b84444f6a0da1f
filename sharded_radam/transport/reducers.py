"""Gradients of all ranks to the mean of each shard: buckets that are filled, reduced, and under way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharded_radam.dtypes import HALF_DTYPES

CHUNK_NUMEL = 2**17
"""On CPU, sums are formed over so many elements at a time: 512 KiB of fp32 stay in the cache."""


class Reducer(ABC):
    """Averages buckets of gradients over the ranks; each rank gets its shard of each bucket.

    ``open``, ``fill`` and ``close`` follow each other; every rank calls them for the same buckets in the same order. A
    bounded number of buckets is under way. Each shard is ``(g0 / N + g1 / N) + g2 / N + ...`` for N ranks, summed in
    their order; for half precision ``((g0 + g1) + g2 + ...) / N`` in fp32. Half precision travels as it is. ``native``
    always divides last, and sums what is not of half precision in the order of the backend. It has memory for
    ``num_slots`` buckets of the largest size.
    """

    num_slots: int

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

    def restart(self) -> None:  # noqa: B027  (only shared memory goes on after a failure)
        """Forget what is under way, on all ranks."""

    @staticmethod
    def slot_bytes(buckets: Sequence[tuple[int, torch.dtype]]) -> int:
        """Bytes that hold any one of some buckets, of these sizes in elements, and dtypes."""
        return max((numel * dtype.itemsize for numel, dtype in buckets), default=0)

    def _slot(self, buckets: Sequence[tuple[int, torch.dtype]], device: torch.device) -> Tensor:
        return torch.empty(self.slot_bytes(buckets), dtype=torch.uint8, device=device)


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
        _sum_and_divide_(total, [part.narrow(0, start, numel) for part in parts], divisor)
        if scratch is not None:
            target.add_(total)


def _sum_and_divide_(total: Tensor, parts: Sequence[Tensor], divisor: int) -> None:
    first, *others = parts
    if first.dtype == total.dtype and not others and divisor != 1:
        torch.div(first, divisor, out=total)  # one pass, where copying and dividing are two
        return
    if first.dtype == total.dtype and others:
        torch.add(first, others.pop(0), out=total)
    else:
        torch._foreach_copy_([total], [first])
    for part in others:
        total.add_(part)
    if divisor != 1:
        total.div_(divisor)


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
            elif source.dtype != target.dtype:  # which ``div`` would divide in the dtype of the source
                target.copy_(source).div_(self.world_size)
            else:
                torch.div(source, self.world_size, out=target)

    def _sum(self, out: Tensor, parts: Sequence[Tensor], accumulate: bool) -> None:
        sum_(out, parts, accumulate, self.world_size if self._divides_last(parts[0]) else 1)

    def _divides_last(self, bucket: Tensor) -> bool:
        return bucket.dtype in HALF_DTYPES


class AloneReducer(Reducer):
    """The mean over one rank."""

    num_slots = 1

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


def typed(memory: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """The beginning of some bytes as ``numel`` elements."""
    return memory.narrow(0, 0, numel * dtype.itemsize).view(dtype)
