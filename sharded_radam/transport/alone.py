"""One rank, or no process group at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_radam.store.meeting import Meeting
from sharded_radam.transport.base import Handle, Transport
from sharded_radam.transport.meter import Meter
from sharded_radam.transport.reducers import AloneReducer, Reducer


class Alone(Transport):
    """One rank, or no process group at all: nothing to communicate."""

    name = "none"

    def __init__(
        self,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        meeting: Meeting | None = None,
        names: Sequence[int] = (0,),
    ) -> None:
        self.group = group  # type: ignore[assignment]
        self.device = device
        self.rank = 0
        self.world_size = 1
        self.meter = Meter(device)
        self.meeting = meeting or Meeting(None, 0, 1, 0.0)
        self.names = names

    def count(self, kind: str, bucket: Tensor) -> None:
        pass

    def all_gather(self, bucket: Tensor) -> list[Handle]:
        return []

    def all_gather_objects(self, item: object) -> list[Any]:
        return [item]

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        pass

    def union(self, flags: Sequence[bool], done: int) -> list[bool]:
        return list(flags)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        return tensor

    def reducer(self, buckets: Sequence[tuple[int, torch.dtype]]) -> Reducer:
        return AloneReducer(torch.empty(Reducer.slot_bytes(buckets), dtype=torch.uint8, device=self.device))
