"""Who owns which elements: integers only, for all ranks at once.

The parameters of one param group, dtype and device are laid out one after the other in a *flat* buffer. Each begins
on a multiple of ``ALIGNMENT`` elements, in its *slot*. The flat is cut into equal *buckets*, whatever parameters they
hold, and each bucket into ``world_size`` equal *shards*, one a rank. A *piece* is slot ∩ shard. With
``ALIGNMENT = 4``, two ranks, buckets of 16 elements and parameters ``a`` (7), ``b`` (3) and ``c`` (10)::

    element   0       4       8       12      16      20      24
    slot      |a a a a a a a .|b b b .|c c c c c c c c c c . .|
    bucket    |-------------- 0 --------------|------ 1 ------|
    owner     |---- rank 0 ---|---- rank 1 ---| rank 0| rank 1|

So ``c`` has three pieces, in two buckets. Padding (``.``) is at the end of slots and of the flat. Every cut is on a
multiple of ``ALIGNMENT`` from the beginning of the slot, whatever the world size: vectorised kernels then treat each
element alike, and the results of the fused engine do not depend on the world size.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 64
"""Elements; slots and shards begin on its multiples."""

FULL_DEVICE_NUMEL = 2**25
"""Elements that fill an accelerator: torch's kernels for lists of tensors give 65,536 to each block, and an H100 has
132 multiprocessors for several blocks each."""


def default_bucket_cap_mb(device_type: str, world_size: int) -> float:
    """Size of a bucket in MiB, where none was asked for.

    On a CPU 25, as DistributedDataParallel's: what was updated is in the cache when it is sent. Elsewhere 4 a rank, so
    that its shard is a message whose time is that of its bytes (Megatron-LM has as much: 1 Mi elements a rank). Not
    less than 64, since each bucket costs the host some calls; not more than 256, since sharded gradients take memory
    for two buckets, and for four in half precision.
    """
    return 25.0 if device_type == "cpu" else float(min(max(4 * world_size, 64), 256))


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What the layout needs to know of a parameter.

    ``dim_order`` is the order of its dimensions in memory, outermost first: ``(0, 2, 3, 1)`` for channels_last.
    """

    name: str
    shape: tuple[int, ...]
    dim_order: tuple[int, ...]
    dtype: torch.dtype
    device_type: str
    group: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Slot:
    """The elements ``[start, start + numel)`` of a flat, which hold the parameter ``param``, an index of ``params``."""

    param: int
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Slot ∩ shard: the elements ``[start, start + numel)`` of a parameter, in memory order.

    ``flat_start`` is where they are in the flat; ``local_start`` where they are in the rank's own shards, put one
    after the other.
    """

    slot: int
    bucket: int
    start: int
    numel: int
    flat_start: int
    local_start: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements of one shard, from one slot or from several and the padding between them.

    It begins and ends on multiples of ``ALIGNMENT``. ``flat_start`` and ``local_start`` are as those of a piece;
    ``parts`` are the parts of pieces in it, in their order.
    """

    flat_start: int
    local_start: int
    numel: int
    parts: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class FlatPlan:
    """The layout of one flat of ``numel`` elements, padding included, for all ranks."""

    slots: tuple[Slot, ...]
    numel: int
    bucket_numel: int
    world_size: int

    @property
    def num_buckets(self) -> int:
        return -(-self.numel // self.bucket_numel)

    @property
    def local_numel(self) -> int:
        """Elements that each rank owns: all its shards together."""
        return self.numel // self.world_size

    def bucket_range(self, bucket: int) -> tuple[int, int]:
        """First element of a bucket in the flat, and the one after its last."""
        start = bucket * self.bucket_numel
        return start, min(start + self.bucket_numel, self.numel)

    def shard_range(self, bucket: int, rank: int) -> tuple[int, int]:
        """The same for the shard of ``rank`` in a bucket."""
        start, stop = self.bucket_range(bucket)
        shard_numel = (stop - start) // self.world_size
        return start + rank * shard_numel, start + (rank + 1) * shard_numel

    def local_range(self, bucket: int) -> tuple[int, int]:
        """Where a shard is among the own shards put one after the other; the same for every rank."""
        start, stop = self.bucket_range(bucket)
        return start // self.world_size, stop // self.world_size

    def calls(self, device_type: str) -> list[range]:
        """The buckets, put together so that one call of an engine updates some of them.

        On a CPU one bucket a call: what is in the cache stays there. Elsewhere so many that the own elements of a call
        fill the device, and no more, so that the first ones travel while the next are updated.
        """
        step = 1
        if device_type != "cpu":
            step = max(1, -(-FULL_DEVICE_NUMEL * self.world_size // self.bucket_numel))
        return [range(at, min(at + step, self.num_buckets)) for at in range(0, self.num_buckets, step)]

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """All pieces of one rank, in the order of the flat; those of one parameter adjoin among the own shards."""
        found = []
        for bucket in range(self.num_buckets):
            shard_start, shard_stop = self.shard_range(bucket, rank)
            to_local = self.local_range(bucket)[0] - shard_start
            for slot, start, stop in self.overlaps(shard_start, shard_stop):
                first = start - self.slots[slot].start
                found.append(Piece(slot, bucket, first, stop - start, start, start + to_local))
        return tuple(found)

    def padding(self, rank: int) -> list[range]:
        """Where the own shards of a rank, put one after the other, have no elements of parameters."""
        found, end = [], 0
        for piece in self.pieces(rank):
            found.append(range(end, piece.local_start))
            end = piece.local_start + piece.numel
        return [part for part in (*found, range(end, self.local_numel)) if part]

    def part_of(self, replica: int, num_replicas: int) -> range:
        """Of the own shards, put one after the other, the elements that one of some replicas writes of a checkpoint."""
        edges = [self.local_numel * each // num_replicas for each in (replica, replica + 1)]
        return range(*edges)

    def buckets_of(self, slot: int) -> range:
        """The buckets that have elements of a slot."""
        at = self.slots[slot]
        return range(at.start // self.bucket_numel, -(-(at.start + at.numel) // self.bucket_numel))

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Slots with elements in ``[start, stop)``: their index, and the first and the one after the last of these."""
        first = bisect_right(self.slots, start, key=lambda slot: slot.start + slot.numel)
        for index in range(first, len(self.slots)):
            slot = self.slots[index]
            if slot.start >= stop:
                break
            if slot.numel:
                yield index, max(slot.start, start), min(slot.start + slot.numel, stop)


def cut(pieces: Iterable[Piece], within: range) -> list[Piece]:
    """The parts of pieces that lie in a range of the own shards, put one after the other."""
    found = []
    for piece in pieces:
        first = max(within.start, piece.local_start)
        stop = min(within.stop, piece.local_start + piece.numel)
        if first < stop:
            found.append(_part(piece, first - piece.local_start, stop - first))
    return found


def stretches(pieces: Iterable[Piece], separate_numel: float = math.inf) -> list[Stretch]:
    """Put the pieces of one shard that adjoin, but for padding, into one stretch each.

    Args:
        pieces: in the order of the flat; some may be left out.
        separate_numel: pieces of so many elements are stretches of their own, but for what is left of them at the end
            after the last multiple of ``ALIGNMENT``.
    """
    found: list[list[Piece]] = []
    end, is_open = -1, False
    for piece in pieces:
        whole = piece.numel // ALIGNMENT * ALIGNMENT
        rest = piece.numel - whole
        if whole and piece.numel >= separate_numel:
            found.append([_part(piece, 0, whole)])
            end, is_open = piece.flat_start + whole, False
            if not rest:
                continue
            piece = _part(piece, whole, rest)
        if is_open and piece.flat_start == end:
            found[-1].append(piece)
        else:
            found.append([piece])
        end, is_open = _round_up(piece.flat_start + piece.numel, ALIGNMENT), True
    made = []
    for parts in found:
        first, last = parts[0], parts[-1]
        numel = _round_up(last.flat_start + last.numel - first.flat_start, ALIGNMENT)
        made.append(Stretch(first.flat_start, first.local_start, numel, tuple(parts)))
    return made


def _part(piece: Piece, offset: int, numel: int) -> Piece:
    starts = (piece.start, piece.flat_start, piece.local_start)
    start, flat_start, local_start = (at + offset for at in starts)
    return Piece(piece.slot, piece.bucket, start, numel, flat_start, local_start)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The layout of all parameters: one flat for every (group, dtype, device type), in order of appearance."""

    params: tuple[ParamSpec, ...]
    flats: tuple[FlatPlan, ...]


def _round_up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def _plan_flat(
    params: Sequence[ParamSpec], members: Sequence[int], world_size: int, bucket_cap_mb: float | None
) -> FlatPlan:
    slots, end = [], 0
    if bucket_cap_mb is None:
        bucket_cap_mb = default_bucket_cap_mb(params[members[0]].device_type, world_size)
    for member in members:
        slots.append(Slot(member, end, params[member].numel))
        end += _round_up(params[member].numel, ALIGNMENT)
    quantum = world_size * ALIGNMENT
    wanted = int(bucket_cap_mb * 2**20 / params[members[0]].dtype.itemsize) // quantum * quantum
    numel = _round_up(end, quantum)
    return FlatPlan(tuple(slots), numel, min(max(wanted, quantum), max(numel, quantum)), world_size)


def make_plan(params: Sequence[ParamSpec], world_size: int, bucket_cap_mb: float | None = None) -> ShardPlan:
    """Lay out parameters over ``world_size`` ranks.

    Args:
        params: all parameters, in the same order on every rank.
        world_size: number of ranks, at least 1.
        bucket_cap_mb: size of a bucket in MiB, at most, but for its least size of ``world_size * ALIGNMENT`` elements;
            ``default_bucket_cap_mb`` of each flat if None.
    """
    members: dict[tuple[int, torch.dtype, str], list[int]] = {}
    for index, param in enumerate(params):
        members.setdefault((param.group, param.dtype, param.device_type), []).append(index)
    return ShardPlan(tuple(params), tuple(_plan_flat(params, m, world_size, bucket_cap_mb) for m in members.values()))
