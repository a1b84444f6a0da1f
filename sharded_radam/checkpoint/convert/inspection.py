"""What a checkpoint has, and in what two of them differ."""

from __future__ import annotations

from typing import Any

import torch

from sharded_radam.checkpoint.convert.output import Progress, silent
from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.reading import read_tensor, read_value
from sharded_radam.state.values import equal


def summary(index: Index) -> dict[str, Any]:
    """What ``inspect`` shows: facts of the save, and each tensor and value."""
    tensors = [
        {
            "name": key,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.nbytes,
            "chunks": len(tensor.boxes),
        }
        for key, tensor in index.tensors.items()
    ]
    extents = {box.extent for tensor in index.tensors.values() for box in tensor.boxes} | {*index.objects.values()}
    return {
        "path": str(index.folder),
        "step": index.info.get("step"),
        "world_size": index.info.get("world_size"),
        "torch": index.info.get("torch"),
        "checksums": index.manifest is not None,
        "files": len({extent.file for extent in extents}),
        "bytes": sum(extent.length for extent in extents),
        "tensors": tensors,
        "values": sorted(index.objects),
    }


def differences(one: Index, other: Index, progress: Progress = silent) -> list[str]:
    """In what two checkpoints differ, a line each; nothing if they have the same names and bits."""
    lines = []
    for index in (one, other):
        index.check_files()
    with DataFiles(one.folder, progress) as ours, DataFiles(other.folder, progress) as theirs:
        for key in sorted({*one.tensors, *one.objects, *other.tensors, *other.objects}):
            sides = [side for side in (one, other) if key in side.tensors or key in side.objects]
            if len(sides) == 1:
                lines.append(f"{key}: only in {sides[0].folder}")
            elif key in one.tensors and key in other.tensors:
                lines += _tensor_difference(key, one, other, ours, theirs)
            elif not equal(read_value(one, key, ours), read_value(other, key, theirs)):
                lines.append(f"{key}: {read_value(one, key, ours)!r} and {read_value(other, key, theirs)!r}")
    return lines


def _tensor_difference(key: str, one: Index, other: Index, ours: DataFiles, theirs: DataFiles) -> list[str]:
    a, b = one.tensors[key], other.tensors[key]
    if a.shape != b.shape or a.dtype != b.dtype:
        return [f"{key}: {a.dtype} {a.shape} and {b.dtype} {b.shape}"]
    left, right = read_tensor(one, key, ours), read_tensor(other, key, theirs)
    differing = (left != right) & ~((left != left) & (right != right))  # NaN is NaN
    count = int(differing.sum())
    if not count:
        return []
    largest = (left[differing].to(torch.complex128) - right[differing]).abs().max().item()
    return [f"{key}: {count} of {left.numel()} elements differ, by {largest:.6g} at most"]
