"""The backend's own all-gather: NCCL, and any backend there is no better way for."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from sharded_radam.transport.base import Handle, Transport, as_bytes


class NativeTransport(Transport):
    """One all-gather a bucket, in place, asynchronous; the backend orders it after the kernels that fill the shard."""

    name = "native"

    def all_gather(self, bucket: Tensor) -> list[Handle]:
        output = as_bytes(bucket)
        own = output.chunk(self.world_size)[self.rank]
        work = dist.all_gather_single(output, own, group=self.group, async_op=True)
        return [Handle(work, output, own)]
