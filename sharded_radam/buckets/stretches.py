"""Stretches with their memory: what an engine gets that is to have few and large calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from sharded_radam.buckets.memory import as_real
from sharded_radam.plan import Piece, Stretch, stretches

_MOST_KNOWN = 1000
"""So many lists are kept. Where all parameters always have gradients, there is one for each bucket."""


def memory_of(
    at: Piece | Stretch, buffer: Tensor, state: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Views of parameters, ``exp_avg``, ``exp_avg_sq`` and masters, complex ones as real numbers."""
    param = as_real(buffer.narrow(0, at.flat_start, at.numel))
    local = {name: as_real(tensor.narrow(0, at.local_start, at.numel)) for name, tensor in state.items()}
    return param, local["exp_avg"], local["exp_avg_sq"], local.get("master")


class ShardStretch(NamedTuple):
    """A stretch with its memory: views of the bucket and of the state, complex ones as real numbers."""

    stretch: Stretch
    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None

    def padding(self) -> Iterator[Tensor]:
        """The padding in the parameters and masters."""
        stretch, reals = self.stretch, self.param.numel() // self.stretch.numel
        starts = [part.flat_start for part in stretch.parts[1:]] + [stretch.flat_start + stretch.numel]
        for part, stop in zip(stretch.parts, starts, strict=True):
            end = part.flat_start + part.numel
            for tensor in (self.param, self.master):
                if tensor is not None and stop > end:
                    yield tensor.narrow(0, reals * (end - stretch.flat_start), reals * (stop - end))


class Stretches:
    """The stretches of a flat.

    Args:
        buffer: of the flat.
        state: of the own shards, with masters if there are some.
        pieces: of each bucket.
    """

    def __init__(self, buffer: Tensor, state: Mapping[str, Tensor], pieces: Sequence[Sequence[Piece]]) -> None:
        self._buffer = buffer
        self._state = state
        self._pieces = pieces
        self._known: dict[tuple[int, frozenset[int], float], list[ShardStretch]] = {}

    def find(self, bucket: int, slots: frozenset[int], separate_numel: float) -> list[ShardStretch]:
        """Those of some slots in a bucket; see :func:`sharded_radam.plan.stretches`."""
        key = (bucket, slots, separate_numel)
        if key not in self._known:
            if len(self._known) == _MOST_KNOWN:
                self._known.clear()
            pieces = [piece for piece in self._pieces[bucket] if piece.slot in slots]
            self._known[key] = [self._with_memory(stretch) for stretch in stretches(pieces, separate_numel)]
        return self._known[key]

    def _with_memory(self, stretch: Stretch) -> ShardStretch:
        return ShardStretch(stretch, *memory_of(stretch, self._buffer, self._state))
