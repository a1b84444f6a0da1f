"""What can be done with a checkpoint in one process, without torch.distributed: the work behind the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_radam.checkpoint.convert.exporting import check_free, saved_tensor, write_new, write_torch
from sharded_radam.checkpoint.draft import ToSave
from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.nesting import Names, read_nested
from sharded_radam.checkpoint.format.reading import read_tensor, read_value
from sharded_radam.checkpoint.format.saved_optimizer import (
    SavedOptimizer,
    differing_options,
    find_optimizer,
    read_options,
)
from sharded_radam.checkpoint.format.verification import check_coverage
from sharded_radam.checkpoint.save import Save, SaveReport
from sharded_radam.state.values import equal
from sharded_radam.store.peers import Peers

Progress = Callable[[int], object]

_TIMEOUT_S = 600.0
"""Which one process alone does not need."""


def _silent(_: int) -> None:
    pass


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


def consolidate(index: Index, output: Path, prefix: str | None = None, progress: Progress = _silent) -> dict[str, int]:
    """Write the optimizer of a checkpoint as one file that ``torch.optim.RAdam.load_state_dict`` takes.

    One tensor of the checkpoint's chunks is in memory at a time: the file is made with room for the data, and then
    filled through a memory map. It has its name only when it is complete.

    Returns:
        Numbers of parameters and of bytes.

    Raises:
        ValueError: there is no optimizer, it is not complete, or the file exists.
    """
    check_free(output)
    index.check_files()
    check_coverage(index.tensors)
    with DataFiles(index.folder, progress) as files:
        saved = find_optimizer(index, files, prefix)
        groups = _consolidated_groups(index, saved, files)
        order = [name for names in _joined_members(index, saved, files) for name in names]
        state = {number: saved.state[name] for number, name in enumerate(order) if name in saved.state}
        content = {"state": _consolidated_state(index, state, files), "param_groups": groups}
        write_new(output, lambda path: write_torch(path, content))
    return {"parameters": len(order), "bytes": output.stat().st_size}


def _joined_members(index: Index, saved: SavedOptimizer, files: DataFiles) -> list[list[str]]:
    """Groups of one parameter, as torch's flattened format has them, joined where their options are equal."""
    if any(len(names) != 1 for names in saved.members) or len(saved.members) < 2:
        return saved.members
    joined: list[tuple[dict[str, Any], list[str]]] = []
    for group, names in zip(saved.groups, saved.members, strict=True):
        options = read_options(index, group, files)
        for other, members in joined:
            if not differing_options(options, other):
                members += names
                break
        else:
            joined.append((options, [*names]))
    return [members for _, members in joined]


def _consolidated_groups(index: Index, saved: SavedOptimizer, files: DataFiles) -> list[dict[str, Any]]:
    groups, start = [], 0
    for names in _joined_members(index, saved, files):
        number = next(number for number, members in enumerate(saved.members) if names[:1] == members[:1])
        group = read_options(index, saved.groups[number], files)
        group["params"] = list(range(start, start + len(names)))
        if not saved.is_numbered:
            group["param_names"] = [saved.called.get(name, name) for name in names]
        groups.append(group)
        start += len(names)
    return groups


def _consolidated_state(
    index: Index, state: Mapping[int, Mapping[str, Names]], files: DataFiles
) -> dict[int, dict[str, Any]]:
    def value(names: Names) -> Any:
        key = names.get((), "")
        return saved_tensor(index, key, files) if key in index.tensors else read_nested(index, names, files)

    return {number: {kind: value(names) for kind, names in kinds.items()} for number, kinds in state.items()}


def import_file(source: Path, output: Path, names: Sequence[str] | None = None) -> SaveReport:
    """Make a checkpoint directory of a file that ``torch.save`` made of a consolidated optimizer state.

    Args:
        source: with the ``state_dict()`` of torch.optim.RAdam or of a consolidated ZeroRedundancyOptimizer or
            ShardedRAdam, or with a dict that has one beside other things; a model's state dict under "model" or
            "state_dict" is taken too.
        output: the directory; it must not exist.
        names: of the parameters, in the optimizer's order. Without them, those of the file; without these, the
            checkpoint has numbers.

    Raises:
        ValueError: the file has no optimizer, or other numbers of parameters than names.
        CheckpointError: the directory could not be written.
    """
    content = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    optimizer, model = _find_parts(content, source)
    groups = [dict(group) for group in optimizer["param_groups"]]
    numbers = [number for group in groups for number in group["params"]]
    listed = [name for group in groups for name in group.get("param_names", ())]
    chosen = list(names) if names is not None else listed
    if chosen and len(chosen) != len(numbers):
        raise ValueError(f"{len(chosen)} names for {len(numbers)} parameters of {source}")
    name_of = dict(zip(numbers, chosen, strict=True)) if chosen else {number: str(number) for number in numbers}
    if chosen:
        for group in groups:
            group["params"] = [name_of[number] for number in group["params"]]
    state = {
        name_of[number]: {kind: torch.as_tensor(value, dtype=_dtype(kind, value)) for kind, value in kinds.items()}
        for number, kinds in optimizer["state"].items()
        if number in name_of
    }
    step = max((int(kinds["step"]) for kinds in state.values() if "step" in kinds), default=0)
    nested = {"optim": {"state": state, "param_groups": groups}, **({"model": model} if model else {})}
    to_save = ToSave(nested, info={"step": step})
    return Save.begin(output, lambda: to_save, Peers(0, 1, None), _TIMEOUT_S).write()


def _dtype(kind: str, value: Any) -> torch.dtype:
    if kind == "step":
        return torch.float32
    return value.dtype if isinstance(value, Tensor) else torch.float32


def _find_parts(content: Any, source: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    def is_optimizer(value: Any) -> bool:
        return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()

    if is_optimizer(content):
        return content, None
    found = [key for key, value in content.items() if is_optimizer(value)] if isinstance(content, dict) else []
    if len(found) != 1:
        raise ValueError(f"{source} has {len(found)} optimizer states, expected one")
    model = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), None)
    return content[found[0]], model


def differences(one: Index, other: Index, progress: Progress = _silent) -> list[str]:
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
