"""The optimizer of a checkpoint as one file of torch.optim.RAdam's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharded_radam.checkpoint.convert.output import Progress, check_free, saved_tensor, silent, write_new, write_torch
from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.nesting import Names, read_nested
from sharded_radam.checkpoint.format.saved_optimizer import (
    SavedOptimizer,
    differing_options,
    find_optimizer,
    read_options,
)
from sharded_radam.checkpoint.format.verification import check_coverage


def consolidate(index: Index, output: Path, prefix: str | None = None, progress: Progress = silent) -> dict[str, int]:
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
