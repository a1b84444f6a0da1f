"""Local gradients into buckets, and from these, reduced, into the sums: the mean gradients of the own shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_radam.buckets.flat import Flat
from sharded_radam.buckets.memory import zeros
from sharded_radam.gradients.schedule import Launch, SlotKey
from sharded_radam.plan import ALIGNMENT
from sharded_radam.transport import Averages, Reducer, Transport


class _Part(NamedTuple):
    """Slot ∩ bucket: ``numel`` real numbers of a parameter from ``start`` on, at ``offset`` in the bucket."""

    slot: int
    start: int
    numel: int
    offset: int


class Sums:
    """The mean gradients of the own shards of some flats, and which parameters have one in there.

    ``totals[i]`` is 1-D with the layout of ``flats[i].state``: real numbers, fp32 for half precision. After ``finish``
    padding in it is zero; elements of parameters that are not in there are undefined.

    Args:
        flats: of the optimizer.
        transport: of their ranks.
        reduce_dtype: in which gradients travel; that of their parameters if None.
    """

    def __init__(self, flats: Sequence[Flat], transport: Transport, reduce_dtype: torch.dtype | None = None) -> None:
        self.flats = list(flats)
        self._dtypes = [reduce_dtype or flat.buffer.dtype.to_real() for flat in flats]
        self._transport = transport
        self._averages: Averages | None = None
        self._whole: list[Tensor] = []  # sums, and zeros that make them divisible between replicas
        self.totals: list[Tensor] = []
        for flat in flats:
            dtype = flat.state["exp_avg"].dtype.to_real()
            numel = flat.reals * flat.plan.local_numel
            self._whole.append(zeros(numel + -numel % self._quantum(), dtype, flat.buffer.device))
            self.totals.append(self._whole[-1].narrow(0, 0, numel))
        self._views = [_views_of(flat, total) for flat, total in zip(flats, self.totals, strict=True)]
        self._padding = [_padding_of(flat) for flat in flats]
        self.reducer: Reducer | None = None
        self._parts = {
            (index, bucket): _parts_of(flat, bucket)
            for index, flat in enumerate(flats)
            for bucket in range(flat.plan.num_buckets)
        }
        # Slots whose elements in a bucket's sums are not zero, and those of them that are still meant.
        self._filled: dict[tuple[int, int], set[int]] = defaultdict(set)
        self._valid: dict[tuple[int, int], set[int]] = defaultdict(set)

    def as_sent(self, grad: Tensor, index: int) -> Tensor:
        """A gradient of a flat in the dtype in which it travels, as real numbers."""
        return (torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad).to(self._dtypes[index])

    def make_reducer(self) -> Reducer:
        """Collective the first time: the reducer for the buckets of all flats."""
        self.reducer = self.reducer or self._transport.reducer(self._sizes())
        return self.reducer

    def _quantum(self) -> int:
        replicas = self._transport.replicas
        return 1 if replicas is None else ALIGNMENT * replicas.world_size

    def _sizes(self) -> list[tuple[int, torch.dtype]]:
        numels = [flat.reals * flat.plan.bucket_numel for flat in self.flats]
        return list(zip(numels, self._dtypes, strict=True))

    def shard_bytes(self) -> int:
        """Bytes of the sums."""
        return sum(total.nbytes for total in self.totals)

    def slot_bytes(self) -> int:
        """Bytes of the buckets that are filled or under way; not collective, so 0 while there is no reducer."""
        of_replicas = self._averages.num_bytes() if self._averages else 0
        return of_replicas + (self.reducer.num_slots * self.reducer.slot_bytes(self._sizes()) if self.reducer else 0)

    def total_of(self, flat: Flat) -> Tensor:
        """The sums of a flat."""
        return self.totals[self.flats.index(flat)]

    def views_of(self, flat: Flat) -> dict[int, Tensor]:
        """The sums of a flat's own pieces, as real numbers, by where they begin in the own shards."""
        return self._views[self.flats.index(flat)]

    def elements(self, index: int) -> Tensor:
        """The sums of a flat as elements of its parameters, which may be complex."""
        total = self.totals[index]
        return torch.view_as_complex(total.view(-1, 2)) if self.flats[index].buffer.is_complex() else total

    def pieces(self, index: int) -> list[list[tuple[int, Tensor]]]:
        """For each slot of a flat: first element in memory order, and 1-D view, of its pieces."""
        flat, elements = self.flats[index], self.elements(index)
        pieces: list[list[tuple[int, Tensor]]] = [[] for _ in flat.params]
        for piece in (own.piece for in_bucket in flat.pieces for own in in_bucket):
            pieces[piece.slot].append((piece.start, elements.narrow(0, piece.local_start, piece.numel)))
        return pieces

    # Which parameters are in there

    def note(self, key: SlotKey) -> None:
        """Know that the elements of a parameter are in there, which somebody has put there."""
        for bucket in self._buckets_of(key):
            self._valid[bucket].add(key[1])
            self._filled[bucket].add(key[1])

    def drop(self, key: SlotKey) -> None:
        """Know that the elements of a parameter are no longer meant."""
        for bucket in self._buckets_of(key):
            self._valid[bucket].discard(key[1])

    def drop_all(self) -> None:
        """Know that no elements are meant any more."""
        self._valid.clear()

    def _buckets_of(self, key: SlotKey) -> Iterator[tuple[int, int]]:
        return ((key[0], bucket) for bucket in self.flats[key[0]].plan.buckets_of(key[1]))

    # Reducing

    def send(self, launch: Launch, grads: Mapping[int, Tensor], mark: int) -> None:
        """Pack gradients into the bucket of a launch, zeros in the place of others, and begin to reduce it.

        Args:
            launch: the bucket, and the slots that it is for.
            grads: 1-D, of slots that have one.
            mark: 0 to 255, equal on all ranks.
        """
        flat, where = self.flats[launch.flat], (launch.flat, launch.bucket)
        self.finish_average()  # of a step that failed
        first, stop = flat.plan.bucket_range(launch.bucket)
        with self._transport.meter.phase("reduce_scatter"):
            reducer = self.make_reducer()
            self._erase_dropped(where)
            bucket = reducer.open(flat.reals * (stop - first), self._dtypes[launch.flat])
            targets, sources, empty = [], [], []
            for part in self._parts[where]:
                target = bucket.narrow(0, part.offset, part.numel)
                if part.slot in grads:
                    targets.append(target)
                    grad = grads[part.slot]
                    sources.append(grad if part.numel == grad.numel() else grad.narrow(0, part.start, part.numel))
                else:
                    empty.append(target)
            reducer.fill(targets, sources)
            if empty:
                torch._foreach_zero_(empty)
            local_start, local_stop = (flat.reals * edge for edge in flat.plan.local_range(launch.bucket))
            out = self.totals[launch.flat].narrow(0, local_start, local_stop - local_start)
            self._transport.count("reduce_scatter", bucket)
            reducer.close(out, bool(self._valid[where]), mark)
        self._valid[where] |= launch.slots
        self._filled[where] = set(self._valid[where])

    def _erase_dropped(self, where: tuple[int, int]) -> None:
        """Make zeros of gradients that were dropped, where others are in the same bucket, to which will be added."""
        flat, dropped = self.flats[where[0]], self._filled[where] - self._valid[where]
        if self._valid[where] and dropped:
            self.finish()  # nothing may still be on its way to there
            for piece in (own.piece for own in flat.pieces[where[1]]):
                if piece.slot in dropped:
                    start, numel = flat.reals * piece.local_start, flat.reals * piece.numel
                    self.totals[where[0]].narrow(0, start, numel).zero_()

    def finish(self) -> None:
        """Wait for all that is under way. What was packed between parameters, or scaled with inf, becomes zero."""
        self.finish_average()
        if self.reducer is not None:
            self.reducer.finish()
        for flat, total, padding in zip(self.flats, self.totals, self._padding, strict=True):
            total.view(-1, flat.reals).index_fill_(0, padding, 0)

    def begin_average(self, indices: Sequence[int]) -> None:
        """Collective: begin to make the sums of some flats, which are the shard group's mean, that of all replicas.

        They are not to be used before ``wait``, or ``finish``.
        """
        replicas, meter = self._transport.replicas, self._transport.meter
        if replicas is None:
            return
        if self._averages is None:
            self._averages = replicas.averages(self._whole, max((numel for numel, _ in self._sizes()), default=0))
        with meter.phase("average"):
            for part in (self._whole[index].nbytes // replicas.world_size for index in indices):
                meter.count("average", 2 * part * (replicas.world_size - 1))
            self._averages.begin(indices)

    def wait(self, index: int, bucket: int) -> None:
        """Return when the sums of a flat's bucket, and of those before it, may be used."""
        if self._averages is not None:
            flat = self.flats[index]
            with self._transport.meter.phase("average"):
                self._averages.wait(index, flat.reals * flat.plan.local_range(bucket)[1])

    def finish_average(self) -> None:
        """Return when nothing travels between replicas."""
        if self._averages is not None:
            with self._transport.meter.phase("average"):
                self._averages.finish()

    def restart(self) -> None:
        """Forget what is under way, on all ranks."""
        self._averages = None
        if self.reducer is not None:
            self.reducer.restart()


def _views_of(flat: Flat, total: Tensor) -> dict[int, Tensor]:
    pieces, reals = (own.piece for in_bucket in flat.pieces for own in in_bucket), flat.reals
    return {piece.local_start: total.narrow(0, reals * piece.local_start, reals * piece.numel) for piece in pieces}


def _padding_of(flat: Flat) -> Tensor:
    """Places in the own shards that are no parameter's."""
    places = [at for part in flat.plan.padding(flat.rank) for at in part]
    return torch.tensor(places, dtype=torch.int64, device=flat.buffer.device)


def _parts_of(flat: Flat, bucket: int) -> list[_Part]:
    plan, reals = flat.plan, flat.reals
    first, end = plan.bucket_range(bucket)
    return [
        _Part(slot, reals * (start - plan.slots[slot].start), reals * (stop - start), reals * (start - first))
        for slot, start, stop in plan.overlaps(first, end)
    ]
