from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sharded_radam import plan as plans
from sharded_radam.plan import ALIGNMENT, ParamSpec, default_bucket_cap_mb, make_plan

pytestmark = pytest.mark.quick

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def spec(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, group: int = 0) -> ParamSpec:
    return ParamSpec(name, shape, tuple(range(len(shape))), dtype, "cpu", group)


@pytest.mark.parametrize(
    ("device_type", "world_size", "mb"),
    [
        ("cpu", 1, 25),
        ("cpu", 512, 25),
        ("cuda", 1, 64),
        ("cuda", 8, 64),
        ("cuda", 16, 64),
        ("cuda", 17, 68),
        ("cuda", 64, 256),
        ("cuda", 1024, 256),
        ("xpu", 32, 128),
    ],
)
def test_default_size_of_a_bucket(device_type: str, world_size: int, mb: float) -> None:
    params = [replace(spec("a", (2**27,), dtype), device_type=device_type) for dtype in DTYPES]
    assert default_bucket_cap_mb(device_type, world_size) == mb
    for flat in make_plan(params, world_size).flats:
        bucket_bytes = flat.bucket_numel * params[flat.slots[0].param].dtype.itemsize
        assert mb * 2**20 - 8 * world_size * ALIGNMENT < bucket_bytes <= mb * 2**20


def test_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawing in the module's docstring, element by element."""
    monkeypatch.setattr(plans, "ALIGNMENT", 4)
    made = make_plan([spec("a", (7,)), spec("b", (3,)), spec("c", (2, 5))], 2, 16 * 4 / 2**20)
    (flat,) = made.flats
    slots, owners, buckets = ["."] * 24, [-1] * 24, [-1] * 24
    for slot in flat.slots:
        slots[slot.start : slot.start + slot.numel] = made.params[slot.param].name * slot.numel
    for bucket in range(flat.num_buckets):
        for rank in range(2):
            start, stop = flat.shard_range(bucket, rank)
            owners[start:stop] = [rank] * (stop - start)
            buckets[start:stop] = [bucket] * (stop - start)
    assert flat.numel == 24
    assert "".join(slots) == "aaaaaaa.bbb.cccccccccc.."
    assert "".join(map(str, buckets)) == "000000000000000011111111"
    assert "".join(map(str, owners)) == "000000001111111100001111"
    pieces = [(p.slot, p.bucket, p.start, p.numel, p.flat_start, p.local_start) for p in flat.pieces(1)]
    assert pieces == [(1, 0, 0, 3, 8, 0), (2, 0, 0, 4, 12, 4), (2, 1, 8, 2, 20, 8)]


shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple) | st.integers(0, 5000).map(lambda n: (n,))
params = st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.integers(0, 2)), max_size=12)


@given(params, st.integers(1, 1024), st.floats(1e-6, 1.0), st.data())
@settings(max_examples=200, deadline=None)
def test_every_element_is_owned_once(
    drawn: list[tuple[tuple[int, ...], torch.dtype, int]], world_size: int, cap: float, data: st.DataObject
) -> None:
    specs = [spec(str(i), shape, dtype, group) for i, (shape, dtype, group) in enumerate(drawn)]
    made = make_plan(specs, world_size, cap)
    assert sorted(slot.param for flat in made.flats for slot in flat.slots) == list(range(len(specs)))
    # All ranks where that is quick, otherwise some: what the others own is then bounded by the tiling of shards.
    ranks = range(world_size) if world_size <= 16 else data.draw(st.lists(st.integers(0, world_size - 1), max_size=4))
    for flat in made.flats:
        assert len({(specs[s.param].dtype, specs[s.param].group) for s in flat.slots}) == 1
        assert flat.numel % (world_size * ALIGNMENT) == 0
        assert flat.numel - sum(s.numel for s in flat.slots) < ALIGNMENT * (len(flat.slots) + world_size)
        edges = [edge for b in range(flat.num_buckets) for r in range(world_size) for edge in flat.shard_range(b, r)]
        assert edges[::2] == [0, *edges[1:-1:2]][: len(edges) // 2]
        assert (edges[-1] if edges else 0) == flat.numel
        assert all(edge % ALIGNMENT == 0 for edge in edges)
        sizes = {
            flat.shard_range(b, r)[1] - flat.shard_range(b, r)[0] for b in range(flat.num_buckets - 1) for r in ranks
        }
        assert len(sizes) <= 1
        for slot in flat.slots:
            assert slot.start % ALIGNMENT == 0
        owned = [0] * flat.numel
        for rank in ranks:
            end = 0
            for piece in flat.pieces(rank):
                slot = flat.slots[piece.slot]
                shard_start, shard_stop = flat.shard_range(piece.bucket, rank)
                assert piece.start % ALIGNMENT == 0
                assert piece.flat_start == slot.start + piece.start
                assert shard_start <= piece.flat_start < piece.flat_start + piece.numel <= shard_stop
                assert piece.start + piece.numel <= slot.numel
                assert end <= piece.local_start
                end = piece.local_start + piece.numel
                assert end <= flat.local_numel
                for element in range(piece.flat_start, piece.flat_start + piece.numel):
                    owned[element] += 1
        if ranks == range(world_size):
            wanted = [0] * flat.numel
            for slot in flat.slots:
                wanted[slot.start : slot.start + slot.numel] = [1] * slot.numel
            assert owned == wanted


@given(params, st.sampled_from([1, 2, 3, 4, 7]), st.floats(1e-6, 0.1))
@settings(max_examples=100, deadline=None)
def test_pieces_of_a_parameter_adjoin_in_local_memory(
    drawn: list[tuple[tuple[int, ...], torch.dtype, int]], world_size: int, cap: float
) -> None:
    specs = [spec(str(i), shape, dtype, group) for i, (shape, dtype, group) in enumerate(drawn)]
    for flat in make_plan(specs, world_size, cap).flats:
        for rank in range(world_size):
            pieces = flat.pieces(rank)
            for one, other in itertools.pairwise(pieces):
                if one.slot == other.slot:
                    assert one.local_start + one.numel == other.local_start


@pytest.mark.parametrize(
    ("left_out", "separate_numel", "wanted"),
    [
        # first element in the flat, number of elements, and the slots
        (set(), float("inf"), [(0, 16, [0, 1, 2]), (16, 8, [2])]),
        ({1}, float("inf"), [(0, 8, [0]), (12, 4, [2]), (16, 8, [2])]),
        (set(), 4, [(0, 4, [0]), (4, 8, [0, 1]), (12, 4, [2]), (16, 4, [2]), (20, 4, [2])]),
        ({0, 2}, 4, [(8, 4, [1])]),
        ({0, 1, 2}, 4, []),
    ],
)
def test_stretches_of_the_drawing(
    monkeypatch: pytest.MonkeyPatch, left_out: set[int], separate_numel: float, wanted: list[tuple[int, int, list[int]]]
) -> None:
    """Those of one rank, which has all that is drawn."""
    monkeypatch.setattr(plans, "ALIGNMENT", 4)
    (flat,) = make_plan([spec("a", (7,)), spec("b", (3,)), spec("c", (2, 5))], 1, 16 * 4 / 2**20).flats
    found = []
    for bucket in range(flat.num_buckets):
        pieces = [piece for piece in flat.pieces(0) if piece.bucket == bucket and piece.slot not in left_out]
        made = plans.stretches(pieces, separate_numel)
        found += [(each.flat_start, each.numel, [part.slot for part in each.parts]) for each in made]
    assert found == wanted


@given(params, st.integers(1, 8), st.floats(1e-6, 1e-2), st.sampled_from([64, 1000, float("inf")]), st.data())
@settings(max_examples=200, deadline=None)
def test_stretches_have_their_pieces_and_padding_only(
    drawn: list[tuple[tuple[int, ...], torch.dtype, int]],
    world_size: int,
    cap: float,
    separate: float,
    data: st.DataObject,
) -> None:
    specs = [spec(str(i), shape, dtype, group) for i, (shape, dtype, group) in enumerate(drawn)]
    for flat in make_plan(specs, world_size, cap).flats:
        rank = data.draw(st.integers(0, world_size - 1))
        chosen = data.draw(st.sets(st.integers(0, len(flat.slots) - 1)))
        padding = {at for part in flat.padding(rank) for at in part}
        pieces = flat.pieces(rank)
        assert padding.isdisjoint(at for p in pieces for at in range(p.local_start, p.local_start + p.numel))
        assert len(padding) + sum(piece.numel for piece in pieces) == flat.local_numel
        for bucket in range(flat.num_buckets):
            wanted = [piece for piece in pieces if piece.bucket == bucket and piece.slot in chosen]
            elements: list[int] = []
            covered: list[int] = []
            for stretch in plans.stretches(wanted, separate):
                assert stretch.flat_start % ALIGNMENT == stretch.numel % ALIGNMENT == 0
                assert stretch.local_start - stretch.flat_start == wanted[0].local_start - wanted[0].flat_start
                covered += range(stretch.local_start, stretch.local_start + stretch.numel)
                for part in stretch.parts:
                    elements += range(part.local_start, part.local_start + part.numel)
            assert elements == [at for p in wanted for at in range(p.local_start, p.local_start + p.numel)]
            assert len(covered) == len(set(covered))
            assert set(covered) - set(elements) <= padding


def test_calls_fill_an_accelerator_and_are_buckets_on_a_cpu() -> None:
    mib = 2**20
    specs = [spec("a", (512 * mib,))]  # 2 GiB, 82 buckets of 25 MiB
    for world_size, calls in [(1, 14), (8, 2), (64, 1)]:
        (flat,) = make_plan(specs, world_size).flats
        assert [len(buckets) for buckets in flat.calls("cpu")] == [1] * flat.num_buckets
        found = flat.calls("cuda")
        assert [bucket for buckets in found for bucket in buckets] == [*range(flat.num_buckets)]
        assert len(found) == calls


def test_slots_do_not_depend_on_world_size_or_cap() -> None:
    specs = [spec("a", (1000, 3)), spec("b", (7,)), spec("c", (129,))]
    slots = {make_plan(specs, w, cap).flats[0].slots for w in (1, 2, 3, 1024) for cap in (1e-4, 1.0)}
    assert len(slots) == 1


def test_nothing_to_lay_out() -> None:
    assert make_plan([], 4).flats == ()
    (flat,) = make_plan([spec("empty", (0, 3))], 4).flats
    assert (flat.numel, flat.num_buckets, flat.pieces(2)) == (0, 0, ())


def test_work_does_not_grow_with_world_size() -> None:
    """Not a timing: the table of 1024 ranks has as many entries as that of one."""
    specs = [spec(str(i), (1000, 768)) for i in range(148)]
    few, many = make_plan(specs, 1).flats[0], make_plan(specs, 1024).flats[0]
    assert len(few.slots) == len(many.slots)
    assert len(many.pieces(1023)) <= len(few.pieces(0)) + many.num_buckets
