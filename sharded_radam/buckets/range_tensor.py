"""A tensor of a parameter's shape, of which one rank holds some ranges of elements.

``sharded_state_dict()`` has these at world size > 1. torch.distributed.checkpoint writes and reads them as N-D boxes of
the whole tensor, by the three methods of its ``_Checkpointable`` protocol, so that a checkpoint has no trace of world
size, buckets or order. A range is at most ``2 * ndim - 1`` boxes::

    range [5, 22) of a tensor of shape (4, 6)        box      offsets  sizes
        . . . . . a                                  a        (0, 5)   (1, 1)
        b b b b b b                                  b        (1, 0)   (2, 6)
        b b b b b b
        c c c c . .                                  c        (3, 0)   (1, 4)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from sharded_radam import callers
from sharded_radam.buckets.memory import window

aten = torch.ops.aten

_NOT_WHOLE = (
    "this is from the sharded_state_dict() of a ShardedRAdam at world size > 1: it holds only the elements that this "
    "rank owns, and a file of it could never be loaded again. Expected: call consolidate_state_dict(to=0) on all ranks "
    "and save the dict that it returns on rank 0 (as state_dict() does there until the next step); or save with "
    "torch.distributed.checkpoint on all ranks, which writes each rank's part."
)
_ONE_WRITER = (
    "torch.distributed.checkpoint is saving on one rank alone (no_dist=True, or a process group of one rank), and this "
    "rank has only a part of the optimizer's state; nothing has been written. Expected: dcp.save on all ranks, without "
    "no_dist; or, on all ranks, get_optimizer_state_dict(model, optimizer, options=StateDictOptions("
    "full_state_dict=True)) or consolidate_state_dict(to=0), of which one rank saves the result."
)


class Box(NamedTuple):
    """``sizes`` elements at ``offsets`` of a tensor; their flat range begins at ``start``."""

    offsets: torch.Size
    sizes: torch.Size
    start: int


@functools.lru_cache(maxsize=65536)
def range_boxes(shape: tuple[int, ...], start: int, stop: int) -> tuple[Box, ...]:
    """The row-major range ``[start, stop)`` of a tensor as boxes, each contiguous in memory, in increasing order."""
    if not shape and start < stop:
        return (Box(torch.Size(()), torch.Size(()), 0),)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    found = []
    while start < stop:
        dim = len(shape) - 1
        while dim > 0 and start % strides[dim - 1] == 0 and start + strides[dim - 1] <= stop:
            dim -= 1  # a whole block of the next outer dimension fits
        at = [start // strides[outer] % shape[outer] for outer in range(dim + 1)]
        count = min((stop - start) // strides[dim], shape[dim] - at[dim])
        offsets = torch.Size(at + [0] * (len(shape) - dim - 1))
        found.append(Box(offsets, torch.Size([1] * dim + [count, *shape[dim + 1 :]]), start))
        start += count * strides[dim]
    return tuple(found)


class RangeTensor(torch.Tensor):
    """Wrapper of ``pieces``: 1-D tensors with the number of their first element, in memory order of ``memory_order``.

    It has the parameter's shape, but no values of its own: it can be detached, cloned, copied, moved and recast, which
    is what checkpoints do. The pieces may be live state, so that loading into it loads the optimizer.
    """

    pieces: list[tuple[int, Tensor]]
    memory_order: tuple[int, ...]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        pieces: Sequence[tuple[int, Tensor]],
        memory_order: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> RangeTensor:
        made: RangeTensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        made.pieces = list(pieces)
        made.memory_order = tuple(memory_order)
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"RangeTensor({tuple(self.shape)}, {self.spans()})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(_NOT_WHOLE)

    def _between_processes(self) -> tuple[Any, ...]:
        """For multiprocessing, whose messages become no files: as when a process of its own writes a checkpoint.

        Sending moves memory that is not shared; pieces may be live state, so copies are sent.
        """
        pieces = [
            (start, piece if piece.untyped_storage().is_shared() else piece.clone()) for start, piece in self.pieces
        ]
        return RangeTensor, (tuple(self.shape), pieces, self.memory_order, self.dtype, self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> RangeTensor:
        return self._map(torch.clone)

    def spans(self) -> list[tuple[int, int]]:
        """The ranges of elements, in memory order."""
        return [(start, start + piece.numel()) for start, piece in self.pieces]

    def _map(self, change: Callable[[Tensor], Tensor], **properties: Any) -> RangeTensor:
        pieces = [(start, change(piece)) for start, piece in self.pieces]
        return RangeTensor(
            self.shape,
            pieces,
            self.memory_order,
            properties.get("dtype") or self.dtype,
            properties.get("device") or self.device,
        )

    def boxes(self) -> dict[torch.Size, Tensor]:
        """Offsets of each box -> its elements: a view of a piece's memory, with a storage of its own."""
        outermost_first = tuple(self.shape[dim] for dim in self.memory_order)
        inverse = sorted(range(len(self.memory_order)), key=self.memory_order.__getitem__)
        found = {}
        for start, piece in self.pieces:
            for box in range_boxes(outermost_first, start, start + piece.numel()):
                view = window(piece, box.start - start, box.sizes.numel()).view(box.sizes).permute(inverse)
                found[torch.Size([box.offsets[dim] for dim in inverse])] = view
        return found

    # torch.distributed._checkpointable

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(offsets, view.shape) for offsets, view in self.boxes().items()]

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        if callers.num_writers() == 1 and sum(stop - start for start, stop in self.spans()) < self.numel():
            raise RuntimeError(_ONE_WRITER)
        chunks = self.__create_chunk_list__()
        if not self.numel():  # a key without bytes, which every rank writes and DCP then writes once
            chunks = [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.size())]
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(self.dtype), self.size()),
            )
            for chunk in chunks
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        if not self.numel():
            return torch.empty(self.size(), dtype=self.dtype)
        return self.boxes()[index.offset]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        first, options = args[0], kwargs or {}
        if isinstance(first, RangeTensor):
            if func is aten.detach.default:
                return first._map(torch.detach)
            if func is aten.clone.default:
                return first._map(torch.clone)
            if func is aten._to_copy.default:
                moved = {key: options[key] for key in ("dtype", "device") if options.get(key) is not None}
                return first._map(lambda piece: piece.to(**moved, copy=True), **moved)
            if func in (aten.empty_like.default, aten.new_empty.default, aten.zeros_like.default):
                device = options.get("device") or first.device
                make = torch.zeros_like if func is aten.zeros_like.default else torch.empty_like
                return first._map(lambda piece: make(piece, device=device), device=device)
            if func is aten.copy_.default and isinstance(args[1], RangeTensor) and first.spans() == args[1].spans():
                for (_, ours), (_, theirs) in zip(first.pieces, args[1].pieces, strict=True):
                    ours.copy_(theirs)
                return first
        raise NotImplementedError(
            f"{func} on a RangeTensor: it has only the elements that this rank owns, and is meant for checkpoints. "
            "(dcp.async_save with a storage_writer? Pass async_stager=DefaultStager() too.)"
        )


ForkingPickler.register(RangeTensor, RangeTensor._between_processes)
