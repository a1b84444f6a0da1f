"""The mean of what each replica has: of gradients that were averaged within each shard group.

One sum a step, of the own shards, which are in fp32 at least. Its order is that of the replicas, and the mean is
``(s0 / R + s1 / R) + s2 / R + ...``, as a reducer forms it, for R replicas; ``native`` takes the backend's order, and
divides last. All replicas get the same bits.

Tensors travel in pieces, so that the first ones may be used while the last ones are under way. Nobody writes to what is
under way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sharded_radam.plan import ALIGNMENT
from sharded_radam.transport.reducers import UNDER_WAY

if TYPE_CHECKING:
    from sharded_radam.transport.base import Handle, Transport


class Part(NamedTuple):
    """The elements from ``start`` on of a tensor, by its number."""

    tensor: int
    start: int
    elements: Tensor


class Averages(ABC):
    """Averages the same 1-D tensors over the ranks of a transport, in place, again and again.

    Args:
        transport: between the replicas.
        tensors: of ``world_size * ALIGNMENT`` elements, or a multiple of that.
        most_numel: elements of a piece, about.
    """

    def __init__(self, transport: Transport, tensors: Sequence[Tensor], most_numel: int) -> None:
        quantum = ALIGNMENT * transport.world_size
        most = -(-most_numel // quantum) * quantum
        self.parts: list[list[Part]] = []
        for index, tensor in enumerate(tensors):
            pieces = torch.split(tensor, most) if tensor.numel() else ()
            self.parts.append([Part(index, number * most, piece) for number, piece in enumerate(pieces)])
        self._waiting: deque[Part] = deque()

    def begin(self, indices: Sequence[int]) -> None:
        """Collective: begin with the tensors of these indices, the same on all ranks; nothing is under way."""
        self._waiting.extend(part for index in indices for part in self.parts[index])
        self._begin()

    def wait(self, index: int, stop: int) -> None:
        """Collective: return when the elements before ``stop`` of a tensor, and all of those before it, may be used."""
        while self._waiting and self._waiting[0][:2] < (index, stop):
            self._end(self._waiting.popleft())

    def finish(self) -> None:
        """Collective: return when nothing is under way."""
        while self._waiting:
            self._end(self._waiting.popleft())

    @abstractmethod
    def _begin(self) -> None:
        """Begin with what is waited for."""

    @abstractmethod
    def _end(self, part: Part) -> None:
        """Return when a part, the first of those that are under way, may be used."""

    def num_bytes(self) -> int:
        """Of memory that it has beside the tensors."""
        return 0


class ReducedAverages(Averages):
    """Each rank reduces its share of each piece, as of buckets of gradients; then all gather the shares."""

    def __init__(self, transport: Transport, tensors: Sequence[Tensor], most_numel: int) -> None:
        super().__init__(transport, tensors, most_numel)
        self._transport = transport
        self._sizes = [(part.elements.numel(), part.elements.dtype) for parts in self.parts for part in parts]
        self._reducer = transport.reducer(self._sizes)
        self._unsent: deque[Part] = deque()
        self._reduced: deque[Part] = deque()
        self._gathered: deque[list[Handle]] = deque()

    def _begin(self) -> None:
        self._unsent.extend(self._waiting)
        for _ in range(min(UNDER_WAY, len(self._unsent))):
            self._send()

    def _send(self) -> None:
        """Reduce the next piece; if there is no room for it, the first one is reduced when this returns."""
        part, transport = self._unsent.popleft(), self._transport
        bucket = self._reducer.open(part.elements.numel(), part.elements.dtype)
        self._reducer.fill([bucket], [part.elements])
        self._reducer.close(part.elements.chunk(transport.world_size)[transport.rank], False, part.start % 251)
        self._reduced.append(part)

    def _end(self, part: Part) -> None:
        while not self._gathered:
            if self._unsent:
                self._send()
                ready = 1
            else:
                self._reducer.finish()
                ready = len(self._reduced)
            for _ in range(ready):
                self._gathered.append(self._transport.all_gather(self._reduced.popleft().elements))
        for handle in self._gathered.popleft():
            handle.wait()

    def num_bytes(self) -> int:
        return self._reducer.num_slots * self._reducer.slot_bytes(self._sizes)
