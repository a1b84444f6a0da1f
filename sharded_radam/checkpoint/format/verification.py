"""Whether a checkpoint is what was saved: its checksums, and that nothing is missing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from sharded_radam.checkpoint.format.chunks import DataFiles, Extent, in_order
from sharded_radam.checkpoint.format.errors import DamagedError
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.metadata import SavedTensor

_LEAST_PARTS, _MOST_PARTS = 100_000, 100
"""So many parts of boxes are looked at in any case, and so many more for each box."""

Intervals = list[tuple[int, int]]
"""First element and the one after the last, in each dimension of a box."""


def check_coverage(tensors: Mapping[str, SavedTensor]) -> None:
    """Raise DamagedError unless the boxes of each tensor tile it: every element is in one box, and in no other."""
    for key, tensor in tensors.items():
        covered = sum(math.prod(box.sizes) for box in tensor.boxes)
        if covered != tensor.numel:
            raise DamagedError(f"{key}: {covered} of {tensor.numel} elements are in the checkpoint")
        boxes = [
            [(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True)]
            for box in tensor.boxes
            if math.prod(box.sizes)
        ]
        if tensor.numel and not tiles(boxes, [(0, size) for size in tensor.shape]):
            raise DamagedError(f"{key}: some elements are in the checkpoint twice, others are not")


def tiles(boxes: Sequence[Intervals], region: Intervals) -> bool:
    """Whether boxes that are not empty cover a region, without overlaps and without anything beyond it.

    The region is cut at every edge of a box in the first dimension. Between two cuts, the boxes that are there must
    tile what is left of the region, in the dimensions that are left.

    Raises:
        DamagedError: the boxes are cut at so many places that this would take long, as no tensor's are.
    """
    return _tiles(boxes, region, iter(range(_LEAST_PARTS + _MOST_PARTS * len(boxes))))


def _tiles(boxes: Sequence[Intervals], region: Intervals, left: Iterator[int]) -> bool:
    """The same; each part of a box that is looked at takes one of ``left``."""
    if len(boxes) == 1 or not region:
        return len(boxes) == 1 and list(boxes[0]) == list(region)
    (first, last), *others = region
    starting: dict[int, list[Intervals]] = {}
    for box in boxes:
        starting.setdefault(box[0][0], []).append(box)
    cuts = sorted({edge for box in boxes for edge in box[0]})
    if not cuts or (cuts[0], cuts[-1]) != (first, last):
        return False
    there: list[Intervals] = []
    for cut in cuts[:-1]:
        there = [box for box in there if box[0][1] > cut] + starting.get(cut, [])
        if there and next(itertools.islice(left, len(there) - 1, None), None) is None:
            raise DamagedError(f"{len(boxes)} boxes that are cut at too many places")
        if not _tiles([box[1:] for box in there], others, left):
            return False
    return True


def verify(index: Index, progress: Callable[[int], object] = lambda num_bytes: None) -> None:
    """Read all bytes and compare their checksums; check that all tensors are complete.

    Raises:
        DamagedError: naming the file and what is in it.
    """
    index.check_files()
    check_coverage(index.tensors)
    users: dict[Extent, str] = {extent: key for key, extent in index.objects.items()}
    for key, tensor in index.tensors.items():
        users |= {box.extent: f"{key} at {box.offsets}" for box in tensor.boxes}
    with DataFiles(index.folder, progress) as files:
        for extent in in_order(users):
            if extent.crc32 is None:  # without a checksum, whether it can be read is all there is to see
                files.load(extent, users[extent])
            else:
                files.read(extent, users[extent])
