"""When gradients are sent, while backward produces them: integers only, for all ranks at once.

A *launch* reduces one bucket. It begins when its slots have their gradients, and never before the launches ahead of it,
so all ranks launch in one order. The order of arrival is that of the first backward pass. Parameters ``a`` to ``d`` in
two buckets, with gradients that arrive from the last to the first::

    slot      |a a a a|b b b b b|c c c|d d d d|
    bucket    |------ 0 ------|------ 1 ------|

    arrives   d   c   b          a
    launches          bucket 1   bucket 0

Gradients that wait for the rest of their buckets take memory. Where they come in an order that has little to do with
that of the parameters, a bucket is launched several times, each time with what has come, so that at most
``MAX_WAITING`` buckets' worth waits. Slots that got no gradient when the order was found out are not waited for: their
launches are the *tail*, which is sent at the step, and only if some rank has a gradient for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sharded_radam.plan import FlatPlan

MAX_WAITING = 2.0
"""Buckets' worth of gradients."""

Slots = tuple[int, int]
"""A flat and a slot in it."""


@dataclass(frozen=True, slots=True)
class Launch:
    """The gradients of these slots, as far as they are in this bucket; zeros in the place of the bucket's others."""

    flat: int
    bucket: int
    slots: frozenset[int]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The launches of a backward pass, in their order, and those at the step for slots that rarely have gradients."""

    launches: tuple[Launch, ...]
    tail: tuple[Launch, ...]


def members(plan: FlatPlan, bucket: int) -> dict[int, int]:
    """The slots in a bucket, and how many of its elements each has."""
    return {slot: stop - start for slot, start, stop in plan.overlaps(*plan.bucket_range(bucket))}


def make_schedule(plans: Sequence[FlatPlan], order: Sequence[Slots]) -> Schedule:
    """The schedule for slots that arrive in this order; all other slots are in the tail."""
    expected = set(order)
    missing: dict[tuple[int, int], set[int]] = {}
    buckets_of: dict[Slots, list[tuple[int, float]]] = defaultdict(list)
    tail = []
    for flat, plan in enumerate(plans):
        for bucket in range(plan.num_buckets):
            found = members(plan, bucket)
            missing[flat, bucket] = {slot for slot in found if (flat, slot) in expected}
            rare = found.keys() - missing[flat, bucket]
            if rare:
                tail.append(Launch(flat, bucket, frozenset(rare)))
            for slot, numel in found.items():
                buckets_of[flat, slot].append((bucket, numel / plan.bucket_numel))
    launches = []
    waiting: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)

    def launch(flat: int, bucket: int) -> None:
        launches.append(Launch(flat, bucket, frozenset(waiting.pop((flat, bucket)))))

    for flat, slot in order:
        for bucket, share in buckets_of[flat, slot]:
            waiting[flat, bucket][slot] = share
            missing[flat, bucket].discard(slot)
            if not missing[flat, bucket]:
                launch(flat, bucket)
        while sum(sum(shares.values()) for shares in waiting.values()) > MAX_WAITING:
            launch(*max(waiting, key=lambda key: sum(waiting[key].values())))
    return Schedule(tuple(launches), tuple(tail))


class Progress:
    """Where backward passes are in the launches of a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.arrived: dict[Slots, None] = {}  # in their order
        self._launches = schedule.launches
        self._numbers: dict[Slots, list[int]] = defaultdict(list)
        for number, launch in enumerate(schedule.launches):
            for slot in launch.slots:
                self._numbers[launch.flat, slot].append(number)
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.arrived.clear()
        self._next = 0
        self._missing = [len(launch.slots) for launch in self._launches]
        self._unsent = {slots: len(numbers) for slots, numbers in self._numbers.items()}

    def expects(self, slots: Slots) -> bool:
        """Whether a slot is in any launch."""
        return slots in self._numbers

    def arrive(self, slots: Slots) -> None:
        """Note an expected gradient."""
        self.arrived[slots] = None
        for number in self._numbers[slots]:
            self._missing[number] -= 1

    @property
    def is_over(self) -> bool:
        """Whether no launch is left."""
        return self._next == len(self._launches)

    @property
    def is_ready(self) -> bool:
        """Whether all gradients of the next launch have come."""
        return not self.is_over and self._missing[self._next] == 0

    def take(self) -> tuple[Launch, list[int]]:
        """The next launch, and those of its slots that no later one needs."""
        launch = self._launches[self._next]
        self._next += 1
        done = []
        for slot in launch.slots:
            self._unsent[launch.flat, slot] -= 1
            if self._unsent[launch.flat, slot] == 0:
                done.append(slot)
        return launch, done
