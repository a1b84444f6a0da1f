"""Whether a checkpoint is what was saved: its checksums, and that nothing is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from sharded_radam.checkpoint.errors import DamagedError
from sharded_radam.checkpoint.files import DataFiles, Extent, in_order
from sharded_radam.checkpoint.index import Index
from sharded_radam.checkpoint.metadata import SavedTensor


def check_coverage(tensors: Mapping[str, SavedTensor]) -> None:
    """Raise DamagedError if the boxes of a tensor do not fill it."""
    for key, tensor in tensors.items():
        covered = sum(math.prod(box.sizes) for box in tensor.boxes)
        if covered != tensor.numel:
            raise DamagedError(f"{key}: {covered} of {tensor.numel} elements are in the checkpoint")


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
