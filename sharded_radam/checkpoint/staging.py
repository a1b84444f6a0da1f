"""Host memory for what is to be written while live tensors change."""

from __future__ import annotations

import contextlib
import mmap
from copy import deepcopy
from dataclasses import replace

import torch

from sharded_radam.buckets.memory import large_pages
from sharded_radam.checkpoint.parts import BoxData, RankPart

_ALIGNMENT = 64
"""Bytes on a multiple of which each copy begins."""


class Staging:
    """Host memory for a copy of a rank's part, so that live tensors may change; used again by the next save.

    New memory is what takes time: a page is cleared by the system before a byte is copied.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def copy(self, part: RankPart) -> RankPart:
        """The same with tensors in this memory, on CPU: as many bytes as are written, and those of the last copy."""
        sizes = [-(-box.data.nbytes // _ALIGNMENT) * _ALIGNMENT for box in part.boxes]
        if self._memory is None or len(self._memory) < sum(sizes):
            self.free()
            self._memory = large_pages(max(sum(sizes), 1))
        storage = torch.frombuffer(self._memory, dtype=torch.uint8).untyped_storage()
        copies, begin = [], 0
        for box, size in zip(part.boxes, sizes, strict=True):
            copy = torch.empty(0, dtype=box.data.dtype)
            copy.set_(storage[begin : begin + box.data.nbytes], 0, box.data.shape)  # type: ignore[call-overload]
            copy.copy_(box.data)
            copies.append(BoxData(box.key, box.offsets, copy))
            begin += size
        return replace(part, boxes=copies, objects=deepcopy(part.objects))

    def free(self) -> None:
        """Give the memory back to the system, now: torch.save leaves cycles that keep it until garbage is collected."""
        if self._memory is not None:
            with contextlib.suppress(AttributeError):
                self._memory.madvise(mmap.MADV_DONTNEED)
            self._memory = None
