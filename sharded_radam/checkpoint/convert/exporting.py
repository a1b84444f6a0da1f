"""Files that others read, made of a checkpoint: what torch.save writes, and safetensors.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sharded_radam.buckets.flat import HALF_DTYPES
from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.directory import fsync
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.nesting import read_nested
from sharded_radam.checkpoint.format.reading import fill_tensor, read_tensor
from sharded_radam.checkpoint.format.saved_optimizer import find_optimizer, list_prefixes
from sharded_radam.checkpoint.format.verification import check_coverage
from sharded_radam.checkpoint.model import EXTRA_STATE, saved_model

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


# Weights


def export_model(index: Index, output: Path, fp32: bool, progress: Callable[[int], object]) -> dict[str, int]:
    """Write the weights of a checkpoint as one file: safetensors if its name ends so, else as torch.save does.

    A safetensors file has tensors only; the other one has extra state, too.

    Args:
        index: of the checkpoint.
        output: the file; it must not exist.
        fp32: whether half-precision tensors become fp32 ones: the masters that the optimizer was saved with; without
            these, what they are now.
        progress: is told numbers of bytes.

    Returns:
        Numbers of tensors, of those from masters, and of bytes.

    Raises:
        ValueError: there is no model, it is not complete, or the file exists.
    """
    check_free(output)
    index.check_files()
    check_coverage(index.tensors)
    model = saved_model(index)
    if not model:
        raise ValueError(f"{index.folder} has no model: it was saved without model=")
    with DataFiles(index.folder, progress) as files:
        masters = _masters(index, files) if fp32 else {}
        content: dict[str, Any] = {}
        for name, names in model.items():
            key = names.get((), "")
            if key not in index.tensors or name.endswith(EXTRA_STATE):
                content[name] = read_nested(index, names, files)
            elif fp32 and index.tensors[key].dtype in HALF_DTYPES:
                content[name] = _in_fp32(index, key, masters.get(key), files)
            else:
                content[name] = saved_tensor(index, key, files)
        is_safe = output.suffix == ".safetensors"
        tensors = {name: value for name, value in content.items() if isinstance(value, Later)}
        write = partial(write_safetensors, tensors=tensors) if is_safe else partial(write_torch, content=content)
        write_new(output, write)
    return {"tensors": len(tensors), "from_masters": len(masters), "bytes": output.stat().st_size}


def _masters(index: Index, files: DataFiles) -> dict[str, str]:
    """Keys of the model's tensors -> keys of their masters; a tied weight is saved once, under two names."""
    masters: dict[str, str] = {}
    for prefix in list_prefixes(index):
        group = prefix.partition(".")[2]
        for name, kinds in find_optimizer(index, files, prefix).state.items():
            master = kinds.get("master", {}).get((), "")
            for key in (f"model.{group}.{name}", f"model.{name}"):
                half, wide = index.tensors.get(key), index.tensors.get(master)
                if half is not None and wide is not None and half.shape == wide.shape:
                    masters.setdefault(key, master)
    of_boxes = {index.tensors[key].boxes: master for key, master in masters.items() if index.tensors[key].numel}
    tied = {key: of_boxes[saved.boxes] for key, saved in index.tensors.items() if saved.boxes in of_boxes}
    return {**tied, **masters}


def _in_fp32(index: Index, key: str, master: str | None, files: DataFiles) -> Later:
    """An fp32 tensor of a half-precision one: the master, wherever that is rounded to it."""
    saved = index.tensors[key]

    def fill(memory: Tensor) -> None:
        half = read_tensor(index, key, files)
        if master is None:
            memory.copy_(half)
            return
        fill_tensor(memory, index.tensors[master], master, files)
        memory.copy_(torch.where(memory.to(half.dtype) == half, memory, half.float()))

    return Later(torch.float32, saved.shape, fill)


# Files


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
    from torch._subclasses.fake_tensor import FakeTensorMode

    def room(value: Any) -> Any:  # tensors of FakeTensorMode have no memory
        return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, (Later, Tensor)) else value

    with FakeTensorMode():
        frame = tree_map(room, content)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(frame, path)
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
