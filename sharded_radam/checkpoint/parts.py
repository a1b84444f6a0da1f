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

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_radam.buckets.memory import dim_order, is_dense
from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.checkpoint.format.nesting import Path, flatten_nested, leaves_of
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


class BoxData(NamedTuple):
    """Elements of the tensor ``key`` at ``offsets``; ``data`` has its own storage, and views live memory."""

    key: str
    offsets: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True, slots=True)
class RankPart:
    """One rank's part: what it writes, and on rank 0, which commits, what there is altogether.

    ``described`` has dtype and shape of every tensor; ``boxes`` and ``objects`` are for this rank to write; keys of
    ``aliases`` are the same as another, which alone is written; ``outline`` is what must be alike on all ranks.
    """

    described: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    paths: dict[str, Path]
    boxes: list[BoxData]
    objects: dict[str, Any]
    aliases: dict[str, str]
    outline: str

    def digest(self) -> str:
        """Equal on two ranks if they save the same things."""
        return hashlib.sha256(self.outline.encode()).hexdigest()


def part_of_rank(nested: Mapping[str, Any], own: Mapping[str, Any], rank: int, world_size: int) -> RankPart:
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
    flat, paths = flatten_nested(nested)
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
    boxes = [box for key, value in _share(replicated, rank, world_size) for box in _boxes(key, value, rank)]
    for key, value in tensors.items():
        if isinstance(value, RangeTensor):
            boxes += _boxes(key, value, rank)
    for key, value in whole.items():
        if rank == 0 and key not in aliases:
            boxes += _boxes(key, _as_ranges(value), rank)
    described = {key: (value.dtype, tuple(value.shape)) for key, value in {**tensors, **whole}.items()}
    return RankPart(described, paths, boxes, objects, aliases, outline)


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
        plain_value = value.value.detach() if is_dense_tensor(value.value) else plain(value.value, key)
        for inner, leaf in leaves_of(plain_value).items():
            name = ".".join(map(str, (key, *inner)))
            if name in paths:
                raise ValueError(f"two values are called {name}: rename one of them")
            paths[name] = (*outer, *inner)
            if isinstance(leaf, Tensor):
                whole[name] = leaf
            else:
                objects[name] = leaf
    return objects, whole


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of tensors of all ranks that are the same memory, such as tied weights, all but the first."""
    first: dict[Any, str] = {}
    tied = {}
    for key, value in tensors.items():
        if value.dim() and value.numel() and not isinstance(value, RangeTensor):
            original = first.setdefault((value.data_ptr(), value.dtype, value.shape, value.stride()), key)
            if original != key:
                tied[key] = original
    return tied


def _is_scalar(value: Tensor) -> bool:
    return value.dim() == 0 and not isinstance(value, RangeTensor) and value.device.type == "cpu"


def _aliases(scalars: Mapping[str, Tensor]) -> dict[str, str]:
    """Of scalars with one value, such as step counters, all but the first."""
    first: dict[Any, str] = {}
    aliases = {}
    for key, value in scalars.items():
        original = first.setdefault((value.dtype, bytes(value.reshape(1).view(torch.uint8).tolist())), key)
        if original != key:
            aliases[key] = original
    return aliases


def _as_ranges(tensor: Tensor) -> RangeTensor:
    """All elements of a plain tensor, over its own memory where that is dense."""
    dense = tensor if is_dense(tensor) else tensor.contiguous()
    order = dim_order(dense)
    return RangeTensor(dense.shape, [(0, dense.permute(order).reshape(-1))], order, dense.dtype, dense.device)


def _share(tensors: Mapping[str, RangeTensor], rank: int, world_size: int) -> Iterator[tuple[str, RangeTensor]]:
    """A rank's equal part of the bytes of all tensors together; empty tensors are rank 0's."""
    memories = {key: tensor.pieces[0][1] for key, tensor in tensors.items()}
    total = sum(memory.nbytes for memory in memories.values())
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    begin = 0  # of the tensor, among the bytes of all
    for key, tensor in tensors.items():
        memory = memories[key]
        start, stop = _element_from(memory, first - begin), _element_from(memory, last - begin)
        pieces = [(start, memory.narrow(0, start, stop - start))] if start < stop else []
        yield key, RangeTensor(tensor.shape, pieces, tensor.memory_order, tensor.dtype, tensor.device)
        begin += memory.nbytes


def _element_from(memory: Tensor, byte: int) -> int:
    """The first element that begins at a byte or later, or the end."""
    number = -(-byte // memory.dtype.itemsize)  # rounded up
    return min(max(number, 0), memory.numel())


def _boxes(key: str, tensor: RangeTensor, rank: int) -> list[BoxData]:
    """The elements of a range tensor as boxes of at most CHUNK_BYTES; of an empty one, rank 0 writes that."""
    if not tensor.numel():
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        return [BoxData(key, (0,) * tensor.dim(), empty)] if rank == 0 else []
    most = max(1, CHUNK_BYTES // tensor.dtype.itemsize)
    pieces = [
        (start + begin, piece.narrow(0, begin, min(most, piece.numel() - begin)))
        for start, piece in tensor.pieces
        for begin in range(0, piece.numel(), most)
    ]
    split = RangeTensor(tensor.shape, pieces, tensor.memory_order, tensor.dtype, tensor.device)
    return [BoxData(key, tuple(offsets), view) for offsets, view in split.boxes().items()]
