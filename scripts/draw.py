"""The two drawings of README.md: one step, and one backward pass with sharded gradients.

    python scripts/draw.py            # docs/step.svg, docs/backward.svg
    python scripts/draw.py FOLDER     # elsewhere

Nothing in them is placed by hand: who owns what is from ``make_plan``, and when a bucket is sent is from
``make_schedule``, for a model of five parameters on three ranks. They are readable in light and in dark mode.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

import torch

from sharded_radam.gradients.schedule import make_schedule
from sharded_radam.plan import ALIGNMENT, FlatPlan, ParamSpec, make_plan

FOLDER = Path(__file__).parent.parent / "docs"
WORLD_SIZE = 3
BUCKET_NUMEL = 15 * ALIGNMENT
SHAPES = {
    "embed.weight": (24, 32),
    "fc1.weight": (32, 32),
    "fc1.bias": (32,),
    "fc2.weight": (24, 32),
    "fc2.bias": (24,),
}
NAMES = list(SHAPES)

WIDTH, LEFT, RIGHT = 940, 120, 22
STYLE = """
svg { font: 13px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif }
.page { fill: #fff; stroke: #d0d7de }
text { fill: #1f2328 }
.soft { fill: #59636e }
.head { font-weight: 600; font-size: 15px }
.title { font-weight: 600; font-size: 17px }
.mid { text-anchor: middle }
.end { text-anchor: end }
.on { fill: #111 }
rect { stroke: #59636e; stroke-width: 1 }
.param { fill: #eaeef2 }
.bucket, .empty { fill: none }
.pad { fill: #afb8c1; stroke: none }
.r0 { fill: #56b4e9 } .r1 { fill: #e69f00 } .r2 { fill: #2cb67d }
.work { fill: #8c959f } .wait { fill: #d8dee4 }
path { stroke: #59636e; fill: none }
.now { stroke-dasharray: 4 4 }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d }
text { fill: #f0f6fc }
.soft { fill: #9198a1 }
.on { fill: #111 }
rect { stroke: #9198a1 }
.param { fill: #262c36 }
.pad { fill: #59636e }
.work { fill: #818b98 } .wait { fill: #343b45 }
path { stroke: #9198a1 }
}
"""


def text(x: float, y: float, content: str, *classes: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{" ".join(classes)}">{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, *classes: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{" ".join(classes)}"/>'


def labelled(x: float, y: float, width: float, height: float, label: str, *classes: str) -> list[str]:
    """A box with text in its middle."""
    on = ("mid", "on") if classes[0] in ("r0", "r1", "r2") else ("mid",)
    return [box(x, y, width, height, *classes), text(x + width / 2, y + height / 2 + 5, label, *on)]


def page(height: float, description: str, parts: Iterable[str]) -> str:
    """An SVG file."""
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">'
    page = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" class="page"/>'
    lines = [opening, f"<title>{escape(description)}</title>", f"<style>{STYLE}</style>", page, *parts, "</svg>"]
    return "\n".join(lines) + "\n"


def example() -> FlatPlan:
    """The layout of the model that is drawn: all of it is one flat."""
    specs = [
        ParamSpec(name, shape, tuple(range(len(shape))), torch.float32, "cpu", 0) for name, shape in SHAPES.items()
    ]
    (flat,) = make_plan(specs, WORLD_SIZE, BUCKET_NUMEL * torch.float32.itemsize / 2**20).flats
    return flat


def draw_layout(flat: FlatPlan, unit: float) -> list[str]:
    """Parameters, buckets and owners of a flat, one below the other; ``unit`` is the width of an element."""
    parts = [text(LEFT - 10, y, label, "end") for y, label in ((81, "parameters"), (119, "buckets"), (157, "shards"))]
    for slot in flat.slots:
        x, width = LEFT + slot.start * unit, slot.numel * unit
        padded = -(-slot.numel // ALIGNMENT) * ALIGNMENT * unit
        parts.append(box(x + width, 62, padded - width, 28, "pad"))
        name = NAMES[slot.param]
        if width > 80:
            parts += labelled(x, 62, width, 28, name, "param")
        else:
            parts += [box(x, 62, width, 28, "param"), text(min(x + width / 2, WIDTH - 50), 56, name, "mid", "soft")]
    for bucket in range(flat.num_buckets):
        start, stop = flat.bucket_range(bucket)
        parts += labelled(LEFT + start * unit, 100, (stop - start) * unit, 28, f"bucket {bucket}", "bucket")
        for rank in range(WORLD_SIZE):
            start, stop = flat.shard_range(bucket, rank)
            parts += labelled(LEFT + start * unit, 138, (stop - start) * unit, 28, f"rank {rank}", f"r{rank}")
    return parts


def draw_shards(flat: FlatPlan, x: float, y: float, unit: float, owners: Iterable[int]) -> list[str]:
    """A flat with the shards of some ranks in their colours."""
    filled = set(owners)
    parts = []
    for bucket in range(flat.num_buckets):
        for rank in range(WORLD_SIZE):
            start, stop = flat.shard_range(bucket, rank)
            name = f"r{rank}" if rank in filled else "empty"
            parts.append(box(x + start * unit, y, (stop - start) * unit, 16, name))
    return parts


def draw_phases(flat: FlatPlan, top: float) -> list[str]:
    """What each rank does in a step, in three columns."""
    gap = 30
    width = (WIDTH - LEFT - RIGHT - 2 * gap) / 3
    columns = [LEFT + number * (width + gap) for number in range(3)]
    unit = width / flat.numel
    heads = [
        ("1. Take gradients", "of the rank's own shards only"),
        ("2. Update the own shards", "a rank keeps moments of these only"),
        ("3. All-gather", "all ranks get all new parameters"),
    ]
    parts = []
    for x, (head, below) in zip(columns, heads, strict=True):
        parts += [text(x, top, head, "head"), text(x, top + 19, below, "soft")]
    for rank in range(WORLD_SIZE):
        y = top + 38 + rank * 66
        parts.append(text(LEFT - 10, y + 13, f"rank {rank}", "end"))
        parts += draw_shards(flat, columns[0], y, unit, [rank])
        parts += draw_shards(flat, columns[1], y, unit, [rank])
        for number, moment in enumerate(("exp_avg", "exp_avg_sq")):
            low = y + 22 + number * 17
            parts.append(box(columns[1], low, flat.local_numel * unit, 12, f"r{rank}"))
            parts.append(text(columns[1] + flat.local_numel * unit + 8, low + 11, moment, "soft"))
        parts += draw_shards(flat, columns[2], y, unit, range(WORLD_SIZE))
    return parts


def draw_step() -> str:
    flat = example()
    parts = [text(24, 32, f"One step on {WORLD_SIZE} ranks", "title")]
    parts += draw_layout(flat, (WIDTH - LEFT - RIGHT) / flat.numel)
    parts += draw_phases(flat, 214)
    note = "Grey: padding. A parameter may be in several buckets. While bucket 1 is updated, bucket 0 travels."
    parts.append(text(24, 462, note, "soft"))
    return page(480, "One step: gradients of the own shards, update, all-gather", parts)


def launch_times(flat: FlatPlan, order: list[int]) -> tuple[list[float], list[tuple[int, float, frozenset[int]]]]:
    """When each parameter of ``order`` has its gradient, and when which bucket is sent, counted in elements.

    A bucket is sent when its gradients have arrived, and not before those ahead of it.
    """
    arrivals, now = [0.0] * len(flat.slots), 0
    for slot in order:
        now += flat.slots[slot].numel
        arrivals[slot] = now
    launches, before = [], 0.0
    for launch in make_schedule([flat], [(0, slot) for slot in order]).launches:
        before = max(before, *(arrivals[slot] for slot in launch.slots))
        launches.append((launch.bucket, before, launch.slots))
    return arrivals, launches


def draw_gradients(flat: FlatPlan, order: list[int], unit: float, top: float, row: float) -> list[str]:
    """A line for each gradient: backward computes it, and it waits until all its buckets are sent."""
    arrivals, launches = launch_times(flat, order)
    parts = []
    for number, slot in enumerate(order):
        y, numel = top + number * row, flat.slots[slot].numel
        stop = LEFT + arrivals[slot] * unit
        released = max(LEFT + at * unit for _, at, slots in launches if slot in slots)
        parts.append(text(LEFT - 10, y + 14, NAMES[flat.slots[slot].param], "end"))
        parts.append(box(stop - numel * unit, y, numel * unit, 18, "work"))
        if released > stop:
            parts.append(box(stop, y, released - stop, 18, "wait"))
    return parts


def draw_launches(flat: FlatPlan, order: list[int], unit: float, top: float, row: float) -> list[str]:
    """A line for each bucket: it is reduced from the moment in which its last gradient has arrived."""
    launches = launch_times(flat, order)[1]
    parts = [
        f'<path d="M{LEFT + at * unit:g} 84V{top + number * row:g}" class="now"/>'
        for number, (_, at, _) in enumerate(launches)
    ]
    for number, (bucket, at, _) in enumerate(launches):
        x, y = LEFT + at * unit, top + number * row
        parts.append(text(x - 8, y + 14, f"bucket {bucket}", "end"))
        for rank in range(WORLD_SIZE):
            start, stop = flat.shard_range(bucket, rank)
            width = (stop - start) * unit
            parts += labelled(x + rank * width, y, width, 20, f"rank {rank}", f"r{rank}")
    return parts


def draw_legend(y: float) -> list[str]:
    return [
        box(LEFT, y, 26, 14, "work"),
        text(LEFT + 34, y + 12, "backward computes this gradient"),
        box(LEFT + 270, y, 26, 14, "wait"),
        text(LEFT + 304, y + 12, "it waits in .grad; then it is released"),
    ]


def draw_backward() -> str:
    flat = example()
    order = list(range(len(flat.slots)))[::-1]  # the last parameter has its gradient first
    start, stop = flat.bucket_range(0)
    unit = (WIDTH - LEFT - RIGHT) / (sum(slot.numel for slot in flat.slots) + stop - start)
    row = 27
    top = 90
    bottom = top + row * len(order) + 12
    parts = [text(24, 32, f"One backward pass with shard_gradients=True, on {WORLD_SIZE} ranks", "title")]
    parts += draw_legend(50)
    parts += draw_launches(flat, order, unit, bottom, row + 2)
    parts += draw_gradients(flat, order, unit, top, row)
    last = bottom + (row + 2) * flat.num_buckets
    notes = (
        "A bucket is sent as soon as all its gradients are there, while backward goes on with the next ones.",
        "Each rank gets the average of its own shard, and keeps no more. Time runs to the right; lengths are elements.",
    )
    parts += [text(24, last + 22 + 19 * number, note, "soft") for number, note in enumerate(notes)]
    return page(last + 58, "One backward pass: each bucket is reduce-scattered when its gradients have arrived", parts)


def main(folder: Path) -> None:
    (folder / "step.svg").write_text(draw_step())
    (folder / "backward.svg").write_text(draw_backward())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
