"""The backend's own collectives: NCCL, and any backend there is no better way for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_radam.transport.base import Handle, Reducer, Transport, as_bytes, slot, typed

_UNDER_WAY = 2
"""Buckets of gradients under way: one travels while the next is filled."""


class NativeTransport(Transport):
    """One all-gather and one reduce-scatter a bucket, in place, asynchronous.

    The backend has a stream of its own, ordered by events after the kernels that fill a bucket; waiting for a handle
    orders the kernels that come later, and does not make the host wait.
    """

    name = "native"

    def all_gather(self, bucket: Tensor) -> list[Handle]:
        output = as_bytes(bucket)
        own = output.chunk(self.world_size)[self.rank]
        work = dist.all_gather_single(output, own, group=self.group, async_op=True)
        return [Handle(work, output, own)]

    def reducer(self, buckets: Sequence[tuple[int, torch.dtype]]) -> Reducer:
        return NativeReducer(self, [(numel, _wide(dtype)) for numel, dtype in buckets])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _UnderWay(NamedTuple):
    handle: Handle
    shard: Tensor
    out: Tensor
    accumulate: bool


class NativeReducer(Reducer):
    """Half-precision gradients travel as fp32: not every backend sums them, and none in fp32."""

    def __init__(self, transport: NativeTransport, buckets: Sequence[tuple[int, torch.dtype]]) -> None:
        self._transport = transport
        self._slots = deque(slot(buckets, transport.device) for _ in range(_UNDER_WAY))
        self._under_way: deque[_UnderWay] = deque()
        self._bucket = self._slots[0]

    def open(self, numel: int, dtype: torch.dtype) -> Tensor:
        if len(self._under_way) == _UNDER_WAY:
            self._complete()
        self._bucket = typed(self._slots[0], numel, _wide(dtype))
        return self._bucket

    def close(self, out: Tensor, accumulate: bool, mark: int) -> None:
        shard = self._bucket.chunk(self._transport.world_size)[self._transport.rank]
        work = dist.reduce_scatter_single(shard, self._bucket, group=self._transport.group, async_op=True)
        self._under_way.append(_UnderWay(Handle(work, shard), shard, out, accumulate))
        self._slots.rotate(-1)

    def finish(self) -> None:
        while self._under_way:
            self._complete()

    def _complete(self) -> None:
        bucket = self._under_way.popleft()
        bucket.handle.wait()
        # Only sums are portable; the mean is formed here.
        bucket.shard.div_(self._transport.world_size)
        if bucket.accumulate:
            bucket.out.add_(bucket.shard)
        else:
            torch._foreach_copy_([bucket.out], [bucket.shard])
