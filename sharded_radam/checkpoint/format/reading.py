"""From boxes that were saved to boxes that are wanted: every chunk is read once, in the order of the files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_radam.checkpoint.format.chunks import DataFiles, Extent, in_order
from sharded_radam.checkpoint.format.errors import DamagedError
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.metadata import SavedTensor
from sharded_radam.checkpoint.format.verification import check_coverage


class Target(NamedTuple):
    """Memory for the elements at ``offsets`` of the saved tensor ``key``; as many as ``memory`` has.

    What ``is_live`` is in use already, and all zero, which is how it is left if the load fails: see ``put_back``.
    """

    key: str
    offsets: Sequence[int]
    memory: Tensor
    is_live: bool = False


class _Copy(NamedTuple):
    key: str
    sizes: tuple[int, ...]
    source: tuple[slice, ...]
    memory: Tensor


Reads = dict[Extent, list[_Copy]]


def plan_reads(index: Index, targets: Iterable[Target]) -> Reads:
    """Which chunks to read, and where their elements go.

    Raises:
        DamagedError: elements that are wanted are in no chunk.
    """
    reads: Reads = {}
    targets = list(targets)
    check_coverage({key: index.tensors[key] for key in dict.fromkeys(target.key for target in targets)})
    for target in targets:
        covered = 0
        for box in index.tensors[target.key].boxes:
            copy = _overlap(target, box.offsets, box.sizes)
            if copy is not None:
                covered += copy.memory.numel()
                reads.setdefault(box.extent, []).append(copy)
        if covered != target.memory.numel():
            raise DamagedError(
                f"{target.key}: {covered} of {target.memory.numel()} elements at {tuple(target.offsets)} are in the "
                f"checkpoint {index.folder}"
            )
    return reads


def _overlap(target: Target, offsets: Sequence[int], sizes: Sequence[int]) -> _Copy | None:
    source, wanted = [], []
    for offset, size, begin, length in zip(offsets, sizes, target.offsets, target.memory.shape, strict=True):
        first, last = max(offset, begin), min(offset + size, begin + length)
        if first >= last:
            return None
        source.append(slice(first - offset, last - offset))
        wanted.append(slice(first - begin, last - begin))
    return _Copy(target.key, tuple(sizes), tuple(source), target.memory[tuple(wanted)])


def read(index: Index, reads: Reads) -> None:
    """Fill the targets, large boxes straight from the file; of the others, one chunk is in memory at a time.

    Raises:
        DamagedError: a chunk is not what was saved.
    """
    with DataFiles(index.folder) as files:
        for extent in in_order(reads):
            copies = reads[extent]
            if _is_whole(index, copies) and files.read_into(extent, copies[0].key, copies[0].memory):
                continue
            chunk = files.tensor(extent, copies[0].key)
            for copy in copies:
                _check(chunk, copy.sizes, index.tensors[copy.key].dtype, f"{extent.file}, {copy.key}")
                copy.memory.copy_(chunk[copy.source])


def put_back(targets: Iterable[Target]) -> None:
    """Let live memory be what it was, whatever of it was read."""
    for target in targets:
        if target.is_live:
            target.memory.zero_()


def _is_whole(index: Index, copies: Sequence[_Copy]) -> bool:
    """Whether there is one place for all elements of a chunk, which takes them as they are."""
    key, sizes, _, memory = copies[0]
    is_alike = memory.dtype == index.tensors[key].dtype and memory.device.type == "cpu"
    return len(copies) == 1 and is_alike and tuple(memory.shape) == sizes


def _check(chunk: Tensor, sizes: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    if tuple(chunk.shape) != sizes or chunk.dtype != dtype:
        raise DamagedError(f"{what}: {chunk.dtype} of shape {tuple(chunk.shape)}, expected {dtype} of {sizes}")


def read_tensor(index: Index, key: str, files: DataFiles) -> Tensor:
    """A whole tensor, in memory of its own."""
    saved = index.tensors[key]
    whole = torch.empty(saved.shape, dtype=saved.dtype)
    fill_tensor(whole, saved, key, files)
    return whole


def fill_tensor(whole: Tensor, saved: SavedTensor, key: str, files: DataFiles) -> None:
    """Copy all boxes of a tensor into ``whole``, one chunk at a time.

    Raises:
        DamagedError: a chunk is not what was saved, or they do not fill the tensor.
    """
    check_coverage({key: saved})
    for box in saved.boxes:
        place = tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes, strict=True))
        chunk = files.tensor(box.extent, key)
        _check(chunk, box.sizes, saved.dtype, key)
        whole[place].copy_(chunk)


def read_value(index: Index, key: str, files: DataFiles) -> Any:
    """A value of any kind."""
    return read_tensor(index, key, files) if key in index.tensors else files.load(index.objects[key], key)
