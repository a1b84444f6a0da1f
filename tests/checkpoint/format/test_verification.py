"""Whether boxes tile a tensor."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sharded_radam.checkpoint.format.chunks import Extent
from sharded_radam.checkpoint.format.errors import DamagedError
from sharded_radam.checkpoint.format.metadata import SavedBox, SavedTensor
from sharded_radam.checkpoint.format.verification import Intervals, check_coverage, tiles

pytestmark = pytest.mark.quick


@st.composite
def tilings(draw: st.DrawFn) -> tuple[list[Intervals], Intervals]:
    """A region of up to 4 dimensions, cut in two again and again, in any order."""
    region = [(0, draw(st.integers(1, 9))) for _ in range(draw(st.integers(0, 4)))]
    boxes = [region]
    for _ in range(draw(st.integers(0, 12))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        wide = [dim for dim, (first, last) in enumerate(box) if last - first > 1]
        if not wide:
            boxes.append(box)
            continue
        dim = draw(st.sampled_from(wide))
        first, last = box[dim]
        cut = draw(st.integers(first + 1, last - 1))
        boxes += [[*box[:dim], (first, cut), *box[dim + 1 :]], [*box[:dim], (cut, last), *box[dim + 1 :]]]
    return draw(st.permutations(boxes)), region


def elements(box: Intervals) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(first, last) for first, last in box)))


@given(tilings())
@settings(max_examples=300, deadline=None)
def test_any_tiling_is_one(tiling: tuple[list[Intervals], Intervals]) -> None:
    boxes, region = tiling
    assert tiles(boxes, region)


@given(tilings(), st.data())
@settings(max_examples=300, deadline=None)
def test_one_edge_moved_by_one_element_is_found(tiling: tuple[list[Intervals], Intervals], data: st.DataObject) -> None:
    boxes, region = tiling
    assume(region)
    at = data.draw(st.integers(0, len(boxes) - 1))
    dim = data.draw(st.integers(0, len(region) - 1))
    first, last = boxes[at][dim]
    by = data.draw(st.sampled_from([(-1, -1), (1, 1), (0, 1), (0, -1), (1, 0), (-1, 0)]))
    moved = (first + by[0], last + by[1])
    assume(moved[0] < moved[1])
    boxes = [*boxes[:at], [*boxes[at][:dim], moved, *boxes[at][dim + 1 :]], *boxes[at + 1 :]]
    assert not tiles(boxes, region)


@given(tilings(), st.data())
@settings(max_examples=200, deadline=None)
def test_any_boxes_against_their_elements(tiling: tuple[list[Intervals], Intervals], data: st.DataObject) -> None:
    """Some boxes in the place of others, which may have as many elements."""
    boxes, region = tiling
    count = len(boxes)
    boxes = [boxes[at] for at in data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))]
    all_of_them = [element for box in boxes for element in elements(box)]
    is_tiling = len(all_of_them) == len(set(all_of_them)) and set(all_of_them) == elements(region)
    assert tiles(boxes, region) == is_tiling


def test_no_box_and_none_too_many() -> None:
    assert not tiles([], [(0, 3)])
    assert not tiles([], [])
    assert tiles([[]], [])
    assert not tiles([[], []], [])


def saved(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, SavedTensor]:
    extent = Extent("a", 0, 9, None)
    return {"w": SavedTensor(torch.float32, shape, tuple(SavedBox(at, sizes, extent) for at, sizes in boxes))}


def test_a_sum_is_no_proof() -> None:
    """One element in two files and another in none, as it was saved once; and what is right."""
    check_coverage(saved((4, 5), ((0, 0), (2, 5)), ((2, 0), (2, 5))))
    check_coverage(saved((0, 5)))
    check_coverage(saved((0, 5), ((0, 0), (0, 5))))
    check_coverage(saved((), ((), ())))
    twice = saved((800,), ((0,), (400,)), ((399,), (1,)), ((401,), (399,)))
    assert math.prod(twice["w"].shape) == sum(math.prod(box.sizes) for box in twice["w"].boxes)
    with pytest.raises(DamagedError, match="w: some elements are in the checkpoint twice, others are not"):
        check_coverage(twice)
    with pytest.raises(DamagedError, match="w: 7 of 8 elements"):
        check_coverage(saved((8,), ((0,), (7,))))


def test_boxes_that_are_cut_at_too_many_places() -> None:
    """Strips that are each cut at a place of their own: right, but to see that would take as long as one likes."""

    def strips(number: int) -> list[Intervals]:
        cuts = (
            [[(at, at + 1), (0, at + 1)] for at in range(number)],
            [[(at, at + 1), (at + 1, number + 1)] for at in range(number)],
        )
        return [[second, first] for one in cuts for first, second in one]

    assert tiles(strips(100), [(0, 101), (0, 100)])
    with pytest.raises(DamagedError, match="4000 boxes that are cut at too many places"):
        tiles(strips(2000), [(0, 2001), (0, 2000)])
