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

SlotKey = tuple[int, int]
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


def make_schedule(plans: Sequence[FlatPlan], order: Sequence[SlotKey]) -> Schedule:
    """The schedule for slots that arrive in this order; all other slots are in the tail."""
    expected = set(order)
    missing: dict[tuple[int, int], set[int]] = {}
    buckets_of: dict[SlotKey, list[tuple[int, float]]] = defaultdict(list)
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
