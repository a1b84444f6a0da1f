"""Files that others read: what torch.save writes, and safetensors.

A file is made with room for its tensors and then filled through a memory map, so that one tensor is in memory at a
time. It has its name only when it is complete.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.directory import fsync
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.reading import fill_tensor

_SAFE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What a safetensors file calls them."""

_LENGTH = struct.Struct("<Q")
"""Of a safetensors file's header, before it."""

_HEADER_ALIGNMENT = 8
"""Bytes on a multiple of which the data begin there."""

Progress = Callable[[int], object]
"""Is told numbers of bytes that were read."""


def silent(_: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Later:
    """The place of a tensor, and what fills it when there is a file to read it into."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: Callable[[Tensor], object]


def saved_tensor(index: Index, key: str, files: DataFiles) -> Later:
    """A tensor of a checkpoint as it was saved."""
    saved = index.tensors[key]
    return Later(saved.dtype, saved.shape, lambda memory: fill_tensor(memory, saved, key, files))


def check_free(output: Path) -> None:
    """Raise ValueError if there is something."""
    if output.exists():
        raise ValueError(f"{output} exists: choose another name, or remove it first")


def write_new(output: Path, write: Callable[[Path], object]) -> None:
    """Give a file its name when it is complete, and on the disk."""
    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        write(unfinished)
        fsync(unfinished)
        os.rename(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    fsync(output.absolute().parent)


def write_torch(path: Path, content: dict[str, Any]) -> None:
    """What torch.save would write of a nested dict, in which tensors may be :class:`Later`."""

    def room(value: Any) -> Any:  # memory that nobody writes to is none
        return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, (Later, Tensor)) else value

    with torch.serialization.skip_data():
        torch.save(tree_map(room, content), path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        written = torch.load(path, mmap=True, weights_only=True)
    for value, memory in zip(tree_leaves(content), tree_leaves(written), strict=True):
        if isinstance(value, Later):
            value.fill(memory)
        elif isinstance(value, Tensor):
            memory.copy_(value)


def write_safetensors(path: Path, tensors: dict[str, Later]) -> None:
    """The format is a number of bytes, so many bytes of JSON, and the tensors: the widest first, as alignment wants.

    Raises:
        ValueError: a tensor of a dtype that the format does not have.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if tensor.dtype not in _SAFE:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors do not have: export to a torch file")
        num_bytes = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        offsets = [end, end := end + num_bytes]
        header[name] = {"dtype": _SAFE[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    data_start = _LENGTH.size + len(text)
    with path.open("xb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        file.truncate(data_start + end)
    with path.open("r+b") as made, mmap.mmap(made.fileno(), 0) as memory:
        for name, tensor in tensors.items():
            _fill(tensor, memory, data_start + header[name]["data_offsets"][0])


def _fill(tensor: Later, memory: mmap.mmap, start: int) -> None:
    if numel := torch.Size(tensor.shape).numel():
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=numel, offset=start)
        tensor.fill(flat.view(tensor.shape))
