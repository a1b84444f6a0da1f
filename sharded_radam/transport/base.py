"""What the optimizer asks of the network, and all of it that does not depend on the backend."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_radam.meeting import Meeting
from sharded_radam.meter import Meter
from sharded_radam.transport.reducers import HALF_DTYPES, AloneReducer, Reducer

_TAG = 0x5AD0
"""Point-to-point messages of ours carry tags from here on, apart from a user's own, which are mostly small."""


class Handle:
    """Communication under way; it owns the request and the tensors read and written."""

    def __init__(self, work: dist.Work | None, *tensors: Tensor) -> None:
        self._work = work
        self._tensors = tensors

    def wait(self, *streams: Any) -> None:
        """Return when the tensors may be used (on CUDA: by kernels launched from now on, here or on ``streams``)."""
        if self._work is not None:
            self._work.wait()
            for stream in streams:
                with torch.cuda.stream(stream):
                    self._work.wait()
        self._work, self._tensors = None, ()


class Transport(ABC):
    """Moves shards between the ranks of one process group; all ranks make the same calls in the same order.

    ``rank`` and ``world_size`` are those of the group, whose backend moves tensors of ``device``. Tensors are
    contiguous, and travel as bytes: any dtype does. ``reason`` says why it is this transport.
    """

    name: str
    reason = ""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.meter = Meter(device)
        self.meeting = Meeting.of(group)

    def copy(self) -> Transport:
        """The same connections, with figures of its own."""
        new = copy(self)
        new.meter = Meter(self.device)
        new.meter.times_phases = self.meter.times_phases
        return new

    def count(self, kind: str, bucket: Tensor) -> None:
        """Note a collective on a bucket, of which each rank sends, and receives, all shards but one."""
        self.meter.count(kind, bucket.nbytes // self.world_size * (self.world_size - 1))

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
            self.meter.count("broadcast", tensor.nbytes if self.rank else 0)
            dist.broadcast(as_bytes(tensor), group=self.group, group_src=0)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Collective: the sum, maximum or minimum over the ranks (modified in place); for a few elements."""
        self.meter.count("all_reduce", tensor.nbytes)
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
        self.meter = Meter(device)
        self.meeting = Meeting(None, 0, 1, 0.0)

    def count(self, kind: str, bucket: Tensor) -> None:
        pass

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
        return AloneReducer(torch.empty(Reducer.slot_bytes(buckets), dtype=torch.uint8, device=self.device))


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as 1-D uint8."""
    return tensor.view(-1).view(torch.uint8)
