"""The backend's own collectives: NCCL, and any backend there is no better way for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_radam.compat import all_gather_coalesced, all_gather_single, can_coalesce, reduce_scatter_single
from sharded_radam.dtypes import HALF_DTYPES, wide
from sharded_radam.store.groups import backend_of
from sharded_radam.transport.averages import Averages, Part
from sharded_radam.transport.base import Handle, Transport, as_bytes
from sharded_radam.transport.reducers import UNDER_WAY, Queue, Reducer, sum_, typed

COALESCING = ("nccl", "gloo")
"""Backends that have all-gathers of several tensors in one call."""


class NativeTransport(Transport):
    """One all-gather and one reduce-scatter a bucket, in place, asynchronous.

    The backend has a stream of its own, ordered by events after the kernels that fill a bucket; waiting for a handle
    orders the kernels that come later, and does not make the host wait.
    """

    name = "native"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._coalesces = backend_of(self.group, self.device.type) in COALESCING and can_coalesce()

    def all_gather(self, bucket: Tensor) -> list[Handle]:
        output = as_bytes(bucket)
        own = output.chunk(self.world_size)[self.rank]
        with self._losing():
            work = all_gather_single(output, own, self.group)
        return [Handle(work, output, own, lost=partial(self.lose, None))]

    def all_gather_each(self, buckets: Sequence[Tensor]) -> list[list[Handle]]:
        if len(buckets) < 2 or not self._coalesces:
            return super().all_gather_each(buckets)
        outputs = [as_bytes(bucket) for bucket in buckets]
        owns = [output.chunk(self.world_size)[self.rank] for output in outputs]
        with self._losing():
            work = all_gather_coalesced(outputs, owns, self.group)
        # All have the same work, so that each may be waited for alone.
        lost = partial(self.lose, None)
        return [[Handle(work, output, own, lost=lost)] for output, own in zip(outputs, owns, strict=True)]

    def gather(self, shard: Tensor, bucket: Tensor | None, to: int) -> None:
        # Not by messages, for each pair of which NCCL makes a communicator.
        parts = None if bucket is None else list(as_bytes(bucket).chunk(self.world_size))
        with self._losing():
            dist.gather(as_bytes(shard), parts, group=self.group, group_dst=to)

    def reducer(self, buckets: Sequence[tuple[int, torch.dtype]]) -> Reducer:
        return NativeReducer(self, buckets)

    def averages(self, tensors: Sequence[Tensor], most_numel: int) -> Averages:
        return NativeAverages(self, tensors, most_numel)


class NativeReducer(Reducer):
    """The backend's reduce-scatter. Half-precision gradients go through an all-to-all as they are, and are summed here.

    Not every backend sums them, and none in fp32.
    """

    num_slots = UNDER_WAY

    def __init__(self, transport: NativeTransport, buckets: Sequence[tuple[int, torch.dtype]]) -> None:
        self._transport = transport
        self._slots = deque(self._slot(buckets, transport.device) for _ in range(self.num_slots))
        self._queue = Queue()
        self._bucket = self._slots[0]

    @staticmethod
    def slot_bytes(buckets: Sequence[tuple[int, torch.dtype]]) -> int:
        # Half precision is packed into the first half, and received into the second.
        return Reducer.slot_bytes([(numel, wide(dtype)) for numel, dtype in buckets])

    def open(self, numel: int, dtype: torch.dtype) -> Tensor:
        self._queue.make_room()
        self._bucket = typed(self._slots[0], numel, dtype)
        return self._bucket

    def close(self, out: Tensor, accumulate: bool, mark: int) -> None:
        bucket, ranks, group = self._bucket, self._transport.world_size, self._transport.group
        with self._transport._losing():
            if bucket.dtype in HALF_DTYPES:
                received = typed(self._slots[0].narrow(0, bucket.nbytes, bucket.nbytes), bucket.numel(), bucket.dtype)
                work = dist.all_to_all_single(as_bytes(received), as_bytes(bucket), group=group, async_op=True)
                parts = received.chunk(ranks)
            else:
                parts = bucket.chunk(ranks)[self._transport.rank : self._transport.rank + 1]
                work = reduce_scatter_single(parts[0], bucket, group)
        handle = Handle(work, bucket, *parts, lost=partial(self._transport.lose, None))
        self._queue.add(partial(self._complete, handle, parts, out, accumulate))
        self._slots.rotate(-1)

    def _complete(self, handle: Handle, parts: Sequence[Tensor], out: Tensor, accumulate: bool) -> None:
        handle.wait()
        # Not the backend's mean: NCCL divides before it adds, which loses bits unless the number of ranks is a power of
        # two, and others have none. Dividing while the sum is copied costs nothing.
        sum_(out, parts, accumulate, self._transport.world_size)

    def finish(self) -> None:
        self._queue.finish()


class NativeAverages(Averages):
    """The backend's all-reduce, asynchronous."""

    def __init__(self, transport: NativeTransport, tensors: Sequence[Tensor], most_numel: int) -> None:
        super().__init__(transport, tensors, most_numel)
        self._transport = transport
        self._handles: deque[Handle] = deque()

    def _begin(self) -> None:
        transport = self._transport
        for part in self._waiting:
            with transport._losing():
                work = dist.all_reduce(part.elements, group=transport.group, async_op=True)
            self._handles.append(Handle(work, part.elements, lost=partial(transport.lose, None)))

    def _end(self, part: Part) -> None:
        self._handles.popleft().wait()
        part.elements.div_(self._transport.world_size)
