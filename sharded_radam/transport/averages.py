"""The mean of what each replica has: of gradients that were averaged within each shard group.

One sum a step, of the own shards, which are in fp32 at least. Its order is that of the replicas, and the mean is
``(s0 / R + s1 / R) + s2 / R + ...``, as a reducer forms it, for R replicas; ``native`` takes the backend's order, and
divides last. All replicas get the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharded_radam.plan import ALIGNMENT

if TYPE_CHECKING:
    from sharded_radam.transport.base import Transport


class Averages(ABC):
    """Averages the same 1-D tensors over the ranks of a transport, in place."""

    @abstractmethod
    def average(self, indices: Sequence[int]) -> None:
        """Collective: those of these indices, the same on all ranks; returns when they may be read."""

    def num_bytes(self) -> int:
        """Of memory that it has beside the tensors."""
        return 0


class ReducedAverages(Averages):
    """Each rank reduces a part of each tensor, as of buckets of gradients; then all gather the parts.

    Args:
        transport: between the replicas.
        tensors: of ``world_size * ALIGNMENT`` elements, or a multiple of that.
        most_numel: elements that a reducer has memory for.
    """

    def __init__(self, transport: Transport, tensors: Sequence[Tensor], most_numel: int) -> None:
        self._transport = transport
        quantum = ALIGNMENT * transport.world_size
        most = -(-most_numel // quantum) * quantum
        self._pieces = [[*torch.split(tensor, most)] if tensor.numel() else [] for tensor in tensors]
        self._sizes = [(piece.numel(), piece.dtype) for pieces in self._pieces for piece in pieces]
        self._reducer = transport.reducer(self._sizes)

    def average(self, indices: Sequence[int]) -> None:
        rank, ranks = self._transport.rank, self._transport.world_size
        pieces = [piece for index in indices for piece in self._pieces[index]]
        for number, piece in enumerate(pieces):
            bucket = self._reducer.open(piece.numel(), piece.dtype)
            self._reducer.fill([bucket], [piece])
            self._reducer.close(piece.chunk(ranks)[rank], False, number % 256)
        self._reducer.finish()
        for handle in [handle for piece in pieces for handle in self._transport.all_gather(piece)]:
            handle.wait()

    def num_bytes(self) -> int:
        return self._reducer.num_slots * self._reducer.slot_bytes(self._sizes)
