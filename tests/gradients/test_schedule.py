"""The schedule: the drawing of its docstring as data, and what holds for all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sharded_radam.gradients.schedule import MAX_WAITING, Launch, make_schedule, members
from sharded_radam.plan import ALIGNMENT, FlatPlan, Slot


def flat(sizes: list[int], bucket_numel: int, world_size: int = 1) -> FlatPlan:
    slots, end = [], 0
    for index, numel in enumerate(sizes):
        slots.append(Slot(index, end, numel))
        end += -(-numel // ALIGNMENT) * ALIGNMENT
    quantum = world_size * ALIGNMENT
    return FlatPlan(tuple(slots), -(-end // quantum) * quantum, bucket_numel, world_size)


A, B, C, D = range(4)
DRAWN = flat([4 * 64, 5 * 64, 3 * 64, 4 * 64], 8 * 64)


def test_the_drawing() -> None:
    assert [members(DRAWN, bucket) for bucket in (0, 1)] == [{A: 4 * 64, B: 4 * 64}, {B: 64, C: 3 * 64, D: 4 * 64}]
    schedule = make_schedule([DRAWN], [(0, D), (0, C), (0, B), (0, A)])
    assert schedule.launches == (Launch(0, 1, frozenset({B, C, D})), Launch(0, 0, frozenset({A, B})))
    assert schedule.tail == ()


def test_rare_gradients_are_in_the_tail() -> None:
    schedule = make_schedule([DRAWN], [(0, D), (0, B), (0, A)])
    assert schedule.launches == (Launch(0, 1, frozenset({B, D})), Launch(0, 0, frozenset({A, B})))
    assert schedule.tail == (Launch(0, 1, frozenset({C})),)


def test_an_order_that_has_nothing_to_do_with_the_layout() -> None:
    """One parameter of each bucket, then the second of each: without more launches, all would wait."""
    plan = flat([64] * 16, 128)
    order = [(0, slot) for slot in (*range(0, 16, 2), *range(1, 16, 2))]
    schedule = make_schedule([plan], order)
    assert len(schedule.launches) > plan.num_buckets
    assert largest_waiting([plan], order) <= MAX_WAITING + 0.5
    assert len(make_schedule([plan], order[:8] + order[8:][::-1]).launches) <= 2 * plan.num_buckets


def largest_waiting(plans: list[FlatPlan], order: list[tuple[int, int]]) -> float:
    """Buckets' worth of gradients that wait, at most, when all that can be launched is."""
    launches, come, most = list(make_schedule(plans, order).launches), set(), 0.0
    unsent = {
        (index, bucket, slot): numel / plan.bucket_numel
        for index, plan in enumerate(plans)
        for bucket in range(plan.num_buckets)
        for slot, numel in members(plan, bucket).items()
    }
    for key in order:
        come.add(key)
        while launches and all((launches[0].flat, slot) in come for slot in launches[0].slots):
            done = launches.pop(0)
            for slot in done.slots:
                del unsent[done.flat, done.bucket, slot]
        most = max(most, sum(numel for (index, _, slot), numel in unsent.items() if (index, slot) in come))
    assert not launches
    return most


@given(st.data())
def test_every_gradient_is_sent_once_and_few_wait(data: st.DataObject) -> None:
    plans = [
        flat(data.draw(st.lists(st.integers(0, 700), min_size=1, max_size=9)), 64 * world_size * cap, world_size)
        for world_size in [data.draw(st.integers(1, 4))]
        for cap in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    ]
    keys = [(index, slot) for index, plan in enumerate(plans) for slot in range(len(plan.slots))]
    order = data.draw(st.permutations(keys))[: data.draw(st.integers(0, len(keys)))]
    schedule = make_schedule(plans, order)
    sent = [(launch.flat, launch.bucket, slot) for launch in schedule.launches for slot in launch.slots]
    late = [(launch.flat, launch.bucket, slot) for launch in schedule.tail for slot in launch.slots]
    everything = [
        (index, bucket, slot)
        for index, plan in enumerate(plans)
        for bucket in range(plan.num_buckets)
        for slot in members(plan, bucket)
    ]
    assert sorted(sent + late) == sorted(everything)
    assert {(index, slot) for index, _, slot in sent} <= set(order)
    assert not {(index, slot) for index, _, slot in late} & set(order)
    assert largest_waiting(plans, order) <= MAX_WAITING + 1e-9
    assert schedule == make_schedule(plans, order)
