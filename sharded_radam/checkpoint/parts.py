"""What one rank writes of a nested dict that all ranks have: its own elements of every tensor, and each value once.

Range tensors say themselves which elements a rank owns. Of tensors that all ranks have alike, the bytes of all of them
together are cut into ``world_size`` equal parts, one a rank::

    model    |  w1     |w2|      w3         |b|
    written  |-- rank 0 --|--- rank 1 --|--- rank 2

Where the cuts are follows from shapes and dtypes, which are compared between ranks, and never from values, which may
differ. What may differ, rank 0 writes: buffers, as under DistributedDataParallel, extra state, options of groups, what
users keep for themselves, and scalars such as step counters, each value once.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_radam.buckets.memory import dim_order, is_dense, large_pages
from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.checkpoint.format.nesting import Path, flatten, parts
from sharded_radam.state.values import is_dense_tensor, plain

CHUNK_BYTES = 64 * 2**20
"""Largest chunk that is written; so much may be read at once."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """A plain value that is kept in one piece; rank 0's is saved."""

    value: Any


@dataclass(frozen=True, slots=True)
class OfRank0:
    """A tensor or a plain value that may differ between ranks, in anything: rank 0's is saved.

    In parts, where torch's nesting of names brings it back as it was, so that torch can load it; else in one piece.
    """

    value: Any


class Part(NamedTuple):
    """Elements of the tensor ``key`` at ``offsets``; ``data`` has its own storage, and views live memory."""

    key: str
    offsets: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True, slots=True)
class Contents:
    """One rank's part: what it writes, and on rank 0, which commits, what there is altogether.

    ``described`` has dtype and shape of every tensor; ``parts`` and ``objects`` are for this rank to write; keys of
    ``aliases`` are the same as another, which alone is written; ``outline`` is what must be alike on all ranks.
    """

    described: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    paths: dict[str, Path]
    parts: list[Part]
    objects: dict[str, Any]
    aliases: dict[str, str]
    outline: str

    def digest(self) -> str:
        """Equal on two ranks if they save the same things."""
        return hashlib.sha256(self.outline.encode()).hexdigest()


def contents(nested: Mapping[str, Any], own: Mapping[str, Any], rank: int, world_size: int) -> Contents:
    """What a rank writes.

    Args:
        nested: values of all ranks: tensors are alike on them, range tensors each have their own part, and what is
            neither, or ``OfRank0``, is saved as rank 0 has it.
        own: values of this rank only; each becomes ``<name>.<rank>``.
        rank: of the group.
        world_size: of the group.

    Raises:
        ValueError: a value cannot be saved; on whichever rank has it.
    """
    flat, paths = flatten(nested)
    tensors = {key: value.detach() for key, value in flat.items() if isinstance(value, Tensor)}
    tied = _tied(tensors)
    shapes = sorted((key, value.dtype, tuple(value.shape)) for key, value in tensors.items())
    outline = repr((shapes, sorted(flat), sorted(tied.items())))
    objects, whole = _of_rank_0(flat, paths)
    if rank != 0:
        objects, whole = {}, {}
    objects |= {f"{name}.{rank}": plain(value, name) for name, value in own.items()}
    scalars = {key: value for key, value in tensors.items() if _is_scalar(value)}
    whole |= scalars
    aliases = _aliases({key: value for key, value in whole.items() if _is_scalar(value)}) if rank == 0 else {}
    aliases |= tied
    replicated = {
        key: _as_ranges(value)
        for key, value in tensors.items()
        if not isinstance(value, RangeTensor) and key not in scalars and key not in tied
    }
    written = [part for key, value in _share(replicated, rank, world_size) for part in _parts(key, value, rank)]
    for key, value in tensors.items():
        if isinstance(value, RangeTensor):
            written += _parts(key, value, rank)
    for key, value in whole.items():
        if rank == 0 and key not in aliases:
            written += _parts(key, _as_ranges(value), rank)
    described = {key: (value.dtype, tuple(value.shape)) for key, value in {**tensors, **whole}.items()}
    return Contents(described, paths, written, objects, aliases, outline)


def _of_rank_0(flat: Mapping[str, Any], paths: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values that rank 0 writes, and tensors that it writes whole, by their names, which are added to ``paths``."""
    objects: dict[str, Any] = {}
    whole: dict[str, Tensor] = {}
    for key, value in flat.items():
        if isinstance(value, Tensor):
            continue
        if not isinstance(value, OfRank0):
            objects[key] = plain(value.value if isinstance(value, Opaque) else value, key)
            continue
        outer = paths.pop(key)
        # A buffer may be large: it is copied as what all ranks have is.
        found = value.value.detach() if is_dense_tensor(value.value) else plain(value.value, key)
        for inner, leaf in parts(found).items():
            name = ".".join(map(str, (key, *inner)))
            if name in paths:
                raise ValueError(f"two values are called {name}: rename one of them")
            paths[name] = (*outer, *inner)
            if isinstance(leaf, Tensor):
                whole[name] = leaf
            else:
                objects[name] = leaf
    return objects, whole


class Staging:
    """Host memory for a copy of a rank's part, so that live tensors may change; used again by the next save.

    New memory is what takes time: a page is cleared by the system before a byte is copied.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def copy(self, source: Contents) -> Contents:
        """The same with tensors in this memory, on CPU: as many bytes as are written, and those of the last copy."""
        sizes = [-(-part.data.nbytes // 64) * 64 for part in source.parts]
        if self._memory is None or len(self._memory) < sum(sizes):
            self.free()
            self._memory = large_pages(max(sum(sizes), 1))
        storage, copies, at = torch.frombuffer(self._memory, dtype=torch.uint8).untyped_storage(), [], 0
        for part, size in zip(source.parts, sizes, strict=True):
            copy = torch.empty(0, dtype=part.data.dtype)
            copy.set_(storage[at : at + part.data.nbytes], 0, part.data.shape)  # type: ignore[call-overload]
            copy.copy_(part.data)
            copies.append(Part(part.key, part.offsets, copy))
            at += size
        return replace(source, parts=copies, objects=deepcopy(source.objects))

    def free(self) -> None:
        """Give the memory back to the system, now: torch.save leaves cycles that keep it until garbage is collected."""
        if self._memory is not None:
            with contextlib.suppress(AttributeError):
                self._memory.madvise(mmap.MADV_DONTNEED)
            self._memory = None


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of tensors of all ranks that are the same memory, such as tied weights, all but the first."""
    first: dict[Any, str] = {}
    found = {}
    for key, value in tensors.items():
        if value.dim() and value.numel() and not isinstance(value, RangeTensor):
            original = first.setdefault((value.data_ptr(), value.dtype, value.shape, value.stride()), key)
            if original != key:
                found[key] = original
    return found


def _is_scalar(value: Tensor) -> bool:
    return value.dim() == 0 and not isinstance(value, RangeTensor) and value.device.type == "cpu"


def _aliases(scalars: Mapping[str, Tensor]) -> dict[str, str]:
    """Of scalars with one value, such as step counters, all but the first."""
    first: dict[Any, str] = {}
    found = {}
    for key, value in scalars.items():
        original = first.setdefault((value.dtype, bytes(value.reshape(1).view(torch.uint8).tolist())), key)
        if original != key:
            found[key] = original
    return found


def _as_ranges(tensor: Tensor) -> RangeTensor:
    """All elements of a plain tensor, over its own memory where that is dense."""
    dense = tensor if is_dense(tensor) else tensor.contiguous()
    order = dim_order(dense)
    return RangeTensor(dense.shape, [(0, dense.permute(order).reshape(-1))], order, dense.dtype, dense.device)


def _share(tensors: Mapping[str, RangeTensor], rank: int, world_size: int) -> Iterator[tuple[str, RangeTensor]]:
    """A rank's equal part of the bytes of all tensors together; empty tensors are rank 0's."""
    total, at = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values()), 0
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    for key, tensor in tensors.items():
        (_, memory), size = tensor.pieces[0], tensor.dtype.itemsize
        start, stop = (min(max(-(-(edge - at) // size), 0), memory.numel()) for edge in (first, last))
        at += memory.numel() * size
        pieces = [(start, memory.narrow(0, start, stop - start))] if start < stop else []
        yield key, RangeTensor(tensor.shape, pieces, tensor.memory_order, tensor.dtype, tensor.device)


def _parts(key: str, tensor: RangeTensor, rank: int) -> list[Part]:
    """The elements of a range tensor as boxes of at most CHUNK_BYTES; of an empty one, rank 0 writes that."""
    if not tensor.numel():
        return [Part(key, (0,) * tensor.dim(), torch.empty(tensor.shape, dtype=tensor.dtype))] if rank == 0 else []
    most = max(1, CHUNK_BYTES // tensor.dtype.itemsize)
    pieces = [
        (start + at, piece.narrow(0, at, min(most, piece.numel() - at)))
        for start, piece in tensor.pieces
        for at in range(0, piece.numel(), most)
    ]
    split = RangeTensor(tensor.shape, pieces, tensor.memory_order, tensor.dtype, tensor.device)
    return [Part(key, tuple(offsets), view) for offsets, view in split.boxes().items()]
